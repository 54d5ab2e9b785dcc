"""Similarity of every node of a zoo with every other (DESIGN.md, *Similarity*).

``similarity(features, "cka")`` takes feat_NC of P nodes and gives sim_PP. The metrics themselves
are in ``cka`` and ``regression``, the products they share in ``gram``, their contract in
``metric``; ``features`` pools what they compare.

Legend: N samples, C channels, P nodes, M models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dery_cli.core.numerics import solving_device
from dery_cli.core.similarity import models
from dery_cli.core.similarity.cka import cka, rbf_cka
from dery_cli.core.similarity.metric import (
    Known,
    Metric,
    MetricOptions,
    Progress,
    Rows,
    Similarity,
    pairwise_metric,
)
from dery_cli.core.similarity.regression import lr, ridge

CKA = Metric(name="cka", directional=False, fn=cka)
RBF_CKA = Metric(name="rbf_cka", directional=False, fn=rbf_cka)
LR = Metric(name="lr", directional=True, fn=lr)
RIDGE = Metric(name="ridge", directional=True, fn=ridge)

__all__ = [
    "CKA",
    "LR",
    "RBF_CKA",
    "RIDGE",
    "Known",
    "Metric",
    "MetricOptions",
    "Similarity",
    "model_similarity",
    "pairwise_metric",
    "similarity",
]


@torch.no_grad()
def similarity(
    features: Sequence[Rows],
    metric: Metric = CKA,
    options: MetricOptions | None = None,
    *,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Compare every node with every other.

    Args:
        features: feat_NC [N, C] of each of P nodes, the same N samples in the same random order.
            Tensors, or whatever reads rows when sliced (``Rows``): nothing else is held in memory.
        metric: ``CKA``, ``RBF_CKA``, ``LR``, ``RIDGE`` or a plugin's.
        options: The metric's options; the defaults if left out.
        known: An earlier result with the same metric, options and samples. Pairs of nodes that it
            holds are not computed again; a node it does not hold needs the features of all.
        progress: Told (multiply-adds done, in all).

    Returns:
        sim_PP and what is needed to add nodes later. It is float64, or float32 where float64 would
        take more than a quarter of ``options.memory``.

    Raises:
        UsageError: Too few samples, nodes with different sample counts, too small a memory bound.
        DeryError: Features hold NaN or infinity.

    Example:
        >>> x = torch.randn(512, 8)
        >>> round(float(similarity([x, 3 * x + 1]).sim_PP[0, 1]), 6)
        1.0
    """
    options = options or MetricOptions()
    options = dataclasses.replace(options, device=str(solving_device(options.device)))
    return metric.fn(features, options, known, progress)


def model_similarity(sim_PP: Tensor, model_P: Sequence[int]) -> Tensor:
    """``models.model_similarity`` of a tensor."""
    return torch.from_numpy(models.model_similarity(sim_PP.numpy(), model_P))
