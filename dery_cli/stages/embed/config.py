"""Options of ``dery embed``."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from dery_cli.errors import UsageError
from dery_cli.runtime.devices import AUTO, PRECISIONS
from dery_cli.sizes import check_above, check_at_least, check_between, check_one_of, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Options of ``dery embed``; those of ``options`` and the seed belong to the artifact.

    Args:
        samples: Images; None for as many as suit the device.
        batch_size: Images a batch, or ``auto``: what the memory holds. The artifact names ``auto``
            among its options, and the size it came to among its data.
        skip_bad: Leave out images that cannot be decoded; in the artifact, whether any were.
        precision: Of the forward passes; the artifact names this, and what it came to.
        donors: Embed these; empty for the whole zoo.
        dry_run: Only say what would be written.
        threads: CPU threads of each process; None for its share of the machine's cores.
        workers: Threads of each process that decode images; None for the same share. The features
            do not depend on it.
    """

    data: str
    samples: int | None = None
    grid: int = 4
    grid_samples: int = 256
    batch_size: int | str = 64
    dtype: str = "fp16"
    precision: str = AUTO
    crop: float = 0.95
    skip_bad: bool = False
    seed: int = 0
    donors: tuple[str, ...] = ()
    dry_run: bool = False
    device: str | None = None
    threads: int | None = None
    workers: int | None = None

    DTYPES: ClassVar[tuple[str, ...]] = ("fp16", "fp32")

    def __post_init__(self) -> None:
        if self.samples is not None:
            check_at_least("--samples", self.samples, 4)
        check_at_least("--grid", self.grid)
        check_at_least("--grid-samples", self.grid_samples, 8)
        if isinstance(self.batch_size, int):
            check_at_least("--batch-size", self.batch_size)
        elif self.batch_size != AUTO:
            raise UsageError(
                f"--batch-size is '{self.batch_size}'", f"give a number of images, or {AUTO}"
            )
        if self.workers is not None:
            check_at_least("--workers", self.workers, 0)
        check_one_of("--dtype", self.dtype, self.DTYPES)
        check_one_of("--precision", self.precision, PRECISIONS)
        check_between("--crop", self.crop, 0, 1)
        check_above("--crop", self.crop)
        check_seed(self.seed)

    def options(self) -> dict[str, Any]:
        """What the artifact records."""
        return {
            "data": self.data,
            "samples": self.samples,
            "grid": self.grid,
            "grid_samples": self.grid_samples,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "precision": self.precision,
            "crop": self.crop,
            "skip_bad": self.skip_bad,
        }
