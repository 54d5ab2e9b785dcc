"""The head of a network: a linear layer on its pre-logits, fitted in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import Judgement, LinearClassifier, fit_classifier
from dery_cli.errors import DeryError


class NotFiniteError(DeryError):
    """The pre-logits that a head should be fitted on are NaN or infinite."""


def linear_head(classifier: LinearClassifier) -> nn.Linear:
    """A closed-form classifier as the ``nn.Linear`` a network ends with."""
    head = nn.Linear(*classifier.weight_CD.shape)
    with torch.no_grad():
        head.weight.copy_(classifier.weight_CD.T)
        head.bias.copy_(classifier.bias_D)
    return head


def fit_head(
    network: AssembledNetwork,
    batches: Iterable[Tensor],
    labels: Sequence[int],
    num_classes: int,
    chosen: Judgement | None = None,
) -> float:
    """Give a network without a head the closed-form one, in one pass over labelled images.

    Args:
        network: In eval mode, on one device; its ``head`` is set.
        batches: Normalised images.
        labels: Their class indices, in order.
        num_classes: Of the head.
        chosen: Penalty and temperature; None cross-validates them on these images, which is right
            where their labels are not in the network's stitches.

    Returns:
        The head's cross-validated accuracy on these images, or that of ``chosen``.

    Raises:
        NotFiniteError: The network gives NaN or infinite pre-logits.
    """
    assert network.head is None
    x_NC = network_outputs(network, batches)
    if not torch.isfinite(x_NC).all():
        raise NotFiniteError("the pre-logits are NaN or infinite")
    classifier = fit_classifier(x_NC, torch.tensor(list(labels)), num_classes, chosen=chosen)
    network.head = linear_head(classifier).to(next(network.parameters()).device)
    return classifier.accuracy
