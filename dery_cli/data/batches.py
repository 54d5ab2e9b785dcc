"""Batches of real images on a device, as one donor or network sees them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dery_cli.data.sets import ImageDataset
from dery_cli.errors import DeryError
from dery_cli.types import InputSpec
from dery_cli.zoo.plugin import ImageSplit
from dery_cli.zoo.transforms import EvalTransform, normalise

KEEP_BYTES = 4 << 30
"""Decoded images are kept in memory up to this size."""

_T = TypeVar("_T")
_R = TypeVar("_R")


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


def in_order(
    work: Callable[[_T], _R], items: Iterable[_T], *, workers: int, ahead: int
) -> Generator[_R, None, None]:
    """``work`` of each item, in order, done by ``workers`` threads while the caller is busy.

    Args:
        work: Called by several threads at the same time, or by this one where ``workers`` is 0.
        items: What to work on.
        workers: Threads.
        ahead: Results that may wait to be taken.
    """
    if not workers:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: collections.deque[Future[_R]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class ImageBatches:
    """Normalised image batches of a split, the same each time they are iterated.

    Args:
        split: Images.
        indices: Which, in this order.
        input: Size and normalisation.
        crop: Field of view, as a share of the short side.
        batch_size: Images a batch; the last may be smaller.
        device: Where the batches go.
        workers: Threads that decode; 0: this one.
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
        self.labels = ImageDataset(split, lambda image: image, indices).labels
        self._spec, self._spans = input, batch_spans(len(indices), batch_size)[share[0] :: share[1]]
        self._indices = indices
        self._store = ImageStore(
            split,
            indices,
            crop=crop,
            batch_size=batch_size,
            device=device,
            workers=workers,
            keep_bytes=0,
        )

    def __iter__(self) -> Iterator[Tensor]:
        batches = [self._indices[start:stop] for start, stop in self._spans]
        return self._store.given_batches(self._spec, batches)


class ImageStore:
    """Images that many donors look at many times: each is decoded once, and kept as bytes.

    An image that is decoded is resized at once for all inputs that are known by then. Donors of one
    input size share what is kept, whatever their normalisation. Images that would go over
    ``keep_bytes`` are decoded in every pass. What is given does not depend on what is kept, nor on
    ``workers``.

    Args:
        split: Images.
        indices: Which of them.
        crop: Field of view, as a share of the short side.
        batch_size: Images a batch.
        device: Where the batches go; what is kept stays in the machine's own memory.
        workers: Threads that decode; 0: this one.
        keep_bytes: Memory for decoded images.
        inputs: What they will be looked at as; any other is decoded for when it is asked for.
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
        inputs: Iterable[InputSpec] = (),
    ) -> None:
        self._split, self._crop = split, crop
        self._batch_size, self._device, self._workers = batch_size, device, workers
        self._left = keep_bytes
        self._row = {index: row for row, index in enumerate(indices)}
        self._kept: dict[_Size, _Kept] = {}
        self._expect(inputs)

    def view(self, spec: InputSpec, indices: Sequence[int]) -> Iterable[Tensor]:
        """Batches of some of the images as a donor of this input sees them; iterate at will.

        Args:
            spec: Size and normalisation.
            indices: Of the split, among the store's.
        """
        return _View(self, spec, indices)

    def batches(self, spec: InputSpec, indices: Sequence[int]) -> Iterator[Tensor]:
        """One pass of ``view``."""
        spans = batch_spans(len(indices), self._batch_size)
        return self.given_batches(spec, [indices[start:stop] for start, stop in spans])

    def given_batches(self, spec: InputSpec, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Some of the images, in these batches.

        Raises:
            DeryError: One of them cannot be read.
        """
        self._expect([spec])
        kept = self._kept[_size(spec)]
        absent = [i for batch in batches for i in batch if not kept.has(self._row[i])]
        decoded = in_order(
            lambda index: self._decode(index, spec),
            absent,
            workers=self._workers,
            ahead=2 * max(map(len, batches), default=0),
        )
        wanted = collections.Counter(absent)
        with contextlib.closing(decoded):
            for batch in batches:
                x_NCHW = torch.empty(
                    (len(batch), *kept.shape),
                    dtype=torch.uint8,
                    pin_memory=self._device.type == "cuda",
                )
                for place, index in enumerate(batch):
                    if wanted[index]:
                        wanted[index] -= 1
                        x_NCHW[place] = next(decoded)
                    else:
                        x_NCHW[place] = kept.pixels_NCHW[self._row[index]]
                yield normalise(x_NCHW.to(self._device, non_blocking=True), spec)

    def _expect(self, inputs: Iterable[InputSpec]) -> None:
        """Make room for inputs that are new: for all images, or for the first that fit."""
        new = {size: spec for spec in inputs if (size := _size(spec)) not in self._kept}
        shapes = {size: (spec.in_chans, *spec.image_size) for size, spec in new.items()}
        image_bytes = sum(map(math.prod, shapes.values()))
        if not image_bytes:
            return
        rows = min(len(self._row), self._left // image_bytes)
        self._left -= rows * image_bytes
        for size, spec in new.items():
            with torch.inference_mode(False):  # or nobody outside of it could add to them
                pixels_NCHW = torch.empty((rows, *shapes[size]), dtype=torch.uint8)
            self._kept[size] = _Kept(
                view=EvalTransform(spec, self._crop),
                shape=shapes[size],
                pixels_NCHW=pixels_NCHW,
                done=bytearray(rows),
            )

    def _decode(self, index: int, spec: InputSpec) -> Tensor:
        """An image's bytes for one input; those for the others are kept on the way."""
        row, asked = self._row[index], self._kept[_size(spec)]

        def resized(image: Image.Image) -> Tensor:
            for kept in self._kept.values():
                if kept is not asked and kept.has_room(row):
                    kept.keep(row, kept.view.pixels(image))
            pixels_CHW = asked.view.pixels(image)
            if asked.has_room(row):
                asked.keep(row, pixels_CHW)
            return pixels_CHW

        pixels_CHW, _label = ImageDataset(self._split, resized, [index])[0]
        return cast("Tensor", pixels_CHW)


_Size = tuple[tuple[int, int], str, int]


def _size(spec: InputSpec) -> _Size:
    return spec.image_size, spec.interpolation, spec.in_chans


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Decoded images of one size.

    Args:
        view: Makes them.
        shape: (C, H, W).
        pixels_NCHW: Room for the store's first N images; it costs memory where it is written to.
        done: Whether each of them is there.
    """

    view: EvalTransform
    shape: tuple[int, ...]
    pixels_NCHW: Tensor
    done: bytearray

    def has(self, row: int) -> bool:
        return row < len(self.done) and bool(self.done[row])

    def has_room(self, row: int) -> bool:
        return row < len(self.done) and not self.done[row]

    def keep(self, row: int, pixels_CHW: Tensor) -> None:
        self.pixels_NCHW[row] = pixels_CHW
        self.done[row] = 1


@dataclasses.dataclass(frozen=True)
class _View:
    store: ImageStore
    spec: InputSpec
    indices: Sequence[int]

    def __iter__(self) -> Iterator[Tensor]:
        return self.store.batches(self.spec, self.indices)
