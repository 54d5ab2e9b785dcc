"""Classes for images without labels: clusters of what a donor makes of them.

Legend: N images, C channels, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESTARTS = 4
MAX_STEPS = 100


def pseudo_labels(x_NC: Tensor, k: int, seed: int) -> Tensor:
    """The cluster of each image by k-means on its features: a weak stand-in for its class.

    Lloyd's algorithm from ``RESTARTS`` drawings of k-means++, the tightest of which counts; in
    float64, so that the answer is the same for the same seed. Clusters are numbered in the order of
    their first image, and none is empty.

    Args:
        x_NC: Features, such as a donor's pre-logits; channels count by their variance.
        k: K, at most the number of distinct images.
        seed: Of the drawings.

    Raises:
        ValueError: There are fewer than ``k`` distinct rows.
    """
    x_NC = x_NC.cpu().double()
    x_NC = x_NC - x_NC.mean(0)
    distinct = torch.unique(x_NC, dim=0)
    if not 1 <= k <= len(distinct):
        raise ValueError(f"{len(distinct)} distinct images do not make {k} clusters")
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(x_NC, plus_plus(x_NC, k, generator)) for _ in range(RESTARTS)]
    _, label_N = min(runs, key=lambda run: run[0])
    number: dict[int, int] = {}
    return torch.tensor([number.setdefault(label, len(number)) for label in label_N.tolist()])


def plus_plus(x_NC: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres far from one another (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(torch.randint(len(x_NC), (1,), generator=generator))]
    away_N = (x_NC - x_NC[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        chosen.append(int(torch.multinomial(away_N, 1, generator=generator)))
        away_N = torch.minimum(away_N, (x_NC - x_NC[chosen[-1]]).square().sum(1))
    return x_NC[chosen]


def _lloyd(x_NC: Tensor, centre_KC: Tensor) -> tuple[float, Tensor]:
    """The sum of squares within clusters, and the cluster of each row."""
    label_N = torch.full((len(x_NC),), -1)
    for _ in range(MAX_STEPS):
        away_NK = torch.cdist(x_NC, centre_KC, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_N, before_N = away_NK.argmin(1), label_N
        label_N = _none_empty(nearest_N, away_NK.amin(1), len(centre_KC))
        if torch.equal(label_N, before_N):
            break
        member_NK = torch.nn.functional.one_hot(label_N, len(centre_KC)).double()
        centre_KC = (member_NK.T @ x_NC) / member_NK.sum(0)[:, None]
    return float((x_NC - centre_KC[label_N]).square().sum()), label_N


def _none_empty(label_N: Tensor, away_N: Tensor, k: int) -> Tensor:
    """Labels in which a cluster that lost all its rows gets the one farthest from its centre."""
    label_N = label_N.clone()
    for cluster in range(k):
        if not (label_N == cluster).any():
            alone_N = torch.bincount(label_N, minlength=k)[label_N] == 1
            label_N[int(away_N.masked_fill(alone_N, -1).argmax())] = cluster
    return label_N
