"""The options of ``dery finetune``, in the panels of its help."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dery_cli.commands import _completion
from dery_cli.commands import _options as shared
from dery_cli.training.recipe import BATCH_NORM, MODES, PRECISIONS, RECIPES
from dery_cli.types import MIN_IMAGES_TO_CHOOSE_ON

START = "Start"
DATA = "Data"
SCHEDULE = "Schedule"
RATES = "Rates"
REGULARISATION = "Regularisation"
DISTILLATION = "Distillation"
RUN = "Run"


def _option(
    panel: str,
    *names: str,
    help: str,  # noqa: A002
    metavar: str | None = None,
    autocompletion: Callable[..., list[str]] | None = None,
) -> Any:
    return typer.Option(
        *names, help=help, metavar=metavar, rich_help_panel=panel, autocompletion=autocompletion
    )


def _shared(option: Any, panel: str) -> Any:
    """An option that other commands have too, in a panel of this one."""
    info = copy.copy(get_args(option)[1])
    info.rich_help_panel = panel
    return info


AssemblyOption = Annotated[
    str,
    _option(
        START,
        "--assembly",
        "-a",
        help="Name of the assembly to start from.",
        autocompletion=_completion.assemblies,
    ),
]
DonorOption = Annotated[
    str | None,
    _option(
        START,
        "--donor",
        help="Start from this whole donor instead: the control.",
        autocompletion=_completion.donors,
    ),
]
ScratchOption = Annotated[
    bool, _option(START, "--scratch", help="The assembly's architecture with random weights.")
]
RecipeOption = Annotated[
    str, _option(START, "--recipe", help=f"Settings to begin with: {', '.join(sorted(RECIPES))}.")
]
ModeOption = Annotated[
    str | None,
    _option(
        START,
        "--mode",
        help=f"{', '.join(MODES)}; frozen trains stitches and head only.",
    ),
]

DataOption = Annotated[str | None, _shared(shared.DataOption, DATA)]
SkipBadOption = Annotated[bool, _shared(shared.SkipBadOption, DATA)]
ValidFractionOption = Annotated[
    float | None,
    _option(
        DATA,
        "--valid-fraction",
        help="Share of the training images the best weights are chosen on; 0 keeps the last. "
        "By default what assemble kept apart: 0.2 of each class, nothing below "
        f"{MIN_IMAGES_TO_CHOOSE_ON} images. For another share the assembly is fitted anew.",
    ),
]
CropScaleOption = Annotated[
    tuple[float, float] | None,
    _option(
        DATA,
        "--crop-scale",
        metavar="MIN MAX",
        help="Area shares of a random resized crop, in place of --crop-padding.",
    ),
]
CropPaddingOption = Annotated[
    float | None,
    _option(DATA, "--crop-padding", help="Random shift, up to this share of the image's side."),
]
HflipOption = Annotated[
    float | None,
    _option(DATA, "--hflip", help="Probability of a mirror image; not for digits or letters."),
]
RandAugmentOption = Annotated[
    int | None,
    _option(DATA, "--randaugment", help="RandAugment, 1 to 10; 0 for none."),
]
MixupOption = Annotated[float | None, _option(DATA, "--mixup", help="Alpha of Mixup, 0 for none.")]
CutmixOption = Annotated[
    float | None, _option(DATA, "--cutmix", help="Alpha of CutMix, 0 for none.")
]

EpochsOption = Annotated[
    int | None, _option(SCHEDULE, "--epochs", help="Passes over the training images.")
]
StepsOption = Annotated[
    int | None, _option(SCHEDULE, "--steps", help="Optimizer updates, instead of --epochs.")
]
StitchFractionOption = Annotated[
    float | None,
    _option(
        SCHEDULE,
        "--stitch-fraction",
        help="Share of the updates with frozen blocks under stitch-then-full.",
    ),
]
BatchSizeOption = Annotated[
    int | None,
    _option(SCHEDULE, "--batch-size", "-b", help="Images of one update, over all processes."),
]
GradAccumOption = Annotated[
    int | None,
    _option(SCHEDULE, "--grad-accum", help="Micro-batches that an update is made of."),
]
WarmupOption = Annotated[
    float | None,
    _option(SCHEDULE, "--warmup", help="Share of the updates with a rising rate."),
]
ReportEveryOption = Annotated[
    int | None,
    _option(
        SCHEDULE,
        "--report-every",
        help="Updates between scores and checkpoints; by default every epoch, if it is not short.",
    ),
]

OptimizerOption = Annotated[
    str | None,
    _option(RATES, "--optimizer", help="Any that timm knows: adamw, sgd, lamb, lion ..."),
]
LrOption = Annotated[
    float | None,
    _option(RATES, "--lr", help="Peak learning rate of stitches and head; none is searched for."),
]
EffortOption = Annotated[
    float | None,
    _option(
        RATES,
        "--effort",
        help="Updates that trials of rates may take, over the run's own: 0.3 by default; 2.5, "
        "of which mostly a few are used, on folds for lack of validation images; 0 for none.",
    ),
]
MinLrOption = Annotated[
    float | None, _option(RATES, "--min-lr", help="Learning rate that the cosine ends at.")
]
BlockLrScaleOption = Annotated[
    float | None, _option(RATES, "--block-lr-scale", help="Blocks' learning rate over --lr.")
]
LayerDecayOption = Annotated[
    float | None,
    _option(
        RATES,
        "--layer-decay",
        help="Further factor a residual block or the like, from the head back; 1 is none.",
    ),
]

WeightDecayOption = Annotated[
    float | None,
    _option(REGULARISATION, "--weight-decay", help="Of weights; norms and biases get none."),
]
ClipGradOption = Annotated[
    float | None,
    _option(REGULARISATION, "--clip-grad", help="Norm the gradient is clipped to, 0 for none."),
]
LabelSmoothingOption = Annotated[
    float | None,
    _option(REGULARISATION, "--label-smoothing", help="Probability spread over all classes."),
]
EmaDecayOption = Annotated[
    float | None,
    _option(
        REGULARISATION, "--ema-decay", help="Of the averaged weights, after warm-up; 0 for none."
    ),
]
BatchNormOption = Annotated[
    str | None,
    _option(
        REGULARISATION,
        "--batch-norm",
        help=f"{', '.join(BATCH_NORM)}: blocks keep the statistics they were pretrained with.",
    ),
]

TeacherOption = Annotated[
    str | None,
    _option(
        DISTILLATION,
        "--teacher",
        metavar="NAME",
        help="Learn from this donor, from the best one (best), from runs/NAME or assemblies/NAME.",
    ),
]
DistillLogitsOption = Annotated[
    float | None,
    _option(
        DISTILLATION,
        "--distill-logits",
        help="Weight 0 to 1 of the teacher's logits against the labels.",
    ),
]
DistillTemperatureOption = Annotated[
    float | None,
    _option(
        DISTILLATION, "--distill-temperature", help="Temperature that both logits are divided by."
    ),
]
DistillFeaturesOption = Annotated[
    float | None,
    _option(
        DISTILLATION,
        "--distill-features",
        help="Weight of the teacher's features at its last node, met through a linear map.",
    ),
]

NameOption = Annotated[
    str | None,
    _option(
        RUN,
        "--name",
        help="Name of the run; the assembly's by default.",
        autocompletion=_completion.runs,
    ),
]
ResumeOption = Annotated[
    bool, _option(RUN, "--resume", help="Go on from the run's last checkpoint, or fail.")
]
TensorboardOption = Annotated[
    bool,
    _option(
        RUN, "--tensorboard", help="Write the curves for TensorBoard too, beside metrics.jsonl."
    ),
]
MixedPrecisionOption = Annotated[
    str | None,
    _option(
        RUN, "--mixed-precision", help=f"{', '.join(PRECISIONS)}; a launcher's choice by default."
    ),
]
WorkspaceOption = Annotated[Path | None, _shared(shared.WorkspaceOption, RUN)]
SeedOption = Annotated[int, _shared(shared.SeedOption, RUN)]
DeviceOption = Annotated[str | None, _shared(shared.DeviceOption, RUN)]
WorkersOption = Annotated[int, _shared(shared.WorkersOption, RUN)]
