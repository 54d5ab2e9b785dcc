"""Eq. 8-11 of Deep Model Reassembly: choose one block per stage and set, within the budgets.

``solve`` states the program to python-mip; ``n_best`` decides it in integers; the two are held
against each other by ``cross_check``. Where nothing fits, ``explain`` says why.

Legend: B candidate blocks, E edges between blocks of consecutive stages, K blocks of an assembly.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from typing import Any

import numpy as np

from dery_cli.core.assembly.explain import Infeasibility, LimitReport, explain
from dery_cli.core.assembly.frontier import Frontier, pareto, random_feasible
from dery_cli.core.assembly.problem import (
    Assembly,
    AssemblyProblem,
    BoolArray,
    Filter,
    IntArray,
    Requirement,
    Resource,
    check_limits,
    peak_resources,
    recount,
    violations,
)
from dery_cli.core.assembly.search import SearchResult, n_best

__all__ = [
    "Agreement",
    "Assembly",
    "AssemblyProblem",
    "Filter",
    "Frontier",
    "Infeasibility",
    "LimitReport",
    "MipAnswer",
    "MipStatus",
    "Requirement",
    "Resource",
    "SearchResult",
    "check_limits",
    "cross_check",
    "explain",
    "n_best",
    "pareto",
    "peak_resources",
    "random_feasible",
    "recount",
    "solve",
    "violations",
]

# more edges than this are first reduced to those that one of the best few answers may use
_DIRECT_EDGES = 4000
_REDUCE_TO_BEST = 32
# python-mip takes a second for each ten thousand edges, and CBC more: beyond this nothing is stated
MOST_EDGES = 60_000
# branches of CBC times edges: a count and no clock, so that a rerun stops at the same place; some
# ten seconds, half a minute at the most
BRANCH_WORK = 3_000_000
# a budget becomes at most this many units: fine, and still resolved by CBC's tolerance
_UNITS = 2**20
# in millionths of score: CBC's own tolerance on the objective
_TOLERANCE = 2


class MipStatus(enum.StrEnum):
    """How the program ended."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    STOPPED = "stopped at its limit"
    TOO_LARGE = "too large"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """A budget as the program states it: ``cost_B . x + cost_E . y <= limit`` (or ``>=``)."""

    cost_B: IntArray
    cost_E: IntArray
    limit: int
    is_maximum: bool

    def allows(self, assembly: Assembly) -> bool:
        blocks, edges = list(assembly.blocks), list(assembly.edges)
        total = int(self.cost_B[blocks].sum() + self.cost_E[edges].sum())
        return total <= self.limit if self.is_maximum else total >= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class MipAnswer:
    """What CBC says.

    Args:
        status: ``optimal`` and ``infeasible`` hold to CBC's tolerance, on the rounded budgets;
            ``too large`` means that too many edges were left to state the program.
        assembly: Its answer, counted anew in integers; None if it has none.
        broken: What of the problem that answer breaks, in words; empty if nothing.
        num_blocks: Block variables of the program.
        num_edges: Edge variables of the program.
        rows: The budgets as they were stated.
    """

    status: MipStatus
    assembly: Assembly | None
    broken: tuple[str, ...]
    num_blocks: int
    num_edges: int
    rows: tuple[BudgetRow, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Whether the program and the exact search say the same. Where not, the search is right.

    Args:
        agrees: True also where the rounded budgets, or a limit, kept CBC from the best answer.
        reason: One line in words.
        score_gap: Search's best score less CBC's, in millionths; None unless both have an answer.
    """

    agrees: bool
    reason: str
    score_gap: int | None


def solve(
    problem: AssemblyProblem,
    *,
    max_seconds: float | None = None,
    keep_E: BoolArray | None = None,
) -> MipAnswer:
    """State Eq. 8-11 to python-mip and solve it with CBC.

    Maximise the score of the chosen blocks x_b and edges y_e, with one block per stage, at most one
    per set, as many edges into and out of a block as it is chosen, and the budgets. Every budget
    is stated above the least that each stage costs anyway, in units that CBC's tolerance resolves,
    and rounded so that no answer is over it; assemblies within a few units of a limit can be lost,
    which ``cross_check`` knows. The search stops after a number of branches that the number of
    edges decides.

    Args:
        problem: Blocks, edges, limits.
        max_seconds: CBC also stops then; what it says by then depends on the machine.
        keep_E: Edges to state, ``SearchResult.kept_E`` for instance. By default all of a small
            problem, and of a large one those that bounds leave.

    Source: Eq. 8-11.
    """
    if keep_E is None and problem.num_edges > _DIRECT_EDGES:
        keep_E = n_best(problem, _REDUCE_TO_BEST, max_seconds=max_seconds).kept_E
    use_E = problem.allowed_E if keep_E is None else problem.allowed_E & keep_E
    use_B = problem.allowed_B.copy()
    if problem.num_stages > 1:
        use_B[:] = False
        use_B[problem.src_E[use_E]] = use_B[problem.dst_E[use_E]] = True
    rows = _budget_rows(problem, use_B, use_E)
    status, assembly = _settled(problem, use_B, use_E, rows), None
    if status is None:
        status, assembly = _solve_stated(problem, use_B, use_E, rows, max_seconds)
    return MipAnswer(
        status=status,
        assembly=assembly,
        broken=() if assembly is None else tuple(violations(problem, assembly)),
        num_blocks=int(use_B.sum()),
        num_edges=int(use_E.sum()),
        rows=rows,
    )


def _settled(
    problem: AssemblyProblem, use_B: BoolArray, use_E: BoolArray, rows: tuple[BudgetRow, ...]
) -> MipStatus | None:
    """What is plain before a program is stated; None where it has to be."""
    stages = set(problem.stage_B[use_B].tolist())
    if len(stages) < problem.num_stages or any(r.is_maximum and r.limit < 0 for r in rows):
        return MipStatus.INFEASIBLE
    return MipStatus.TOO_LARGE if use_E.sum() > MOST_EDGES else None


def _solve_stated(
    problem: AssemblyProblem,
    use_B: BoolArray,
    use_E: BoolArray,
    rows: tuple[BudgetRow, ...],
    max_seconds: float | None,
) -> tuple[MipStatus, Assembly | None]:
    """The program over some blocks and edges, stated and handed to CBC."""
    mip = _python_mip()
    model = mip.Model(sense=mip.MAXIMIZE, solver_name=mip.CBC)
    model.verbose = 0
    model.threads = 1
    model.max_mip_gap, model.max_mip_gap_abs = 1e-9, 0.5
    x_B = {b: model.add_var(var_type=mip.BINARY) for b in np.flatnonzero(use_B).tolist()}
    # of several edges between two blocks a budget may want a mixture
    parallel = _has_parallel(problem, use_E)
    y_E = {
        e: model.add_var(lb=0, ub=1, var_type=mip.BINARY if parallel else mip.CONTINUOUS)
        for e in np.flatnonzero(use_E).tolist()
    }
    # millionths as they are: CBC passes over answers that are less than 1e-4 better
    model.objective = mip.xsum(
        [int(problem.score_B[b]) * x for b, x in x_B.items()]
        + [int(problem.score_E[e]) * y for e, y in y_E.items()]
    )
    _add_choices(problem, model, x_B, y_E)
    _add_flow(problem, model, x_B, y_E)
    for row in rows:
        terms = [int(row.cost_B[b]) * x for b, x in x_B.items()]
        terms += [int(row.cost_E[e]) * y for e, y in y_E.items()]
        total = mip.xsum(terms)
        model += (total <= row.limit) if row.is_maximum else (total >= row.limit)
    if problem.max_donors is not None:
        _add_donor_limit(problem, model, x_B)
    found = model.optimize(
        max_seconds=float("inf") if max_seconds is None else max_seconds,
        max_nodes=max(1, BRANCH_WORK // max(1, len(y_E))),
    )
    status = {
        mip.OptimizationStatus.OPTIMAL: MipStatus.OPTIMAL,
        mip.OptimizationStatus.INFEASIBLE: MipStatus.INFEASIBLE,
        mip.OptimizationStatus.INT_INFEASIBLE: MipStatus.INFEASIBLE,
    }.get(found, MipStatus.STOPPED)
    return status, _read(problem, x_B, y_E) if model.num_solutions else None


def _has_parallel(problem: AssemblyProblem, use_E: BoolArray) -> bool:
    key_E = problem.src_E[use_E] * problem.num_blocks + problem.dst_E[use_E]
    return len(np.unique(key_E)) < len(key_E)


def _add_choices(
    problem: AssemblyProblem, model: Any, x_B: dict[int, Any], y_E: dict[int, Any]
) -> None:
    """One block of every stage, at most one of every set, and one edge for every requirement."""
    mip = _python_mip()
    for stage in range(problem.num_stages):
        model += mip.xsum(x for b, x in x_B.items() if problem.stage_B[b] == stage) == 1
    for number in range(problem.num_sets):
        members = [x for b, x in x_B.items() if problem.set_B[b] == number]
        if len(members) > 1:
            model += mip.xsum(members) <= 1
    for requirement in problem.requirements:
        model += mip.xsum(y for e, y in y_E.items() if requirement.gives_E[e]) >= 1


def _python_mip() -> Any:
    """Loaded when a program is solved: it starts CBC's library."""
    import mip

    return mip


def _budget_rows(
    problem: AssemblyProblem, use_B: BoolArray, use_E: BoolArray
) -> tuple[BudgetRow, ...]:
    """Every budget, less what each stage and joint costs at least, in units CBC can resolve."""
    stage_E = problem.stage_B[problem.src_E]
    places = [(problem.stage_B == k) & use_B for k in range(problem.num_stages)]
    joints = [(stage_E == k) & use_E for k in range(problem.num_stages - 1)]
    rows = []
    for resource in problem.resources:
        above_B, base_B, most_B = _above_least(resource.cost_B, places)
        above_E, base_E, most_E = _above_least(resource.cost_E, joints)
        base, most = base_B + base_E, most_B + most_E
        if resource.maximum is not None and resource.maximum - base < most:
            room = resource.maximum - base
            unit = max(1, -(-room // _UNITS))
            limit = room // unit
            costs = [
                np.minimum(-(-above // unit), max(0, limit) + 1) for above in (above_B, above_E)
            ]
            rows.append(BudgetRow(cost_B=costs[0], cost_E=costs[1], limit=limit, is_maximum=True))
        if resource.minimum is not None and resource.minimum > base:
            room = resource.minimum - base
            unit = max(1, -(-room // _UNITS))
            limit = -(-room // unit)
            costs = [np.minimum(above // unit, limit) for above in (above_B, above_E)]
            rows.append(BudgetRow(cost_B=costs[0], cost_E=costs[1], limit=limit, is_maximum=False))
    return tuple(rows)


def _above_least(cost_X: IntArray, groups: list[BoolArray]) -> tuple[IntArray, int, int]:
    """Costs above the least of their group, the sum of those leasts, and the most above it."""
    above_X = cost_X.copy()
    base = most = 0
    for member_X in groups:
        if member_X.any():
            least = int(cost_X[member_X].min())
            above_X[member_X] -= least
            base += least
            most += int(above_X[member_X].max())
    return above_X, base, most


def _add_flow(
    problem: AssemblyProblem, model: Any, x_B: dict[int, Any], y_E: dict[int, Any]
) -> None:
    """As many edges leave a block, and enter it, as the block is chosen."""
    mip = _python_mip()
    leaving: dict[int, list[Any]] = {b: [] for b in x_B}
    entering: dict[int, list[Any]] = {b: [] for b in x_B}
    for edge, y in y_E.items():
        leaving[int(problem.src_E[edge])].append(y)
        entering[int(problem.dst_E[edge])].append(y)
    for block, x in x_B.items():
        if problem.stage_B[block] < problem.num_stages - 1:
            model += mip.xsum(leaving[block]) == x
        if problem.stage_B[block] > 0:
            model += mip.xsum(entering[block]) == x


def _add_donor_limit(problem: AssemblyProblem, model: Any, x_B: dict[int, Any]) -> None:
    """A donor with a chosen block counts; ``max_donors`` of them at most."""
    mip = _python_mip()
    donor_of = {b: int(problem.donor_B[b]) for b in x_B if problem.donor_B[b] >= 0}
    used = {d: model.add_var(ub=1) for d in sorted(set(donor_of.values()))}
    for block, donor in donor_of.items():
        model += x_B[block] <= used[donor]
    model += mip.xsum(used.values()) <= problem.max_donors


def _read(problem: AssemblyProblem, x_B: dict[int, Any], y_E: dict[int, Any]) -> Assembly:
    """The chosen blocks and edges, counted anew."""
    chosen = sorted((b for b, x in x_B.items() if x.x > 0.5), key=lambda b: problem.stage_B[b])
    edges = []
    for pair in itertools.pairwise(chosen):
        parallel = [e for e in y_E if (problem.src_E[e], problem.dst_E[e]) == pair]
        edges.append(max(parallel, key=lambda e: y_E[e].x))
    return recount(problem, chosen, edges)


def cross_check(mip_answer: MipAnswer, search_result: SearchResult) -> Agreement:
    """Hold CBC's answer against the exact search's.

    Args:
        mip_answer: From ``solve``.
        search_result: From ``n_best`` on the same problem.
    """
    best, answer = search_result.best, mip_answer.assembly
    gap = None if best is None or answer is None else best.score - answer.score
    if answer is not None and mip_answer.broken:
        return Agreement(False, f"CBC's answer breaks a limit: {mip_answer.broken[0]}", gap)
    if mip_answer.status is MipStatus.TOO_LARGE:
        reason = f"the program was not stated: {mip_answer.num_edges:,} edges are left"
        return Agreement(True, reason, gap)
    if best is None:
        if answer is None:
            return Agreement(True, "neither finds an assembly that fits", gap)
        if search_result.complete:
            return Agreement(False, "CBC has an answer where the search finds none", gap)
        return Agreement(True, "the search ran out of time before CBC's answer", gap)
    if gap is not None and gap < -_TOLERANCE:
        if search_result.proven:
            return Agreement(False, f"CBC scores {-gap / 1e6:.6f} above a proven optimum", gap)
        return Agreement(True, "the search ran out of time before CBC's answer", gap)
    if gap is not None and gap <= _TOLERANCE:
        return Agreement(True, "same score", gap)
    if mip_answer.status is MipStatus.STOPPED:
        return Agreement(True, "CBC stopped at its limit before the best answer", gap)
    missed = [
        a
        for a in search_result.assemblies
        if (answer is None or a.score > answer.score + _TOLERANCE)
        and all(row.allows(a) for row in mip_answer.rows)
    ]
    if missed:
        what = "finds nothing" if gap is None else f"stops {gap / 1e6:.6f} short"
        return Agreement(False, f"CBC {what} though a better assembly satisfies its rows", gap)
    return Agreement(
        True, "the best is within a rounding unit of a budget, which CBC cannot see", gap
    )
