"""How long calls take, measured so that a slow drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


def interleaved_medians(
    calls: Mapping[Key, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    synchronise: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Key, int]:
    """Median time of each call in nanoseconds, at least 1.

    The calls take turns: every round runs each of them once.

    Args:
        calls: What is timed.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        synchronise: Waits until the device is idle; part of the time.
        advance: Called after every round.
        clock: Nanoseconds.
    """
    times: dict[Key, list[int]] = {key: [] for key in calls}
    for number in range(warmup + repeats):
        for key, call in calls.items():
            synchronise()
            start = clock()
            call()
            synchronise()
            if number >= warmup:
                times[key].append(clock() - start)
        advance()
    return {key: max(1, round(statistics.median(spans))) for key, spans in times.items()}
