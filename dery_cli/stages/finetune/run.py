"""The finetune stage with its artifact: what ``dery finetune`` runs once its options are right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dery_cli.data.samples import SEEN, held_out_anew
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace, unchanged, write_log
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact
from dery_cli.runtime.processes import Processes, open_processes
from dery_cli.runtime.terminal import GrowingTable, Terminal
from dery_cli.runtime.terminal import Progress as ProgressBar
from dery_cli.sizes import show_duration
from dery_cli.stages.finetune.rates import rate_of_run
from dery_cli.stages.finetune.rebuild import refit_start
from dery_cli.stages.finetune.splits import Splits, choose_split, make_splits
from dery_cli.stages.finetune.start import (
    Start,
    load_donor_weights,
    start_from_assembly,
    start_from_donor,
)
from dery_cli.stages.finetune.store import RUN
from dery_cli.stages.finetune.teacher import (
    LoadedTeacher,
    TeacherChoice,
    choose_teacher,
    load_teacher,
)
from dery_cli.training.checkpoint import GO_ON
from dery_cli.training.evaluate import EvalResult, evaluate
from dery_cli.training.loop import finetune
from dery_cli.training.optim import make_optimizer, parameter_groups
from dery_cli.training.plan import make_plan
from dery_cli.training.progress import CALMER, FinetuneResult, Progress, untrained
from dery_cli.training.rate_finder import FoundRate, with_rate
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.request import FinetuneRequest
from dery_cli.training.runlog import clear_run, run_lock, settle_run
from dery_cli.training.tensorboard import Curves
from dery_cli.zoo.networks import MODEL_FILE
from dery_cli.zoo.transforms import DEFAULT_CROP

LOG_FILE = "run.log.json"


def fine_tune(
    terminal: Terminal,
    space: Workspace,
    request: FinetuneRequest,
    config: FinetuneConfig,
    device: str | None,
) -> Artifact:
    """Train, or find the run up to date; under a launcher all processes call this.

    Raises:
        Dismissed: In every process but the main one, when all is over.
        DeryError: Something is wrong with the request, the data, the folder or the training.
    """
    with open_processes(device, torch.get_num_threads(), terminal.warn) as processes:
        path = space.run(request.run_name) / "run.json"
        with processes.united():
            plan = _prepare(terminal, space, request, config, processes)
            if processes.main:
                settle_run(path.parent)
            found = None if request.resume else unchanged(path, plan.record)
            trained = None
            if found is None:
                trained = _train(terminal, space, request, config, processes, plan, path.parent)
        if not processes.main:
            processes.await_order()
        if trained is not None:
            return _write(path, plan, config, processes, trained)
        assert found is not None
        if request.tensorboard:
            Curves(path.parent).close()
        terminal.say(f"the run '{request.run_name}' is up to date")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be trained, on what, by whom.

    Args:
        start: The network.
        data: The target.
        splits: Its images in three parts.
        refit: The start is fitted anew first, without the images to choose on.
        steps: Updates in all.
        classes: Class names in label order.
        teacher: To learn from, or None.
        record: What the run's record will be, its data left out.
    """

    start: Start
    data: DataSet
    splits: Splits
    refit: bool
    steps: int
    classes: tuple[str, ...]
    teacher: TeacherChoice | None
    record: Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trained:
    """What training came to.

    Args:
        before: Score on the test images before, if there are any.
        result: Of the loop; the network holds the best weights.
        teacher: That it learned from, or None.
        rate: That was found for it, or None where none was searched for.
    """

    before: EvalResult | None
    result: FinetuneResult
    teacher: LoadedTeacher | None
    rate: FoundRate | None


def _prepare(
    terminal: Terminal,
    space: Workspace,
    request: FinetuneRequest,
    config: FinetuneConfig,
    processes: Processes,
) -> _Plan:
    start, data = _open(terminal, space, request, config)
    chosen = choose_split(
        start,
        data,
        fraction=request.valid_fraction,
        seed=config.seed,
        seen=not request.scratch,
    )
    splits = make_splits(data, start, config, chosen.split)
    # what the loop would refuse is refused now: comparing teachers takes its time
    steps = make_plan(config, len(splits.kept), processes=processes.count).steps
    make_optimizer(parameter_groups(start.assembly.network, config), config)
    classes = start.assembly.classes
    assert classes is not None
    teacher = None
    if request.teacher is not None:
        teacher = choose_teacher(space, request.teacher, classes, splits)
    return _Plan(
        start=start,
        data=data,
        splits=splits,
        refit=chosen.refit,
        steps=steps,
        classes=classes,
        teacher=teacher,
        record=run_artifact(start, splits, config, teacher, refit=chosen.refit),
    )


