"""Which images of a data set are taken, and whether they are still the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from dery_cli.data.sets import DataSet
from dery_cli.data.splits import image_digest, stratified_holdout
from dery_cli.io.records import Artifact
from dery_cli.zoo.plugin import ImageSplit

SEEN = "it may have seen some of those it is tested on"


def choose_samples(count: int, samples: int, seed: int) -> list[int]:
    """``samples`` of ``count`` indices in random order, the same for the same seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible choice, not a secret
    return order[:samples]


def fingerprint(split: ImageSplit, indices: Sequence[int] | None = None) -> str:
    """Hash of the chosen images' content, order and labels."""
    chosen = range(len(split)) if indices is None else indices
    sha = hashlib.sha256()
    for index in chosen:
        sha.update(image_digest(split, index))
        sha.update(str(None if split.labels is None else int(split.labels[index])).encode())
    return sha.hexdigest()


def choose_target(data: DataSet, samples: int, seed: int) -> tuple[int, ...]:
    """The target's training images that heads and probes are fitted on, in order."""
    return tuple(sorted(choose_samples(len(data.train), samples, seed)))


def held_out_anew(record: Artifact, data: DataSet) -> bool:
    """Whether the part that is held out of a folder is not the one that a network was made with.

    Each class is divided anew when images come or go, so it may hold some that were trained on.

    Args:
        record: Of an assembly or a run.
        data: What it is to be tested on.
    """
    if data.spec != record.data["target"] or not data.held_out:
        return False
    chosen: Sequence[int]
    if record.kind.name == "run":
        digest, fraction = record.parents["data"], record.options["valid_fraction"]
        chosen = range(len(data.train))
        if fraction > 0 and data.train.labels is not None:
            kept, valid = stratified_holdout(
                data.train.labels, fraction=fraction, seed=record.seed or 0
            )
            chosen = [*kept, *valid]
    else:
        digest = record.parents["target"]
        chosen = choose_target(data, record.options["target_samples"], record.seed or 0)
    return fingerprint(data.train, chosen) != digest
