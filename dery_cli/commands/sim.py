"""``dery sim``: similarity of every node of the zoo with every other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dery_cli.artifacts import Artifact, Workspace, transaction, unchanged, write_log
from dery_cli.commands._options import (
    DeviceOption,
    Result,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.config import parse_size
from dery_cli.errors import DeryError, UsageError
from dery_cli.terminal import Terminal

if TYPE_CHECKING:
    from dery_cli.core.similarity import Known
    from dery_cli.embeddings import Embeddings
    from dery_cli.similarity_store import StoredSimilarity

METRICS = ("cka", "rbf_cka", "lr", "ridge")


@command
def sim(
    terminal: Terminal,
    metric: Annotated[
        str, typer.Option("--metric", help=f"Representation similarity: {', '.join(METRICS)}.")
    ] = "cka",
    minibatch: Annotated[
        int, typer.Option("--minibatch", help="Samples a Gram matrix is built from (cka).")
    ] = 256,
    biased: Annotated[
        bool, typer.Option("--biased", help="The plain HSIC estimator, not the unbiased one (cka).")
    ] = False,
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", help="RBF bandwidth over the median distance (rbf_cka).")
    ] = 1.0,
    projection: Annotated[
        int | None,
        typer.Option("--projection", help="Random directions wide predictors are reduced to (lr)."),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Bytes that may be in use at once, such as 4G.")
    ] = "4G",
    workspace: WorkspaceOption = None,
    device: DeviceOption = None,
) -> Result:
    """Compare all nodes of all donors at once, from their embeddings.

    Adding a donor computes only its own pairs. The matrix is similarity/METRIC.safetensors, its
    index the JSON beside it; raw estimates may leave [0, 1], the programs clamp them.
    """
    if metric not in METRICS:
        raise UsageError(f"--metric is '{metric}'", f"choose from {', '.join(METRICS)}")
    memory_bytes = parse_size(memory, "--memory")
    options: dict[str, Any] = {"minibatch": minibatch, "biased": biased}
    if metric == "rbf_cka":
        options["bandwidth"] = bandwidth
    if metric == "lr":
        options["projection"] = projection

    from dery_cli.embeddings import read_embeddings
    from dery_cli.similarity_store import read_similarity, similarity_artifact
    from dery_cli.zoo import require_zoo

    space = open_workspace(workspace)
    zoo = require_zoo(space)
    embeddings = read_embeddings(space, zoo)
    count = len(embeddings.calibration.indices)
    if metric in ("cka", "rbf_cka") and count < minibatch:
        options["minibatch"] = count
    record = similarity_artifact(embeddings, metric, options)
    path = space.similarity(metric)
    with space.lock(terminal.note):
        if unchanged(path, record) is not None:
            stored = read_similarity(space, metric)
            terminal.say(f"the similarity '{metric}' is up to date")
        else:
            stored = _compute(terminal, space, record, embeddings, options, memory_bytes, device)
    return _summary(terminal, stored)


def _compute(
    terminal: Terminal,
    space: Workspace,
    record: Artifact,
    embeddings: Embeddings,
    options: dict[str, Any],
    memory: int,
    device: str | None,
) -> StoredSimilarity:
    from safetensors.torch import save_file

    from dery_cli.core import similarity as core
    from dery_cli.loading import pick_device
    from dery_cli.similarity_store import StoredSimilarity, node_index

    started = time.monotonic()
    metric = record.options["metric"]
    path = space.similarity(metric)
    index = node_index(embeddings.zoo)
    metrics = {m.name: m for m in (core.CKA, core.RBF_CKA, core.LR, core.RIDGE)}
    known = _known(space, record, embeddings)
    chosen = core.MetricOptions(memory=memory, device=str(pick_device(device)), **options)
    with terminal.progress(f"similarity of {len(index)} nodes", 100) as bar:
        result = core.similarity(
            [embeddings.features(donor, node) for donor, node in index],
            metrics[metric],
            chosen,
            known=known,
            progress=lambda done, total: bar.update(100 * done // max(total, 1)),
        )
        bar.update(100)
    for warning in result.warnings:
        terminal.warn(warning)
    with transaction(path) as work:
        save_file(
            {
                "sim_PP": result.sim_PP,
                "numer_PP": result.numer_PP,
                "unit_P": result.unit_P,
            },
            work.path(f"{metric}.safetensors"),
        )
        record = work.commit(record)
    seconds = time.monotonic() - started
    log = {"seconds": seconds, "reused": known is not None}
    write_log(path.with_name(f"{metric}.log.json"), log)
    terminal.say(f"compared {len(index)} nodes of {len(embeddings.zoo)} donors in {seconds:.1f} s")
    return StoredSimilarity(record=record, result=result, index=tuple(index))


def _known(space: Workspace, record: Artifact, embeddings: Embeddings) -> Known | None:
    """The earlier matrix, where it has the same options and some of the same embeddings."""
    from dery_cli.core.similarity import Known
    from dery_cli.similarity_store import node_index, read_similarity

    try:
        before = read_similarity(space, record.options["metric"])
    except DeryError:
        return None
    if dict(before.record.options) != dict(record.options):
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
    from dery_cli.core.similarity import model_similarity

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
