"""How many updates of how many images: the arithmetic of a run, free of torch."""

from __future__ import annotations

import dataclasses
import math

from dery_cli.errors import UsageError
from dery_cli.training.recipe import FinetuneConfig

MIN_UPDATES_BETWEEN_REPORTS = 25
"""With little data an epoch is a few updates: it is not scored and saved after each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of updates with its own warm-up and cosine.

    Args:
        start: Updates done before it.
        steps: Updates in it.
        frozen: Whether the blocks stay as they are.
    """

    start: int
    steps: int
    frozen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The run in numbers.

    The training images are one endless row of shuffled passes; an update takes the next
    ``batch_size`` of it, so no image is left out and every batch is full.

    Args:
        images: Training images n.
        batch_size: Images of one update, over all processes.
        micro_batch: Images of one micro-batch, over all processes.
        steps: Updates in all.
        phases: One, or two under ``stitch-then-full``.
        reports: Updates after which the run is scored and saved, ascending; the last is ``steps``.
        notes: What had to be changed to fit the data, in words.
    """

    images: int
    batch_size: int
    micro_batch: int
    steps: int
    phases: tuple[Phase, ...]
    reports: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def epoch(self, step: int) -> float:
        """Passes over the training images after ``step`` updates."""
        return step * self.batch_size / self.images

    def phase(self, step: int) -> Phase:
        """The phase that update number ``step`` (from 0) belongs to."""
        for phase in self.phases:
            if step < phase.start + phase.steps:
                return phase
        return self.phases[-1]


def make_plan(config: FinetuneConfig, images: int, *, processes: int = 1) -> Plan:
    """Fit ``config`` to so many images on so many processes.

    Raises:
        UsageError: The batch cannot be divided, or there are too few images for one.
    """
    unit = processes * config.grad_accum * (2 if config.mixes else 1)
    what = f"{processes} processes x {config.grad_accum} micro-batches"
    if config.mixes:
        what += " x 2 (mixup pairs images)"
    if config.batch_size % unit:
        raise UsageError(
            f"a batch of {config.batch_size} does not divide into {what}",
            f"give a multiple of {unit}: --batch-size {math.ceil(config.batch_size / unit) * unit}",
        )
    batch_size = config.batch_size
    notes: tuple[str, ...] = ()
    if images < batch_size:
        batch_size = images // unit * unit
        if batch_size == 0:
            raise UsageError(
                f"{images} training images are fewer than the smallest batch of {unit} ({what})",
                "add images, or use fewer processes and micro-batches",
            )
        notes = (
            f"{images} training images are fewer than a batch of {config.batch_size}: "
            f"it was reduced to {batch_size}",
        )
    steps = config.steps or math.ceil((config.epochs or 0) * images / batch_size)
    return Plan(
        images=images,
        batch_size=batch_size,
        micro_batch=batch_size // config.grad_accum,
        steps=steps,
        phases=_phases(config, steps),
        reports=_reports(config, steps, images, batch_size),
        notes=notes,
    )


def _phases(config: FinetuneConfig, steps: int) -> tuple[Phase, ...]:
    if config.mode != "stitch-then-full":
        return (Phase(start=0, steps=steps, frozen=config.mode == "frozen"),)
    first = round(steps * config.stitch_fraction)
    phases = (
        Phase(start=0, steps=first, frozen=True),
        Phase(start=first, steps=steps - first, frozen=False),
    )
    return tuple(phase for phase in phases if phase.steps)


def _reports(config: FinetuneConfig, steps: int, images: int, batch_size: int) -> tuple[int, ...]:
    if config.report_every is not None:
        marks = list(range(config.report_every, steps, config.report_every))
    else:
        marks, epoch = [], 1
        while (end := math.ceil(epoch * images / batch_size)) < steps:
            if end - (marks[-1] if marks else 0) >= MIN_UPDATES_BETWEEN_REPORTS:
                marks.append(end)
            epoch += 1
    return (*marks, steps)


def learning_rate(config: FinetuneConfig, phase: Phase, step: int) -> float:
    """Learning rate of stitches and head at update number ``step`` (from 0), in closed form.

    With W warm-up updates of the phase's T: lr (t+1)/(W+1) while t < W, then half a cosine over
    the remaining T - W updates from lr to min_lr. The loop uses timm's scheduler; this is what it
    is tested against, and what the progress table of a finished run can be checked by.
    """
    t, warmup = step - phase.start, warmup_updates(config, phase)
    if t < warmup:
        return config.lr * (t + 1) / (warmup + 1)
    share = (t - warmup) / (phase.steps - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * share))


def warmup_updates(config: FinetuneConfig, phase: Phase) -> int:
    """Updates W of the phase in which the learning rate rises."""
    return min(round(config.warmup * phase.steps), phase.steps - 1)
