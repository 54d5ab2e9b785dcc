"""The learning rate found by short trials, judged on images that the trials were not fitted on.

A trial is a run of few updates with a schedule of its own. It is compared with what it started
from, image by image, on a part of the images that neither has seen: the validation part, or folds
of the training images in turn, each with a start that was made without it.

The boldest rate comes first. On a validation part all rates are compared. On folds, which cost
much, the first rate with a clear gain is taken. There a short trial without one proves little, and
a trial as long as the run is made before a rate is given up, unless the loss rose: the first
updates cost a start some points before they gain any (batch norms move away from what its head was
fitted to). Of a whole donor on the demo's digits (0.90 untrained, 0.98 after 141 updates) trials of
14, 28, 47 and 70 updates gained -0.07, +0.02, +0.07 and +0.07; on letters one of 54 lost 0.02 where
244 gained 0.23.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dery_cli.core.scoring import network_outputs
from dery_cli.data.batches import ErrorItems, collate, raise_errors
from dery_cli.errors import DeryError, UsageError
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig

STEPS_DOWN = ((1.0, 1.0), (1 / 3, 1.0), (1.0, 0.1))
"""What is tried, the boldest first: factors of the rate, and of the blocks' share in it."""

FEWEST_UPDATES = 48
"""Of a trial, unless the whole run is shorter; a shorter one tells nothing."""

EFFORT = 0.3
"""Updates of all trials over the run's, where they are judged on a validation part."""

EFFORT_ON_FOLDS = 2.5
"""The same at most, where they are judged on folds; mostly the first short one is enough."""

CLEAR = 2.0
"""Standard errors by which a gain or a loss is clear."""

FOLDS = 3
"""Parts of the training images where none are held out."""

