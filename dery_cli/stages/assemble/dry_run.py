"""What ``dery assemble`` would do: how many networks there are, what is built, what it takes."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from dery_cli.core.assembly.frontier import count_assemblies, share_that_fits
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.features import target_bytes
from dery_cli.stages.assemble.free_space import PathSearch
from dery_cli.stages.assemble.paper_space import PaperSpace
from dery_cli.stages.assemble.plan import planned, zoo_pass
from dery_cli.stages.assemble.prepare import Job, prepare
from dery_cli.stages.assemble.setting import SearchSpace

DRAWS = 4096
"""Networks drawn to say which share of them is within the budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What would be done.

    Args:
        networks: In the space, whatever they cost.
        within_budget: Of them, about: as many as of networks drawn by the seed.
        builds: Candidates that would be built and scored.
        finalists: Of them, that would be tried.
        tuned: Of these, that would be fine-tuned for a few updates.
        multiply_adds: Of all that, and of one pass of the donors over the target's images; about.
        seconds: At the speed of one donor on this machine, just timed; rough.
        bytes: On disk, about.
    """

    networks: int
    within_budget: int
    builds: int
    finalists: int
    tuned: int
    multiply_adds: int
    seconds: float
    bytes: int


def dry_run(terminal: Terminal, space: Workspace, config: AssembleConfig) -> DryRun:
    """Count what ``assemble_network`` would do; nothing is written.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        InfeasibleError: Nothing is within the budget.
    """
    job = prepare(terminal, space, config)
    setting = job.setting
    searched: SearchSpace
    if config.space == "paper":
        assert job.partition is not None
        searched = PaperSpace(setting, job.partition)
    else:
        searched = PathSearch(setting)
    searched.check_budget()
    networks = count_assemblies(searched.problem.without_limits())
    share = share_that_fits(searched.problem, np.random.default_rng(config.seed), DRAWS)
    candidates, _ = searched.candidates()
    plan = planned(setting, candidates, job.proxy)
    work = plan.work + zoo_pass(setting)
    largest = max(candidate.params for candidate in candidates)
    images = len(setting.target.indices)
    features = target_bytes(setting.zoo, images, setting.num_classes)
    return DryRun(
        networks=networks,
        within_budget=round(networks * share),
        builds=plan.builds,
        finalists=plan.finalists,
        tuned=plan.tuned,
        multiply_adds=work,
        seconds=work / _speed(job),
        bytes=4 * largest + (features if config.space == "free" else 0),
    )


def _speed(job: Job) -> float:
    """Multiply-adds a second of the smallest donor on one batch of the target's images."""
    import torch

    setting = job.setting
    donors = setting.zoo.donors.values()
    smallest = min(donors, key=lambda d: (d.anatomy.flops(0, d.anatomy.num_units), d.name))
    block = setting.donors[smallest.name].block(0, smallest.anatomy.num_units).eval()
    x = next(iter(setting.builder.view(smallest.name)))
    with torch.inference_mode():
        block(x)
        started = time.perf_counter()
        float(block(x).sum())
    passed = max(time.perf_counter() - started, 1e-6)
    return smallest.anatomy.flops(0, smallest.anatomy.num_units) * len(x) / passed