def _open(
    terminal: Terminal,
    space: Workspace,
    request: FinetuneRequest,
    config: FinetuneConfig,
) -> tuple[Start, DataSet]:
    """The network to start from, and the target."""
    skip_bad = request.skip_bad
    if request.donor is None:
        start = start_from_assembly(
            space, request.assembly, scratch=request.scratch, seed=config.seed
        )
        target = start.assembly.record.data
        skip_bad = skip_bad or (request.data is None and target["target_skip_bad"])
        data = open_checked(terminal, request.data or target["target"], skip_bad=skip_bad)
        if not request.scratch and held_out_anew(start.assembly.record, data):
            terminal.warn(
                f"the images of {data.spec} changed since the network was assembled: {SEEN}; "
                "dery assemble makes it anew"
            )
        return start, data
    assert request.data is not None
    data = open_checked(terminal, request.data, skip_bad=skip_bad)
    return start_from_donor(space, request.donor, data, DEFAULT_CROP), data


def _start(
    terminal: Terminal,
    space: Workspace,
    request: FinetuneRequest,
    config: FinetuneConfig,
    processes: Processes,
    plan: _Plan,
) -> LoadedTeacher | None:
    """Put the weights that the run begins with into the network; and find its teacher."""
    kept, device, workers = plan.splits.kept, processes.device, config.workers
    if request.donor is not None:
        load_donor_weights(
            terminal,
            space,
            request.donor,
            plan.data,
            plan.start,
            kept,
            device=device,
            workers=workers,
        )
    if plan.refit:
        refit_start(terminal, space, plan.start, plan.data, kept, device=device, workers=workers)
    if plan.teacher is None:
        return None
    return load_teacher(
        terminal,
        processes,
        space,
        plan.teacher,
        plan.start,
        plan.data,
        plan.splits,
        seed=config.seed,
        workers=workers,
    )


def _train(
    terminal: Terminal,
    space: Workspace,
    request: FinetuneRequest,
    config: FinetuneConfig,
    processes: Processes,
    plan: _Plan,
    run_dir: Path,
) -> _Trained:
    teacher = _start(terminal, space, request, config, processes, plan)
    settings: dict[str, Any] = {
        "teacher": None if teacher is None else teacher.module,
        "teacher_identity": "" if teacher is None else teacher.identity,
    }
    rate = rate_of_run(
        terminal,
        space,
        plan.start,
        plan.data,
        plan.splits,
        config,
        processes,
        scratch=request.scratch,
        steps=plan.steps,
        record=plan.record,
        run_dir=run_dir,
        resume=request.resume,
        settings=settings,
    )
    before = _score(plan, config, processes.device) if processes.main else None
    processes.share(None)  # the others wait for the score, however long it takes
    if rate is not None and not rate.admitted and plan.splits.valid is None:
        if processes.main:
            clear_run(run_dir)
        return _Trained(before=before, result=untrained(run_dir), teacher=teacher, rate=rate)
    if rate is not None:
        config = with_rate(config, rate)
    curves = Curves(run_dir) if request.tensorboard and processes.main else None
    table = _table(terminal, plan.steps, validated=plan.splits.valid is not None)
    with terminal.progress("fine-tuning", plan.steps) as bar:
        result = finetune(
            plan.start.assembly.network,
            plan.splits.train,
            plan.splits.valid,
            config,
            run_dir,
            classes=plan.classes,
            device=processes.device,
            resume=request.resume or None,
            **settings,
            origin={
                "start": f"{plan.start.name} {plan.start.parent[:16]}",
                "data": plan.splits.digest[:16],
            },
            progress=_shown(bar, table, curves),
            warn=terminal.warn,
        )
        bar.update(result.steps)
    if curves is not None:
        curves.close()
    return _Trained(before=before, result=result, teacher=teacher, rate=rate)


def _shown(
    bar: ProgressBar, table: GrowingTable, curves: Curves | None
) -> Callable[[Progress], None]:
    """What shows how far a run is: the bar, a row for each report, the curves."""

    def advance(now: Progress) -> None:
        note = "" if now.loss is None else f"loss {now.loss:.3f}"
        bar.update(now.step, note, now.eta)
        if now.report is not None:
            table.row(_cells(now, now.report))
            if curves is not None:
                curves.update()

    return advance


