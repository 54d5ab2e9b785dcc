"""Batches of real images on a device, as one donor or network sees them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dery_cli.data.sets import ImageDataset
from dery_cli.errors import DeryError
from dery_cli.types import InputSpec
from dery_cli.zoo.plugin import ImageSplit
from dery_cli.zoo.transforms import EvalTransform, normalise

KEEP_BYTES = 4 << 30
"""Decoded images are kept in memory up to this size."""


def batch_spans(count: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, last + 1) sample of each batch of ``count`` samples."""
    return [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


class ErrorItems(Dataset[Any]):
    """``dataset``, with the error for an item where an image cannot be read.

    A loading process would wrap the error in its traceback; so it travels as an item, through
    ``collate``, and ``raise_errors`` raises it where the batches are used.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DeryError as error:
            return error


def collate(items: list[Any]) -> Any:
    """The batch, or the first error among its items."""
    for item in items:
        if isinstance(item, DeryError):
            return item
    return default_collate(items)


def raise_errors(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """The batches.

    Raises:
        DeryError: One of them is an error.
    """
    for batch in batches:
        if isinstance(batch, DeryError):
            raise batch
        yield batch


def as_dataset(images: ImageDataset) -> Dataset[Any]:
    """``images`` under torch's type; ``data/sets.py`` does without torch, so it is no subclass."""
    return cast("Dataset[Any]", images)


def _images(
    dataset: ImageDataset, spans: Sequence[tuple[int, int]], device: torch.device, workers: int
) -> Iterator[Tensor]:
    """The images of each span, stacked; to be moved to ``device`` by who takes them.

    Raises:
        DeryError: One of them cannot be read.
    """
    loader = DataLoader(
        ErrorItems(as_dataset(dataset)),
        batch_sampler=[list(range(start, stop)) for start, stop in spans],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for x_NCHW, _labels in raise_errors(loader):
        yield x_NCHW


class ImageBatches:
    """Normalised image batches of a split, the same each time they are iterated.

    Args:
        split: Images.
        indices: Which, in this order.
        input: Size and normalisation.
        crop: Field of view, as a share of the short side.
        batch_size: Images a batch; the last may be smaller.
        device: Where the batches go.
        workers: Processes that decode.
        share: (i, n): only every n-th batch, from batch i on.
    """

    def __init__(
        self,
        split: ImageSplit,
        indices: Sequence[int],
        input: InputSpec,  # noqa: A002 - the word of DESIGN.md
        *,
        crop: float,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        dataset = ImageDataset(split, EvalTransform(input, crop), indices)
        self.labels = dataset.labels
        self._dataset, self._device, self._workers = dataset, device, workers
        self._spans = batch_spans(len(dataset), batch_size)[share[0] :: share[1]]

    def __iter__(self) -> Iterator[Tensor]:
        for x_NCHW in _images(self._dataset, self._spans, self._device, self._workers):
            yield x_NCHW.to(self._device, non_blocking=True)


class ImageStore:
    """Images that many donors look at many times: decoded once a size, and kept as bytes.

    Donors of one input size share what is kept, whatever their normalisation. What would go over
    ``keep_bytes`` is decoded in every pass.

    Args:
        split: Images.
        indices: Which of them.
        crop: Field of view, as a share of the short side.
        batch_size: Images a batch.
        device: Where the batches go; what is kept stays in the machine's own memory.
        workers: Processes that decode.
        keep_bytes: Memory for decoded images.
    """

    def __init__(
        self,
        split: ImageSplit,
        indices: Sequence[int],
        *,
        crop: float,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._split, self._indices, self._crop = split, indices, crop
        self._batch_size, self._device, self._workers = batch_size, device, workers
        self._left = keep_bytes
        self._row = {index: row for row, index in enumerate(indices)}
        self._kept: dict[tuple[object, ...], Tensor | None] = {}

    def view(self, spec: InputSpec, indices: Sequence[int]) -> Iterable[Tensor]:
        """Batches of some of the images as a donor of this input sees them; iterate at will.

        Args:
            spec: Size and normalisation.
            indices: Of the split, among the store's.
        """
        return _View(self, spec, indices)

    def batches(self, spec: InputSpec, indices: Sequence[int]) -> Iterator[Tensor]:
        """One pass of ``view``."""
        kept_NCHW = self._pixels(spec)
        if kept_NCHW is None:
            yield from ImageBatches(
                self._split,
                indices,
                spec,
                crop=self._crop,
                batch_size=self._batch_size,
                device=self._device,
                workers=self._workers,
            )
            return
        rows_N = torch.tensor([self._row[index] for index in indices])
        for some_N in torch.split(rows_N, self._batch_size):
            yield normalise(kept_NCHW[some_N].to(self._device), spec)

    def _pixels(self, spec: InputSpec) -> Tensor | None:
        """All images at this size, (N, C, H, W) bytes; None where there is no room for them."""
        key = (spec.image_size, spec.interpolation, spec.in_chans)
        if key not in self._kept:
            shape = (len(self._indices), spec.in_chans, *spec.image_size)
            fits = math.prod(shape) <= self._left
            self._left -= math.prod(shape) if fits else 0
            self._kept[key] = self._decoded(spec, shape) if fits else None
        return self._kept[key]

    def _decoded(self, spec: InputSpec, shape: tuple[int, ...]) -> Tensor:
        dataset = ImageDataset(self._split, EvalTransform(spec, self._crop).pixels, self._indices)
        spans = batch_spans(len(dataset), self._batch_size)
        pixels_NCHW = torch.empty(shape, dtype=torch.uint8)
        batches = _images(dataset, spans, torch.device("cpu"), self._workers)
        for (start, stop), x_NCHW in zip(spans, batches, strict=True):
            pixels_NCHW[start:stop] = x_NCHW
        return pixels_NCHW


@dataclasses.dataclass(frozen=True)
class _View:
    store: ImageStore
    spec: InputSpec
    indices: Sequence[int]

    def __iter__(self) -> Iterator[Tensor]:
        return self.store.batches(self.spec, self.indices)
