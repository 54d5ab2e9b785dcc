"""Options of ``dery partition``."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from dery_cli.errors import UsageError
from dery_cli.sizes import check_at_least, check_one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Options of ``dery partition``."""

    blocks: int = 4
    eps: float = 0.2
    restarts: int = 200
    size: str = "nodes"
    metric: str = "cka"
    max_seconds: float | None = None
    seed: int = 0

    SIZES: ClassVar[tuple[str, ...]] = ("nodes", "macs", "params")

    def __post_init__(self) -> None:
        check_at_least("-K", self.blocks)
        if self.blocks > 8:
            raise UsageError(f"-K is {self.blocks}; at most 8 blocks are supported")
        check_at_least("--eps", self.eps, 0)
        check_at_least("--restarts", self.restarts)
        check_one_of("--size", self.size, self.SIZES)
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UsageError(f"--max-seconds is {self.max_seconds}; it must be positive")

    def options(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "eps": self.eps,
            "restarts": self.restarts,
            "size": self.size,
            "metric": self.metric,
            "max_seconds": self.max_seconds,
        }
