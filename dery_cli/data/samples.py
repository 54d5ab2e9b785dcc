"""Which images of a data set are taken for what, and whether they are still the same.

A target's training images are split once: into a part that everything is fitted on and, from
``MIN_IMAGES_TO_CHOOSE_ON`` labelled images on, a part that is chosen on. Fewer are fitted on
altogether, and folds choose. Samples have their share of every class, in a shuffled order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence

from dery_cli.data.sets import DataSet
from dery_cli.data.splits import image_digest, stratified_holdout
from dery_cli.io.records import Artifact, json_sha256
from dery_cli.types import MIN_IMAGES_TO_CHOOSE_ON
from dery_cli.zoo.plugin import ImageSplit

SEEN = "it may have seen some of those it is tested on"
VALID_FRACTION = 0.2
"""Of each class, held out to choose on where there are enough images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The one division of a target's training images, into those to fit on and those to choose on.

    Args:
        fraction: Of each class that is chosen on; 0 where there are too few images.
        seed: That shuffles each class.
        digest: Hash of all labels in order: other images are divided otherwise.
    """

    fraction: float
    seed: int
    digest: str

    @classmethod
    def of(cls, images: ImageSplit, seed: int, fraction: float | None = None) -> Split:
        """The split of some training images, by their number where ``fraction`` is None."""
        labels = images.labels
        if fraction is None:
            enough = labels is not None and len(images) >= MIN_IMAGES_TO_CHOOSE_ON
            fraction = VALID_FRACTION if enough else 0.0
        return cls(fraction=fraction, seed=seed, digest=_labels_sha256(images))

    def is_of(self, images: ImageSplit) -> bool:
        """Whether these images, as far as their labels tell, are those that were split."""
        return self.digest == _labels_sha256(images)

    def parts(self, images: ImageSplit) -> tuple[list[int], list[int]]:
        """Indices to fit on, and indices to choose on."""
        if not self.fraction or images.labels is None:
            return list(range(len(images))), []
        return stratified_holdout(images.labels, fraction=self.fraction, seed=self.seed)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def _labels_sha256(images: ImageSplit) -> str:
    labels = images.labels
    return json_sha256([len(images), None if labels is None else [int(k) for k in labels]])


def choose_samples(
    pool: Sequence[int], labels: Sequence[int] | None, samples: int, seed: int
) -> tuple[int, ...]:
    """Some indices of a pool in random order, the same for the same seed.

    Each class has its share of them, and one image at least as far as ``samples`` goes.

    Args:
        pool: Indices to choose from.
        labels: Class of every image of the data set, by index; None where there are none.
        samples: How many to choose at most.
        seed: Of the choice and of the order.
    """
    generator = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    order = list(pool)
    generator.shuffle(order)
    if labels is None or samples >= len(order):
        return tuple(order[:samples])
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(int(labels[index]), []).append(index)
    # the first of every class, then each class at its own pace
    turn = {
        index: (rank + 0.5) / len(some) if rank else 0.0
        for some in members.values()
        for rank, index in enumerate(some)
    }
    chosen = set(sorted(order, key=turn.__getitem__)[:samples])
    return tuple(index for index in order if index in chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSamples:
    """The images of a target that an assembly is made with.

    Args:
        split: That they keep to.
        indices: Of the part to fit on, those that probes and the head are fitted on.
        fit_indices: Those of them that stitches are fitted on.
        valid_indices: Of the part to choose on; empty where there is none.
    """

    split: Split
    indices: tuple[int, ...]
    fit_indices: tuple[int, ...]
    valid_indices: tuple[int, ...]

    @property
    def all_indices(self) -> tuple[int, ...]:
        """Every image that something is fitted or chosen on."""
        return (*self.indices, *self.valid_indices)


def choose_target(images: ImageSplit, split: Split, *, samples: int, fit: int) -> TargetSamples:
    """The training images that an assembly is made with.

    Args:
        images: The target's training images.
        split: Of them.
        samples: At most so many to fit on, and half as many to choose on.
        fit: At most so many of the first for stitches.
    """
    kept, held_out = split.parts(images)
    indices = choose_samples(kept, images.labels, samples, split.seed)
    return TargetSamples(
        split=split,
        indices=indices,
        fit_indices=choose_samples(indices, images.labels, fit, split.seed),
        valid_indices=choose_samples(held_out, images.labels, max(1, samples // 2), split.seed),
    )


def fingerprint(split: ImageSplit, indices: Sequence[int] | None = None) -> str:
    """Hash of the chosen images' content, order and labels."""
    chosen = range(len(split)) if indices is None else indices
    sha = hashlib.sha256()
    for index in chosen:
        sha.update(image_digest(split, index))
        sha.update(str(None if split.labels is None else int(split.labels[index])).encode())
    return sha.hexdigest()


def held_out_anew(record: Artifact, data: DataSet) -> bool:
    """Whether the part that is held out of a folder is not the one that a network was made with.

    Each class is divided anew when images come or go, so it may hold some that were trained on.

    Args:
        record: Of an assembly or a run.
        data: What it is to be tested on.
    """
    return data.spec == record.data["target"] and data.held_out and made_of_others(record, data)


def made_of_others(record: Artifact, data: DataSet) -> bool:
    """Whether a network was made with other images than these data give by the same rules."""
    split = Split(**record.data["split"])
    if not split.is_of(data.train):
        return True
    if record.kind.name == "run":
        kept, held_out = split.parts(data.train)
        return fingerprint(data.train, [*kept, *held_out]) != record.parents["data"]
    options = record.options
    chosen = choose_target(
        data.train, split, samples=options["target_samples"], fit=options["fit_samples"]
    )
    return fingerprint(data.train, chosen.all_indices) != record.parents["target"]
