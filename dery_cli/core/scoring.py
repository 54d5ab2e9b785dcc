"""What a network says of images, and how often it is right.

Legend: N (or B, of one batch) samples, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dery_cli.core.numerics import double


def network_outputs(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Logits of all images, pre-logits where the network has no head: (N, K or C), on the CPU."""
    with torch.no_grad():
        return torch.cat([network(x).cpu() for x in batches])


def top1(logits_NK: Tensor, label_N: Tensor) -> Tensor:
    """Share of the samples whose class is ranked first; leading dimensions are kept.

    Args:
        logits_NK: (..., N, K).
        label_N: Class indices.

    Returns:
        In double precision, (...).
    """
    return double(logits_NK.argmax(-1) == label_N).mean(-1)


def score_batch(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per image: label, guess, cross entropy, and whether the label is among the first five."""
    logits_BK = logits_BK.float()
    first_BT = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    loss_B = functional.cross_entropy(logits_BK, labels_B, reduction="none")
    return labels_B, logits_BK.argmax(1), loss_B, (first_BT == labels_B[:, None]).any(dim=1)
