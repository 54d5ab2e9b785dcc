"""Solve, build, learn, solve again: the objective follows what built networks come to.

Each round builds the best paths under the present belief, and the best under weights drawn from it:
those are what would be best if the belief were wrong in a way that the builds so far leave open,
and so teach most. Of one sequence of donors a round takes two at most. What a build comes to is the
cross-validated probe of the network with label-free stitches, a figure of ``Chooser.score``.

Everything follows from the seed and from counted multiply-adds: what the memo holds is looked up,
not rebuilt, and changes neither what is built nor what is learnt.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.core.assembly.objective import FloatArray, Objective, learn
from dery_cli.core.assembly.problem import AssemblyProblem
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.free_space import POOL, PathSearch, in_turns
from dery_cli.stages.assemble.setting import best_of
from dery_cli.stages.assemble.terms import PathTerms

ROUND = 8
"""Networks built a round: half the best, half the best under drawn weights."""

OF_A_SEQUENCE = 2
"""Of them, at most so many of one sequence of donors."""

SPREAD_DRAWS = 128
"""Paths drawn within the budget, whose terms tell how much each term varies."""

RESAMPLES = 999

Key = tuple[object, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """What was built, and what was learnt from it.

    Args:
        scored: Every built network.
        predicted: What was predicted of each before it was built, by its key; only of those built
            when the objective had learnt something.
        objective: The last.
        terms: Of the zoo's paths.
        scale_F: How much each term varies among paths within the budget.
        rounds: How often was solved, built and learnt.
    """

    scored: list[Scored]
    predicted: dict[Key, float]
    objective: Objective
    terms: PathTerms
    scale_F: FloatArray
    rounds: int

    def to_json(self, seed: int) -> dict[str, Any]:
        """For the record: how well builds were foreseen, and the terms in words."""
        tau, low, high = self.agreement(seed)
        points = 100 * self.objective.mean_F * self.scale_F
        order = np.argsort(-np.abs(points), kind="stable")
        return {
            "builds": len(self.scored),
            "rounds": self.rounds,
            "tau": tau,
            "tau_interval": [low, high],
            "foreseen": len(self.predicted),
            "terms": [
                [self.terms.names[f], round(float(points[f]), 4)]
                for f in order.tolist()
                if abs(points[f]) >= 0.05
            ],
        }

    def agreement(self, seed: int) -> tuple[float | None, float | None, float | None]:
        """Kendall's tau of what was predicted with what came out, and its 95 % interval.

        The interval is a bootstrap's over the builds; None where there are fewer than eight.
        """
        pairs = [
            (self.predicted[entry.candidate.key], entry.proxy)
            for entry in self.scored
            if entry.candidate.key in self.predicted
        ]
        if len(pairs) < ROUND:
            return None, None, None
        pair_B2 = np.array(pairs)
        generator = np.random.default_rng(seed)
        taus = [
            _tau(pair_B2[generator.integers(0, len(pairs), len(pairs))]) for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(taus, (0.025, 0.975)).tolist()
        return _tau(pair_B2), low, high


def _tau(pair_B2: FloatArray) -> float:
    found = float(kendalltau(pair_B2[:, 0], pair_B2[:, 1]).statistic)
    return found if np.isfinite(found) else 0.0  # all alike


class Learner:
    """Builds within an allowance, and learns what to build.

    Args:
        terminal: Shows progress.
        searched: The program over the paths; it keeps the last objective.
        terms: Of the paths.
        build: Builds candidates and asks the proxy.
        cost: Multiply-adds of building and scoring a candidate.
        before: Networks that are known already, whole donors for instance.
        seed: Of draws.
    """

    def __init__(
        self,
        terminal: Terminal,
        searched: PathSearch,
        terms: PathTerms,
        *,
        build: Callable[[Sequence[Candidate], str], list[Scored]],
        cost: Callable[[Candidate], int],
        before: Sequence[Scored],
        seed: int,
    ) -> None:
        self._terminal, self._searched, self._terms = terminal, searched, terms
        self._build, self._cost = build, cost
        self._generator = np.random.default_rng(seed)
        self._built = {entry.candidate.key: entry for entry in before}
        self._predicted: dict[Key, float] = {}
        self._scale_F = self._spread(seed)
        self._objective = self._learn()

    def run(self, allowance: float, most: int) -> Lesson:
        """Build as many as the allowance of multiply-adds pays for, ``most`` at most."""
        left, rounds, built = allowance, 0, 0
        while built < most:
            wanted = self._next(first=not rounds)
            affordable = []
            for candidate in wanted[: most - built]:
                if self._cost(candidate) <= left:
                    left -= self._cost(candidate)
                    affordable.append(candidate)
            if not affordable:
                break
            if rounds:
                for candidate in affordable:
                    self._predicted[candidate.key] = self._foresee(candidate)
            entries = self._build(affordable, f"building, round {rounds + 1}")
            self._built.update({entry.candidate.key: entry for entry in entries})
            built += len(affordable)
            rounds += 1
            self._objective = self._learn()
        self._use(self._objective.mean_F)
        return Lesson(
            scored=[self._told(entry) for entry in self._built.values()],
            predicted=self._predicted,
            objective=self._objective,
            terms=self._terms,
            scale_F=self._scale_F,
            rounds=rounds,
        )

    def _told(self, entry: Scored) -> Scored:
        """The entry with what the last objective says of it."""
        candidate = dataclasses.replace(
            entry.candidate, program_score=self._foresee(entry.candidate)
        )
        return dataclasses.replace(entry, candidate=candidate)

    def _foresee(self, candidate: Candidate) -> float:
        terms_BF = self._terms.of(candidate.refs)[None]
        return float(self._objective.predict(terms_BF)[0])

    def _spread(self, seed: int) -> FloatArray:
        """The deviation of each term among paths drawn within the budget."""
        generator = np.random.default_rng(seed)
        self._use(self._terms.formula_F)
        stated = self._searched.stated
        problems = [stated.with_stitches(most) for most in range(stated.space.max_stitches + 1)]
        drawn = (
            random_feasible(problems[place % len(problems)], generator)
            for place in range(SPREAD_DRAWS)
        )
        found = [self._terms.of(stated.network(one)) for one in drawn if one is not None]
        found += [self._terms.of(entry.candidate.refs) for entry in self._built.values()]
        return np.std(found, axis=0) if len(found) > 1 else np.zeros(len(self._terms.names))

    def _learn(self) -> Objective:
        entries = [e for e in self._built.values() if np.isfinite(e.proxy)]
        shape = (len(entries), len(self._terms.names))
        terms_BF = np.array([self._terms.of(e.candidate.refs) for e in entries]).reshape(shape)
        outcome_B = np.array([entry.proxy for entry in entries], dtype=np.float64)
        return learn(terms_BF, outcome_B, self._terms.formula_F, self._scale_F)

    def _use(self, weight_F: FloatArray) -> None:
        self._searched.use_scores(self._terms.weighted(weight_F))

    def _next(self, *, first: bool) -> list[Candidate]:
        """What to build in a round, the best and the drawn in turns; the best alone at first."""
        taken: Counter[tuple[str, ...]] = Counter()
        chosen: dict[Key, Candidate] = {}

        def take(candidates: Iterator[Candidate]) -> bool:
            for candidate in candidates:
                known = candidate.key in self._built or candidate.key in chosen
                if known or taken[candidate.sequence] >= OF_A_SEQUENCE:
                    continue
                taken[candidate.sequence] += 1
                chosen[candidate.key] = candidate
                return True
            return False

        self._use(self._terms.formula_F if first else self._objective.mean_F)
        best = iter(self._best())
        while len(chosen) < (ROUND if first else ROUND // 2) and take(best):
            pass
        while not first and len(chosen) < ROUND:
            self._use(self._objective.draw(self._generator))
            if not take(iter(self._answers(self._searched.problem))):
                break
        return list(chosen.values())

    def _best(self) -> list[Candidate]:
        """The best of all paths and of those with few stitches, sequences of donors in turns."""
        stated = self._searched.stated
        problems = [self._searched.problem]
        problems += [stated.with_stitches(most) for most in range(stated.space.max_stitches)]
        found = {c.key: c for problem in problems for c in self._answers(problem)}
        best_first = sorted(found.values(), key=lambda c: (-(c.program_score or 0.0), str(c)))
        return in_turns(best_first)

    def _answers(self, problem: AssemblyProblem) -> list[Candidate]:
        found = best_of(problem, POOL, self._searched.setting.config).assemblies
        return [self._searched.candidate(assembly) for assembly in found]
