"""An assembly is made: search, build, try, pick, and write it with what it was compared with."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from dery_cli.io.artifacts import write_log
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact
from dery_cli.stages.assemble.build import check_size
from dery_cli.stages.assemble.candidates import Candidate, Proof, Scored, ranked, unique
from dery_cli.stages.assemble.choose import (
    Choice,
    Chooser,
    Control,
    random_control,
    whole_controls,
)
from dery_cli.stages.assemble.free_space import PathSearch, named_network
from dery_cli.stages.assemble.learn import Lesson
from dery_cli.stages.assemble.memo import Memo
from dery_cli.stages.assemble.model_card import model_card
from dery_cli.stages.assemble.paper_space import PaperSpace
from dery_cli.stages.assemble.plan import planned
from dery_cli.stages.assemble.prepare import Job
from dery_cli.stages.assemble.scores import (
    LEARNT_FROM,
    learn_objective,
    memo_of,
    score_paper,
    scored_space,
)
from dery_cli.stages.assemble.setting import Setting, best_of
from dery_cli.stages.assemble.store import (
    CANDIDATES,
    CANDIDATES_FORMAT,
    LOG_FILE,
)
from dery_cli.stages.partition.store import StoredPartition
from dery_cli.training.closed_form import CompleteNetwork
from dery_cli.zoo.networks import MODEL_FILE, describe_network, licences


def make_assembly(job: Job) -> Artifact:
    """Search, build, try and pick; write the pick and what it was compared with.

    Raises:
        InfeasibleError: Nothing is within the budget.
        DeryError: The optimum is not proven though ``require_optimal`` asks for it, or the built
            network is not the size that the program promised.
    """
    started = time.monotonic()
    setting, config, target = job.setting, job.setting.config, job.setting.target
    if target.labels is None:
        guide = "clusters of images stand for classes, a weak guide"
        job.terminal.note(
            f"{target.data.spec} has no labels: no head; "
            + (guide if job.proxy == LEARNT_FROM else f"{job.proxy} decides")
        )
    memo = memo_of(job)
    chosen = _choose(job, memo)
    choice, lesson = chosen.choice, chosen.lesson
    best = choice.compared[0][1]
    rows = []
    with job.terminal.progress("building the pick and its controls", len(choice.compared)) as bar:
        built = setting.builder.build(best.candidate, best.trial)
        for role, entry in choice.compared:
            rows.append(_row(setting, memo, role, entry))
            bar.advance()
    input_shape = _input_shape(setting, best)
    check_size(built.network, best.candidate, input_shape, config.memory_batch)
    timing = _timing(setting, memo, best.candidate)
    data = {
        **_describe(setting, best, built),
        "proxy": {"name": job.proxy, "score": rows[0]["proxy"]},
        "held_out": best.held_out,
        "program": {**chosen.proof, "score": best.candidate.program_score},
        "builds": {
            "scored": len(choice.scored),
            "tried": choice.tried,
            "without_score": sum(not math.isfinite(entry.proxy) for entry in choice.scored),
            "too_slow": choice.too_slow,
            "tuned": choice.tuned,
        },
        "learning": None if lesson is None else lesson.to_json(config.seed),
        "licenses": licences(setting.zoo, best.candidate.refs),
        "comparison": rows,
        "test_top1": rows[0]["test_top1"],
    }
    listing = {
        "schema": CANDIDATES_FORMAT,
        "proxy": job.proxy,
        "candidates": [
            {**entry.to_json(), "predicted": _predicted(lesson, entry)}
            for entry in ranked(choice.scored)
        ],
    }
    path = job.space.assembly(config.name)
    with transaction(path) as work:
        work.write_tensors(MODEL_FILE, built.network.state_dict())
        work.write_json("candidates.json", listing, CANDIDATES)
        work.write_text("README.md", model_card(config.name, data))
        done = work.commit(dataclasses.replace(job.record, data=data))
    log = {"seconds": time.monotonic() - started, "latency": timing}
    write_log(path.parent / LOG_FILE, log)
    return done


def _predicted(lesson: Lesson | None, entry: Scored) -> float | None:
    """What the objective, as learnt by then, said of a network before it was built."""
    return None if lesson is None else lesson.predicted.get(entry.candidate.key)


def _choose(job: Job, memo: Memo) -> Chosen:
    """What is built and tried, what is proven of the program, and what was learnt."""
    setting, config = job.setting, job.setting.config
    chooser = Chooser(job.terminal, setting, job.proxy, memo)
    wholes = setting.whole_candidates()
    if config.blocks is not None:
        candidate = named_network(setting)
        entries = chooser.score(wholes, "building controls")
        choice = chooser.choose(
            [candidate],
            whole_controls(setting, entries),
            num_finalists=1,
            forced=True,
        )
        return Chosen(choice=choice, proof=NOTHING_SEARCHED)
    searched = scored_space(job)
    candidates, proof = searched.candidates()
    plan = planned(setting, candidates, job.proxy)
    whole_entries = chooser.score(wholes, "building whole donors")
    lesson = None
    if isinstance(searched, PathSearch) and job.proxy == LEARNT_FROM:
        lesson = learn_objective(job, searched, chooser, whole_entries)
        candidates = [entry.candidate for entry in lesson.scored]
        proof = searched.proof(lesson.objective.offset)
    else:
        candidates = unique([*candidates[: plan.builds], *wholes])
    if not proof["solver_agrees"]:
        job.terminal.warn(
            f"CBC and the exact search disagree; the search counts: {proof['agreement']}"
        )
    config.check_proven(optimal=proof["optimal"])
    controls = whole_controls(setting, whole_entries)
    if isinstance(searched, PathSearch):
        best_slice = searched.best_slice()
        if best_slice is not None:
            controls.append(Control(role="best slice", candidates=[best_slice]))
        if job.partition is not None:
            controls += _paper_control(job, job.partition)
    role = "random path" if config.space == "free" else "random assembly"
    controls += random_control(setting, searched, role)
    choice = chooser.choose(candidates, controls, num_finalists=plan.finalists, tuning=plan.tuning)
    return Chosen(choice=choice, proof=proof, lesson=lesson)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What came of building and trying.

    Args:
        choice: The pick and its controls.
        proof: Of the program's answers.
        lesson: What was learnt of the objective; None where the formula alone ranked.
    """

    choice: Choice
    proof: Proof
    lesson: Lesson | None = None


