"""What a run tells while it goes and when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dery_cli.errors import DeryError
from dery_cli.training.checkpoint import find_checkpoint
from dery_cli.training.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, for a progress bar.

    Args:
        step: Updates done.
        steps: Updates in all.
        epoch: Passes over the training images.
        lr: Learning rate of stitches and head in the update just done.
        loss: Training loss last looked at.
        images_per_second: Of this run so far, over all processes, scoring and saving left out.
        eta: Seconds left, from the pace of this process; None before there is one.
        report: The line just added to ``metrics.jsonl``, or None.
    """

    step: int
    steps: int
    epoch: float
    lr: float
    loss: float | None
    images_per_second: float
    eta: float | None
    report: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run came to.

    Args:
        finished: False where ``stop`` ended it early.
        steps: Updates done.
        epochs: Passes over the training images.
        batch_size: Images of one update.
        best_step: Update the best weights are from.
        best: Their ``valid_loss`` and ``valid_top1``; empty without validation data.
        history: The lines of ``metrics.jsonl``.
        seconds: Spent by this process.
        updates_per_second: Of this process, scoring and saving left out.
        best_dir: Checkpoint with the best weights.
        last_dir: Checkpoint to resume from.
    """

    finished: bool
    steps: int
    epochs: float
    batch_size: int
    best_step: int
    best: dict[str, float]
    history: tuple[dict[str, Any], ...]
    seconds: float
    updates_per_second: float
    best_dir: Path | None
    last_dir: Path


def untrained(run_dir: Path) -> FinetuneResult:
    """What a run comes to that keeps its start."""
    return FinetuneResult(
        finished=True,
        steps=0,
        epochs=0.0,
        batch_size=1,
        best_step=0,
        best={},
        history=(),
        seconds=0.0,
        updates_per_second=0.0,
        best_dir=None,
        last_dir=run_dir,
    )


def is_better(line: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether a report's top-1, then its loss, is better than the best one's, if there is one."""
    if not best:
        return True
    loss, best_loss = line["valid_loss"], best["valid_loss"]
    higher = (line["valid_top1"], -loss) > (best["valid_top1"], -best_loss)
    return math.isfinite(loss) and (higher or not math.isfinite(best_loss))


CALMER = "try a lower --lr, or --block-lr-scale 0.1, or --batch-norm fixed"


def diverged(run_dir: Path, what: str, step: int, steps: int) -> DeryError:
    """What a loss or weights that are not finite are answered with."""
    last = find_checkpoint(run_dir, "last")
    return DeryError(
        f"{what} at update {step} of {steps}; the last good checkpoint is {last}",
        CALMER,
        details={"step": step, "checkpoint": None if last is None else str(last)},
    )


FULL_PER_FROZEN = 1.5
"""Time of a full update in that of a frozen one, before one was seen: three products, not two."""


class Clock:
    """Seconds spent on updates and on reports, for the pace and an honest time left.

    A device that works on its own is handed updates faster than it does them. So their seconds
    count from when it was waited for: ``settle``.

    Args:
        wait: Waits until the device is idle; None where it always is.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.began = time.perf_counter()
        self.spent = {"full": 0.0, "frozen": 0.0, "report": 0.0}
        self.count = {"full": 0, "frozen": 0, "report": 0}
        self._wait = wait
        self._handed: list[tuple[str, float]] = []

    def update(self, *, frozen: bool) -> contextlib.AbstractContextManager[None]:
        return self._timed("frozen" if frozen else "full")

    def report(self) -> contextlib.AbstractContextManager[None]:
        return self._timed("report")

    def settle(self) -> None:
        """Wait for the device, and count the updates that it was handed."""
        if self._wait is None or not self._handed:
            return
        start = time.perf_counter()
        self._wait()
        last = self._handed[-1][0]
        self.spent[last] += time.perf_counter() - start
        for what, seconds in self._handed:
            self.spent[what] += seconds
            self.count[what] += 1
        self._handed = []

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if self._wait is not None and what != "report":
            self._handed.append((what, seconds))
            return
        self.spent[what] += seconds
        self.count[what] += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def updates_per_second(self) -> float:
        count, spent = (by["full"] + by["frozen"] for by in (self.count, self.spent))
        return count / max(spent, 1e-9)

    def eta(self, plan: Plan, step: int, reports: int) -> float | None:
        """Seconds for the updates after ``step``, and so many reports.

        A report not yet seen counts as nothing, and full updates not yet seen as
        ``FULL_PER_FROZEN`` of the frozen ones before them.
        """
        mean = {what: self.spent[what] / max(self.count[what], 1) for what in self.spent}
        if not self.count["full"]:
            mean["full"] = FULL_PER_FROZEN * mean["frozen"]
        if not (self.count["full"] or self.count["frozen"]):
            return None
        left = reports * mean["report"]
        for phase in plan.phases:
            updates = phase.start + phase.steps - max(phase.start, step)
            left += max(updates, 0) * mean["frozen" if phase.frozen else "full"]
        return left
