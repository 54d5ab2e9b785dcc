"""Networks that ``dery assemble`` may pick, and the pick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from dery_cli.core.assembly.notation import format_network, merged
from dery_cli.core.stitching.fit import StitchFit
from dery_cli.core.stitching.joint_r2 import joint_score
from dery_cli.core.stitching.probe import Judgement
from dery_cli.training.tuned_trial import TunedTrial
from dery_cli.types import BlockRef

Proof = dict[str, Any]
"""What is proven of the program's answers, as the record says it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network that may be picked.

    Args:
        refs: Its blocks in order.
        sets: Equivalence set of each block; None but in the paper's space.
        params: Parameters, stitches and head included.
        flops: Multiply-adds for one image, likewise.
        program_score: The program's objective; None for what no program gave.
        latency: Nanoseconds, the sum of its parts; None where there is no such budget.
        memory: Bytes, likewise.
        whole: Whether it is a donor as it is.
        reestimated: Whether a whole donor's batch norm is re-estimated on the target's images.
    """

    refs: tuple[BlockRef, ...]
    sets: tuple[int, ...] | None
    params: int
    flops: int
    program_score: float | None
    latency: int | None = None
    memory: int | None = None
    whole: bool = False
    reestimated: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal networks that are built in the same way."""
        return (merged(self.refs), self.reestimated)

    @property
    def sequence(self) -> tuple[str, ...]:
        """Its donors in order."""
        return tuple(ref.donor for ref in merged(self.refs))

    def __str__(self) -> str:
        return format_network(self.refs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A built candidate.

    Args:
        candidate: What was built.
        proxy: Its proxy's score; minus infinity where it gave none.
        fits: Of the stitches.
        trial: What target images that the complete network was not fitted on say of it; None
            where it was not tried.
        tuned: What they say after a few updates; None where it was not fine-tuned.
    """

    candidate: Candidate
    proxy: float
    fits: tuple[StitchFit | None, ...]
    trial: Judgement | None = None
    tuned: TunedTrial | None = None

    @property
    def held_out(self) -> float | None:
        """Accuracy in the trial; None where there was none."""
        return None if self.trial is None else self.trial.accuracy

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
            "batch_norm": "re-estimated" if self.candidate.reestimated else "as it is",
            "blocks": [[ref.donor, ref.start, ref.stop] for ref in self.candidate.refs],
            "adapters": [ref.adapter for ref in self.candidate.refs],
            "params": self.candidate.params,
            "flops": self.candidate.flops,
            "program_score": self.candidate.program_score,
            "latency_ns": self.candidate.latency,
            "memory_bytes": self.candidate.memory,
            "proxy": self.proxy if math.isfinite(self.proxy) else None,
            "held_out": self.held_out,
            "held_out_loss": None if self.trial is None else self.trial.cross_entropy,
            "tuned": None if self.tuned is None else self.tuned.accuracy,
            "tuned_loss": None if self.tuned is None else self.tuned.cross_entropy,
            "r2": [None if fit is None else fit.r2 for fit in self.fits],
        }


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """Those that were fine-tuned by their cross-entropy, those tried by it, the others by proxy.

    On a few hundred images two networks often tell the same number right; how sure they are of it
    foresees better which of them tells more test images right. Ties go to the better proxy, then to
    the smaller network, then to the first by name.
    """

    def order(entry: Scored) -> tuple[bool, float, float, float, int, int, str]:
        candidate = entry.candidate
        tuned, tried = (
            math.inf if trial is None or trial.cross_entropy is None else trial.cross_entropy
            for trial in (entry.tuned, entry.trial)
        )
        figures = (entry.tuned is None, tuned, tried, -entry.proxy)
        return (*figures, candidate.params, candidate.flops, str(candidate))

    return sorted(scored, key=order)


def pick(scored: Sequence[Scored]) -> Scored:
    """The first of ``ranked``."""
    return ranked(scored)[0]


MOST_OF_A_SEQUENCE = 2
"""Finalists of one sequence of donors."""


def finalists(
    scored: Sequence[Scored], count: int, admits: Callable[[Scored], bool] = lambda _: True
) -> list[Scored]:
    """The first ``count``, of each sequence of donors the first two, and the first whole model.

    Args:
        scored: To choose from.
        count: So many, and perhaps the whole model.
        admits: Whether one may be a finalist; asked only of those that would be.
    """
    order = ranked(scored)
    taken: dict[tuple[str, ...], int] = {}
    chosen: list[Scored] = []
    for entry in order:
        sequence = entry.candidate.sequence
        if taken.get(sequence, 0) < MOST_OF_A_SEQUENCE and len(chosen) < count and admits(entry):
            taken[sequence] = taken.get(sequence, 0) + 1
            chosen.append(entry)
    whole = next((entry for entry in order if entry.candidate.whole and admits(entry)), None)
    return chosen if whole is None or whole in chosen else [*chosen, whole]


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each network once, the first of each."""
    seen: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        seen.setdefault(candidate.key, candidate)
    return list(seen.values())


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of the joints' R2, as a summary of an assembly; None where there is no joint."""
    if not values:
        return None
    return math.exp(sum(joint_score(value) for value in values) / len(values))
