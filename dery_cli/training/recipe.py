"""How a network is fine-tuned, as plain data: the configuration and the named recipes.

Nothing here imports torch, so that a command can check its options before the heavy imports.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from dery_cli.errors import UsageError
from dery_cli.sizes import (
    LARGEST,
    check_above,
    check_at_least,
    check_between,
    check_one_of,
    check_seed,
)

MODES = ("frozen", "full", "stitch-then-full")
PRECISIONS = ("no", "fp16", "bf16")
BATCH_NORM = ("train", "fixed")
MOST_EPOCHS = 100_000
MOST_STEPS = 10_000_000
"""Beyond these even the list of a run's reports would take long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything the training loop may be told.

    Args:
        mode: ``frozen`` trains stitches and head (the paper's FROZEN-TUNING; blocks stay in eval
            mode), ``full`` everything, ``stitch-then-full`` one after the other.
        epochs: Passes over the training images; this or ``steps``.
        steps: Optimizer updates; this or ``epochs``.
        stitch_fraction: Share of the updates spent frozen under ``stitch-then-full``.
        batch_size: Images of one update, over all processes and accumulated micro-batches.
        grad_accum: Micro-batches an update is made of.
        optimizer: A name timm's optimizer factory knows.
        lr: Peak learning rate of stitches and head; where rates are tried, the highest.
        block_lr_scale: Learning rate of the blocks as a factor of ``lr``.
        layer_decay: Further factor per donor's unit of the blocks, counted back from the head; 1 is
            none.
        weight_decay: Of weights of two and more dimensions; norms, biases and embeddings get none.
        warmup: Share of the updates during which the learning rate rises linearly.
        min_lr: Learning rate the cosine ends at.
        clip_grad: Norm the gradient is clipped to; 0 or None for no clipping.
        batch_norm: ``train`` normalises by the batch and updates the running statistics, ``fixed``
            keeps the statistics pretrained blocks came with.
        label_smoothing: Probability spread over all classes.
        ema_decay: Largest decay of the averaged weights, reached by a warm-up; 0 or None for no
            average.
        mixup: Alpha of Mixup's beta distribution, 0 for none.
        cutmix: Alpha of CutMix, 0 for none.
        randaugment: Magnitude 1 to 10 of RandAugment, 0 for none.
        crop_scale: Smallest and largest area share of a random resized crop, None for none.
        crop_ratio: Smallest and largest aspect ratio of that crop.
        crop_padding: Random shift by up to this share of the image's side, instead of that crop.
        hflip: Probability of a mirror image; mirrored digits or letters are other classes.
        distill_logits: Weight 0 to 1 of the teacher's logits against the labels.
        distill_temperature: Temperature both logits are divided by.
        distill_features: Weight of the teacher's pre-logits, matched through a linear map.
        mixed_precision: ``no``, ``fp16`` or ``bf16``; None takes what ``accelerate launch`` says.
        seed: Of the data order, the augmentation, Mixup and dropout.
        workers: Processes that load images; the numbers do not depend on it.
        effort: Updates that trials of rates may take, over the run's own; 0 for no trials, None
            for what suits the images (see ``rate_finder``). The loop takes ``lr`` as it is.
        report_every: Updates between two scores, metrics lines and checkpoints; None reports at
            the end of an epoch, and not before ``MIN_UPDATES_BETWEEN_REPORTS``.

    Raises:
        UsageError: A value is out of its range, or ``epochs`` and ``steps`` contradict.
    """

    mode: str = "full"
    epochs: int | None = None
    steps: int | None = None
    stitch_fraction: float = 0.3
    batch_size: int = 64
    grad_accum: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    block_lr_scale: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.1
    min_lr: float = 1e-6
    clip_grad: float | None = None
    batch_norm: str = "train"
    label_smoothing: float = 0.1
    ema_decay: float | None = 0.9998
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: int = 0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: float = 0.0
    hflip: float = 0.0
    distill_logits: float = 0.5
    distill_temperature: float = 2.0
    distill_features: float = 0.0
    mixed_precision: str | None = None
    seed: int = 0
    workers: int = 0
    effort: float | None = 0.0
    report_every: int | None = None

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("batch_norm", self.batch_norm, BATCH_NORM)
        if self.mixed_precision is not None:
            check_one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(
                f"give either epochs or steps, not {'neither' if self.epochs is None else 'both'}",
                "for example --epochs 100, or --steps 150",
            )
        self._check_counts()
        self._check_rates()
        self._check_shares()
        self._check_crop()

    def _check_counts(self) -> None:
        for name, most in (("epochs", MOST_EPOCHS), ("steps", MOST_STEPS)):
            if getattr(self, name) is not None:
                check_between(name, getattr(self, name), 1, most)
        for name in ("batch_size", "grad_accum"):
            check_at_least(name, getattr(self, name))
        if self.report_every is not None:
            check_at_least("report_every", self.report_every)
        check_at_least("workers", self.workers, 0)
        check_between("randaugment", self.randaugment, 0, 10)
        check_seed(self.seed, "seed")

    def _check_rates(self) -> None:
        for name in ("lr", "distill_temperature"):
            check_above(name, getattr(self, name))
        for name in ("block_lr_scale", "weight_decay", "min_lr", "mixup", "cutmix"):
            check_at_least(name, getattr(self, name), 0)
        check_at_least("distill_features", self.distill_features, 0)
        if self.effort is not None:
            check_at_least("effort", self.effort, 0)
        if self.clip_grad is not None:
            check_at_least("clip_grad", self.clip_grad, 0)
        if self.min_lr > self.lr:
            raise UsageError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")

    def _check_shares(self) -> None:
        for name in ("hflip", "distill_logits", "layer_decay"):
            check_between(name, getattr(self, name), 0, 1)
        check_above("layer_decay", self.layer_decay)
        for name in ("warmup", "stitch_fraction", "label_smoothing", "crop_padding"):
            check_between(name, getattr(self, name), 0, 1, below=True)
        if self.ema_decay is not None:
            check_between("ema_decay", self.ema_decay, 0, 1, below=True)

    def _check_crop(self) -> None:
        _check_rising("crop_ratio", self.crop_ratio, LARGEST)
        if self.crop_scale is None:
            return
        _check_rising("crop_scale", self.crop_scale, 1)
        if self.crop_padding:
            raise UsageError(
                "crop_scale and crop_padding exclude each other",
                "a random resized crop already shifts the image: leave crop_padding at 0",
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, which needs an even batch."""
        return self.mixup > 0 or self.cutmix > 0

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in data.items()}


