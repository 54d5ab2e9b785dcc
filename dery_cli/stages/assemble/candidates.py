"""Networks that ``dery assemble`` may pick, and the pick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dery_cli.core.stitching.fit import StitchFit
from dery_cli.stages.assemble.problem import geometric_mean, merged
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
        proxy: Its proxy's score; minus infinity where it gave none.
        fits: Of the stitches.
        held_out: Cross-validated accuracy: of the complete network, on target images that it was
            not fitted on; None where it was not asked for.
    """

    candidate: Candidate
    proxy: float
    fits: tuple[StitchFit | None, ...]
    held_out: float | None = None

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
            "proxy": self.proxy if math.isfinite(self.proxy) else None,
            "held_out": self.held_out,
            "r2": [None if fit is None else fit.r2 for fit in self.fits],
        }


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """Those with a cross-validated accuracy by it, then the others by proxy.

    Ties go to the better proxy, then to the smaller network, then to the first by name.
    """

    def order(entry: Scored) -> tuple[float, float, int, int, str]:
        candidate = entry.candidate
        held_out = 1.0 if entry.held_out is None else -entry.held_out
        return (held_out, -entry.proxy, candidate.params, candidate.flops, str(candidate))

    return sorted(scored, key=order)


def pick(scored: Sequence[Scored]) -> Scored:
    """The first of ``ranked``."""
    return ranked(scored)[0]


def finalists(scored: Sequence[Scored], count: int) -> list[Scored]:
    """The first ``count``, and the first whole model if it is not among them."""
    order = ranked(scored)
    chosen = order[:count]
    whole = next((entry for entry in order if entry.candidate.whole), None)
    return chosen if whole is None or whole in chosen else [*chosen, whole]