def _score(plan: _Plan, config: FinetuneConfig, device: torch.device) -> EvalResult | None:
    """The network on the test images, if there are any."""
    if plan.splits.test is None:
        return None
    return evaluate(
        plan.start.assembly.network,
        plan.splits.test,
        classes=plan.classes,
        device=device,
        workers=config.workers,
    )


def _write(
    path: Path, plan: _Plan, config: FinetuneConfig, processes: Processes, trained: _Trained
) -> Artifact:
    """Score the best weights on the test images, and write the run's artifact.

    Raises:
        DeryError: The network's loss is not finite, or the files cannot be written.
    """
    before, result, teacher = trained.before, trained.result, trained.teacher
    after, source = _score(plan, config, processes.device), plan.start.assembly.record.data
    test_loss = None if after is None else after.loss
    losses = {"validation": result.best.get("valid_loss"), "test": test_loss}
    for what, loss in losses.items():
        if loss is not None and not math.isfinite(loss):  # though the weights are finite
            raise DeryError(
                f"after {result.steps} updates the loss on the {what} images is {loss}", CALMER
            )
    data: dict[str, Any] = {
        "network": source["network"],
        "start": plan.start.name,
        "target": plan.splits.target,
        "target_skip_bad": plan.splits.target_skip_bad,
        "split": plan.splits.split.to_json(),
        "fitted_on": "fit" if plan.splits.split.fraction else "all",
        "params": source["params"],
        "flops": source["flops"],
        "best": {
            "step": result.best_step,
            "steps": result.steps,
            "epochs": result.epochs,
            "batch_size": result.batch_size,
            **result.best,
        },
        "test_top1_before": None if before is None else before.top1,
        "test_top1": None if after is None else after.top1,
        "test_loss": test_loss,
        "test_images": None if after is None else after.images,
    }
    if trained.rate is not None:
        data["rate"] = trained.rate.to_json()
        data["kept_start"] = result.best_step == 0
    if teacher is not None:
        data["teacher"] = {
            "name": teacher.name,
            "sha256": teacher.sha256,
            "probe_accuracy": teacher.accuracy,
        }
    with run_lock(path.parent):
        try:
            with transaction(path) as work:
                work.write_tensors(MODEL_FILE, plan.start.assembly.network.state_dict())
                done = work.commit(dataclasses.replace(plan.record, data=data))
        except DeryError as error:  # it says to rerun; with --resume that cannot begin anew
            raise DeryError(error.message, GO_ON) from error
    write_log(
        path.with_name(LOG_FILE),
        {
            "seconds": result.seconds,
            "updates_per_second": result.updates_per_second,
            "processes": processes.count,
        },
    )
    return done


def run_artifact(
    start: Start,
    splits: Splits,
    config: FinetuneConfig,
    teacher: TeacherChoice | None,
    *,
    refit: bool = False,
) -> Artifact:
    """The record of a run; ``workers`` changes no number and is left out."""
    options = {key: value for key, value in config.to_json().items() if key != "workers"}
    options |= {
        "valid_fraction": splits.split.fraction,
        "start": start.name,
        "refitted": refit,
    }
    parents = {"network": start.parent, "data": splits.digest}
    if teacher is not None:
        options["teacher"] = teacher.name
        parents["teacher"] = teacher.sha256
    return Artifact(kind=RUN, parents=parents, options=options, seed=config.seed)


def _table(terminal: Terminal, steps: int, *, validated: bool) -> GrowingTable:
    scores = {"valid loss": 7, "valid top-1": 6} if validated else {}
    update = len(f"{steps}/{steps}")
    first = {"epoch": 7, "update": update, "lr": 8, "train loss": 7}
    return terminal.growing_table({**first, **scores, "images/s": 8, "time left": 8})


def _cells(now: Progress, report: Mapping[str, Any]) -> list[str]:
    scores = [f"{report[key]:.4f}" for key in ("valid_loss", "valid_top1") if key in report]
    return [
        f"{now.epoch:.2f}",
        f"{now.step}/{now.steps}",
        f"{now.lr:.2e}",
        f"{report['train_loss']:.4f}",
        *scores,
        f"{now.images_per_second:.0f}",
        "-" if now.eta is None else show_duration(now.eta),
    ]
