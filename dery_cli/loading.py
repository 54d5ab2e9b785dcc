"""Batches of real images on a device, as one donor or network sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dery_cli.data import EvalTransform, ImageDataset
from dery_cli.errors import UsageError
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
        keep: bool = False,
    ) -> None:
        dataset = ImageDataset(split, EvalTransform(input, crop), indices)
        self.labels = dataset.labels
        self._device = device
        self._kept: list[Tensor] | None = None
        self._keep = keep
        self._loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            dataset,  # type: ignore[arg-type] # map-style by protocol
            batch_size=batch_size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Tensor] = []
        for x_NCHW, _ in self._loader:
            x_NCHW = x_NCHW.to(self._device, non_blocking=True)
            if self._keep:
                kept.append(x_NCHW)
            yield x_NCHW
        if self._keep:
            self._kept = kept
