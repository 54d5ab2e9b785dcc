"""Networks that ``dery assemble`` may pick, and the pick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dery_cli.core.stitch_fit import StitchFit
from dery_cli.reassembly import geometric_mean, merged
from dery_cli.types import BlockRef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network that may be picked.

    Args:
        refs: Its blocks in order.
        sets: Equivalence set of each block; None for a whole model.
        params: Parameters, stitches and head included.
        flops: Multiply-adds for one image, likewise.
        program_score: The program's objective; None for a whole model.
        latency: Nanoseconds, the sum of its parts; None where there is no such budget.
        memory: Bytes, likewise.
    """

    refs: tuple[BlockRef, ...]
    sets: tuple[int, ...] | None
    params: int
    flops: int
    program_score: float | None
    latency: int | None = None
    memory: int | None = None

    @property
    def whole(self) -> bool:
        return self.sets is None

    def __str__(self) -> str:
        if self.whole:
            return f"whole {self.refs[0].donor}"
        return " + ".join(str(ref) for ref in merged(self.refs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A built candidate.

    Args:
        candidate: What was built.
        proxy: Its proxy's score.
        fits: Of the stitches.
    """

    candidate: Candidate
    proxy: float
    fits: tuple[StitchFit | None, ...]

    @property
    def r2(self) -> float | None:
        """Geometric mean of the stitches' cross-validated R2."""
        return geometric_mean(
            [fit.r2 for fit in self.fits if fit is not None and fit.r2 is not None]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "network": str(self.candidate),
            "whole": self.candidate.whole,
            "blocks": [[ref.donor, ref.start, ref.stop] for ref in self.candidate.refs],
            "params": self.candidate.params,
            "flops": self.candidate.flops,
            "program_score": self.candidate.program_score,
            "latency_ns": self.candidate.latency,
            "memory_bytes": self.candidate.memory,
            "proxy": self.proxy,
            "r2": [None if fit is None else fit.r2 for fit in self.fits],
        }


def pick(scored: Sequence[Scored]) -> Scored:
    """The best by proxy; ties go to the smaller network, then to the first by name."""

    def order(entry: Scored) -> tuple[float, int, int, str]:
        candidate = entry.candidate
        return (-entry.proxy, candidate.params, candidate.flops, str(candidate))

    return min(scored, key=order)
