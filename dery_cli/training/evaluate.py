"""Scoring a network: top-1, top-5, per class, confusion matrix, loss, throughput."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dery_cli.core.scoring import score_batch
from dery_cli.data.batches import ErrorItems, collate, raise_errors
from dery_cli.errors import UsageError
from dery_cli.runtime.devices import waiter
from dery_cli.training.sampling import check_labels, labels_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How well a network does on a data set.

    Args:
        images: Images scored.
        loss: Mean cross entropy, labels not smoothed.
        top1: Share of images whose class is ranked first.
        top5: Share whose class is among the first five; None with five classes or fewer.
        per_class: Top-1 of the images of each class, None for a class without images.
        confusion: ``confusion[true][predicted]`` images.
        classes: Class names.
        images_per_second: Of the network alone, loading not counted; the first batch is left out
            where there are more.
        seconds: In all, loading included.
    """

    images: int
    loss: float
    top1: float
    top5: float | None
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    images_per_second: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["per_class"] = list(self.per_class)
        data["confusion"] = [list(row) for row in self.confusion]
        data["classes"] = list(self.classes)
        return data


class Tally:
    """Running counts of one pass over a data set.

    Args:
        classes: Number of classes K.
    """

    def __init__(self, classes: int) -> None:
        self.confusion_KK = torch.zeros(classes, classes, dtype=torch.int64)
        self.loss = 0.0
        self.top5 = 0
        self.images = 0

    def add(self, stats: Sequence[torch.Tensor]) -> None:
        """Add what ``score_batch`` gave for some images."""
        labels_B, guess_B, loss_B, top5_B = (part.cpu() for part in stats)
        K = len(self.confusion_KK)
        cells = torch.bincount(labels_B * K + guess_B, minlength=K * K)
        self.confusion_KK += cells.view(K, K)
        self.loss += float(loss_B.double().sum())
        self.top5 += int(top5_B.sum())
        self.images += len(labels_B)

    @property
    def top1(self) -> float:
        return float(self.confusion_KK.diagonal().sum()) / self.images

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    classes: Sequence[str],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score ``model`` on ``dataset``, which gives (normalised image, label).

    The model is moved to ``device``; its modes are kept.

    Args:
        model: Maps images to logits, one a class.
        dataset: With labels 0 to ``len(classes) - 1``.
        classes: Class names in label order.
        batch_size: Images at once.
        device: Where to compute.
        workers: Processes that load images.
        progress: Called with images done and images in all.

    Raises:
        UsageError: No images, or labels or logits that do not fit ``classes``.
    """
    check_labels(labels_of(dataset), len(classes), "evaluation")
    total = len(dataset)  # type: ignore[arg-type]
    if total == 0:
        raise UsageError("there are no images to evaluate on")
    device = torch.device(device)
    model.to(device)
    loader = DataLoader(
        ErrorItems(dataset),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    tally, times, began = Tally(len(classes)), [], time.perf_counter()
    with evaluating(model):
        for images_BCHW, labels_B in _to_device(loader, device):
            start = _now(device)
            logits_BK = model(images_BCHW)
            times.append((len(images_BCHW), _now(device) - start))
            check_logits(logits_BK, len(classes))
            tally.add(score_batch(logits_BK, labels_B))
            if progress is not None:
                progress(tally.images, total)
    return _result(tally, classes, times, time.perf_counter() - began)


def check_logits(logits_BK: torch.Tensor, classes: int) -> None:
    """Refuse a network with another number of outputs.

    Raises:
        UsageError: The shapes differ.
    """
    if logits_BK.ndim != 2 or logits_BK.shape[1] != classes:
        raise UsageError(
            f"the network gives {tuple(logits_BK.shape[1:])} numbers an image, "
            f"the data have {classes} classes",
            "use the data the network was assembled for, or assemble for these",
        )


def _result(
    tally: Tally, classes: Sequence[str], times: list[tuple[int, float]], seconds: float
) -> EvalResult:
    counts_K, right_K = tally.confusion_KK.sum(1), tally.confusion_KK.diagonal()
    timed = times[1:] or times
    return EvalResult(
        images=tally.images,
        loss=tally.mean_loss,
        top1=tally.top1,
        top5=tally.top5 / tally.images if len(classes) > 5 else None,
        per_class=tuple(
            float(right) / float(count) if count else None
            for right, count in zip(right_K, counts_K, strict=True)
        ),
        confusion=tuple(tuple(row) for row in tally.confusion_KK.tolist()),
        classes=tuple(classes),
        images_per_second=sum(n for n, _ in timed) / max(sum(t for _, t in timed), 1e-9),
        seconds=seconds,
    )


def _to_device(
    loader: Iterable[Any], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for images_BCHW, labels_B in raise_errors(loader):
        yield images_BCHW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True)


def _now(device: torch.device) -> float:
    if (wait := waiter(device)) is not None:
        wait()
    return time.perf_counter()