NOTHING_SEARCHED: Proof = {
    "upper_bound": None,
    "optimal": True,
    "complete": True,
    "solver": "not asked",
    "solver_agrees": True,
    "agreement": "the network was given",
}

FITTED_ON = {"finetuned": "fit", "untrained": "all"}
"""The part of the target's training images that is delivered on, by what is delivered for."""

PAPER_TRIES = 3
"""Best of the paper's program that its control is chosen from."""


def _paper_control(job: Job, partition: StoredPartition) -> list[Control]:
    """The best of the paper's space, which the same trial chooses of the first few."""
    paper = PaperSpace(job.setting, partition)
    if best_of(paper.problem, 1, job.setting.config).best is None:
        return []
    score_paper(job, paper)
    found = best_of(paper.problem, PAPER_TRIES, job.setting.config).assemblies
    return [
        Control(role="best of the paper's space", candidates=[paper.candidate(a) for a in found])
    ]


def _describe(setting: Setting, best: Scored, built: CompleteNetwork) -> dict[str, Any]:
    """What the record says of the network itself and of what it was made for."""
    chosen, target = best.candidate, setting.target
    return {
        "network": describe_network(
            setting.zoo,
            chosen.refs,
            built.fits,
            classes=target.data.classes,
            crop=target.crop,
            sets=chosen.sets,
            stem=setting.stem,
        ),
        "name": str(chosen),
        "whole": chosen.whole,
        "params": chosen.params,
        "flops": chosen.flops,
        "latency_ns": chosen.latency,
        "memory_bytes": chosen.memory,
        "input_shape": list(_input_shape(setting, best)),
        "budget": str(setting.config.budget),
        "target": target.data.spec,
        "target_skip_bad": target.data.skip_bad,
        "split": setting.split.to_json(),
        "fitted_on": FITTED_ON[setting.config.purpose] if target.valid_indices else "all",
        "batch_norm": chosen.reestimated,
        "head": None
        if best.trial is None
        else {"penalty": best.trial.penalty, "temperature": best.trial.temperature},
        "match": None if built.match is None else dataclasses.asdict(built.match),
    }


def _timing(setting: Setting, memo: Memo, chosen: Candidate) -> dict[str, Any] | None:
    """The network's own latency beside the sum of its parts.

    None without a budget, and where the parts were measured elsewhere.
    """
    if chosen.latency is None or setting.config.latency_from is not None:
        return None
    measured = memo.whole_latency(chosen)
    return {
        "batch_size": setting.config.latency_batch,
        "sum_of_parts_ns": chosen.latency,
        "built_network_ns": measured,
        "additive_error": chosen.latency / measured - 1,
    }


def _input_shape(setting: Setting, best: Scored) -> tuple[int, ...]:
    spec = setting.zoo[best.candidate.refs[0].donor].input
    return (spec.in_chans, *spec.image_size)


def _row(setting: Setting, memo: Memo, role: str, entry: Scored) -> dict[str, Any]:
    return {
        "role": role,
        **entry.to_json(),
        "mean_r2": entry.r2,
        "test_top1": _test_top1(setting, memo, entry),
    }


def _test_top1(setting: Setting, memo: Memo, entry: Scored) -> float | None:
    """Of the complete network on the test images, which nothing was chosen on."""
    if setting.target.data.test is None or setting.target.labels is None:
        return None
    found = memo.test_top1(entry.candidate)
    if found is None:
        found = setting.builder.test_top1(entry.candidate, entry.trial)
        assert found is not None
        memo.keep_test_top1(entry.candidate, found)
    return found
