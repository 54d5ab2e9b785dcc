"""The closed-form head as the layer that a network ends with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.core.stitching.head import NotFiniteError, fit_head
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import fit_classifier


def data():
    """Features of 60 samples in three classes, told apart by their mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    return torch.randn(60, 5, generator=generator) + 2 * labels[:, None], labels


def network():
    block = nn.Linear(5, 5)
    nn.init.eye_(block.weight)
    nn.init.zeros_(block.bias)
    return AssembledNetwork([block], [None]).eval()


def test_the_head_gives_the_classifiers_logits():
    x_NC, labels = data()
    fitted = network()
    accuracy = fit_head(fitted, torch.split(x_NC, 16), labels.tolist(), 3)
    classifier = fit_classifier(x_NC, labels, 3)
    assert accuracy == pytest.approx(classifier.accuracy)
    assert accuracy > 0.6
    logits = x_NC.double() @ classifier.weight_CD + classifier.bias_D
    with torch.no_grad():
        assert torch.allclose(fitted(x_NC).double(), logits, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    x_NC, labels = data()
    x_NC[7, 2] = value
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        fit_head(network(), [x_NC], labels.tolist(), 3)
