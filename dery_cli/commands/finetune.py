"""``dery finetune``: train an assembly (or a control) on the target."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dery_cli.artifacts import Artifact, Workspace, transaction, unchanged, write_log
from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SeedOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.config import check_name, show_count
from dery_cli.data import DEFAULT_CROP, open_data
from dery_cli.errors import UsageError
from dery_cli.terminal import Terminal
from dery_cli.training.recipe import MODES, RECIPES, FinetuneConfig, make_config

if TYPE_CHECKING:
    from dery_cli.finetuning import Splits, Start
    from dery_cli.training.progress import FinetuneResult, Progress

MIN_IMAGES_TO_CHOOSE_ON = 1000


@command
def finetune(
    terminal: Terminal,
    assembly: Annotated[
        str, typer.Option("--assembly", "-a", help="Name of the assembly to start from.")
    ] = "default",
    donor: Annotated[
        str | None,
        typer.Option("--donor", help="Start from this whole donor instead: the control."),
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="The assembly's architecture with random weights.")
    ] = False,
    data: DataOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run; the assembly's by default.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help=f"Settings to begin with: {', '.join(sorted(RECIPES))}.")
    ] = "default",
    mode: Annotated[
        str | None,
        typer.Option("--mode", help=f"{', '.join(MODES)}; frozen trains stitches and head only."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the training images.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer updates, instead of --epochs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images of one update.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate of stitches and head.")
    ] = None,
    block_lr_scale: Annotated[
        float | None, typer.Option("--block-lr-scale", help="Blocks' learning rate over --lr.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Of weights; norms and biases get none.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Share of the updates with a rising rate.")
    ] = None,
    batch_norm: Annotated[
        str | None,
        typer.Option(
            "--batch-norm",
            help="train, or fixed: blocks keep the statistics they were pretrained with.",
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="Probability spread over all classes.")
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option("--ema-decay", help="Of the averaged weights, after warm-up.")
    ] = None,
    mixup: Annotated[float | None, typer.Option("--mixup", help="Alpha of Mixup.")] = None,
    cutmix: Annotated[float | None, typer.Option("--cutmix", help="Alpha of CutMix.")] = None,
    randaugment: Annotated[
        int | None, typer.Option("--randaugment", help="Magnitude of RandAugment, 0 to 10.")
    ] = None,
    valid_fraction: Annotated[
        float | None,
        typer.Option(
            "--valid-fraction",
            help="Share of the training images the best weights are chosen on; 0 keeps the last. "
            f"By default 0.2, and 0 below {MIN_IMAGES_TO_CHOOSE_ON} images.",
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option("--mixed-precision", help="no, fp16 or bf16.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Fine-tune on the target's training images, and report on its test images.

    The best weights are chosen on a split of the training images, or, where these are few, the last
    ones are kept. Checkpoints are written as it
    goes; --resume continues to the numbers of an uninterrupted run.
    """
    config = make_config(
        recipe,
        mode=mode,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        block_lr_scale=block_lr_scale,
        weight_decay=weight_decay,
        warmup=warmup,
        batch_norm=batch_norm,
        label_smoothing=label_smoothing,
        ema_decay=ema_decay,
        mixup=mixup,
        cutmix=cutmix,
        randaugment=randaugment,
        mixed_precision=mixed_precision,
        seed=seed,
        workers=workers,
    )
    if valid_fraction is not None and not 0 <= valid_fraction < 1:
        raise UsageError(f"--valid-fraction is {valid_fraction}; it must be in [0, 1)")
    if donor is not None and scratch:
        raise UsageError("--donor and --scratch exclude each other")
    run_name = check_name(name or donor or assembly, "run")
    space = open_workspace(workspace)
    start, splits = _prepare(space, assembly, donor, scratch, data, config, valid_fraction, device)

    from dery_cli.finetuning import run_artifact

    extra = {"valid_fraction": splits.valid_fraction, "start": start.name}
    record = run_artifact(start, splits, config, extra)
    path = space.run(run_name) / "run.json"
    found = None if resume else unchanged(path, record)
    if found is not None:
        terminal.say(f"the run '{run_name}' is up to date")
    else:
        found = _train(terminal, path, start, splits, config, record, resume, device)
    return _show(terminal, path, dict(found.data), run_name)


