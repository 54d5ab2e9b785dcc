"""Assemblies and runs side by side, from their records alone; nothing is computed or loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dery_cli.core.assembly.notation import format_network
from dery_cli.io.artifacts import Workspace, read_record
from dery_cli.stages.assemble.store import ASSEMBLY
from dery_cli.stages.finetune.store import RUN
from dery_cli.types import BlockRef
from dery_cli.zoo.found import find_record, made_by

HELD_OUT = "training images that it was not fitted on in the trial that chose it"
TEST = "test images, which nothing was chosen on"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One network.

    Args:
        name: ``assemblies/NAME`` or ``runs/NAME``, or the folder.
        network: As tables print it.
        donors: That its blocks are of.
        params: Stitches and head included.
        flops: Multiply-adds for one image.
        latency_ns: Of a batch as the assembly's record has it; None where it was not asked for.
        memory_bytes: Likewise.
        stitches: Joints with a layer between.
        held_out: Top-1 of the trial that chose it; None for runs and where there was none.
        test_top1: On test images.
        licenses: Of the donors.
        data: Spec of the target.
    """

    name: str
    network: str
    donors: list[str]
    params: int
    flops: int
    latency_ns: int | None
    memory_bytes: int | None
    stitches: int
    held_out: float | None
    test_top1: float | None
    licenses: list[str]
    data: str


def compare(space: Workspace, folders: list[Path]) -> list[Compared]:
    """Read the record in each folder.

    Raises:
        StaleError: A run is unfinished.
        DeryError: A record is damaged.
    """
    return [_compared(space, folder) for folder in folders]


def _compared(space: Workspace, folder: Path) -> Compared:
    path, kind = find_record(folder)
    told = ASSEMBLY if kind.name == ASSEMBLY.name else RUN
    record = read_record(path, told, missing=f"no network in {folder}", hint=made_by(path, kind))
    data: dict[str, Any] = dict(record.data)
    blocks, joints = data["network"]["blocks"], data["network"]["joints"]
    refs = []
    for index, (block, joint) in enumerate(zip(blocks, joints, strict=True)):
        before = blocks[index - 1] if index else None
        follows = before is not None and (before["donor"], before["stop"]) == (
            block["donor"],
            block["start"],
        )
        adapter = follows and joint is not None
        refs.append(BlockRef(block["donor"], block["start"], block["stop"], adapter=adapter))
    place = path.parent.resolve()
    inside = place.is_relative_to(space.root.resolve())
    return Compared(
        name=str(place.relative_to(space.root.resolve())) if inside else str(folder),
        network=format_network(tuple(refs)),
        donors=sorted({block["donor"] for block in blocks}),
        params=data["params"],
        flops=data["flops"],
        latency_ns=data.get("latency_ns"),
        memory_bytes=data.get("memory_bytes"),
        stitches=sum(joint is not None for joint in joints),
        held_out=data.get("held_out"),
        test_top1=data["test_top1"],
        licenses=sorted({block["license"] for block in blocks}),
        data=data["target"],
    )
