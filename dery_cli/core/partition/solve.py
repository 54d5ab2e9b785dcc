"""Partition of a zoo into equivalence sets (paper, Eq. 2-5): the best cut found, and a bound on it.

Every donor is cut into K consecutive blocks; the blocks of the whole zoo form K equivalence sets,
each around an anchor that is one of its members. The objective is the summed functional similarity
S(B, B') = s(in, in') + s(out, out') (Definition 3) of every block to the anchor of its set.

Legend: P nodes of the zoo, M donors, K blocks a donor and sets, R restarts, C candidate blocks.

The parts, in the order in which to read them: candidates and exact path programs in ``blocks``,
alternation and swaps in ``search``, bound and proof in ``bound``, the integer program in
``integer``.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np

from dery_cli.core.partition.blocks import (
    BlockTable,
    IntArray,
    PartitionProblem,
    block_table,
)
from dery_cli.core.partition.bound import Budget, Proof, swap_in, tighten, whole
from dery_cli.core.partition.integer import improve
from dery_cli.core.partition.search import (
    Answers,
    Incumbent,
    alternate,
    anchor_step,
    partition_step,
    seeds,
)
from dery_cli.errors import UsageError

__all__ = ["Partition", "PartitionProblem", "partition"]

RESTARTS_AT_ONCE = 25
"""Restarts solved side by side."""

FIRST_STEPS = 100
"""Subgradient steps before swaps, which use the gains they find."""

ROOT_WORK = 1e10
"""Work of the bound over all blocks, in blocks times anchors an evaluation; some minutes."""

SHORT_WORK = 1e8
"""Work of branching that is cheaper than the integer program."""

BRANCH_WORK = 1.5e9
"""Work of branching after it; about half a minute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition of the zoo and what is proven about it.

    Args:
        cuts: K + 1 nodes of each donor, from 0 to n.
        sets: The set of each of the K blocks of each donor. Sets are numbered by the mean relative
            depth at which their members begin.
        anchors: (donor, first node, last node) of each set's anchor, a member of it.
        similarity: S of each block to its anchor, as ``sets``; 2 at most.
        objective: Their sum.
        upper_bound: No partition of this zoo has a larger objective (to 1e-9 of it).
        gap: (upper_bound - objective) / objective.
        optimal: The gap is closed.
        forced: Donors that the size limit leaves one way to cut only.
        history: The best objective after each phase.
    """

    cuts: tuple[tuple[int, ...], ...]
    sets: tuple[tuple[int, ...], ...]
    anchors: tuple[tuple[int, int, int], ...]
    similarity: tuple[tuple[float, ...], ...]
    objective: float
    upper_bound: float
    gap: float
    optimal: bool
    forced: tuple[bool, ...]
    history: tuple[tuple[str, float], ...]

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.anchors)

    def members(self, index: int) -> tuple[tuple[int, int], ...]:
        """(donor, stage from 0) of every block of one set."""
        return tuple(
            (m, k)
            for m, row in enumerate(self.sets)
            for k, chosen in enumerate(row)
            if chosen == index
        )

    @property
    def admits_assembly(self) -> bool:
        """Whether one block a stage can be chosen so that all K sets occur (Eq. 9-10)."""
        from scipy.optimize import linear_sum_assignment

        offered_KK = np.zeros((self.num_blocks, self.num_blocks), bool)
        offered_KK[np.arange(self.num_blocks), np.array(self.sets)] = True
        stages, sets = linear_sum_assignment(offered_KK, maximize=True)
        return bool(offered_KK[stages, sets].all())


def partition(
    problem: PartitionProblem,
    *,
    restarts: int = 200,
    seed: int = 0,
    max_seconds: float | None = None,
    bound_steps: int = 400,
    progress: Callable[[str, float], None] | None = None,
) -> Partition:
    """Cut the zoo into equivalence sets (Eq. 2-5), as well as can be, and bound what is possible.

    Args:
        problem: The zoo, K and the size limit.
        restarts: Starts of the alternation, half k-means++-like.
        seed: Of the starts; everything else is deterministic.
        max_seconds: Stop improving after this time. An answer and a bound are always returned,
            but which ones then depends on the machine.
        bound_steps: Subgradient steps of the bound over all blocks.
        progress: Told (phase, gap); the gap is inf until a bound is known.

    Raises:
        InfeasibleError: The size limit leaves a donor no partition.
        UsageError: ``restarts`` or ``bound_steps`` below 1, ``max_seconds`` not above 0.
    """
    _check_options(restarts, bound_steps, max_seconds)
    stop_at = math.inf if max_seconds is None else time.monotonic() + max_seconds

    def out_of_time() -> bool:
        return time.monotonic() >= stop_at

    table = block_table(problem)
    history: list[tuple[str, float]] = []

    def tell(phase: str, value: float, bound: float = math.inf) -> None:
        if not history or history[-1] != (phase, value):
            history.append((phase, value))
        if progress is not None:
            progress(phase, _gap(max(bound, value), value))

    answers = None
    rng = np.random.default_rng(seed)
    for done in range(0, restarts, RESTARTS_AT_ONCE):
        if answers is not None and out_of_time():
            break
        upto = min(done + RESTARTS_AT_ONCE, restarts)
        more, _ = alternate(table, seeds(table, upto - done, rng))
        answers = more if answers is None else answers.join(more)
        tell(f"restarts {upto} of {restarts}", float(answers.value_R.max()))
    assert answers is not None
    answer = answers.take(np.array([answers.best]))

    incumbent = Incumbent(table=table, answer=answer)
    root = whole(table, answer.anchors_KR[:, 0])
    budget = Budget(work=ROOT_WORK, out_of_time=out_of_time)
    root, often_A = tighten(root, incumbent, min(bound_steps, FIRST_STEPS), budget)
    tell("bound", incumbent.value, root.bound)
    if root.bound > incumbent.floor and not out_of_time():
        swap_in(root, incumbent, answers, out_of_time)
        tell("swaps", incumbent.value, root.bound)
    if root.bound > incumbent.floor and bound_steps > FIRST_STEPS and not budget.spent:
        root, often_A = tighten(root, incumbent, bound_steps - FIRST_STEPS, budget)
    proof = Proof(root, often_A, incumbent)
    tell("bound", incumbent.value, proof.bound)
    for work in (SHORT_WORK, BRANCH_WORK):
        if proof.done or out_of_time():
            break
        if work == BRANCH_WORK:
            improve(root, incumbent, answers.anchors_KR, lambda: stop_at - time.monotonic())
            tell("program", incumbent.value, proof.bound)
        proof.run(
            Budget(work=work, out_of_time=out_of_time),
            lambda: tell("proof", incumbent.value, proof.bound),
        )
    return _result(table, incumbent.answer, proof.bound, proof.done, history)


def _check_options(restarts: int, bound_steps: int, max_seconds: float | None) -> None:
    if restarts < 1:
        raise UsageError(f"--restarts {restarts} is below 1", "the default is --restarts 200")
    if bound_steps < 1:
        raise UsageError(f"bound steps {bound_steps} are below 1")
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError(f"--max-seconds {max_seconds:g} is not above 0")


def _result(
    table: BlockTable,
    answer: Answers,
    bound: float,
    optimal: bool,
    history: list[tuple[str, float]],
) -> Partition:
    """The answer in canonical order, its objective summed exactly."""
    answer = partition_step(table, np.sort(answer.anchors_KR, axis=0))
    anchors = anchor_step(table, answer)[:, 0]  # the first of equals
    blocks_MK, sets_MK = answer.blocks_MKR[..., 0], answer.sets_MKR[..., 0]
    depth_MK = table.start_C[blocks_MK] / np.asarray(table.units)[:, None]
    keys = []
    for index in range(table.num_blocks):
        where = np.nonzero((sets_MK == index).ravel())[0]
        keys.append((round(float(depth_MK.ravel()[where].mean()), 12), int(where[0]), index))
    order = [index for _, _, index in sorted(keys)]
    rank = np.argsort(np.array(order))
    similarity_MK = table.similarity(blocks_MK, anchors[sets_MK])
    objective = math.fsum(similarity_MK.ravel().tolist())
    upper_bound = objective if optimal else max(bound, objective)
    return Partition(
        cuts=tuple((0, *(int(table.stop_C[b]) for b in row)) for row in blocks_MK),
        sets=tuple(tuple(int(rank[s]) for s in row) for row in sets_MK),
        anchors=tuple(_describe(table, anchors[index]) for index in order),
        similarity=tuple(tuple(float(s) for s in row) for row in similarity_MK),
        objective=objective,
        upper_bound=upper_bound,
        gap=_gap(upper_bound, objective),
        optimal=optimal,
        forced=_forced(table),
        history=tuple(history),
    )


def _gap(bound: float, value: float) -> float:
    return (bound - value) / value if value > 0 else math.inf


def _describe(table: BlockTable, block: IntArray) -> tuple[int, int, int]:
    return int(table.donor_C[block]), int(table.start_C[block]), int(table.stop_C[block])


def _forced(table: BlockTable) -> tuple[bool, ...]:
    """Donors with exactly K candidate blocks: as each lies on a cut, there is only one cut."""
    counts = np.bincount(table.donor_C, minlength=len(table.units))
    return tuple(bool(count == table.num_blocks) for count in counts)
