"""An upper bound on Eq. 2-5 over all candidate blocks, and the branching that closes the gap.

Write x_b for "block b is used", y_a for "block a is an anchor", z_ba for "b belongs to a's set".
Relaxing x_b = sum_a z_ba with one multiplier lambda_b a block leaves two easy programs:

    L(lambda) = sum_m max_{cuts of m} sum_{b in cut} lambda_b                          (paths)
              + sum of the K largest G_a,
    G_a       = sum_m max_{cuts of m} sum_{b in cut} max(S_ba - lambda_b, 0)           (gains)

where in a's own donor the cut passes through a, whose term is S_aa - lambda_a without the max,
since an anchor belongs to its own set. That a donor's members of a set lie on *one* cut (and not
only that each of them is open) is what makes the bound tight. Any lambda gives a valid bound;
subgradient steps with Polyak's length lower it.

Legend as in ``blocks``; A anchors still open.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable

import numpy as np

from dery_cli.core.partition.blocks import (
    BlockTable,
    BoolArray,
    FloatArray,
    IntArray,
    backward,
    forward,
    keep_blocks,
    trace,
)
from dery_cli.core.partition.search import RELATIVE, Answers, Incumbent, swap

DEFLECTION = 0.7
"""Share of the last direction kept in the next one; measured best on block-structured zoos."""

PATIENCE = 10
"""Steps without a lower bound after which the step is shortened by ``SHRINK``."""

SHRINK = 0.7

CHECK_STEPS = 20
"""Steps after which new anchor sets are solved and progress is judged."""

STAGNATION = 0.03
"""Stop where ``CHECK_STEPS`` steps closed less than this share of the gap."""

GAINS_AT_ONCE = 400_000
"""Reduced similarities held at a time: what stays in the cache."""

CHILD_STEPS = 40
"""Subgradient steps at a branch, which starts from its parent's multipliers."""

SWAP_POOL = 64
"""Anchors tried by swaps: those with the largest reduced gain."""

SWAP_STARTS = 20
"""Answers that swaps start from."""

