"""The similarity artifact: the zoo's node-by-node matrix with its index."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dery_cli.core.similarity.metric import Similarity
from dery_cli.errors import DeryError, StaleError
from dery_cli.io.artifacts import Workspace, open_artifact, open_unchanged
from dery_cli.io.journal import transaction
from dery_cli.io.look import Opened
from dery_cli.io.records import Artifact, Kind
from dery_cli.io.schema import boolean, fields, file_name, integer, list_of, plain, plain_name, row
from dery_cli.stages.embed.store import Embeddings
from dery_cli.zoo.registry import Zoo

if TYPE_CHECKING:
    import numpy as np

SIMILARITY = Kind(
    name="similarity",
    version=1,
    options=fields({"metric": file_name}, more=plain),
    data=fields({"index": list_of(row(plain_name, integer(1)), least=1), "directional": boolean}),
)


@dataclasses.dataclass(frozen=True)
class StoredSimilarity:
    """A similarity matrix that is on disk, read when it is asked for.

    Args:
        record: Its record.
        index: (donor, node) of each row: the nodes 1..n of every donor.
        read: Gives the matrix and its numerators.
        read_matrix: Gives the matrix alone, without torch.
    """

    record: Artifact
    index: tuple[tuple[str, int], ...]
    read: Callable[[], Similarity]
    read_matrix: Callable[[], np.ndarray[Any, Any]]

    @functools.cached_property
    def result(self) -> Similarity:
        """The matrix and its numerators.

        Raises:
            DeryError: The file is not of its record's nodes.
        """
        return self.read()

    @functools.cached_property
    def clamped(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The matrix within [0, 1], in float64; takes no torch, else as ``result``."""
        return self.read_matrix().astype("float64").clip(0.0, 1.0)

    @property
    def directional(self) -> bool:
        """Whether sim(i, j) may differ from sim(j, i): how well node i predicts node j."""
        return bool(self.record.data["directional"])


def node_index(zoo: Zoo) -> list[tuple[str, int]]:
    """The nodes that are compared, row by row: node 0 of no donor, the others in order."""
    return [
        (name, node)
        for name, donor in zoo.donors.items()
        for node in range(1, len(donor.anatomy.nodes))
    ]


def similarity_artifact(
    embeddings: Embeddings, metric: str, options: dict[str, Any], *, directional: bool
) -> Artifact:
    """The record of a similarity matrix, before its file is hashed.

    Args:
        embeddings: Of the donors compared.
        metric: Its name.
        options: What the result depends on; ``seed`` is among them where something is drawn.
        directional: Whether sim(i, j) may differ from sim(j, i).
    """
    options = dict(options)
    seed = options.pop("seed", None)
    return Artifact(
        kind=SIMILARITY,
        parents={f"embedding/{name}": sha for name, sha in embeddings.hashes.items()},
        options={"metric": metric, **options},
        seed=seed,
        data={
            "index": [[name, node] for name, node in node_index(embeddings.zoo)],
            "directional": directional,
        },
    )


def write_similarity(
    workspace: Workspace, record: Artifact, result: Similarity
) -> StoredSimilarity:
    """Write a similarity matrix under its record."""
    path = workspace.similarity(record.options["metric"])
    tensors = {name: getattr(result, name) for name in shapes(len(record.data["index"]))}
    with transaction(path) as work:
        work.write_tensors(path.with_suffix(".safetensors").name, tensors)
        record = work.commit(record)
    return StoredSimilarity(
        record=record,
        index=_index(record),
        read=lambda: result,
        read_matrix=lambda: result.sim_PP.numpy(),
    )


def read_similarity(workspace: Workspace, metric: str) -> StoredSimilarity:
    """Read a similarity artifact without asking whether it is up to date.

    Raises:
        StaleError: There is none.
        DeryError: It is damaged.
    """
    missing = f"there is no similarity matrix '{metric}'"
    path, hint = workspace.similarity(metric), f"dery sim --metric {metric}"
    return _stored(open_artifact(path, SIMILARITY, missing=missing, hint=hint, late=True))


def unchanged_similarity(workspace: Workspace, wanted: Artifact) -> StoredSimilarity | None:
    """The matrix of the same embeddings and options, if it is there and whole."""
    opened = open_unchanged(workspace.similarity(wanted.options["metric"]), wanted, late=True)
    if opened is None:
        return None
    stored = _stored(opened)
    try:
        stored.clamped  # noqa: B018 - what does not fit its record counts as none
    except DeryError:
        return None
    return stored


def _stored(opened: Opened) -> StoredSimilarity:
    record = opened.record
    file = opened.path.with_suffix(".safetensors").name
    wanted = shapes(len(record.data["index"]))

    def read() -> Similarity:
        found = opened.tensors(file, wanted)
        return Similarity(
            metric=record.options["metric"],
            sim_PP=found["sim_PP"],
            numer_PP=found["numer_PP"],
            unit_P=found["unit_P"],
        )

    return StoredSimilarity(
        record=record,
        index=_index(record),
        read=read,
        read_matrix=lambda: opened.arrays(file, wanted)["sim_PP"],
    )


def shapes(nodes: int) -> dict[str, tuple[int, ...]]:
    """What the tensors of a matrix of so many nodes look like."""
    return {"sim_PP": (nodes, nodes), "numer_PP": (nodes, nodes), "unit_P": (nodes,)}


def _index(record: Artifact) -> tuple[tuple[str, int], ...]:
    return tuple((name, node) for name, node in record.data["index"])


def require_similarity(
    workspace: Workspace, embeddings: Embeddings, metric: str
) -> StoredSimilarity:
    """The similarity of the zoo as it is now.

    Raises:
        StaleError: There is none, or it was computed from other embeddings.
        DeryError: It is damaged.
    """
    stored = read_similarity(workspace, metric)
    now = {f"embedding/{name}": sha for name, sha in embeddings.hashes.items()}
    if dict(stored.record.parents) != now:
        changed = {
            key.partition("/")[2]
            for key in now.keys() | stored.record.parents.keys()
            if now.get(key) != stored.record.parents.get(key)
        }
        raise StaleError(
            f"the similarity is of other embeddings of {', '.join(sorted(changed)[:4])}",
            f"dery sim --metric {metric}",
        )
    return stored
