"""Whether the objective that ``dery assemble`` learns foresees networks that were never built.

Kendall's tau of what it says of seeded paths within the budget, stratified by stitches, with their
test accuracy, beside that of the cross-validated probe of the built network itself and of the
untaught formula; and how far the pick's test accuracy is below the best of those paths.

    python tests/bench/bench_learning.py [--paths 200] [--data demo DIR] [--budgets 100k 400k 900k]
    python tests/bench/bench_learning.py --zoo "--manifest lite --image-size 96" --data DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import tempfile
from pathlib import Path

import numpy as np
from bench_demo import dery
from scipy.stats import kendalltau

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import parse_size
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.choose import Chooser
from dery_cli.stages.assemble.config import AssembleConfig, Budget
from dery_cli.stages.assemble.free_space import PathSearch
from dery_cli.stages.assemble.prepare import Job, prepare
from dery_cli.stages.assemble.run import assemble_network
from dery_cli.stages.assemble.scores import (
    learn_objective,
    memo_of,
    scored_space,
    target_scores,
)
from dery_cli.stages.assemble.terms import PathTerms

PATHS_QUICK = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unseen:
    """A path that was built for this bench alone.

    Args:
        candidate: The path.
        probe: Of the built network, cross-validated on training images.
        test: Of the complete network on test images.
    """

    candidate: Candidate
    probe: float
    test: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["demo"])
    parser.add_argument("--zoo", default="--manifest demo", help="options of dery zoo add")
    parser.add_argument("--budgets", nargs="+", default=["400k"])
    parser.add_argument("--paths", type=int, default=PATHS_QUICK)
    parser.add_argument("--effort", type=float, default=AssembleConfig.effort)
    args = parser.parse_args()
    columns = ("tau", "top quarter", "formula", "probe", "pick", "best", "regret", "formula's")
    print(f"{'data':<12}{'budget':>8}" + "".join(f"{name:>12}" for name in columns), flush=True)
    for data in args.data:
        with tempfile.TemporaryDirectory() as folder:
            space = ["--workspace", folder]
            dery("zoo", "add", *shlex.split(args.zoo), *space)
            dery("embed", "--data", data, *space)
            for budget in args.budgets:
                config = AssembleConfig(
                    budget=Budget(max_params=parse_size(budget, "--budgets")),
                    effort=args.effort,
                    purpose="untrained",
                )
                cells = measured(Workspace(Path(folder)), config, args.paths)
                line = "".join(f"{cells[name]:>12.3f}" for name in columns)
                print(f"{data[-12:]:<12}{budget:>8}{line}", flush=True)


def measured(space: Workspace, config: AssembleConfig, paths: int) -> dict[str, float]:
    """The bench's figures for one target and one budget."""
    terminal = Terminal(quiet=True)
    picked = assemble_network(terminal, space, config).record
    with space.lock(terminal.note):
        job = prepare(terminal, space, config)
        searched = scored_space(job)
        assert isinstance(searched, PathSearch)
        chooser = Chooser(terminal, job.setting, job.proxy, memo_of(job))
        wholes = chooser.score(job.setting.whole_candidates(), "whole donors")
        lesson = learn_objective(job, searched, chooser, wholes)
        known = {entry.candidate.key for entry in lesson.scored}
        unseen = built(job, chooser, drawn(searched, known, paths))
        terms = PathTerms(job.setting.zoo, target_scores(job))
        formula = best_by_formula(job, searched, terms)
        formula_test = built(job, chooser, [formula])[0].test
    term_BF = np.array([terms.of(one.candidate.refs) for one in unseen])
    test_B = np.array([one.test for one in unseen])
    foreseen_B = lesson.objective.predict(term_BF)
    top_B = test_B >= np.quantile(test_B, 0.75)
    best = float(test_B.max())
    return {
        "tau": tau(foreseen_B, test_B),
        "top quarter": tau(foreseen_B[top_B], test_B[top_B]),
        "formula": tau(term_BF @ terms.formula_F, test_B),
        "probe": tau(np.array([one.probe for one in unseen]), test_B),
        "pick": picked.data["test_top1"],
        "best": best,
        "regret": best - picked.data["test_top1"],
        "formula's": best - formula_test,
    }


def tau(one_B: np.ndarray, other_B: np.ndarray) -> float:
    return float(kendalltau(one_B, other_B).statistic)


def drawn(searched: PathSearch, known: set[tuple[object, ...]], paths: int) -> list[Candidate]:
    """Paths within the budget, by seed, of 0, 1, ... stitches at most in turns."""
    generator = np.random.default_rng(1)
    stated = searched.stated
    layers = stated.space.max_stitches + 1
    problems = [stated.with_stitches(most) for most in range(layers)]
    found: dict[tuple[object, ...], Candidate] = {}
    for place in range(20 * paths):
        answer = random_feasible(problems[place % layers], generator)
        if answer is None:
            continue
        candidate = searched.candidate(answer)
        if candidate.key not in known:
            found.setdefault(candidate.key, candidate)
        if len(found) == paths:
            break
    return list(found.values())


def best_by_formula(job: Job, searched: PathSearch, terms: PathTerms) -> Candidate:
    """The best path before anything is built."""
    searched.use_scores(terms.weighted(terms.formula_F))
    candidates, _ = searched.candidates()
    return candidates[0]


def built(job: Job, chooser: Chooser, candidates: list[Candidate]) -> list[Unseen]:
    """Each as ``assemble`` would build it."""
    scored: list[Scored] = chooser.score(candidates, "paths")
    found = []
    for entry in scored:
        test = job.setting.builder.test_top1(entry.candidate, None)
        assert test is not None
        found.append(Unseen(candidate=entry.candidate, probe=entry.proxy, test=test))
    return found


if __name__ == "__main__":
    main()