NUMBERS_DO_NOT_DEPEND_ON = ("workers",)
"""Fields a resumed run may change."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Chosen on letters rendered from fonts (tests/bench/letters.py). bench_recipe.py, three
    # assemblies of demo donors (0.2-2 M params), 520 images, 150 updates: mean top-1 0.576, 0.697,
    # 0.726 at rates of 1e-3, 3e-3, 6e-3; with blocks at 0.3 of the rate 0.415, 0.566, 0.628. An
    # assembly of ImageNet donors (3.7 M params, README), 100 updates: 0.857 at 1e-3, 0.899 at 3e-3.
    "default": {
        "mode": "full",
        "epochs": 30,
        "batch_size": 64,
        "lr": 3e-3,
        "effort": None,
        "block_lr_scale": 1.0,
        "warmup": 0.1,
        "clip_grad": 1.0,
        "ema_decay": 0.9998,
        "crop_padding": 0.06,
    },
    # The paper's: AdamW 1e-3, cosine, RandAugment, Mixup, CutMix, label smoothing, EMA.
    "paper": {
        "mode": "full",
        "epochs": 100,
        "batch_size": 1024,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup": 0.05,
        "min_lr": 1e-5,
        "label_smoothing": 0.1,
        "ema_decay": 0.9998,
        "mixup": 0.8,
        "cutmix": 1.0,
        "randaugment": 9,
        "crop_scale": (0.08, 1.0),
        "hflip": 0.5,
    },
}


def make_config(recipe: str = "default", **changes: Any) -> FinetuneConfig:
    """The named recipe with some of its fields changed; None leaves a field as the recipe has it.

    Changing ``steps`` drops the recipe's ``epochs`` and the other way round; so do ``crop_scale``
    and ``crop_padding``.

    Raises:
        UsageError: No such recipe or field, or a value out of range.
    """
    if recipe not in RECIPES:
        close = difflib.get_close_matches(recipe, RECIPES, n=1)
        raise UsageError(
            f"no recipe is called {recipe!r}",
            f"did you mean {close[0]}?" if close else f"recipes: {', '.join(sorted(RECIPES))}",
        )
    changes = {name: value for name, value in changes.items() if value is not None}
    _known_fields(changes)
    fields = dict(RECIPES[recipe])
    for one, other in (("steps", "epochs"), ("crop_scale", "crop_padding")):
        if one in changes and other not in changes:
            fields.pop(other, None)
        if other in changes and one not in changes:
            fields.pop(one, None)
    return FinetuneConfig(**{**fields, **changes})


def _known_fields(data: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(FinetuneConfig)]
    for name in data:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"fine-tuning has no setting {name!r}",
                f"did you mean {close[0]}?" if close else f"settings: {', '.join(known)}",
            )


def _check_rising(name: str, value: tuple[float, float], high: float) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
        raise UsageError(
            f"{name} is {' '.join(map(str, value))}; "
            f"it must be two rising numbers above 0 and at most {high}"
        )
