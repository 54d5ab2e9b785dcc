"""What was exported, held against the network it was made of, on real images.

Legend: N images, K outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dery_cli.errors import DeryError

Runnable = Callable[[Tensor], Tensor]
"""Normalised images (N, C, H, W) to outputs (N, K)."""
LEAST_AGREEMENT = 0.99
"""Of the answers within the tolerance few images are near ties."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike two networks answer.

    Args:
        images: Compared.
        top1: Share of the images that both put first into the same class; None without a head.
        difference: Largest over the images of max |y' - y| / max |y|, over the outputs of one
            image; infinite where one is no number.
    """

    images: int
    top1: float | None
    difference: float


def compare(
    original: Runnable, exported: Runnable, batches: Iterable[Tensor], *, classes: bool
) -> Agreement:
    """Run both on the same batches.

    Args:
        original: The network as it was.
        exported: As it was loaded back.
        batches: Normalised images.
        classes: Whether the outputs are logits.

    Raises:
        DeryError: There are other outputs than there should be.
    """
    images, same, largest = 0, 0, 0.0
    with torch.no_grad():
        for x_NCHW in batches:
            y_NK, found_NK = original(x_NCHW), exported(x_NCHW)
            if found_NK.shape != y_NK.shape:
                raise DeryError(
                    f"the exported network gives {tuple(found_NK.shape)} numbers for a batch, the "
                    f"original {tuple(y_NK.shape)}",
                    "nothing was written",
                )
            scale_N = y_NK.abs().amax(1).clamp_min(torch.finfo(y_NK.dtype).tiny)
            off_N = (found_NK - y_NK).abs().amax(1) / scale_N
            worst = float(off_N.max())
            largest = max(largest, worst if math.isfinite(worst) else math.inf)
            same += int((found_NK.argmax(1) == y_NK.argmax(1)).sum())
            images += y_NK.shape[0]
    return Agreement(images=images, top1=same / images if classes else None, difference=largest)


def check_agreement(found: Agreement, tolerance: float) -> None:
    """Refuse an export that answers otherwise than the original.

    Raises:
        DeryError: It does; nothing was written.
    """
    if found.difference > tolerance:
        raise DeryError(
            f"the exported network differs from the original by up to {found.difference:.2g} "
            f"(relative) on {found.images} images; {tolerance:g} is allowed",
            "nothing was written; --tolerance allows more",
        )
    if found.top1 is not None and found.top1 < LEAST_AGREEMENT:
        raise DeryError(
            f"the exported network gives {found.top1:.2%} of {found.images} images the class that "
            f"the original gives; at least {LEAST_AGREEMENT:.0%} is asked for",
            "nothing was written",
        )


def top1(network: Runnable, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of labelled images whose class a network ranks first."""
    right = images = 0
    with torch.no_grad():
        for x_NCHW, label_N in batches:
            right += int((network(x_NCHW).argmax(1) == label_N).sum())
            images += label_N.shape[0]
    return right / images
