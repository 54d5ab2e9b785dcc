"""What a report shows, read from a workspace; what is not there is left out and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace, open_artifact, read_record
from dery_cli.io.records import Artifact
from dery_cli.io.schema import SchemaError
from dery_cli.stages.assemble.store import ASSEMBLY, CANDIDATES, read_refusal
from dery_cli.stages.embed.store import Embeddings, read_embeddings
from dery_cli.stages.finetune.store import RUN
from dery_cli.stages.partition.store import PARTITION, StoredPartition, stored_partition
from dery_cli.stages.sim.store import StoredSimilarity, read_similarity
from dery_cli.training.runlog import read_metrics
from dery_cli.zoo.registry import Zoo, require_zoo

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """All that is there to be shown.

    Args:
        name: Of the assembly and the run.
        zoo: The donors.
        embeddings: Of the donors.
        similarity: Of their nodes.
        partition: Of the donors.
        assembly: Record of the assembly.
        candidates: Every built network, as ``candidates.json`` lists it.
        run: Record of the run.
        metrics: Of the run, a line a report.
        refusal: Why the last try of the assembly fitted nothing; None where it did.
        missing: What is left out, and why.
    """

    name: str
    zoo: Zoo
    embeddings: Embeddings | None
    similarity: StoredSimilarity | None
    partition: StoredPartition | None
    assembly: Artifact | None
    candidates: list[dict[str, Any]]
    run: Artifact | None
    metrics: list[dict[str, Any]]
    refusal: dict[str, Any] | None
    missing: list[str]


def gather(space: Workspace, name: str) -> Gathered:
    """Read what a workspace has of an assembly, of the run of that name, and of the stages before.

    Raises:
        StaleError: There is no zoo.
    """
    missing: list[str] = []
    zoo = require_zoo(space)

    def found(what: str, read: Callable[[], _Found]) -> _Found | None:
        try:
            return read()
        except DeryError as error:
            missing.append(f"{what}: {error.message}")
            return None

    path = space.assembly(name)
    assembly = found("assembly", lambda: read_record(path, ASSEMBLY, **_hints("assemble", name)))
    run_path = space.run(name) / "run.json"
    run = found("run", lambda: read_record(run_path, RUN, **_hints("finetune", name)))
    partition = found(
        "partition",
        lambda: stored_partition(
            read_record(space.partition, PARTITION, **_hints("partition", ""))
        ),
    )
    candidates: list[dict[str, Any]] = []
    if assembly is not None:
        candidates = found("built networks", lambda: _candidates(path, name)) or []
    metrics = [] if run is None else read_metrics(space.run(name))
    if run is not None and not metrics:
        missing.append("training curves: the run has no reports")
    metric = _metric(space, partition)
    return Gathered(
        name=name,
        zoo=zoo,
        embeddings=found("embeddings", lambda: read_embeddings(space, zoo)),
        similarity=found("similarity", lambda: read_similarity(space, metric)),
        partition=partition,
        assembly=assembly,
        candidates=candidates,
        run=run,
        metrics=metrics,
        refusal=read_refusal(space, name),
        missing=missing,
    )


def _metric(space: Workspace, partition: StoredPartition | None) -> str:
    """The partition's similarity; without one ``cka``, else the first that is there."""
    if partition is not None:
        return str(partition.record.options["metric"])
    there = sorted(
        path.stem
        for path in space.similarity("cka").parent.glob("*.json")
        if not path.name.endswith(".log.json")
    )
    return "cka" if "cka" in there or not there else there[0]


def _hints(command: str, name: str) -> Mapping[str, str]:
    called = f" '{name}'" if name else ""
    return {"missing": f"there is no {command} result{called}", "hint": f"dery {command}"}


def _candidates(path: Path, name: str) -> list[dict[str, Any]]:
    """The listing beside an assembly, which its record names by hash.

    Raises:
        DeryError: It is missing or damaged.
    """
    hints = _hints("assemble", name)
    open_artifact(
        path,
        ASSEMBLY,
        missing=hints["missing"],
        hint=hints["hint"],
        only=("candidates.json",),
    )
    try:
        listing = json.loads((path.parent / "candidates.json").read_text(encoding="utf-8"))
        CANDIDATES(listing)
    except (OSError, ValueError, SchemaError) as error:
        raise DeryError(f"{path.parent / 'candidates.json'} cannot be read: {error}") from error
    return list(listing["candidates"])
