"""The similarity artifact: the zoo's node-by-node matrix with its index."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from dery_cli.core.similarity.metric import Similarity
from dery_cli.errors import StaleError
from dery_cli.io.artifacts import Artifact, Workspace, check_files, read_record, transaction
from dery_cli.stages.embed.store import Embeddings
from dery_cli.zoo.registry import Zoo


@dataclasses.dataclass(frozen=True)
class StoredSimilarity:
    """A similarity matrix read back.

    Args:
        record: Its record.
        result: The matrix and its numerators, over the nodes 1..n of every donor.
        index: (donor, node) of each row.
    """

    record: Artifact
    result: Similarity
    index: tuple[tuple[str, int], ...]

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
        kind="similarity",
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
    from safetensors.torch import save_file

    numer_PP = result.numer_PP
    if numer_PP.data_ptr() == result.sim_PP.data_ptr():  # no file holds one tensor twice
        numer_PP = numer_PP.clone()
    path = workspace.similarity(record.options["metric"])
    with transaction(path) as work:
        save_file(
            {
                "sim_PP": result.sim_PP.contiguous(),
                "numer_PP": numer_PP.contiguous(),
                "unit_P": result.unit_P.contiguous(),
            },
            work.path(path.with_suffix(".safetensors").name),
        )
        record = work.commit(record)
    return StoredSimilarity(record=record, result=result, index=_index(record))


def read_similarity(workspace: Workspace, metric: str) -> StoredSimilarity:
    """Read a similarity artifact without asking whether it is up to date.

    Raises:
        StaleError: There is none.
        DeryError: It is damaged.
    """
    from safetensors.torch import load_file

    hint = f"dery sim --metric {metric}"
    path = workspace.similarity(metric)
    record = read_record(
        path, "similarity", missing=f"there is no similarity matrix '{metric}'", hint=hint
    )
    check_files(path, record, hint=hint)
    tensors: dict[str, Tensor] = load_file(path.with_suffix(".safetensors"))
    return StoredSimilarity(
        record=record,
        result=Similarity(
            metric=metric,
            sim_PP=tensors["sim_PP"],
            numer_PP=tensors["numer_PP"],
            unit_P=tensors["unit_P"],
        ),
        index=_index(record),
    )


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
