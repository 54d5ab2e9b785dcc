"""``dery finetune``: train an assembly (or a control) on the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dery_cli.commands import _finetune_options as opt
from dery_cli.commands._options import Result, command, open_workspace
from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.runtime.launcher import precision
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals
from dery_cli.training.recipe import make_config
from dery_cli.training.request import FinetuneRequest, check_distillation, check_search


@command
def finetune(
    terminal: Terminal,
    assembly: opt.AssemblyOption = "default",
    donor: opt.DonorOption = None,
    scratch: opt.ScratchOption = False,
    recipe: opt.RecipeOption = "default",
    mode: opt.ModeOption = None,
    data: opt.DataOption = None,
    skip_bad: opt.SkipBadOption = False,
    valid_fraction: opt.ValidFractionOption = None,
    crop_padding: opt.CropPaddingOption = None,
    crop_scale: opt.CropScaleOption = None,
    hflip: opt.HflipOption = None,
    randaugment: opt.RandAugmentOption = None,
    mixup: opt.MixupOption = None,
    cutmix: opt.CutmixOption = None,
    epochs: opt.EpochsOption = None,
    steps: opt.StepsOption = None,
    stitch_fraction: opt.StitchFractionOption = None,
    batch_size: opt.BatchSizeOption = None,
    grad_accum: opt.GradAccumOption = None,
    warmup: opt.WarmupOption = None,
    report_every: opt.ReportEveryOption = None,
    optimizer: opt.OptimizerOption = None,
    lr: opt.LrOption = None,
    effort: opt.EffortOption = None,
    min_lr: opt.MinLrOption = None,
    block_lr_scale: opt.BlockLrScaleOption = None,
    layer_decay: opt.LayerDecayOption = None,
    weight_decay: opt.WeightDecayOption = None,
    clip_grad: opt.ClipGradOption = None,
    label_smoothing: opt.LabelSmoothingOption = None,
    ema_decay: opt.EmaDecayOption = None,
    batch_norm: opt.BatchNormOption = None,
    teacher: opt.TeacherOption = None,
    distill_logits: opt.DistillLogitsOption = None,
    distill_temperature: opt.DistillTemperatureOption = None,
    distill_features: opt.DistillFeaturesOption = None,
    name: opt.NameOption = None,
    resume: opt.ResumeOption = False,
    tensorboard: opt.TensorboardOption = False,
    mixed_precision: opt.MixedPrecisionOption = None,
    workspace: opt.WorkspaceOption = None,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = None,
    workers: opt.WorkersOption = 0,
) -> Result:
    """Fine-tune on the target's training images, and report on its test images.

    What is not said is as the recipe has it. The rate is found by short trials
    on images held out; where none of them gains the start is kept. The best
    weights are chosen on a split of the training images, or, where these are
    few, the last ones are kept. Checkpoints are written as it goes: the same
    command line goes on where it was interrupted, to the numbers of an
    uninterrupted run; other options begin anew, and are refused under --resume.

    'torchrun --nproc-per-node N -m dery_cli finetune ...', or on several GPUs
    'accelerate launch -m dery_cli finetune ...', shares every batch out among
    N processes.

    For example: dery finetune --epochs 20 --teacher best
    """
    check_search(lr, effort)
    config = make_config(
        recipe,
        effort=0.0 if lr is not None else effort,
        mode=mode,
        epochs=epochs,
        steps=steps,
        stitch_fraction=stitch_fraction,
        batch_size=batch_size,
        grad_accum=grad_accum,
        optimizer=optimizer,
        lr=lr,
        block_lr_scale=block_lr_scale,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        warmup=warmup,
        min_lr=min_lr,
        clip_grad=clip_grad,
        batch_norm=batch_norm,
        label_smoothing=label_smoothing,
        ema_decay=ema_decay,
        mixup=mixup,
        cutmix=cutmix,
        randaugment=randaugment,
        crop_scale=crop_scale,
        crop_padding=crop_padding,
        hflip=hflip,
        distill_logits=distill_logits,
        distill_temperature=distill_temperature,
        distill_features=distill_features,
        mixed_precision=mixed_precision or precision(),
        seed=seed,
        workers=workers,
        report_every=report_every,
    )
    distilling = (distill_logits, distill_temperature, distill_features) != (None, None, None)
    check_distillation(teacher, config.distill_logits, config.distill_features, distilling)
    request = FinetuneRequest(
        assembly=assembly,
        donor=donor,
        scratch=scratch,
        data=data,
        skip_bad=skip_bad,
        valid_fraction=valid_fraction,
        teacher=teacher,
        name=name,
        resume=resume,
        tensorboard=tensorboard,
    )
    space = open_workspace(workspace)
    from dery_cli.stages.finetune.run import fine_tune

    record = fine_tune(terminal, space, request, config, device)
    return _show(terminal, space.run(request.run_name), dict(record.data))


def _show(terminal: Terminal, folder: Path, data: dict[str, Any]) -> Result:
    terminal.table(
        None,
        ["run", "start", *COST_COLUMNS, "updates", "test top-1 before", "after"],
        [
            [
                folder.name,
                data["start"],
                *cost_cells(data["params"], data["flops"]),
                data["best"]["steps"],
                show_decimals(data["test_top1_before"]),
                show_decimals(data["test_top1"]),
            ]
        ],
    )
    terminal.say(f"weights and metrics are in {folder}")
    return {"run": folder.name, "folder": str(folder), **data}
