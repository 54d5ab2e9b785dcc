"""Multipliers on the budgets: one linear bound that knows all of them (Lagrangian relaxation).

For multipliers u >= 0 on the maxima and v >= 0 on the minima, every assembly within budget has

    value <= value - u.(cost - maximum) - v.(minimum - cost) <= longest path of the right side.

The u, v that make the right side least are found by cutting planes: every longest path gives a
line under the convex bound, and a linear program of a few columns says where to look next. That is
floating point; the bound is then restated with integer multipliers, which are as valid as any
others, so what it says is exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np

from dery_cli.core.assembly.graph import SAFE, Bound, FloatArray, LayeredGraph, best_path
from dery_cli.core.assembly.problem import AssemblyProblem

# relative accuracy asked of the multipliers: of what separates the bound from the best known
_ACCURACY = 0.005
# how far towards the program's answer the next path is asked for; less than 1 damps its jumps
_STEP = 0.7
_MAX_BOX = 1e9


@dataclasses.dataclass(frozen=True)
class _Limit:
    """What a budget asks beyond what every path satisfies anyway; one multiplier, signed.

    A multiplier above 0 prices the maximum, below 0 the minimum. ``spread`` is the most by which
    two paths differ, the unit in which multipliers are sought.
    """

    index: int
    minimum: int | None
    maximum: int | None
    spread: int

    @property
    def ends(self) -> list[int]:
        return [end for end in (self.minimum, self.maximum) if end is not None]

    def priced(self, multiplier: float) -> int:
        """The end that a multiplier of this sign prices; 0 for a multiplier of 0."""
        end = self.maximum if multiplier > 0 else self.minimum
        return end if end is not None and multiplier else 0


class _CuttingPlanes:
    """Minimise the greatest of the lines ``height + slope . x`` over a box: revised simplex.

    Works on the dual, whose rows are one more than the multipliers: a new line is a new column and
    the basis stays feasible, so every solve starts where the last one ended.

    Args:
        low, high: The box, 0 on the side that a multiplier must not reach.
    """

    def __init__(self, low: FloatArray, high: FloatArray) -> None:
        self.low, self.high, self.box = low, high, 1.0
        size = len(low)
        zeros = np.zeros((1, size))
        self.columns = np.hstack([np.vstack([zeros, s * np.eye(size)]) for s in (1.0, -1.0)])
        self.heights = np.zeros(2 * size)
        self.basis: list[int] = []

    def add(self, height: float, slope: FloatArray) -> None:
        size = len(slope)
        if not self.basis:
            sides = [j if slope[j] > 0 else size + j for j in range(size)]
            self.basis = [*sides, 2 * size]
        self.columns = np.column_stack([self.columns, np.concatenate([[1.0], -slope])])
        self.heights = np.append(self.heights, height)

    def solve(self) -> tuple[float, FloatArray]:
        """Least greatest height and where it is."""
        size = len(self.low)
        right = np.zeros(size + 1)
        right[0] = 1.0
        self.heights[:size] = self.low * self.box
        self.heights[size : 2 * size] = -self.high * self.box
        point = np.zeros(size + 1)
        for _ in range(20 * (size + 1)):
            matrix = self.columns[:, self.basis]
            point = np.linalg.solve(matrix.T, self.heights[self.basis])
            gain = self.heights - point @ self.columns
            entering = int(np.argmax(gain))
            if gain[entering] <= 1e-9:
                break
            share = np.linalg.solve(matrix, right)
            rate = np.linalg.solve(matrix, self.columns[:, entering])
            ratio = np.full(size + 1, np.inf)
            ratio[rate > 1e-12] = share[rate > 1e-12] / rate[rate > 1e-12]
            self.basis[int(np.argmin(ratio))] = entering
        return float(point[0]), point[1:]

    def at_the_box(self, point: FloatArray) -> bool:
        """Whether a wider box could give less."""
        reached = (self.low < 0) & (point <= self.low * self.box * 0.999)
        reached |= (self.high > 0) & (point >= self.high * self.box * 0.999)
        return bool(reached.any()) and self.box < _MAX_BOX


def lagrangian_bound(
    graph: LayeredGraph,
    problem: AssemblyProblem,
    *,
    rounds: int,
    target: int,
    deadline: float | None = None,
) -> Bound | None:
    """The tightest linear bound found.

    Args:
        graph: Not empty.
        problem: The budgets.
        rounds: Longest-path passes at most.
        target: Least value of interest; sets how accurate the multipliers need to be.
        deadline: ``time.monotonic()`` after which no further pass is begun.

    Returns:
        The bound, or None if a budget alone is broken by every path.
    """
    limits = _binding_limits(graph, problem)
    if limits is None:
        return None
    most, least = _reach(graph, 0)
    spread = max(1, most - least)
    point = np.zeros(len(limits))
    best, best_point = most / spread, point
    planes = _CuttingPlanes(
        np.array([-1.0 if t.minimum is not None else 0.0 for t in limits]),
        np.array([1.0 if t.maximum is not None else 0.0 for t in limits]),
    )
    for _ in range(rounds if limits else 0):
        coefs = [1.0 / spread] + [0.0] * len(problem.resources)
        const = 0.0
        for limit, multiplier in zip(limits, point, strict=True):
            coefs[limit.index] = -multiplier / limit.spread
            const += multiplier * limit.priced(multiplier) / limit.spread
        weight, total_Q = best_path(graph, coefs)
        if weight + const < best:
            best, best_point = weight + const, point
        for ends in itertools.product(*(t.ends for t in limits)):
            slope = [
                (end - total_Q[t.index]) / t.spread for t, end in zip(limits, ends, strict=True)
            ]
            planes.add(total_Q[0] / spread, np.array(slope))
        height, answer = planes.solve()
        at_the_box = planes.at_the_box(answer)
        if at_the_box:
            planes.box *= 4
        if not at_the_box and best - height <= _ACCURACY * max(0.0, best - target / spread) + 1e-9:
            break
        if height < target / spread and best < target / spread:
            break
        if deadline is not None and time.monotonic() > deadline:
            break
        point = best_point + _STEP * (answer - best_point)
    return _integer_bound(graph, problem, limits, best_point, spread)


def _reach(graph: LayeredGraph, index: int) -> tuple[int, int]:
    """Greatest and least total of one quantity over all paths."""
    unit = [0] * len(graph.start_QS)
    unit[index] = 1
    most = int(best_path(graph, unit)[0])
    unit[index] = -1
    return most, -int(best_path(graph, unit)[0])


def _binding_limits(graph: LayeredGraph, problem: AssemblyProblem) -> list[_Limit] | None:
    """The budgets that some path breaks; None if one of them alone is broken by every path."""
    found = []
    for index, resource in enumerate(problem.resources, start=1):
        minimum, maximum = resource.minimum, resource.maximum
        if minimum is None and maximum is None:
            continue
        most, least = _reach(graph, index)
        if (minimum is not None and most < minimum) or (maximum is not None and least > maximum):
            return None
        minimum = None if minimum is None or minimum <= least else minimum
        maximum = None if maximum is None or maximum >= most else maximum
        if minimum is not None or maximum is not None:
            found.append(_Limit(index, minimum, maximum, most - least))
    return found


def _integer_bound(
    graph: LayeredGraph,
    problem: AssemblyProblem,
    limits: list[_Limit],
    point: FloatArray,
    spread: int,
) -> Bound:
    """Restate float multipliers as integers small enough that no path's weight overflows."""
    reach_Q = [
        int(np.abs(graph.start_QS[q]).max())
        + sum(int(np.abs(t.amount_QT[q]).max()) for t in graph.transitions)
        for q in range(1 + len(problem.resources))
    ]
    rates = [spread * float(x) / t.spread for t, x in zip(limits, point, strict=True)]
    priced = sum(abs(rate) * reach_Q[t.index] for rate, t in zip(rates, limits, strict=True))
    scale = max(1, int(SAFE / 2 / max(reach_Q[0] + priced, 1)))
    # steep multipliers on large values: lower ones that fit are valid too
    fitting = min(1.0, (SAFE / 2 / scale - reach_Q[0]) / max(priced, 1))
    coefs = [scale] + [0] * len(problem.resources)
    const = 0
    for limit, rate in zip(limits, rates, strict=True):
        multiplier = round(rate * scale * fitting)
        coefs[limit.index] = -multiplier
        const += multiplier * limit.priced(multiplier)
    return Bound(coefs=tuple(coefs), const=const)
