"""Options of ``dery zoo rank``."""

from __future__ import annotations

import dataclasses

from dery_cli.runtime.devices import AUTO, FP32, PRECISIONS
from dery_cli.sizes import check_above, check_at_least, check_between, check_one_of, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Options of ``dery zoo rank``; the defaults are those of ``embed`` and ``assemble``.

    Args:
        data: Data spec.
        samples: Images that the probes are fitted on, at most.
        crop: Field of view.
        batch_size: Images a batch.
        precision: Of the forward passes.
        skip_bad: Leave out images that cannot be decoded.
        workers: Processes that decode.
    """

    data: str
    samples: int = 2048
    crop: float = 0.95
    batch_size: int = 64
    precision: str = AUTO
    skip_bad: bool = False
    seed: int = 0
    device: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_at_least("--target-samples", self.samples, 8)
        check_at_least("--batch-size", self.batch_size)
        check_one_of("--precision", self.precision, PRECISIONS)
        check_between("--crop", self.crop, 0, 1)
        check_above("--crop", self.crop)
        check_seed(self.seed)

    @property
    def computed_in(self) -> str:
        """The precision that the option comes to."""
        return FP32 if self.precision == AUTO else self.precision
