"""How much the classes should count in a stitch's fit, by what the next block makes of it.

Where the donors know the task, plain regression is best: a donor stitched to itself comes back.
Where they do not, it loses what the task needs. So each joint tries several weights: it is fitted
on half of the images and the probe is asked on the other half, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.fit import FOLDS, StitchRegression, reestimate_batch_norm
from dery_cli.core.stitching.probe import probe_error
from dery_cli.types import Node

CLASS_WEIGHTS = (0.0, 2.0, 4.0)
MIN_IMAGES = 40
"""Half of fewer images tells nothing; the plain regression is kept."""


def choose_class_weight(
    regression: StitchRegression,
    block: nn.Module,
    after: Node,
    batches: Callable[[], Iterable[Tensor]],
    labels: Sequence[int],
) -> float:
    """The weight with the lowest error of the probe at the end of the next block.

    Args:
        regression: Of the stitch in front of the block; left at its last fit.
        block: In eval mode, with statistics of its own: they are left at those of a trial.
        after: Node the block ends at.
        batches: Starts a pass over what the stitch gets; image i is in fold i mod ``FOLDS``.
        labels: Classes of the images.
    """
    label_N = torch.tensor(list(labels))
    num_classes = int(label_N.max()) + 1
    if len(label_N) < MIN_IMAGES:
        return CLASS_WEIGHTS[0]
    even, odd = range(0, FOLDS, 2), range(1, FOLDS, 2)
    errors = []
    for weight in CLASS_WEIGHTS:
        error = 0.0
        for fitted_on, asked_on in ((even, odd), (odd, even)):
            regression.fit(weight, only=fitted_on, judged=False)
            asked_N = torch.isin(torch.arange(len(label_N)) % FOLDS, torch.tensor(asked_on))
            feat_NC = _features(regression.stitch, block, after, batches, asked_N)
            error += probe_error(feat_NC, label_N[asked_N], num_classes)
        errors.append(error)
    return CLASS_WEIGHTS[errors.index(min(errors))]


def _features(
    stitch: nn.Module,
    block: nn.Module,
    after: Node,
    batches: Callable[[], Iterable[Tensor]],
    asked_N: Tensor,
) -> Tensor:
    """What the block, its statistics those of the other images, makes of those asked about."""

    def stitched(wanted_N: Tensor) -> Iterator[Tensor]:
        start = 0
        for x in batches():
            kept = wanted_N[start : start + len(x)].to(x.device)
            start += len(x)
            if kept.any():
                yield stitch(x[kept])

    with torch.no_grad():
        reestimate_batch_norm(block, lambda: stitched(~asked_N))
        return torch.cat([probe_features(block(x), after) for x in stitched(asked_N)])