TRIAL_FOLDER = ".trial.tmp"
"""In the run's folder, which removes what ends so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What a trial starts from, is fitted on and is asked about.

    Args:
        start: Makes the network, which has not seen the images held out; called once.
        fit: Augmented training images.
        held_out: Images as the network sees them in use, with labels.
    """

    start: Callable[[], nn.Module]
    fit: Dataset[Any]
    held_out: Dataset[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateTrial:
    """What became of one rate.

    Args:
        lr: Peak rate of stitches and head.
        block_lr_scale: That of blocks over it.
        updates: Of the trials that it is judged by: the long ones, where there were any.
        images: That these were asked about.
        top1: On these; of a trial whose loss rose, nought.
        gain: That less the start's.
        error: Standard error of the gain, image by image.
        diverged: Whether a loss rose far above its start.
    """

    lr: float
    block_lr_scale: float
    updates: int
    images: int
    top1: float
    gain: float
    error: float
    diverged: bool

    @property
    def harmed(self) -> bool:
        """Whether it ended below its start by more than chance explains."""
        return self.diverged or self.gain < -self.error

    @property
    def is_clear(self) -> bool:
        """Whether more images would hardly change the sign of the gain."""
        return self.diverged or abs(self.gain) > CLEAR * self.error


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundRate:
    """The rate that a run takes.

    Args:
        lr: Peak rate of stitches and head.
        block_lr_scale: That of blocks over it.
        admitted: False where no trial allows any training: the start is to be kept.
        start_top1: Of the starts, on the images held out that were asked about.
        images: So many.
        updates: Of all trials.
        trials: The boldest first.
    """

    lr: float
    block_lr_scale: float
    admitted: bool
    start_top1: float
    images: int
    updates: int
    trials: tuple[RateTrial, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trials": [dataclasses.asdict(t) for t in self.trials]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FoundRate:
        trials = tuple(RateTrial(**trial) for trial in data["trials"])
        return cls(**{**data, "trials": trials})


def with_rate(config: FinetuneConfig, found: FoundRate) -> FinetuneConfig:
    """The configuration of a run that takes the rate found."""
    return at_rate(config, found.lr, found.block_lr_scale)


def at_rate(config: FinetuneConfig, lr: float, scale: float, **changes: Any) -> FinetuneConfig:
    """The configuration with other rates, and other fields changed."""
    least = min(config.min_lr, lr)
    return dataclasses.replace(config, lr=lr, block_lr_scale=scale, min_lr=least, **changes)


def rates_to_try(config: FinetuneConfig) -> list[tuple[float, float]]:
    """Rates and blocks' shares, the boldest first; the configuration's own are the boldest."""
    pairs: list[tuple[float, float]] = []
    for down, share in STEPS_DOWN:
        scale = config.block_lr_scale * (1.0 if config.mode == "frozen" else share)
        if (pair := (config.lr * down, scale)) not in pairs:
            pairs.append(pair)
    return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allowance:
    """How much the trials of a run may cost.

    Args:
        updates: Of a short trial.
        total: Of all trials, at most.
    """

    updates: int
    total: int


def allowance(config: FinetuneConfig, steps: int, parts: int) -> Allowance:
    """What ``effort`` comes to, in updates.

    Args:
        config: None for its ``effort`` is ``EFFORT``, or ``EFFORT_ON_FOLDS`` on several parts.
        steps: Of the run.
        parts: That trials are judged on.
    """
    effort = config.effort
    if effort is None:
        effort = EFFORT if parts == 1 else EFFORT_ON_FOLDS
    total = int(effort * steps)
    even = total // (len(rates_to_try(config)) * max(parts, 1))
    return Allowance(updates=min(steps, max(FEWEST_UPDATES, even)), total=total)


def trial(
    network: nn.Module,
    fit: Dataset[Any],
    held_out: Dataset[Any],
    config: FinetuneConfig,
    folder: Path,
    *,
    classes: Sequence[str],
    device: torch.device,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> torch.Tensor | None:
    """Whether each image held out is told right after a short run; None where its loss rose.

    Args:
        network: To start from; it is left as it was.
        fit: Augmented images to train on.
        held_out: Images to ask about, with labels.
        config: How; its ``steps`` are the trial's.
        folder: For its files; removed afterwards by the main process.
        classes: Class names.
        device: Where to compute.
        settings: A teacher and other arguments of ``finetune``.
    """
    tried = copy.deepcopy(network)
    if not short_run(tried, fit, config, folder, classes=classes, device=device, settings=settings):
        return None
    PartialState().wait_for_everyone()  # all have read its weights: the next one replaces them
    return told_right(tried, held_out, device)


def short_run(
    network: nn.Module,
    fit: Dataset[Any],
    config: FinetuneConfig,
    folder: Path,
    *,
    classes: Sequence[str],
    device: torch.device,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Train a network in place for a few updates; False where its loss rose.

    Args:
        network: To train.
        fit: Augmented images to train on.
        config: How; its ``steps`` are the run's.
        folder: For its files.
        classes: Class names.
        device: Where to compute.
        settings: Further arguments of ``finetune``.
    """
    try:
        finetune(
            network,
            fit,
            None,
            config,
            folder,
            classes=classes,
            device=device,
            forgiving=False,
            warn=lambda _: None,
            **settings,
        )
    except UsageError:
        raise
    except DeryError as error:
        if "step" not in (error.details or {}):
            raise
        return False
    return True


def told_right(network: nn.Module, images: Dataset[Any], device: torch.device) -> torch.Tensor:
    """Whether the class of each image is ranked first, (N,) in double precision."""
    loader = DataLoader(
        ErrorItems(images), batch_size=256, collate_fn=collate, generator=torch.Generator()
    )
    label_N: list[torch.Tensor] = []

    def batches() -> Any:
        for images_BCHW, labels_B in raise_errors(loader):
            label_N.append(labels_B)
            yield images_BCHW.to(device)

    network.to(device).eval()
    guess_N = network_outputs(network, batches()).argmax(1)
    return (guess_N == torch.cat(label_N)).double()


def find_rate(
    parts: Sequence[Part],
    config: FinetuneConfig,
    steps: int,
    folder: Path,
    *,
    classes: Sequence[str],
    device: torch.device,
    settings: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
) -> FoundRate | None:
    """Try rates and choose one; None where the allowance is for no trial.

    Args:
        parts: To try on, in turn.
        config: Of the run; its rates are the boldest that are tried.
        steps: Of the run.
        folder: Of the run.
        classes: Class names.
        device: Where to compute.
        settings: Further arguments of ``finetune``.
        progress: Told the updates of each trial that is over.
    """
    allowed = allowance(config, steps, len(parts))
    if not parts or allowed.total < allowed.updates:
        return None
    search = _Search(parts, config, steps, folder, allowed, classes, device, settings, progress)
    trials: list[RateTrial] = []
    for lr, scale in rates_to_try(config):
        if (judged := search.judge(lr, scale)) is None:
            break
        trials.append(judged)
        if len(parts) > 1 and judged.is_clear and judged.gain > 0:
            break
    if PartialState().is_main_process:
        shutil.rmtree(folder / TRIAL_FOLDER, ignore_errors=True)
    chosen = choose(trials)
    best = trials[-1] if chosen is None else chosen
    before = torch.cat(search.right_before)
    return FoundRate(
        lr=best.lr,
        block_lr_scale=best.block_lr_scale,
        admitted=chosen is not None,
        start_top1=float(before.mean()),
        images=len(before),
        updates=search.used,
        trials=tuple(trials),
    )


class _Search:
    """Trials one after the other, within an allowance."""

    def __init__(
        self,
        parts: Sequence[Part],
        config: FinetuneConfig,
        steps: int,
        folder: Path,
        allowed: Allowance,
        classes: Sequence[str],
        device: torch.device,
        settings: Mapping[str, Any],
        progress: Callable[[int], None],
    ) -> None:
        self._parts, self._config, self._steps, self._allowed = parts, config, steps, allowed
        self._progress = progress
        self._how: dict[str, Any] = {"classes": classes, "device": device, "settings": settings}
        self._folder, self._device = folder / TRIAL_FOLDER, device
        self._starts: list[nn.Module] = []
        self.right_before: list[torch.Tensor] = []
        self.used = 0

    def judge(self, lr: float, scale: float) -> RateTrial | None:
        """A rate after a short trial, and where that is not enough long ones on the other parts.

        None where nothing of the allowance is left.
        """
        updates = self._allowed.updates
        if not self._affords(updates):
            return None
        judged = self._judged(lr, scale, updates, {0: self._end(0, lr, scale, updates)})
        ends: dict[int, torch.Tensor | None] = {}
        for number in range(1, len(self._parts)):
            decided = judged.diverged or (judged.is_clear and (bool(ends) or judged.gain > 0))
            if decided or not self._affords(self._steps):
                break
            ends[number] = self._end(number, lr, scale, self._steps)
            judged = self._judged(lr, scale, self._steps, ends)
        return judged

    def _affords(self, updates: int) -> bool:
        return self.used + updates <= self._allowed.total

    def _end(self, number: int, lr: float, scale: float, updates: int) -> torch.Tensor | None:
        """Whether a part's images are told right after a trial; None where its loss rose."""
        part = self._parts[number]
        if number == len(self._starts):
            self._starts.append(part.start())
            self.right_before.append(told_right(self._starts[-1], part.held_out, self._device))
        config = at_rate(self._config, lr, scale, steps=updates, epochs=None, report_every=updates)
        start = self._starts[number]
        end = trial(start, part.fit, part.held_out, config, self._folder, **self._how)
        self.used += updates
        self._progress(updates)
        return end

    def _judged(
        self, lr: float, scale: float, updates: int, ends: Mapping[int, torch.Tensor | None]
    ) -> RateTrial:
        before = [self.right_before[number] for number in ends]
        return _judged(lr, scale, updates, before, list(ends.values()))


def _judged(
    lr: float,
    scale: float,
    updates: int,
    right_before: Sequence[torch.Tensor],
    right_after: Sequence[torch.Tensor | None],
) -> RateTrial:
    """A rate's figures, from whether the images of some parts are told right before and after."""
    ends = [end for end in right_after if end is not None]
    diverged = len(ends) < len(right_after)
    before_N = torch.cat(list(right_before))
    after_N = torch.zeros_like(before_N) if diverged else torch.cat(ends)
    gain_N = after_N - before_N
    return RateTrial(
        lr=lr,
        block_lr_scale=scale,
        updates=updates,
        images=len(gain_N),
        top1=float(after_N.mean()),
        gain=float(gain_N.mean()),
        error=float(gain_N.std(correction=0)) / math.sqrt(len(gain_N)),
        diverged=diverged,
    )


def choose(trials: Sequence[RateTrial]) -> RateTrial | None:
    """The trial whose rate a run may take; None where none of them speaks for training.

    Admitted is a trial that ended no worse than its start, for a run has more images than a trial;
    where a bolder one did harm, one that ended better by more than its standard error: a run goes
    further than a trial at its rate, about as far as a bolder one. Of those admitted that of the
    largest gain, and the boldest of equals.

    Args:
        trials: The boldest first.
    """
    best: RateTrial | None = None
    harm = False
    for one in trials:
        harm = harm or one.harmed
        admitted = one.gain > one.error if harm else one.gain >= 0
        if admitted and (best is None or one.gain > best.gain):
            best = one
    return best
