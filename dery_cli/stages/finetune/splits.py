"""The target's images in three parts: to train on, to choose on, to report on."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.utils.data import Dataset

from dery_cli.data.batches import as_dataset
from dery_cli.data.classes import check_classes, training_labels
from dery_cli.data.samples import Split, fingerprint
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.stages.finetune.start import Start
from dery_cli.training.augment import train_transform
from dery_cli.training.recipe import FinetuneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The target's images as the training loop takes them.

    Args:
        train: Augmented.
        valid: Chosen on; None where nothing is held out.
        test: Reported on; None where there are none.
        digest: Hash of the training images and the split.
        split: That they keep to.
        kept: Which of the target's training images are trained on.
        target: Data spec.
        target_skip_bad: Whether broken images are left out of these data.
    """

    train: Dataset[Any]
    valid: Dataset[Any] | None
    test: Dataset[Any] | None
    digest: str
    split: Split
    kept: tuple[int, ...]
    target: str
    target_skip_bad: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitChoice:
    """How a target is divided, and whether the start has to forget the part to choose on.

    Args:
        split: Of the target's training images.
        refit: The start was fitted on images that the split holds out to choose on.
    """

    split: Split
    refit: bool


def choose_split(
    start: Start, data: DataSet, *, fraction: float | None, seed: int, seen: bool
) -> SplitChoice:
    """The split that the start was made with where there is one, else one by ``seed``.

    Args:
        start: Assembly or whole donor.
        data: The target.
        fraction: To hold out; None for that of the start, or by the number of images.
        seed: Of a split of its own.
        seen: Whether the start's weights were fitted on images of some target.
    """
    record = start.assembly.record.data
    fresh = Split.of(data.train, seed, fraction)
    if "split" not in record or record["target"] != data.spec:
        return SplitChoice(split=fresh, refit=False)  # it has seen nothing of these data
    own = Split(**record["split"])
    if not own.is_of(data.train):
        return SplitChoice(split=fresh, refit=seen and fresh.fraction > 0)
    if seen and record["fitted_on"] == "all":
        own = dataclasses.replace(own, fraction=0.0)
    if fraction in (None, own.fraction):
        return SplitChoice(split=own, refit=False)
    return SplitChoice(split=fresh, refit=seen and fresh.fraction > 0)


def make_splits(data: DataSet, start: Start, config: FinetuneConfig, split: Split) -> Splits:
    """Divide the target and attach the preprocessing.

    Raises:
        UsageError: The data have no labels, or other classes than the network's head.
    """
    training_labels(data)
    check_classes(data, start.assembly.classes)
    kept, held_out = split.parts(data.train)
    transform = start.assembly.transform
    augmented = train_transform(transform.input, config, transform.crop)
    return Splits(
        train=as_dataset(ImageDataset(data.train, augmented, kept)),
        valid=as_dataset(ImageDataset(data.train, transform, held_out)) if held_out else None,
        test=None if data.test is None else as_dataset(ImageDataset(data.test, transform)),
        digest=fingerprint(data.train, [*kept, *held_out]),
        split=split,
        kept=tuple(kept),
        target=data.spec,
        target_skip_bad=data.skip_bad,
    )
