"""The rate of a run: found once, kept beside its checkpoints, and taken from there on going on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dery_cli.data.sets import DataSet
from dery_cli.io.artifacts import Workspace, made_of_the_same, write_record
from dery_cli.io.records import Artifact
from dery_cli.runtime.processes import Processes
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.finetune.folds import make_parts
from dery_cli.stages.finetune.splits import Splits
from dery_cli.stages.finetune.start import Start
from dery_cli.stages.finetune.store import RATES
from dery_cli.training.rate_finder import FoundRate, allowance, find_rate
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.runlog import run_lock

FILE = "rates.json"


def rate_of_run(
    terminal: Terminal,
    space: Workspace,
    start: Start,
    data: DataSet,
    splits: Splits,
    config: FinetuneConfig,
    processes: Processes,
    *,
    scratch: bool,
    steps: int,
    record: Artifact,
    run_dir: Path,
    resume: bool,
    settings: Mapping[str, Any],
) -> FoundRate | None:
    """Find the rate, or take what was found for this very run; None where none is searched for.

    Args:
        terminal: Shown the table of trials.
        space: Of the donors.
        start: Of the run, its weights loaded.
        data: The target.
        splits: Of its training images.
        config: Of the run; its rates are the boldest.
        processes: All call this.
        scratch: Whether the start has random weights.
        steps: Updates of the run.
        record: Of the run: what was found belongs to its parents and options.
        run_dir: The run's folder.
        resume: Whether it must go on: where nothing was found for it, nothing is, and the loop
            says what differs.
        settings: The teacher, as ``finetune`` takes it.
    """
    if config.effort == 0:
        return None
    path = run_dir / FILE
    wanted = dataclasses.replace(record, kind=RATES, data={})
    kept = made_of_the_same(path, wanted) if processes.main else None
    told = processes.share(None if kept is None else dict(kept.data))[0]
    if told is not None:
        return FoundRate.from_json(told)
    if resume:
        return None
    parts = make_parts(space, start, data, splits, config, processes.device, scratch=scratch)
    allowed = allowance(config, steps, len(parts))
    if not parts or allowed.total < allowed.updates:
        if splits.valid is not None:  # the best weights are no worse than the start then
            return None
        terminal.warn(
            f"too few images or updates to try rates: taking {config.lr:g} untried; "
            "a higher --effort or --lr says otherwise"
        )
        return None
    held = run_lock(run_dir) if processes.main else contextlib.nullcontext()
    with held, terminal.progress("trying rates", allowed.total) as bar:
        found = find_rate(
            parts,
            config,
            steps,
            run_dir,
            classes=start.assembly.classes or (),
            device=processes.device,
            settings=settings,
            progress=bar.advance,
        )
    assert found is not None
    found = FoundRate.from_json(processes.share(found.to_json())[0])  # the main process decides
    if processes.main:
        with run_lock(run_dir):
            write_record(path, dataclasses.replace(wanted, data=found.to_json()))
        say(terminal, found, steps, validated=splits.valid is not None)
    return found


def say(terminal: Terminal, found: FoundRate, steps: int, *, validated: bool) -> None:
    """The table of the trials, what they cost and what came of them."""
    where = "the validation images" if validated else "images held out of the fit, in folds"
    terminal.table(
        f"rates tried for {found.updates} updates ({found.updates / steps:.0%} of the run's) on "
        f"{found.images} {where}; the start tells {found.start_top1:.3f} of them right",
        ["rate", "blocks", "updates", "images", "top-1", "gain", "+-", ""],
        [
            [
                f"{trial.lr:.1e}",
                f"x {trial.block_lr_scale:g}",
                trial.updates,
                trial.images,
                "-" if trial.diverged else f"{trial.top1:.3f}",
                "-" if trial.diverged else f"{trial.gain:+.3f}",
                f"{trial.error:.3f}",
                _verdict(found, trial.lr, trial.block_lr_scale, diverged=trial.diverged),
            ]
            for trial in found.trials
        ],
    )
    if not found.admitted:
        terminal.warn(
            "no rate that was tried made the network better on images it had not seen"
            + (
                ": the most cautious is taken"
                if validated
                else ": the start is kept as it is; --lr trains all the same"
            )
        )


def _verdict(found: FoundRate, lr: float, scale: float, *, diverged: bool) -> str:
    if diverged:
        return "the loss rose"
    taken = found.admitted and (lr, scale) == (found.lr, found.block_lr_scale)
    return "taken" if taken else ""
