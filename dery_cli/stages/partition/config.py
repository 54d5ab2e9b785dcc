"""Options of ``dery partition``."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from dery_cli.sizes import check_above, check_between, check_one_of, check_seed


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
        check_between("-K", self.blocks, 1, 8)
        check_between("--eps", self.eps, 0, 100)
        check_between("--restarts", self.restarts, 1, 100_000)
        check_one_of("--size", self.size, self.SIZES)
        if self.max_seconds is not None:
            check_above("--max-seconds", self.max_seconds)
        check_seed(self.seed)

    def options(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "eps": self.eps,
            "restarts": self.restarts,
            "size": self.size,
            "metric": self.metric,
            "max_seconds": self.max_seconds,
        }