LEAF_WORK = 1_000_000
"""Anchor sets times blocks up to which a subproblem is solved set by set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subproblem:
    """The answers that use all anchors of ``fixed`` and draw the others from ``open_A``.

    Args:
        table: Blocks still possible.
        ids_C: Their indices in the whole table.
        fixed: Anchors decided on (indices into ``table``).
        open_A: Anchors still possible (indices into ``table``).
        lambda_C: Multipliers.
        bound: Upper bound on its answers; -inf where there are none.
    """

    table: BlockTable
    ids_C: IntArray
    fixed: IntArray
    open_A: IntArray
    lambda_C: FloatArray
    bound: float

    @property
    def num_free(self) -> int:
        """Anchors still to choose."""
        return self.table.num_blocks - len(self.fixed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed:
    """L(lambda) and what it is made of.

    Args:
        value: The bound, -inf where the subproblem has no answer.
        paths: Its first part.
        gain_A: G of fixed and open anchors, in this order.
        chosen: Anchors of the K largest gains, the fixed ones first.
        slack_C: Subgradient x_b - sum_a z_ba.
    """

    value: float
    paths: float
    gain_A: FloatArray
    chosen: IntArray
    slack_C: FloatArray


def _reduced(table: BlockTable, anchors: IntArray, lambda_C: FloatArray) -> FloatArray:
    """max(S_ba - lambda_b, 0), -inf beside a in its donor and unclamped for a itself: (C, A)."""
    gain_CA = table.columns(anchors)
    gain_CA -= lambda_C[:, None]
    places = np.arange(len(anchors))
    own = gain_CA[anchors, places]
    np.maximum(gain_CA, 0.0, out=gain_CA)
    gain_CA[anchors, places] = own
    gain_CA[table.overlaps(anchors)] = -np.inf
    return gain_CA


def gains(table: BlockTable, anchors: IntArray, lambda_C: FloatArray) -> FloatArray:
    """G_a of the given anchors, -inf where no cut of its donor holds the anchor."""
    result = np.empty(len(anchors))
    ends = table.last_M
    step = max(1, GAINS_AT_ONCE // len(table))
    for at in range(0, len(anchors), step):
        gain_CA = _reduced(table, anchors[at : at + step], lambda_C)
        result[at : at + step] = forward(table, gain_CA)[-1, ends].sum(axis=0)
    return result


def relax(sub: Subproblem, lambda_C: FloatArray) -> Relaxed:
    """L(lambda) of a subproblem, and a subgradient."""
    table, num_fixed = sub.table, len(sub.fixed)
    ahead = forward(table, lambda_C[:, None])
    paths = float(ahead[-1, table.last_M, 0].sum())
    gain_A = gains(table, np.concatenate([sub.fixed, sub.open_A]), lambda_C)
    order = np.argsort(-gain_A[num_fixed:], kind="stable")[: sub.num_free]
    chosen = np.concatenate([sub.fixed, sub.open_A[order]])
    value = paths + float(gain_A[:num_fixed].sum()) + float(gain_A[num_fixed:][order].sum())
    slack_C = np.zeros(len(table))
    if len(chosen) < table.num_blocks or not np.isfinite(value):
        return Relaxed(value=-np.inf, paths=paths, gain_A=gain_A, chosen=chosen, slack_C=slack_C)
    slack_C[trace(table, lambda_C[:, None], ahead)] += 1.0
    gain_CK = _reduced(table, chosen, lambda_C)
    cuts = trace(table, gain_CK, forward(table, gain_CK))
    for k, anchor in enumerate(chosen):
        cut = cuts[:, :, k].ravel()
        slack_C[cut[(gain_CK[cut, k] > 0) | (cut == anchor)]] -= 1.0
    return Relaxed(value=value, paths=paths, gain_A=gain_A, chosen=chosen, slack_C=slack_C)


def reduce(sub: Subproblem, relaxed: Relaxed, lambda_C: FloatArray, floor: float) -> Subproblem:
    """Drop blocks and anchors that no answer above ``floor`` can use (reduced-cost fixing)."""
    table, num_fixed = sub.table, len(sub.fixed)
    ahead, behind = forward(table, lambda_C[:, None]), backward(table, lambda_C[:, None])
    via_C = np.full(len(table), -np.inf)
    for k in range(table.num_blocks):
        reach = ahead[k, table.in_C, 0] + behind[table.num_blocks - 1 - k, table.out_C, 0]
        via_C = np.maximum(via_C, reach + lambda_C)
    detour_C = ahead[-1, table.last_M, 0][table.donor_C] - via_C
    used_C = relaxed.value - detour_C > floor
    gain_A = relaxed.gain_A[num_fixed:]
    weakest = np.sort(gain_A)[-sub.num_free]
    swapped_A = relaxed.value + np.minimum(gain_A - weakest, 0.0) - detour_C[sub.open_A]
    open_A = sub.open_A[(swapped_A > floor) & used_C[sub.open_A]]
    used_C[sub.fixed] = True
    sub = dataclasses.replace(sub, open_A=open_A, lambda_C=lambda_C)
    return sub if used_C.all() else _restrict(sub, used_C)


def _restrict(sub: Subproblem, used_C: BoolArray) -> Subproblem:
    """The subproblem without the blocks that are not marked."""
    place_C = np.cumsum(used_C) - 1
    open_A = sub.open_A[used_C[sub.open_A]]
    return dataclasses.replace(
        sub,
        table=keep_blocks(sub.table, used_C),
        ids_C=sub.ids_C[used_C],
        fixed=place_C[sub.fixed],
        open_A=place_C[open_A],
        lambda_C=sub.lambda_C[used_C],
    )


@dataclasses.dataclass
class Budget:
    """How much more may be done: counted work, so that a rerun stops at the same step, and time.

    Args:
        work: Blocks times anchors of one evaluation, summed over all evaluations still allowed.
        out_of_time: Whether the caller's time limit is over.
    """

    work: float
    out_of_time: Callable[[], bool] = lambda: False

    @property
    def spent(self) -> bool:
        """Whether to stop."""
        return self.work <= 0 or self.out_of_time()


def swap_in(
    sub: Subproblem, incumbent: Incumbent, answers: Answers, out_of_time: Callable[[], bool]
) -> None:
    """Improve the best different ``answers`` by swaps of anchors with large reduced gains."""
    gain_A = gains(sub.table, sub.open_A, sub.lambda_C)
    pool = sub.ids_C[sub.open_A[np.argsort(-gain_A, kind="stable")[:SWAP_POOL]]]
    order = np.argsort(-answers.value_R, kind="stable")
    distinct = dict(
        zip(np.round(answers.value_R[order], 9).tolist()[::-1], order[::-1], strict=True)
    )
    starts = [answers.take(np.array([at])) for at in list(distinct.values())[::-1]]
    for start in [incumbent.answer, *starts[:SWAP_STARTS]]:
        incumbent.accept(swap(incumbent.table, start, pool, out_of_time))


def tighten(
    sub: Subproblem, incumbent: Incumbent, steps: int, budget: Budget
) -> tuple[Subproblem, FloatArray]:
    """Lower a subproblem's bound by subgradient steps, dropping what cannot beat the incumbent.

    Returns:
        The subproblem, and for every anchor still open how often it was chosen lately (0 to 1).
    """
    lambda_C, direction_C, often_C = (
        sub.lambda_C,
        np.zeros(len(sub.table)),
        np.zeros(len(sub.table)),
    )
    length, stalled, mark = 1.0, 0, np.inf
    offers: list[tuple[int, ...]] = []
    for step in range(steps):
        relaxed = relax(sub, lambda_C)
        budget.work -= len(sub.table) * (len(sub.fixed) + len(sub.open_A))
        if relaxed.value == -np.inf:
            return dataclasses.replace(sub, bound=-np.inf), often_C[sub.open_A]
        offers.append(tuple(sub.ids_C[relaxed.chosen].tolist()))
        often_C *= 0.9
        often_C[relaxed.chosen] += 0.1
        direction_C = relaxed.slack_C + DEFLECTION * direction_C
        if relaxed.value < sub.bound - RELATIVE or step == 0:
            stalled = 0
            sub = dataclasses.replace(sub, bound=min(sub.bound, relaxed.value), lambda_C=lambda_C)
            ids_C = sub.ids_C
            sub = reduce(sub, relaxed, lambda_C, incumbent.floor)
            kept = np.isin(ids_C, sub.ids_C, assume_unique=True)
            lambda_C, direction_C, often_C = lambda_C[kept], direction_C[kept], often_C[kept]
        else:
            stalled += 1
            if stalled == PATIENCE:
                length, stalled = length * SHRINK, 0
        if sub.bound <= incumbent.floor or len(sub.open_A) < sub.num_free:
            break
        if step % CHECK_STEPS == CHECK_STEPS - 1:
            incumbent.offer(offers)
            offers = []
            if mark - sub.bound < STAGNATION * (sub.bound - incumbent.value):
                break
            mark = sub.bound
        if budget.spent:
            break
        norm = float(direction_C @ direction_C)
        if norm == 0.0:
            break
        lambda_C = lambda_C - length * (relaxed.value - incumbent.value) / norm * direction_C
    incumbent.offer(offers)
    if len(sub.open_A) < sub.num_free:
        sub = dataclasses.replace(sub, bound=-np.inf)
    return sub, often_C[sub.open_A]


def _children(sub: Subproblem, often_A: FloatArray) -> list[Subproblem]:
    """Branch on the anchor the relaxation is least sure of: without it, and with it."""
    doubt_A = np.minimum(often_A, 1.0 - often_A)
    at = int(np.argmax(doubt_A >= doubt_A.max() - 1e-9))
    anchor = sub.open_A[at]
    without = dataclasses.replace(sub, open_A=np.delete(sub.open_A, at))
    blocks, _ = sub.table.overlaps(np.array([anchor]))
    used_C = np.ones(len(sub.table), bool)
    used_C[blocks] = False
    within = dataclasses.replace(without, fixed=np.append(sub.fixed, anchor))
    return [_restrict(within, used_C), without]


def _leaf(sub: Subproblem, incumbent: Incumbent) -> bool:
    """Solve a subproblem with few anchor sets left outright; False where there are too many."""
    few = max(1, LEAF_WORK // len(incumbent.table))
    if math.comb(len(sub.open_A), sub.num_free) > few:
        return False
    fixed = tuple(sub.ids_C[sub.fixed].tolist())
    incumbent.offer(
        [fixed + c for c in itertools.combinations(sub.ids_C[sub.open_A].tolist(), sub.num_free)]
    )
    return True


def whole(table: BlockTable, anchors: IntArray) -> Subproblem:
    """The whole problem, with each block's similarity to the best of ``anchors`` as multiplier."""
    return Subproblem(
        table=table,
        ids_C=np.arange(len(table)),
        fixed=np.zeros(0, np.int64),
        open_A=np.arange(len(table)),
        lambda_C=table.columns(anchors).max(axis=1),
        bound=np.inf,
    )


