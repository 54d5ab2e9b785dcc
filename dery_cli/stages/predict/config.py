"""Options of ``dery predict``."""

from __future__ import annotations

import dataclasses

from dery_cli.sizes import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What to answer, and how.

    Args:
        top: Classes an image.
        skip_bad: Leave out images that cannot be decoded.
        batch_size: Images a batch.
        device: Where to compute; None for the best that is there.
        workers: Processes that decode images.
    """

    top: int = 3
    skip_bad: bool = False
    batch_size: int = 64
    device: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_at_least("--top", self.top)
        check_at_least("--batch-size", self.batch_size)
