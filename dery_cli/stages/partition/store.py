"""The partition artifact: the blocks that models are cut into, their sets, and what is proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dery_cli.core.partition.solve import Partition
from dery_cli.errors import StaleError
from dery_cli.io.artifacts import Artifact, Workspace, read_record
from dery_cli.stages.embed.store import Embeddings
from dery_cli.stages.sim.store import require_similarity
from dery_cli.types import BlockRef

PARTITION_HINT = "dery partition"


@dataclasses.dataclass(frozen=True)
class StoredPartition:
    """A partition read back.

    Args:
        record: Its record.
        names: The donors that were cut, by their number in ``partition``.
        partition: The blocks and sets, without the course of the search.
    """

    record: Artifact
    names: tuple[str, ...]
    partition: Partition

    def block(self, donor: int, stage: int) -> BlockRef:
        """The block of a donor's number at a stage from 0."""
        cuts = self.partition.cuts[donor]
        return BlockRef(self.names[donor], cuts[stage], cuts[stage + 1])

    def anchor(self, index: int) -> BlockRef:
        """The anchor of a set."""
        donor, start, stop = self.partition.anchors[index]
        return BlockRef(self.names[donor], start, stop)

    @property
    def forced(self) -> list[str]:
        """Donors that the size limit leaves one way to cut only."""
        named = zip(self.names, self.partition.forced, strict=True)
        return [name for name, forced in named if forced]


def partition_to_json(names: Sequence[str], answer: Partition) -> dict[str, Any]:
    """What the record says of a partition of these donors."""
    return {
        "donors": [
            {
                "donor": names[m],
                "cuts": list(answer.cuts[m]),
                "sets": list(answer.sets[m]),
                "similarity": list(answer.similarity[m]),
                "forced": bool(answer.forced[m]),
            }
            for m in range(len(names))
        ],
        "anchors": [
            {"set": index, "donor": names[m], "start": start, "stop": stop}
            for index, (m, start, stop) in enumerate(answer.anchors)
        ],
        "objective": answer.objective,
        "upper_bound": answer.upper_bound,
        "gap": answer.gap,
        "optimal": answer.optimal,
        "admits_assembly": answer.admits_assembly,
    }


def stored_partition(record: Artifact) -> StoredPartition:
    """The partition that a record holds."""
    data: Mapping[str, Any] = record.data
    names = tuple(donor["donor"] for donor in data["donors"])
    return StoredPartition(
        record=record,
        names=names,
        partition=Partition(
            cuts=tuple(tuple(donor["cuts"]) for donor in data["donors"]),
            sets=tuple(tuple(donor["sets"]) for donor in data["donors"]),
            anchors=tuple(
                (names.index(anchor["donor"]), anchor["start"], anchor["stop"])
                for anchor in data["anchors"]
            ),
            similarity=tuple(tuple(donor["similarity"]) for donor in data["donors"]),
            objective=data["objective"],
            upper_bound=data["upper_bound"],
            gap=data["gap"],
            optimal=data["optimal"],
            forced=tuple(donor["forced"] for donor in data["donors"]),
            history=(),
        ),
    )


def require_partition(workspace: Workspace, embeddings: Embeddings) -> StoredPartition:
    """The partition of the zoo as it is now.

    Raises:
        StaleError: There is none, or it or its similarity was made from something else.
        DeryError: It is damaged.
    """
    record = read_record(
        workspace.partition, "partition", missing="there is no partition", hint=PARTITION_HINT
    )
    similarity = require_similarity(workspace, embeddings, record.options["metric"])
    if record.parents["similarity"] != similarity.record.sha256:
        raise StaleError("the partition was made from another similarity matrix", PARTITION_HINT)
    return stored_partition(record)
