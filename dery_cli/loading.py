"""Batches of real images on a device, as one donor or network sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dery_cli.data import EvalTransform, ImageDataset
from dery_cli.errors import DeryError, UsageError
from dery_cli.plugin import ImageSplit
from dery_cli.types import InputSpec


def pick_device(name: str | None) -> torch.device:
    """The device of ``--device``, or the best there is.

    Raises:
        UsageError: No such device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {reason}") from error
    if device.type == "meta":
        raise UsageError("--device meta holds no data", "use cpu, cuda or mps")
    return device


def batch_spans(count: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, last + 1) sample of each batch of ``count`` samples."""
    return [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


class _Images:
    """Images without labels; a file that cannot be read is an item too.

    A loading process would wrap the error in its traceback.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Tensor | DeryError:
        try:
            x_CHW: Tensor = self._dataset[position][0]
        except DeryError as error:
            return error
        return x_CHW


def _stacked(items: list[Tensor | DeryError]) -> Tensor | DeryError:
    for item in items:
        if isinstance(item, DeryError):
            return item
    return torch.stack(items)  # type: ignore[arg-type] # no errors are left


def as_dataset(images: ImageDataset) -> Dataset[Any]:
    """``images`` under torch's type; ``data.py`` keeps torch out, so it is one by protocol only."""
    return cast("Dataset[Any]", images)


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
        keep: Decode once and keep the batches (on ``device``) for later passes.
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
        keep: bool = False,
    ) -> None:
        dataset = ImageDataset(split, EvalTransform(input, crop), indices)
        self.labels = dataset.labels
        spans = batch_spans(len(dataset), batch_size)[share[0] :: share[1]]
        self._device = device
        self._kept: list[Tensor] | None = None
        self._keep = keep
        self._loader: DataLoader[Tensor | DeryError] = DataLoader(
            cast("Dataset[Tensor | DeryError]", _Images(dataset)),
            batch_sampler=[list(range(start, stop)) for start, stop in spans],
            collate_fn=_stacked,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Tensor] = []
        for batch in self._loader:
            if isinstance(batch, DeryError):
                raise batch
            x_NCHW = batch.to(self._device, non_blocking=True)
            if self._keep:
                kept.append(x_NCHW)
            yield x_NCHW
        if self._keep:
            self._kept = kept
