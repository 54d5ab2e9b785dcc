"""The exact search behind Eq. 8-11: the N best assemblies in integers, with a proof.

Partial assemblies are extended stage by stage, many at a time as rows of arrays, the most promising
first. A row is dropped only when a bound in integers says that nothing it leads to fits, or that
all of it is below the N-th best found. So when no row is left, the list is the N best, or all.

Legend: R rows (partial assemblies), C their children, Q quantities (0 the value, then resources).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from dery_cli.core.assembly.bound import lagrangian_bound
from dery_cli.core.assembly.graph import (
    Bound,
    LayeredGraph,
    backward,
    build,
    fix,
    limit_bounds,
    value_scale,
    weights,
)
from dery_cli.core.assembly.problem import Assembly, AssemblyProblem, BoolArray, IntArray, recount

# children made at a time: enough to fill vector operations, little enough to stay in memory
_CHILDREN = 1 << 17
# as long as the pool is not full: the sooner it is, the sooner its worst rules rows out
_FIRST_CHILDREN = 1 << 12
# children after which a first, greedy descent gives way to fixing and tighter multipliers
_DIVE_CHILDREN = 1 << 20
# longest-path passes to set multipliers by, before each search over a graph
_ROUNDS = (30, 60)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The N best assemblies and what is proven of them.

    Args:
        assemblies: Best first; ties in score by cost, then by block numbers.
        complete: Proven: these are the N best, or all there are. False only if time ran out.
        upper_bound: No assembly within the limits scores above it (millionths). None if none fits.
        kept_E: The edges that bounds leave: any of the N best uses these only.
        partials: Partial assemblies looked at.
    """

    assemblies: tuple[Assembly, ...]
    complete: bool
    upper_bound: int | None
    kept_E: BoolArray
    partials: int

    @property
    def best(self) -> Assembly | None:
        return self.assemblies[0] if self.assemblies else None

    @property
    def proven(self) -> bool:
        """Whether the first is proven best (or nothing fits, proven)."""
        if self.best is None:
            return self.complete
        return self.upper_bound is not None and self.best.score >= self.upper_bound

    @property
    def gap(self) -> int | None:
        """How far above the best found an undiscovered one could score, in millionths."""
        if self.best is None or self.upper_bound is None:
            return None
        return max(0, self.upper_bound - self.best.score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Partial assemblies that end in one layer.

    Args:
        layer: Layer of their last state.
        state_R: That state.
        mask_R: Sets used and requirements fulfilled, as bits.
        amount_QR: Quantities so far.
        block_RL: Blocks, in stage order.
        edge_RL: Edges.
        num_donors_R: Different donors.
        bound_R: Lagrangian bound on what they lead to, in the bound's own scale.
    """

    layer: int
    state_R: IntArray
    mask_R: IntArray
    amount_QR: IntArray
    block_RL: IntArray
    edge_RL: IntArray
    num_donors_R: IntArray
    bound_R: IntArray

    def take(self, index: IntArray | BoolArray | slice) -> Rows:
        return Rows(
            layer=self.layer,
            state_R=self.state_R[index],
            mask_R=self.mask_R[index],
            amount_QR=self.amount_QR[:, index],
            block_RL=self.block_RL[index],
            edge_RL=self.edge_RL[index],
            num_donors_R=self.num_donors_R[index],
            bound_R=self.bound_R[index],
        )

    def __len__(self) -> int:
        return len(self.state_R)


class Search:
    """One search over one graph; its state is the stack of rows not yet extended and the pool.

    Args:
        problem: What is asked.
        graph: Where; it may be reduced, as long as all interesting assemblies are left.
        bounds: The limits, then the Lagrangian bound last.
        count: N.
        target: Least value of interest.
    """

    def __init__(
        self,
        problem: AssemblyProblem,
        graph: LayeredGraph,
        bounds: Sequence[Bound],
        count: int,
        target: int,
    ) -> None:
        self.problem, self.graph, self.count, self.target = problem, graph, count, target
        self.bounds, self.main = list(bounds), bounds[-1]
        self.rest_JLS = [backward(graph, bound.coefs) for bound in self.bounds]
        self.pool: Rows | None = None
        self.partials = 0
        self._set_bit_B, self._given_E = problem.set_bit_B, problem.given_bits_E
        self._sort_children()
        self.stack = [] if graph.empty else [self._start()]

    @property
    def found(self) -> int:
        return 0 if self.pool is None else len(self.pool)

    def bound_on_rest(self) -> int | None:
        """Greatest value that anything not yet looked at can have; None if nothing is left."""
        open_rows = [int(rows.bound_R.max()) for rows in self.stack if len(rows)]
        if not open_rows:
            return None
        return (max(open_rows) + self.main.const) // self.main.coefs[0]

    def run(self, *, max_children: int | None = None, deadline: float | None = None) -> None:
        """Extend rows until none is left, or the pool is full and the allowance is used up."""
        while self.stack:
            if max_children is not None and self.partials >= max_children:
                return
            if deadline is not None and time.monotonic() > deadline:
                return
            rows = self.stack.pop()
            rows = rows.take(rows.bound_R >= self.main.threshold(self.target))
            if not len(rows):
                continue
            if rows.layer == self.problem.num_stages - 1:
                self._collect(rows)
            else:
                self._extend(rows)

    def _start(self) -> Rows:
        block_R = self.graph.block_LS[0]
        count = len(block_R)
        rows = Rows(
            layer=0,
            state_R=np.arange(count),
            mask_R=self.graph.mask_LS[0],
            amount_QR=self.graph.start_QS,
            block_RL=block_R[:, None],
            edge_RL=np.zeros((count, 0), dtype=np.int64),
            num_donors_R=np.ones(count, dtype=np.int64),
            bound_R=np.zeros(count, dtype=np.int64),
        )
        return self._within_bounds(rows)

    def _within_bounds(self, rows: Rows) -> Rows:
        """Leave out the rows that a bound rules out, and put the others in order of promise."""
        keep_R = np.ones(len(rows), dtype=bool)
        total_R = rows.bound_R
        for bound, rest_LS in zip(self.bounds, self.rest_JLS, strict=True):
            total_R = weights(bound.coefs, rows.amount_QR) + rest_LS[rows.layer][rows.state_R]
            keep_R &= total_R >= bound.threshold(self.target)
        rows = dataclasses.replace(rows, bound_R=total_R).take(keep_R)
        return rows.take(np.argsort(-rows.bound_R, kind="stable"))

    def _sort_children(self) -> None:
        """For every state, its transitions by falling Lagrangian bound."""
        self.child_LT, self.key_LT, self.stop_LS = [], [], []
        for layer, t in enumerate(self.graph.transitions):
            key_T = weights(self.main.coefs, t.amount_QT) + self.rest_JLS[-1][layer + 1][t.dst_T]
            order_T = np.lexsort((-key_T, t.src_T))
            self.child_LT.append(order_T)
            self.key_LT.append(key_T[order_T])
            self.stop_LS.append(np.append(t.src_start_S[1:], len(order_T)))

    def _num_children(self, rows: Rows) -> IntArray:
        """How many of each row's transitions the Lagrangian bound lets through: a bisection."""
        first_R = self.graph.transitions[rows.layer].src_start_S[rows.state_R]
        low_R, high_R = first_R, self.stop_LS[rows.layer][rows.state_R]
        need_R = self.main.threshold(self.target) - weights(self.main.coefs, rows.amount_QR)
        key_T = self.key_LT[rows.layer]
        while (low_R < high_R).any():
            middle_R = (low_R + high_R) // 2
            passes_R = key_T[np.minimum(middle_R, len(key_T) - 1)] >= need_R
            passes_R &= low_R < high_R
            low_R, high_R = (
                np.where(passes_R, middle_R + 1, low_R),
                np.where(passes_R, high_R, middle_R),
            )
        return low_R - first_R

    def _extend(self, rows: Rows) -> None:
        count_R = self._num_children(rows)
        most = _CHILDREN if self.found == self.count else _FIRST_CHILDREN
        now = max(1, int(np.searchsorted(np.cumsum(count_R), most, side="right")))
        if now < len(rows):
            self.stack.append(rows.take(slice(now, None)))
            rows, count_R = rows.take(slice(0, now)), count_R[:now]
        transition = self.graph.transitions[rows.layer]
        row_C = np.repeat(np.arange(len(rows)), count_R)
        rank_C = np.arange(len(row_C)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
        first_R = transition.src_start_S[rows.state_R]
        pick_C = self.child_LT[rows.layer][first_R[row_C] + rank_C]
        self.partials += len(pick_C)
        state_C = transition.dst_T[pick_C]
        block_C = self.graph.block_LS[rows.layer + 1][state_C]
        edge_C = transition.edge_T[pick_C]
        bit_C = self._set_bit_B[block_C]
        donors_C = rows.num_donors_R[row_C]
        keep_C = (rows.mask_R[row_C] & bit_C) == 0
        if self.problem.max_donors is not None:
            donor_RL, donor_C = self.problem.donor_B[rows.block_RL], self.problem.donor_B[block_C]
            new_C = ~(donor_RL[row_C] == donor_C[:, None]).any(1) & (donor_C >= 0)
            donors_C = donors_C + new_C
            keep_C &= donors_C <= self.problem.max_donors
        mask_C = rows.mask_R[row_C] | bit_C | self._given_E[edge_C]
        if rows.layer == self.problem.num_stages - 2:
            required = self.problem.required_bits
            keep_C &= (mask_C & required) == required
        row_C, pick_C, state_C = row_C[keep_C], pick_C[keep_C], state_C[keep_C]
        children = Rows(
            layer=rows.layer + 1,
            state_R=state_C.astype(np.int64),
            mask_R=mask_C[keep_C],
            amount_QR=rows.amount_QR[:, row_C] + transition.amount_QT[:, pick_C],
            block_RL=np.column_stack([rows.block_RL[row_C], block_C[keep_C]]),
            edge_RL=np.column_stack([rows.edge_RL[row_C], edge_C[keep_C]]),
            num_donors_R=donors_C[keep_C],
            bound_R=np.zeros(len(row_C), dtype=np.int64),
        )
        self.stack.append(self._within_bounds(children))

    def _collect(self, rows: Rows) -> None:
        """Take whole assemblies into the pool, which holds the N best in the final order."""
        if len(rows) > self.count:
            value_R = rows.amount_QR[0]
            nth = len(rows) - self.count
            rows = rows.take(value_R >= np.partition(value_R, nth)[nth])
        if self.pool is not None:
            rows = _joined(self.pool, rows)
        self.pool = _ordered(rows, self.count)
        if self.found == self.count:
            self.target = max(self.target, int(self.pool.amount_QR[0, -1]))


def _joined(one: Rows, two: Rows) -> Rows:
    fields = {
        f.name: np.concatenate([getattr(one, f.name), getattr(two, f.name)], axis=_axis(f.name))
        for f in dataclasses.fields(Rows)
        if f.name != "layer"
    }
    return Rows(layer=one.layer, **fields)


def _axis(field: str) -> int:
    return 1 if field == "amount_QR" else 0


def n_best(
    problem: AssemblyProblem, count: int, *, max_seconds: float | None = None
) -> SearchResult:
    """The ``count`` best assemblies, in a deterministic order, proven.

    Where there are sets or requirements, first without remembering them, to find good assemblies
    and leave out the edges that cannot matter; then over states that remember.

    Args:
        problem: Blocks, edges, limits.
        count: N; fewer are returned where fewer fit.
        max_seconds: Stop then, and say what is proven so far.

    Source: Eq. 8-11; A* with Lagrangian bounds and reduced-cost fixing.
    """
    if count < 1:
        raise ValueError(f"count {count} is below 1")
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    limits = limit_bounds(problem)
    graph = fix(build(problem, tracked=False), limits, 0)
    if graph.empty:
        return _nothing(problem, 0)
    unit = (-1,) + (0,) * len(problem.resources)
    target = -int(max(backward(graph, unit)[0] + weights(unit, graph.start_QS)))
    pool: Rows | None = None
    partials = 0
    for tracked in (False, True) if problem.num_bits else (False,):
        if tracked:
            kept_E = graph.edges(problem.num_edges)
            graph = fix(build(problem, tracked=True, keep_E=kept_E), limits, 0)
        for rounds in _ROUNDS:
            bound = None
            if not graph.empty:
                bound = lagrangian_bound(
                    graph, problem, rounds=rounds, target=target, deadline=deadline
                )
            if bound is None:
                return _nothing(problem, partials)
            bounds = [*limits, bound]
            graph = fix(graph, bounds, target)
            search = Search(problem, graph, bounds, count, target)
            final = tracked == bool(problem.num_bits) and rounds == _ROUNDS[-1]
            search.run(max_children=None if final else _DIVE_CHILDREN, deadline=deadline)
            partials += search.partials
            pool = _merged(pool, search.pool, count)
            if not search.stack or (deadline is not None and time.monotonic() > deadline):
                kept_E = fix(graph, bounds, search.target).edges(problem.num_edges)
                return _result(problem, pool, search, kept_E, partials)
            target = search.target
            graph = fix(graph, bounds, target)
    raise AssertionError("the last search runs until nothing is left")


def _nothing(problem: AssemblyProblem, partials: int) -> SearchResult:
    return SearchResult(
        assemblies=(),
        complete=True,
        upper_bound=None,
        kept_E=np.zeros(problem.num_edges, dtype=bool),
        partials=partials,
    )


def _merged(one: Rows | None, two: Rows | None, count: int) -> Rows | None:
    """The ``count`` best of two pools, each assembly once, in the final order."""
    if one is None or two is None:
        return two if one is None else one
    rows = _joined(one, two)
    path_RX = np.column_stack([rows.block_RL, rows.edge_RL])
    return _ordered(rows.take(np.unique(path_RX, axis=0, return_index=True)[1]), count)


def _ordered(rows: Rows, count: int) -> Rows:
    """The ``count`` best: value, then costs, then block numbers, then edge numbers."""
    keys = [*rows.edge_RL.T[::-1], *rows.block_RL.T[::-1], *rows.amount_QR[:0:-1]]
    return rows.take(np.lexsort([*keys, -rows.amount_QR[0]])[:count])


def _result(
    problem: AssemblyProblem, pool: Rows | None, search: Search, kept_E: BoolArray, partials: int
) -> SearchResult:
    found: list[Assembly] = []
    if pool is not None:
        found = [
            recount(problem, block_L.tolist(), edge_L.tolist())
            for block_L, edge_L in zip(pool.block_RL, pool.edge_RL, strict=True)
        ]
    bounds = [assembly.score for assembly in found[:1]]
    rest = search.bound_on_rest()
    if rest is not None:
        bounds.append(-(-rest // value_scale(problem)))
    return SearchResult(
        assemblies=tuple(found),
        complete=not search.stack,
        upper_bound=max(bounds, default=None),
        kept_E=kept_E,
        partials=partials,
    )
