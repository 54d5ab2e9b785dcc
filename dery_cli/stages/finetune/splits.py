"""The target's images in three parts: to train on, to choose on, to report on."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.utils.data import Dataset

from dery_cli.data.batches import as_dataset
from dery_cli.data.classes import check_classes, training_labels
from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.data.splits import stratified_holdout
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
        valid_fraction: Share held out to choose on.
        kept: Which of the target's training images are trained on.
        target: Data spec.
        target_skip_bad: Whether broken images are left out of these data.
    """

    train: Dataset[Any]
    valid: Dataset[Any] | None
    test: Dataset[Any] | None
    digest: str
    valid_fraction: float
    kept: tuple[int, ...]
    target: str
    target_skip_bad: bool


def make_splits(
    data: DataSet, start: Start, config: FinetuneConfig, valid_fraction: float
) -> Splits:
    """Split the target by seed and attach the preprocessing.

    Raises:
        UsageError: The data have no labels, or other classes than the network's head.
    """
    labels = training_labels(data)
    check_classes(data, start.assembly.classes)
    kept = list(range(len(data.train)))
    held_out: list[int] = []
    if valid_fraction > 0:
        kept, held_out = stratified_holdout(labels, fraction=valid_fraction, seed=config.seed)
    transform = start.assembly.transform
    augmented = train_transform(transform.input, config, transform.crop)
    return Splits(
        train=as_dataset(ImageDataset(data.train, augmented, kept)),
        valid=as_dataset(ImageDataset(data.train, transform, held_out)) if held_out else None,
        test=None if data.test is None else as_dataset(ImageDataset(data.test, transform)),
        digest=fingerprint(data.train, [*kept, *held_out]),
        valid_fraction=valid_fraction,
        kept=tuple(kept),
        target=data.spec,
        target_skip_bad=data.skip_bad,
    )
