"""Why this network: what its parts are foreseen to be worth, and what else the budget would buy."""

from __future__ import annotations

import dataclasses

from dery_cli.core.assembly.problem import AssemblyProblem
from dery_cli.errors import UsageError
from dery_cli.io.records import Artifact
from dery_cli.stages.assemble.choose import Chooser
from dery_cli.stages.assemble.config import AssembleConfig, Budget
from dery_cli.stages.assemble.free_space import PathSearch
from dery_cli.stages.assemble.prepare import Job
from dery_cli.stages.assemble.scores import (
    LEARNT_FROM,
    learn_objective,
    memo_of,
    scored_space,
    target_scores,
)
from dery_cli.stages.assemble.setting import best_of
from dery_cli.stages.assemble.terms import PathTerms
from dery_cli.types import BlockRef

CHANGES = (("10 % larger", 11), ("10 % smaller", 9))
"""Other budgets that are asked for: in words, and tenths of each upper limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What a part of the pick adds to what is foreseen of it.

    Args:
        part: In words.
        value: A share of accuracy.
    """

    part: str
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreseen:
    """The best that the program foresees under a condition; all but the first two may be None.

    Args:
        what: The condition.
        budget: It is within.
        network: None where nothing fits, or time ran out.
        params: Of it.
        flops: Multiply-adds of one image.
        predicted: Foreseen accuracy.
    """

    what: str
    budget: str
    network: str | None = None
    params: int | None = None
    flops: int | None = None
    predicted: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missed:
    """What would be left without a donor.

    Args:
        donor: Name.
        best: That the program foresees without it.
        lost: Accuracy foreseen less; None where nothing is left.
    """

    donor: str
    best: Foreseen
    lost: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a network was picked, as far as the objective tells.

    What is foreseen is a weighted sum over the parts; the trial, not this, decides between those
    that were built.

    Args:
        network: The pick.
        learnt: Whether the weights were learnt from builds; else they are the formula's.
        shares: Of the pick's parts; with ``offset`` they add up to ``predicted``.
        offset: What every network has.
        predicted: Foreseen of the pick.
        measured: What its proxy came to; None where it gave no number.
        now: The best foreseen within the budget, which the pick need not be.
        budgets: The same within other budgets; empty where there is no upper limit.
        missed: For each donor of the pick or of ``now``, most missed first.
    """

    network: str
    learnt: bool
    shares: list[Share]
    offset: float
    predicted: float
    measured: float | None
    now: Foreseen
    budgets: list[Foreseen]
    missed: list[Missed]


def explain_pick(job: Job, record: Artifact) -> Explanation:
    """Explain the assembly of a job, by what is known of its builds.

    All that was built is looked up, in the order in which it was; only what ``doctor --fix`` took
    away is built again. The caller holds the workspace's lock.

    Args:
        job: In the free space.
        record: Of the assembly.

    Raises:
        DeryError: A file cannot be read or written.
    """
    setting = job.setting
    chooser = Chooser(job.terminal, setting, job.proxy, memo_of(job))
    searched = scored_space(job)
    assert isinstance(searched, PathSearch)
    wholes = chooser.score(setting.whole_candidates(), "looking up whole donors")
    learnt = job.proxy == LEARNT_FROM
    if learnt:
        lesson = learn_objective(job, searched, chooser, wholes)
        terms, weight_F, offset = lesson.terms, lesson.objective.mean_F, lesson.objective.offset
    else:
        terms, offset = PathTerms(setting.zoo, target_scores(job)), 0.0
        weight_F = terms.formula_F
    picked = record.data["comparison"][0]
    refs = tuple(
        BlockRef(donor, start, stop, adapter=adapter)
        for (donor, start, stop), adapter in zip(picked["blocks"], picked["adapters"], strict=True)
    )
    shares = [Share(part=part, value=value) for part, value in terms.shares(refs, weight_F)]
    asked = _Asked(searched, offset)
    now = asked.best("best foreseen", searched.problem)
    return Explanation(
        network=record.data["name"],
        learnt=learnt,
        shares=shares,
        offset=offset,
        predicted=float(terms.of(refs) @ weight_F) + offset,
        measured=picked["proxy"],
        now=now[0],
        budgets=asked.other_budgets(),
        missed=asked.missed(now, {ref.donor for ref in refs}),
    )


Answer = tuple[Foreseen, frozenset[str]]
"""What is foreseen, and the donors that it takes."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The program under the last objective, asked for its best under conditions."""

    searched: PathSearch
    offset: float

    @property
    def _config(self) -> AssembleConfig:
        return self.searched.setting.config

    def best(self, what: str, problem: AssemblyProblem, budget: Budget | None = None) -> Answer:
        """The best of a program like the searched one."""
        within = str(budget or self._config.budget)
        found = best_of(problem, 1, self._config).best
        if found is None:
            return Foreseen(what=what, budget=within), frozenset()
        candidate = self.searched.candidate(found)
        assert candidate.program_score is not None
        foreseen = Foreseen(
            what=what,
            budget=within,
            network=str(candidate),
            params=candidate.params,
            flops=candidate.flops,
            predicted=candidate.program_score + self.offset,
        )
        return foreseen, frozenset(candidate.sequence)

    def other_budgets(self) -> list[Foreseen]:
        """The best where every upper limit is another."""
        budget, problem = self._config.budget, self.searched.problem
        upper = {
            name: limit
            for name, limit in dataclasses.asdict(budget).items()
            if name.startswith("max_") and limit is not None
        }
        found = []
        for what, tenths in CHANGES if upper else ():
            limits = {
                resource.name: (resource.minimum, _tenths(resource.maximum, tenths))
                for resource in problem.resources
                if resource.maximum is not None
            }
            changed = {name: _tenths(limit, tenths) for name, limit in upper.items()}
            try:
                other = dataclasses.replace(budget, **changed)
                problem_then = problem.with_limits(**limits)
            except UsageError:  # below a lower limit
                found.append(Foreseen(what=what, budget="below the lower limit"))
                continue
            found.append(self.best(what, problem_then, other)[0])
        return found

    def missed(self, now: Answer, picked: set[str]) -> list[Missed]:
        """What is left without each donor of the pick and of the best foreseen."""
        stated = self.searched.stated
        found = []
        for donor in stated.space.donors:
            if donor not in picked | now[1]:
                continue
            best, _ = self.best(f"without {donor}", stated.without(donor))
            most, left = now[0].predicted, best.predicted
            lost = None if most is None or left is None else most - left
            found.append(Missed(donor=donor, best=best, lost=lost))
        return sorted(found, key=lambda one: (one.lost is not None, -(one.lost or 0.0), one.donor))


def _tenths(limit: int, tenths: int) -> int:
    return max(1, limit * tenths // 10)
