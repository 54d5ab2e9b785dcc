"""Which image comes when, and with which random numbers: all from (seed, epoch, image, update).

Nothing here keeps a random state, so a resumed run, another number of loading processes or another
number of training processes sees the same images, augmented the same way, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from dery_cli.data.batches import ErrorItems
from dery_cli.errors import UsageError


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch, on the devices in use.

    ``torch.manual_seed`` would also queue the seed, with a stack trace, for every kind of device
    not in use: half a millisecond and some memory each time.
    """
    seed_cpu(seed)
    for generator in torch.cuda.default_generators:  # none before CUDA is used
        generator.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed Python, numpy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 -- timm's augmentations draw from it
    seed_torch(seed)


def seed_torch(seed: int) -> None:
    """Seed torch on the CPU alone."""
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the caller's random states (Python, numpy, torch CPU) as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(state)


class SeededDataset(Dataset[tuple[torch.Tensor, int]]):
    """``dataset`` under keys (epoch, index), each drawn with random numbers of its own.

    The global generators are left as the last image left them: see ``random_state_kept``.

    Args:
        dataset: Gives (image, label) by index, drawing from the global generators; only from
            torch's where its ``transform`` says ``torch_only``.
        seed: Of the run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.items = ErrorItems(dataset)
        self.seed = seed
        # Seeding all three takes as long as a crop and a flip.
        torch_only = getattr(getattr(dataset, "transform", None), "torch_only", False)
        self._seed = seed_torch if torch_only else seed_cpu

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        images = []
        for epoch, index in keys:
            self._seed(derive_seed(self.seed, "image", epoch, index))
            images.append(self.items[index])
        return images


class StreamSampler:
    """Batches of (epoch, index) keys off the endless row of shuffled passes.

    Args:
        images: Images n of the data set.
        batch_size: Keys of one (micro-)batch, over all processes.
        start: Batches already used up.
        stop: Batches in all.
        seed: Of the run.
    """

    drop_last = False

    def __init__(self, images: int, *, batch_size: int, start: int, stop: int, seed: int) -> None:
        self.images = images
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.seed = seed

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order_N = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start, self.stop):
            keys = []
            for place in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if place // self.images != epoch:
                    epoch = place // self.images
                    order_N = epoch_order(self.images, self.seed, epoch)
                keys.append((epoch, int(order_N[place % self.images])))
            yield keys


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch."""
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(images)


def labels_of(dataset: Any) -> Sequence[int] | None:
    """Labels of ``dataset`` without decoding an image, or None where it does not tell them.

    Raises:
        UsageError: It says that its images have none.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else [labels[i] for i in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return [int(label) for label in dataset.tensors[-1]]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            if (labels := getattr(dataset, name)) is None:
                raise UsageError(
                    "the images have no labels", "give a folder of class folders, or labelled data"
                )
            return [int(label) for label in labels]
    return None


def check_labels(labels: Sequence[int] | None, classes: int, what: str) -> None:
    """Refuse labels that do not belong to so many classes.

    Raises:
        UsageError: No image, fewer than two classes among training labels, or a label out of range.
    """
    if labels is None:
        return
    if len(labels) == 0:
        raise UsageError(f"the {what} data have no images")
    low, high = min(labels), max(labels)
    if low < 0 or high >= classes:
        raise UsageError(
            f"the {what} data have a label {low if low < 0 else high}, the network has "
            f"{classes} classes (0 to {classes - 1})",
            "use the data the network was assembled for, or assemble for these: "
            "dery assemble --data ...",
        )
    if what == "training" and low == high:
        raise UsageError(
            f"all {len(labels)} training images are of one class ({low})",
            "fine-tuning needs images of two or more classes",
        )