class Proof:
    """Branch and bound from a tightened root, highest bound first.

    Args:
        root: What ``tighten`` returned.
        often_A: What it returned beside it.
        incumbent: Improved on the way.
    """

    def __init__(self, root: Subproblem, often_A: FloatArray, incumbent: Incumbent) -> None:
        self.incumbent = incumbent
        self._pushed = itertools.count()
        self._queue: list[tuple[float, int, Subproblem]] = []
        self._branch(root, often_A)

    @property
    def bound(self) -> float:
        """Upper bound on every answer: the incumbent's value where it is proven best."""
        highest = -self._queue[0][0] if self._queue else -np.inf
        return highest if highest > self.incumbent.floor else self.incumbent.value

    @property
    def done(self) -> bool:
        """Whether the incumbent is proven best."""
        return self.bound <= self.incumbent.floor

    def run(self, budget: Budget, report: Callable[[], None] = lambda: None) -> None:
        """Tighten and branch until done or the budget is spent; ``report`` after every branch."""
        while not (self.done or budget.spent):
            _, _, sub = heapq.heappop(self._queue)
            if not _leaf(sub, self.incumbent):
                self._branch(*tighten(sub, self.incumbent, CHILD_STEPS, budget))
            report()

    def _branch(self, sub: Subproblem, often_A: FloatArray) -> None:
        if sub.bound > self.incumbent.floor and not _leaf(sub, self.incumbent):
            for child in _children(sub, often_A):
                heapq.heappush(self._queue, (-child.bound, next(self._pushed), child))
