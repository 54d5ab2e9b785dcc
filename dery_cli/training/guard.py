"""Notices a training loss that rises far above where it started."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FIRST = 4
"""Updates whose least loss is the start: the very first steps may already throw it off."""

WINDOW = 8
"""Updates whose median is compared with it: one bad batch is no rise."""

SLOWER = 3
"""The rate is divided by this each time."""

MOST_TIMES = 4
"""After so many the run ends."""


class LossGuard:
    """Watches the losses of a run.

    A loss has risen when the median of the last ``WINDOW`` is above the start by the start itself
    and by the loss of guessing among the classes, whichever is more: augmentation, label smoothing
    and a frozen start move it by less.

    Args:
        num_classes: Of the head.
        first: Losses of the first updates, of a run that goes on.
        recent: Its last losses.
    """

    def __init__(
        self, num_classes: int, first: Sequence[float] = (), recent: Sequence[float] = ()
    ) -> None:
        self._room = math.log(num_classes)
        self.first, self.recent = list(first), list(recent)

    def add(self, loss: float) -> None:
        """Look at the loss of one more update."""
        if len(self.first) < FIRST:
            self.first.append(loss)
        self.recent = [*self.recent, loss][-WINDOW:]

    @property
    def start(self) -> float:
        """Least loss of the first updates."""
        return min(self.first, default=math.nan)

    @property
    def risen(self) -> bool:
        """Whether the loss is far above its start."""
        if len(self.recent) < WINDOW:
            return False
        return statistics.median(self.recent) > self.start + max(self.start, self._room)
