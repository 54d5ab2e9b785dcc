"""``dery sim``: similarity of every node of the zoo with every other."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, runtime_checkable

import typer

from dery_cli.commands._options import (
    DeviceOption,
    Result,
    SeedOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.core.similarity.metric import Metric, MetricOptions
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import Artifact, Workspace, transaction, unchanged, write_log
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import parse_size
from dery_cli.zoo.plugin import find_plugin, guarded, plugin_names

if TYPE_CHECKING:
    from dery_cli.core.similarity.compare import Known
    from dery_cli.stages.embed.store import Embeddings
    from dery_cli.stages.sim.store import StoredSimilarity

METRIC_GROUP = "dery.metrics"

# what a built-in metric's result depends on, beside the features; a plugin's may depend on all
USES = {
    "cka": ("minibatch", "biased"),
    "rbf_cka": ("minibatch", "biased", "bandwidth"),
    "lr": ("projection",),
    "ridge": ("penalty", "folds"),
}


@runtime_checkable
class MetricPlugin(Protocol):
    """What ``core.metrics.Metric`` has. Entry-point group ``dery.metrics``."""

    @property
    def name(self) -> str: ...

    @property
    def directional(self) -> bool: ...

    @property
    def fn(self) -> Any: ...


def find_metric(name: str) -> Metric:
    """Load a similarity metric by name; see ``core.metrics``.

    Raises:
        UsageError: No such metric.
        DeryError: It cannot be loaded.
    """
    return cast(Metric, find_plugin(METRIC_GROUP, name, MetricPlugin, what="metric"))


@command
def sim(
    terminal: Terminal,
    metric: Annotated[
        str,
        typer.Option(
            "--metric", help="Representation similarity: cka, rbf_cka, lr, ridge, or a plugin's."
        ),
    ] = "cka",
    minibatch: Annotated[
        int | None,
        typer.Option(
            "--minibatch",
            help="Samples a Gram matrix is built from (cka, rbf_cka); 256, or all if fewer.",
        ),
    ] = None,
    biased: Annotated[
        bool | None,
        typer.Option(
            "--biased/--unbiased",
            help="The plain HSIC estimator, or the unbiased one (cka, rbf_cka).",
            show_default="unbiased",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", help="RBF bandwidth over the median distance (rbf_cka); 1 by default."
        ),
    ] = None,
    projection: Annotated[
        int | None,
        typer.Option(
            "--projection", help="Random directions wide predictors are reduced to (lr); off."
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            "--penalty", help="Penalty over the mean feature variance (ridge); 0.01 by default."
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option("--folds", help="Parts of the cross-validation (ridge); 5 by default."),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Bytes that may be in use at once, such as 4G.")
    ] = "4G",
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> Result:
    """Compare all nodes of all donors at once, from their embeddings.

    Adding a donor computes only its own pairs. The matrix is similarity/METRIC.safetensors, its
    index the JSON beside it; raw estimates may leave [0, 1], the programs clamp them.
    """
    names = plugin_names(METRIC_GROUP)
    if metric not in names:
        raise UsageError(f"--metric is '{metric}'", f"choose from {', '.join(names)}")
    given = {
        name: value
        for name, value in {
            "minibatch": minibatch,
            "biased": biased,
            "bandwidth": bandwidth,
            "projection": projection,
            "penalty": penalty,
            "folds": folds,
        }.items()
        if value is not None
    }
    for name in given:
        if name not in USES.get(metric, given):
            users = [other for other, used in USES.items() if name in used]
            raise UsageError(
                f"--{name} is no option of the metric {metric}",
                f"it belongs to {' and '.join(users)}",
            )
    memory_bytes = parse_size(memory, "--memory")

    from dery_cli.stages.embed.store import read_embeddings
    from dery_cli.stages.sim.store import read_similarity, similarity_artifact
    from dery_cli.zoo.registry import require_zoo

    space = open_workspace(workspace)
    require_zoo(space)
    found = find_metric(metric)
    with space.lock(terminal.note):
        embeddings = read_embeddings(space, require_zoo(space))
        for warning in embeddings.warnings:
            terminal.warn(warning)
        options = _options(given, len(embeddings.calibration.indices), seed)
        record = similarity_artifact(
            embeddings, metric, _recorded(metric, options), directional=found.directional
        )
        if unchanged(space.similarity(metric), record) is not None:
            stored = read_similarity(space, metric)
            terminal.say(f"the similarity '{metric}' is up to date")
        else:
            options = dataclasses.replace(options, memory=memory_bytes, device=_device(device))
            stored = _compute(terminal, space, record, embeddings, found, options)
    return _summary(terminal, stored)


def _device(name: str | None) -> str:
    from dery_cli.runtime.devices import pick_device

    return str(pick_device(name))


def _options(given: dict[str, Any], count: int, seed: int) -> MetricOptions:
    """Options for ``count`` samples.

    Raises:
        UsageError: One is out of its range.
    """
    if "minibatch" not in given:
        least = 2 if given.get("biased") else 4
        given = {**given, "minibatch": max(least, min(MetricOptions.minibatch, count))}
    return MetricOptions(seed=seed, **given)


def _recorded(metric: str, options: MetricOptions) -> dict[str, Any]:
    """The options that the result depends on; the seed only where something is drawn."""
    recorded = dataclasses.asdict(options)
    del recorded["memory"], recorded["device"]
    draws = metric not in USES or (metric == "lr" and options.projection is not None)
    used = [*USES.get(metric, recorded), *(["seed"] if draws else [])]
    return {name: recorded[name] for name in used}


def _compute(
    terminal: Terminal,
    space: Workspace,
    record: Artifact,
    embeddings: Embeddings,
    metric: Metric,
    options: MetricOptions,
) -> StoredSimilarity:
    from safetensors.torch import save_file

    from dery_cli.core.similarity import compare as core
    from dery_cli.stages.sim.store import StoredSimilarity, node_index

    started = time.monotonic()
    name = record.options["metric"]
    path = space.similarity(name)
    index = node_index(embeddings.zoo)
    known = _known(space, record, embeddings)
    foreign = guarded(name, "a similarity") if name not in USES else contextlib.nullcontext()
    with foreign, terminal.progress(f"similarity of {len(index)} nodes", 100) as bar:
        result = core.similarity(
            [embeddings.features(donor, node) for donor, node in index],
            metric,
            options,
            known=known,
            progress=lambda done, total: bar.update(100 * done // max(total, 1)),
        )
        if result.sim_PP.shape != (len(index),) * 2:
            raise ValueError(f"{len(index)} nodes gave a matrix {tuple(result.sim_PP.shape)}")
        bar.update(100)
    for row in result.constant_nodes:
        donor, node = index[row]
        terminal.detail(f"node {node} of {donor} has constant features: similarity 0 to all")
    for warning in result.warnings:
        terminal.warn(warning)
    numer_PP = result.numer_PP
    if numer_PP.data_ptr() == result.sim_PP.data_ptr():  # no file holds one tensor twice
        numer_PP = numer_PP.clone()
    with transaction(path) as work:
        save_file(
            {
                "sim_PP": result.sim_PP.contiguous(),
                "numer_PP": numer_PP.contiguous(),
                "unit_P": result.unit_P.contiguous(),
            },
            work.path(f"{name}.safetensors"),
        )
        record = work.commit(record)
    seconds = time.monotonic() - started
    log = {"seconds": seconds, "reused": known is not None}
    write_log(path.with_name(f"{name}.log.json"), log)
    terminal.say(f"compared {len(index)} nodes of {len(embeddings.zoo)} donors in {seconds:.1f} s")
    return StoredSimilarity(record=record, result=result, index=tuple(index))


def _known(space: Workspace, record: Artifact, embeddings: Embeddings) -> Known | None:
    """The earlier matrix, where it has the same options and some of the same embeddings."""
    from dery_cli.core.similarity.compare import Known
    from dery_cli.stages.sim.store import node_index, read_similarity

    try:
        before = read_similarity(space, record.options["metric"])
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


def _summary(terminal: Terminal, stored: StoredSimilarity) -> Result:
    """The most and least similar pairs of models."""
    from dery_cli.core.similarity.compare import model_similarity

    names = list(dict.fromkeys(name for name, _ in stored.index))
    owner = {name: number for number, name in enumerate(names)}
    sim_MM = model_similarity(stored.result.clamp().double(), [owner[n] for n, _ in stored.index])
    pairs = sorted(
        ((float(sim_MM[i, j]), names[i], names[j]) for i in range(len(names)) for j in range(i)),
        reverse=True,
    )
    shown = pairs if len(pairs) <= 8 else [*pairs[:4], *pairs[-4:]]
    if shown:
        terminal.table(
            "most and least similar models (mean over nodes of the best match)",
            ["donor", "donor", "similarity"],
            [[b, a, f"{value:.3f}"] for value, a, b in shown],
        )
    return {
        "metric": stored.record.options["metric"],
        "nodes": len(stored.index),
        "donors": len(names),
        "pairs": [{"donors": [b, a], "similarity": value} for value, a, b in pairs],
        "sha256": stored.record.sha256,
    }
