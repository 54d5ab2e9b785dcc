"""What the program of an ``assemble`` ranks by: scores that are kept, and the objective learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dery_cli.io.artifacts import unchanged, write_record
from dery_cli.io.records import Artifact
from dery_cli.stages.assemble.candidates import Scored
from dery_cli.stages.assemble.choose import Chooser
from dery_cli.stages.assemble.features import score_target
from dery_cli.stages.assemble.features_store import TargetScores, target_name
from dery_cli.stages.assemble.free_space import PARTNERS, PathSearch
from dery_cli.stages.assemble.learn import Learner, Lesson
from dery_cli.stages.assemble.memo import Memo
from dery_cli.stages.assemble.paper_space import PaperSpace
from dery_cli.stages.assemble.plan import MOST_BUILDS, allowance, build_cost
from dery_cli.stages.assemble.prepare import Job
from dery_cli.stages.assemble.setting import SearchSpace
from dery_cli.stages.assemble.store import SCORES
from dery_cli.stages.assemble.terms import PathTerms

LEARNT_FROM = "probe"
"""The proxy that an objective can be learnt from: an accuracy, as the formula foresees one."""


def scored_space(job: Job) -> SearchSpace:
    """What is searched, its scores computed or taken from their artifacts.

    Raises:
        InfeasibleError: Nothing is within the budget.
    """
    if job.setting.config.space == "paper":
        assert job.partition is not None
        paper = PaperSpace(job.setting, job.partition)
        paper.check_budget()
        score_paper(job, paper)
        return paper
    free = PathSearch(job.setting)
    free.check_budget()
    scores = target_scores(job)
    job.setting.builder.stand_in = scores.stand_in
    terms = PathTerms(job.setting.zoo, scores)
    free.use_scores(terms.weighted(terms.formula_F))
    if free.free.dropped is not None:
        job.terminal.note(
            f"each node keeps its {PARTNERS} best stitches; the best left out scores "
            f"{free.free.dropped:.4f}"
        )
    return free


def target_scores(job: Job) -> TargetScores:
    """What the target's images say of every node and every pair of nodes."""
    setting = job.setting
    return score_target(
        job.terminal,
        job.space,
        setting.zoo,
        setting.donors,
        setting.target,
        setting.images,
        digest=job.record.parents["target"],
        seed=setting.config.seed,
    )


def score_paper(job: Job, paper: PaperSpace) -> None:
    """Let the paper's program rank by gains and joints, computed or kept."""
    assert job.partition is not None
    parents = {n: sha for n, sha in job.record.parents.items() if n != "latency"}
    wanted = Artifact(
        kind=SCORES,
        parents=parents,
        options={"target_samples": job.record.options["target_samples"]},
        seed=job.record.seed,
    )
    found = unchanged(job.space.scores, wanted)
    if found is None:
        with job.terminal.progress("scoring blocks", paper.num_scores) as bar:
            data = paper.scores(lambda phase: bar.update(bar.done + 1, phase))
        found = write_record(job.space.scores, dataclasses.replace(wanted, data=data))
    else:
        job.terminal.detail("gains and joints are those of an earlier run")
    paper.use_scores(found.data)


def memo_of(job: Job) -> Memo:
    """What networks for this target came to."""
    digest = job.record.parents["target"]
    name = target_name(job.setting.target, digest, job.setting.config.seed)
    return Memo(job.space.builds(name), job.setting, digest)


def learn_objective(
    job: Job, searched: PathSearch, chooser: Chooser, wholes: Sequence[Scored]
) -> Lesson:
    """Build within the allowance, learning what to build."""
    setting = job.setting
    learner = Learner(
        job.terminal,
        searched,
        PathTerms(setting.zoo, target_scores(job)),
        build=chooser.score,
        cost=lambda candidate: build_cost(setting, candidate),
        before=wholes,
        seed=setting.config.seed,
    )
    return learner.run(allowance(setting) / 2, MOST_BUILDS)