def _prepare(
    space: Workspace,
    assembly: str,
    donor: str | None,
    scratch: bool,
    data: str | None,
    config: FinetuneConfig,
    valid_fraction: float | None,
    device: str | None,
) -> tuple[Start, Splits]:
    from dery_cli.finetuning import make_splits, start_from_assembly, start_from_donor
    from dery_cli.loading import pick_device

    if donor is None:
        start = start_from_assembly(space, assembly, scratch=scratch, seed=config.seed)
        dataset = open_data(data or start.assembly.record.data["target"])
    else:
        if data is None:
            raise UsageError(
                "--donor needs --data: which images?", f"dery finetune --donor {donor} --data SPEC"
            )
        dataset = open_data(data)
        start = start_from_donor(space, donor, dataset, DEFAULT_CROP, pick_device(device))
    if valid_fraction is None:  # the best of a few dozen images is a lottery
        valid_fraction = 0.2 if len(dataset.train) >= MIN_IMAGES_TO_CHOOSE_ON else 0.0
    return start, make_splits(dataset, start, config, valid_fraction)


def _train(
    terminal: Terminal,
    path: Any,
    start: Start,
    splits: Splits,
    config: FinetuneConfig,
    record: Artifact,
    resume: bool,
    device: str | None,
) -> Artifact:
    from accelerate import PartialState

    from dery_cli.assembly_store import MODEL_FILE, save_network
    from dery_cli.training.evaluate import evaluate
    from dery_cli.training.loop import finetune as train

    network, classes = start.assembly.network, start.assembly.classes
    assert classes is not None
    before = None
    if splits.test is not None:
        before = evaluate(network, splits.test, classes=classes, workers=config.workers)
        network.cpu()
    total = config.steps or 100
    with terminal.progress("fine-tuning", total) as bar:

        def advance(now: Progress) -> None:
            bar.total = now.steps
            note = "" if now.loss is None else f"loss {now.loss:.3f}"
            bar.update(now.step if config.steps else 100 * now.step // now.steps, note)
            if now.report is not None:
                terminal.note(_report_line(now.report))

        result = train(
            network,
            splits.train,
            splits.valid,
            config,
            path.parent,
            classes=classes,
            device=device,
            resume=resume,
            progress=advance,
        )
    after = None
    if splits.test is not None:
        where = next(network.parameters()).device
        after = evaluate(
            network, splits.test, classes=classes, device=where, workers=config.workers
        )
    source = start.assembly.record.data
    data = {
        "network": source["network"],
        "start": start.name,
        "target": source["target"],
        "params": source["params"],
        "flops": source["flops"],
        "best": _plain(result),
        "test_top1_before": None if before is None else before.top1,
        "test_top1": None if after is None else after.top1,
        "test_loss": None if after is None else after.loss,
        "test_images": None if after is None else after.images,
    }
    done = dataclasses.replace(record, data=data)
    if not PartialState().is_main_process:  # under accelerate launch one process writes
        return done
    with transaction(path) as work:
        save_network(work.path(MODEL_FILE), network)
        done = work.commit(done)
    write_log(
        path.with_name("run.log.json"),
        {"seconds": result.seconds, "updates_per_second": result.updates_per_second},
    )
    return done


def _plain(result: FinetuneResult) -> dict[str, Any]:
    return {
        "step": result.best_step,
        "steps": result.steps,
        "epochs": result.epochs,
        "batch_size": result.batch_size,
        **result.best,
    }


def _report_line(report: dict[str, Any]) -> str:
    parts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in report.items()
        if value is not None
    ]
    return "  ".join(parts)


def _show(terminal: Terminal, path: Any, data: dict[str, Any], name: str) -> Result:
    def shown(value: float | None) -> str | None:
        return None if value is None else f"{value:.4f}"

    terminal.table(
        None,
        ["run", "start", "params", "multiply-adds", "updates", "test top-1 before", "after"],
        [
            [
                name,
                data["start"],
                show_count(data["params"]),
                show_count(data["flops"]),
                data["best"]["steps"],
                shown(data["test_top1_before"]),
                shown(data["test_top1"]),
            ]
        ],
    )
    terminal.say(f"weights and metrics are in {path.parent}")
    return {"run": name, "folder": str(path.parent), **data}
