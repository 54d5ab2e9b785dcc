"""Why no assembly fits: the limit broken by least, the wish that admits none, or what is missing.

Every figure comes from the exact search on the problem with one thing changed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dery_cli.core.assembly.problem import (
    Assembly,
    AssemblyProblem,
    Filter,
    Requirement,
    recount,
)
from dery_cli.core.assembly.search import n_best
from dery_cli.errors import InfeasibleError

# how finely the common relaxation of all limits is found
_RELAX_STEPS = 12
# every search gets this long even when the time allowed is used up, so that it has an answer
_LEAST_SECONDS = 1.0


_JSON_UNITS = {"latency": "ns", "memory": "bytes", "flops": "multiply-adds"}


def _shower(name: str) -> Callable[[int], str]:
    """Writes a total of an option: a latency in ms, rounded up to a us, else the plain count."""
    if name == "latency":
        return lambda total: f"{math.ceil(total / 1000) / 1000:,.3f} ms"
    if name == "memory":
        return lambda total: f"{total:,} bytes"
    return lambda total: f"{total:,}"


def _argument(name: str, total: int) -> str:
    """A total as the option takes it, such that the total is within."""
    return f"{math.ceil(total / 1000) / 1000:.3f}ms" if name == "latency" else str(total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitReport:
    """What one limit does.

    Args:
        name: The option's resource.
        bound: ``max`` or ``min``.
        limit: Its value.
        alone: The least (for ``max``) or greatest (``min``) total of any assembly, no other budget
            asked.
        with_rest: The same, with every other limit kept; None if nothing fits even then.
        exact: False where time ran out, so that better values than these may exist.
    """

    name: str
    bound: str
    limit: int
    alone: int
    with_rest: int | None
    exact: bool

    @property
    def alone_feasible(self) -> bool:
        return self.alone <= self.limit if self.bound == "max" else self.alone >= self.limit

    @property
    def excess(self) -> int | None:
        """By how much the limit would have to give way, the others kept."""
        return None if self.with_rest is None else abs(self.with_rest - self.limit)

    @property
    def option(self) -> str:
        return f"--{self.bound}-{self.name}"

    def sentence(self) -> str:
        """The report in words."""
        edge, way, over = (
            ("smallest", "down", "over") if self.bound == "max" else ("largest", "up", "under")
        )
        show = _shower(self.name)
        text = f"{self.option} {show(self.limit)}"
        if self.alone_feasible:
            text += f" can be kept alone ({way} to {show(self.alone)})"
        else:
            off = abs(self.alone - self.limit)
            text += f": the {edge} assembly has {show(self.alone)}, {show(off)} {over}"
        if self.with_rest is None and self.exact:
            text += "; without it the other limits still admit nothing"
        elif self.with_rest is None:
            text += "; without it nothing was found in the time allowed"
        elif self.alone_feasible or self.with_rest != self.alone:
            text += f"; with the other limits the nearest is {show(self.with_rest)}"
            text += f", {show(abs(self.with_rest - self.limit))} {over}"
        return text

    def to_json(self) -> dict[str, object]:
        return {
            "option": self.option,
            "unit": _JSON_UNITS.get(self.name, self.name),
            "limit": self.limit,
            "alone_feasible": self.alone_feasible,
            "alone": self.alone,
            "with_other_limits": self.with_rest,
            "excess": self.excess,
            "exact": self.exact,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infeasibility:
    """Why nothing fits.

    Args:
        cause: ``candidates`` (a stage or set has none), ``sets`` (stages and sets do not match),
            ``edges`` (blocks that match are not joined), ``filters`` (these and requirements),
            ``donors`` or ``budgets``.
        sentences: The explanation in words, most important first.
        hint: What would fit.
        limits: One report for each budget; empty unless the cause is budgets.
        candidates_KS: Allowed candidate blocks of each stage and set; empty without sets.
        closest: An assembly that breaks as little as possible, if the cause is budgets.
        proven: False if time ran out before it was certain that nothing fits.
    """

    cause: str
    sentences: tuple[str, ...]
    hint: str
    limits: tuple[LimitReport, ...]
    candidates_KS: tuple[tuple[int, ...], ...]
    closest: Assembly | None = None
    proven: bool = True

    def to_json(self) -> dict[str, object]:
        return {
            "cause": self.cause,
            "proven": self.proven,
            "sentences": list(self.sentences),
            "limits": [report.to_json() for report in self.limits],
            "candidates_by_stage_and_set": [list(row) for row in self.candidates_KS],
        }

    def to_error(self) -> InfeasibleError:
        """The error that becomes exit code 3."""
        return InfeasibleError(
            f"no assembly {'fits' if self.proven else 'found in time'}: {self.sentences[0]}",
            self.hint,
            details=self.to_json(),
        )


class _Clock:
    """Shares the time allowed among the searches of one explanation."""

    def __init__(self, max_seconds: float | None) -> None:
        self.end = None if max_seconds is None else time.monotonic() + max_seconds

    def left(self) -> float | None:
        return None if self.end is None else max(_LEAST_SECONDS, self.end - time.monotonic())


def explain(problem: AssemblyProblem, *, max_seconds: float | None = None) -> Infeasibility | None:
    """Why no assembly fits, or None if one does.

    Args:
        problem: Blocks, edges, limits.
        max_seconds: For everything; figures that were not proven by then are marked.
    """
    clock = _Clock(max_seconds)
    found = n_best(problem, 1, max_seconds=clock.left())
    if found.best is not None:
        return None
    free = problem.without_limits()
    if n_best(free, 1, max_seconds=clock.left()).best is not None:
        verdict = _explain_budgets(problem, clock)
        return dataclasses.replace(verdict, proven=found.complete)
    if _admits(dataclasses.replace(free, max_donors=None), clock):
        return _explain_donors(free, clock)
    unfiltered = dataclasses.replace(free, filters=(), requirements=(), max_donors=None)
    if (problem.filters or problem.requirements) and _admits(unfiltered, clock):
        return _explain_wishes(problem, clock)
    return _explain_structure(unfiltered)


def _admits(problem: AssemblyProblem, clock: _Clock) -> bool:
    return n_best(problem, 1, max_seconds=clock.left()).best is not None


Wish = Filter | Requirement


def _wishes(problem: AssemblyProblem) -> list[Wish]:
    return [*problem.filters, *problem.requirements]


def _with_wishes(problem: AssemblyProblem, wishes: Sequence[Wish]) -> AssemblyProblem:
    return dataclasses.replace(
        problem,
        filters=tuple(w for w in wishes if isinstance(w, Filter)),
        requirements=tuple(w for w in wishes if isinstance(w, Requirement)),
    )


def _candidates(problem: AssemblyProblem) -> tuple[tuple[int, ...], ...]:
    if not problem.num_sets:
        return ()
    table_KS = np.zeros((problem.num_stages, problem.num_sets), dtype=np.int64)
    allowed_B = problem.allowed_B
    np.add.at(table_KS, (problem.stage_B[allowed_B], problem.set_B[allowed_B]), 1)
    return tuple(tuple(row) for row in table_KS.tolist())


def _explain_structure(problem: AssemblyProblem) -> Infeasibility:
    table = _candidates(problem)
    if not problem.num_sets:
        return _structural("edges", ["the donors offer no path that may be used"], table)
    empty = [k + 1 for k, row in enumerate(table) if not any(row)]
    if empty:
        sentences = [f"{_listed('stage', empty)} without a candidate block"]
        return _structural("candidates", sentences, table)
    for stages in _subsets(problem.num_stages):
        sets = [s + 1 for s in range(problem.num_sets) if any(table[k][s] for k in stages)]
        if len(sets) < len(stages):
            where = _listed("stage", [k + 1 for k in stages])
            text = f"{where} need {len(stages)} different equivalence sets, but have blocks of "
            return _structural("sets", [f"{text}{_listed('set', sets)} only"], table)
    joints = set(problem.stage_B[problem.src_E].tolist())
    apart = [k + 1 for k in range(problem.num_stages - 1) if k not in joints]
    if apart:
        text = ", ".join(f"{k} and {k + 1}" for k in apart)
        return _structural("edges", [f"no edge joins blocks of stages {text}"], table)
    text = "no chain of joined blocks, one of each stage, has all its sets different"
    return _structural("edges", [text], table)


def _structural(
    cause: str, sentences: list[str], table: tuple[tuple[int, ...], ...]
) -> Infeasibility:
    return Infeasibility(
        cause=cause,
        sentences=tuple(sentences),
        hint="add donors"
        if not table
        else "make another partition (dery partition with another --seed or --eps), or add donors",
        limits=(),
        candidates_KS=table,
    )


def _explain_wishes(problem: AssemblyProblem, clock: _Clock) -> Infeasibility:
    """Which wishes leave nothing: each one alone, and each one dropped."""
    table = _candidates(problem)
    free = dataclasses.replace(problem.without_limits(), max_donors=None)
    wishes = _wishes(problem)
    names = " ".join(wish.name for wish in wishes)
    sentences = []
    empty = [k + 1 for k, row in enumerate(table) if not any(row)]
    if empty:
        sentences.append(f"{names} leaves {_listed('stage', empty)} without a candidate block")
    empty = [s + 1 for s, column in enumerate(zip(*table, strict=True)) if not any(column)]
    if empty and problem.num_sets == problem.num_stages:
        sentences.append(f"{names} leaves {_listed('set', empty)} empty")
    alone = [wish.name for wish in wishes if not _admits(_with_wishes(free, [wish]), clock)]
    if not sentences:
        named = alone[:1] or [names]
        sentences.append(f"no assembly satisfies {named[0]}")
    enough = []
    for dropped in wishes:
        kept = [wish for wish in wishes if wish is not dropped]
        helps = _admits(_with_wishes(free, kept), clock)
        enough += [dropped.name] if helps else []
        share = ""
        if table and isinstance(dropped, Filter) and dropped.allowed_B is not None:
            left = int(dropped.allowed_B.sum())
            share = f"{dropped.name} allows {left} of {problem.num_blocks} blocks; "
        left_out = "it" if share else dropped.name
        verdict = "an assembly exists" if helps else "there is still none"
        sentences.append(f"{share}without {left_out} {verdict}")
    hint = f"drop or widen {(enough or alone or [names])[0]}"
    return Infeasibility(
        cause="filters", sentences=tuple(sentences), hint=hint, limits=(), candidates_KS=table
    )


def _explain_donors(problem: AssemblyProblem, clock: _Clock) -> Infeasibility:
    assert problem.max_donors is not None
    enough = next(
        count
        for count in range(problem.max_donors + 1, problem.num_stages + 1)  # never more
        if count == problem.num_stages
        or _admits(dataclasses.replace(problem, max_donors=count), clock)
    )
    return Infeasibility(
        cause="donors",
        sentences=(f"--max-donors {problem.max_donors}: every assembly takes {enough} or more",),
        hint=f"use --max-donors {enough}",
        limits=(),
        candidates_KS=_candidates(problem),
    )


def _explain_budgets(problem: AssemblyProblem, clock: _Clock) -> Infeasibility:
    reports: list[LimitReport] = []
    nearest: list[tuple[float, int, LimitReport, Assembly]] = []
    free = problem.without_limits()
    for option in dict.fromkeys(r.option for r in problem.resources):
        members = [r for r in problem.resources if r.option == option]
        for bound, limit in (("max", members[0].maximum), ("min", members[0].minimum)):
            if limit is None:
                continue
            alone = _extreme(free, option, bound, clock)
            kept = {
                r.name: (None, r.maximum) if bound == "min" else (r.minimum, None) for r in members
            }
            rest = _extreme(problem.with_limits(**kept), option, bound, clock)
            assert alone[0] is not None
            report = LimitReport(
                name=option,
                bound=bound,
                limit=limit,
                alone=_total(problem, option, alone[0]),
                with_rest=None if rest[0] is None else _total(problem, option, rest[0]),
                exact=alone[1] and rest[1],
            )
            reports.append(report)
            if rest[0] is not None and report.excess is not None:
                nearest.append((report.excess / limit, len(nearest), report, rest[0]))
    return _budget_verdict(problem, reports, min(nearest, default=None), clock)


def _total(problem: AssemblyProblem, option: str, assembly: Assembly) -> int:
    total = problem.total(option, assembly.costs)
    assert total is not None
    return total


def _budget_verdict(
    problem: AssemblyProblem,
    reports: list[LimitReport],
    nearest: tuple[float, int, LimitReport, Assembly] | None,
    clock: _Clock,
) -> Infeasibility:
    """Put the limit that is broken by the least first, and say what would fit."""
    closest: Assembly | None
    if nearest is not None:
        _, _, first, closest = nearest
        ordered = [first, *(r for r in reports if r is not first)]
        assert first.with_rest is not None
        hint = f"{first.option} {_argument(first.name, first.with_rest)} fits"
    else:
        ordered = sorted(reports, key=lambda r: r.alone_feasible)
        closest, hint = _relaxed(problem, clock)
    sentences = (*(r.sentence() for r in ordered), *_without_wishes(problem, clock))
    if all(r.alone_feasible for r in ordered):
        sentences = ("every limit can be kept alone, but not all together", *sentences)
    return Infeasibility(
        cause="budgets",
        sentences=sentences,
        hint=hint,
        limits=tuple(reports),
        candidates_KS=_candidates(problem),
        closest=closest,
    )


def _without_wishes(problem: AssemblyProblem, clock: _Clock) -> list[str]:
    """Which filters, or the limit on donors, keep an assembly within budget out."""
    sentences = []
    for dropped in _wishes(problem):
        kept = [wish for wish in _wishes(problem) if wish is not dropped]
        if _admits(_with_wishes(problem, kept), clock):
            sentences.append(f"without {dropped.name} an assembly fits every budget")
    if problem.max_donors is not None and _admits(
        dataclasses.replace(problem, max_donors=None), clock
    ):
        name = f"--max-donors {problem.max_donors}"
        sentences.append(f"without {name} an assembly fits every budget")
    return sentences


def _relaxed(problem: AssemblyProblem, clock: _Clock) -> tuple[Assembly | None, str]:
    """The assembly that fits when all limits give way by the same least factor (bisection)."""
    low, high, closest = 0.0, 1.0, None
    while closest is None and high < 2**40:
        closest = n_best(_scaled(problem, high), 1, max_seconds=clock.left()).best
        low, high = (low, high) if closest else (high, high * 4)
    for _ in range(_RELAX_STEPS):
        middle = (low + high) / 2
        found = n_best(_scaled(problem, middle), 1, max_seconds=clock.left()).best
        low, high, closest = (middle, high, closest) if found is None else (low, middle, found)
    if closest is None:
        return None, "loosen several limits at once"
    options = dict.fromkeys(r.option for r in problem.resources)
    totals = [f"{_argument(name, _total(problem, name, closest))} {name}" for name in options]
    return closest, f"several limits must give way: there is an assembly of {', '.join(totals)}"


def _scaled(problem: AssemblyProblem, factor: float) -> AssemblyProblem:
    """Every maximum raised, and every minimum lowered, by the factor."""
    return problem.with_limits(
        **{
            r.name: (
                None if r.minimum is None else max(1, int(r.minimum / (1 + factor))),
                None if r.maximum is None else int(r.maximum * (1 + factor)),
            )
            for r in problem.resources
        }
    )


def _extreme(
    problem: AssemblyProblem, option: str, bound: str, clock: _Clock
) -> tuple[Assembly | None, bool]:
    """The assembly of least (``max``) or greatest (``min``) total of an option, and if proven.

    Where several resources share the option its total is the largest of theirs. The least of it is
    found by bisection: an assembly stays below a maximum if all its resources do.
    """
    members = [r for r in problem.resources if r.option == option]
    sign = -1 if bound == "max" else 1
    by_cost = dataclasses.replace(
        problem, score_B=sign * members[0].cost_B, score_E=sign * members[0].cost_E
    )
    found = n_best(by_cost, 1, max_seconds=clock.left())
    if found.best is None:
        return None, found.proven
    best, proven = recount(problem, found.best.blocks, found.best.edges), found.proven
    if len(members) == 1:
        return best, proven
    low, high = 0, _total(problem, option, best)
    while low + 1 < high:
        middle = (low + high) // 2
        limits = {r.name: (None, middle) for r in members}
        found = n_best(by_cost.with_limits(**limits), 1, max_seconds=clock.left())
        proven = proven and found.proven
        if found.best is None:
            low = middle
        else:
            best = recount(problem, found.best.blocks, found.best.edges)
            high = _total(problem, option, best)
    return best, proven


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Non-empty subsets of 0..count-1, small ones first."""
    for size in range(1, count + 1):
        yield from itertools.combinations(range(count), size)


def _listed(word: str, numbers: list[int]) -> str:
    plural = "s" if len(numbers) > 1 else ""
    return f"{word}{plural} {', '.join(str(n) for n in numbers)}"
