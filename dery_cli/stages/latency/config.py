"""Options of ``dery latency pack``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.errors import UsageError
from dery_cli.sizes import check_at_least, check_name, check_one_of
from dery_cli.types import StitchKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Options of ``dery latency pack``.

    Args:
        to: Folder to write.
        networks: Assemblies that are packed whole too.
        classes: Of heads; None takes those of the embedded data.
        stitch: What stitches are made of.
        batch_size: Images.
        force: Replace what is there.
    """

    to: Path
    networks: tuple[str, ...] = ()
    classes: int | None = None
    stitch: str = "linear"
    batch_size: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        for name in self.networks:
            check_name(name, "assembly")
        if len(set(self.networks)) < len(self.networks):
            raise UsageError("--network names one assembly twice", "name each once")
        check_one_of("--stitch", self.stitch, tuple(StitchKind))
        check_at_least("--latency-batch", self.batch_size)
        if self.classes is not None:
            check_at_least("--classes", self.classes)
