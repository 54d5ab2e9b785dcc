"""The sim stage: similarity of every node of the zoo with every other."""

from __future__ import annotations

import contextlib
import dataclasses
import time

from dery_cli.core.similarity.metric import Known, Metric, MetricOptions, Similarity
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace, write_log
from dery_cli.io.records import Artifact
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.embed.store import Embeddings, read_embeddings
from dery_cli.stages.sim.config import DIRECTIONAL, SimConfig
from dery_cli.stages.sim.store import (
    StoredSimilarity,
    node_index,
    read_similarity,
    shapes,
    similarity_artifact,
    unchanged_similarity,
    write_similarity,
)
from dery_cli.zoo.plugin import find_metric, guarded
from dery_cli.zoo.registry import require_zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """How alike the models of a zoo are.

    Args:
        metric: Its name.
        nodes: Nodes in all.
        donors: Models.
        pairs: (model, model, similarity), the most similar first: the mean over the nodes of the
            best match.
        sha256: Of the similarity's record.
    """

    metric: str
    nodes: int
    donors: int
    pairs: tuple[tuple[str, str, float], ...]
    sha256: str


def compare_zoo(terminal: Terminal, space: Workspace, config: SimConfig) -> Compared:
    """Compare all nodes of all donors, or say that the matrix is up to date.

    Raises:
        StaleError: The zoo is empty, or not all embedded alike.
        UsageError: An option of the metric is out of its range.
        DeryError: The metric or a file is broken.
    """
    require_zoo(space)
    metric = None if config.built_in else find_metric(config.metric)
    directional = config.metric in DIRECTIONAL if metric is None else metric.directional
    with space.lock(terminal.note):
        embeddings = read_embeddings(space, require_zoo(space))
        for warning in embeddings.warnings:
            terminal.warn(warning)
        options = config.metric_options(len(embeddings.calibration.indices))
        record = similarity_artifact(
            embeddings, config.metric, config.recorded(options), directional=directional
        )
        started = time.monotonic()
        stored = unchanged_similarity(space, record)
        if stored is not None:
            terminal.say(f"the similarity '{config.metric}' is up to date")
        else:
            options = dataclasses.replace(
                options, memory=config.memory, device=str(pick_device(config.device))
            )
            known = _known(space, record, embeddings)
            metric = metric or find_metric(config.metric)
            result = _compute(terminal, config, embeddings, metric, options, known)
            stored = write_similarity(space, record, result)
            seconds = time.monotonic() - started
            log = {
                "seconds": seconds,
                "reused": known is not None,
                "device": options.device,
                "tf32": False,
            }
            write_log(space.similarity(config.metric).with_suffix(".log.json"), log)
            terminal.say(
                f"compared {len(stored.index)} nodes of {len(embeddings.zoo)} donors "
                f"in {seconds:.1f} s"
            )
    return _compared(stored)


def _known(space: Workspace, record: Artifact, embeddings: Embeddings) -> Known | None:
    """The earlier matrix, where it has the same options and some of the same embeddings."""
    try:
        before = read_similarity(space, record.options["metric"])
        before.result  # noqa: B018 - what cannot be read cannot be built on
    except DeryError:
        return None
    if dict(before.record.options) != dict(record.options) or before.record.seed != record.seed:
        return None
    same = {
        key.partition("/")[2]
        for key, sha in record.parents.items()
        if before.record.parents.get(key) == sha
    }
    places = {entry: row for row, entry in enumerate(before.index) if entry[0] in same}
    if not places:
        return None
    positions = [places.get(entry) for entry in node_index(embeddings.zoo)]
    return Known(similarity=before.result, positions=positions)


def _compute(
    terminal: Terminal,
    config: SimConfig,
    embeddings: Embeddings,
    metric: Metric,
    options: MetricOptions,
    known: Known | None,
) -> Similarity:
    from dery_cli.core.similarity.compare import similarity

    index = node_index(embeddings.zoo)
    foreign = (
        contextlib.nullcontext() if config.built_in else guarded(config.metric, "a similarity")
    )
    with foreign, terminal.progress(f"similarity of {len(index)} nodes", 100) as bar:
        result = similarity(
            [embeddings.features(donor, node) for donor, node in index],
            metric,
            options,
            known=known,
            progress=lambda done, total: bar.update(100 * done // max(total, 1)),
        )
        for name, shape in shapes(len(index)).items():
            if (found := tuple(getattr(result, name).shape)) != shape:
                raise ValueError(f"{len(index)} nodes gave {name} of the shape {found}")
        bar.update(100)
    for row in result.constant_nodes:
        donor, node = index[row]
        terminal.detail(f"node {node} of {donor} has constant features: similarity 0 to all")
    for warning in result.warnings:
        terminal.warn(warning)
    return result


def _compared(stored: StoredSimilarity) -> Compared:
    from dery_cli.core.similarity.models import model_similarity

    names = list(dict.fromkeys(name for name, _ in stored.index))
    owner = {name: number for number, name in enumerate(names)}
    sim_MM = model_similarity(stored.clamped, [owner[n] for n, _ in stored.index])
    pairs = sorted(
        ((float(sim_MM[i, j]), names[i], names[j]) for i in range(len(names)) for j in range(i)),
        reverse=True,
    )
    return Compared(
        metric=stored.record.options["metric"],
        nodes=len(stored.index),
        donors=len(names),
        pairs=tuple((b, a, value) for value, a, b in pairs),
        sha256=stored.record.sha256,
    )
