"""How long calls take, measured so that a slow drift of the machine hits all of them alike.

The stitches of a zoo are too many to time each: those between nodes of the same shapes do the same
work, and of many pairs of shapes some are timed and a line stands for the others.

Legend: V nodes, S shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dery_cli.core.stitching.stitch import stitch_cost
from dery_cli.types import Node, StitchKind

IntArray = NDArray[np.int64]

Key = TypeVar("Key")

MOST_TIMED = 256
"""Stitches of so many pairs of shapes are timed; for others a line through these stands."""


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


def shapes_of(nodes: Sequence[Node]) -> tuple[IntArray, list[Node]]:
    """The number of each node's shape, and one node of every shape.

    Stitches between nodes of the same shapes do the same work.
    """
    numbers: dict[object, int] = {}
    examples: list[Node] = []
    shape_V = np.zeros(len(nodes), dtype=np.int64)
    for place, node in enumerate(nodes):
        key = (node.layout, node.shape, node.grid, node.num_prefix_tokens)
        if key not in numbers:
            numbers[key] = len(examples)
            examples.append(node)
        shape_V[place] = numbers[key]
    return shape_V, examples


def timed_pairs(examples: Sequence[Node], kind: StitchKind) -> list[tuple[int, int]]:
    """The pairs of shapes to time: all, or some evenly spread over the multiply-adds."""
    usable = [place for place, node in enumerate(examples) if node.index]
    pairs = [(a, b) for a in usable for b in usable]
    if len(pairs) <= MOST_TIMED:
        return pairs
    pairs.sort(key=lambda p: (stitch_cost(examples[p[0]], examples[p[1]], kind).flops, p))
    step = (len(pairs) - 1) / (MOST_TIMED - 1)
    return sorted({pairs[round(step * place)] for place in range(MOST_TIMED)})


def all_stitches(
    examples: Sequence[Node], timed: Mapping[tuple[int, int], int], kind: StitchKind
) -> tuple[list[list[int]], float | None]:
    """Nanoseconds between all shapes: timed, or by a line; and the line's error where it serves."""
    places = [(a, b) for a in range(len(examples)) for b in range(len(examples))]
    work = np.array([_stitch_work(examples[a], examples[b], kind) for a, b in places], dtype=float)
    known = np.array([place in timed for place in places])
    times = np.array([timed.get(place, 0) for place in places], dtype=float)
    # relative errors count alike, whatever the size
    weight = 1 / np.maximum(times[known], 1)
    line, *_ = np.linalg.lstsq(work[known] * weight[:, None], times[known] * weight, rcond=None)
    foreseen = np.maximum(work @ line, times[known].min(initial=0))
    table = np.where(known, times, foreseen).round().astype(np.int64)
    usable = [p for p, (a, b) in enumerate(places) if examples[a].index and examples[b].index]
    error = None
    if not known[usable].all():
        error = float(np.median(np.abs(foreseen[known] * weight - 1)))
    return table.reshape(len(examples), -1).tolist(), error


def _stitch_work(source: Node, target: Node, kind: StitchKind) -> tuple[float, float, float]:
    """What a stitch's time is a line in: one, its multiply-adds, numbers it reads and writes."""
    flops = stitch_cost(source, target, kind).flops
    return (1.0, float(flops), float(np.prod(source.shape) + np.prod(target.shape)))
