"""Proxies that any other has to beat: sizes, and the probe."""

from __future__ import annotations

import math

import torch

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.probe import probe_accuracy
from dery_cli.core.training_free.inputs import ProxyInputs, stated


@stated(source="none needed", cost="none", reads_labels=False)
def params(inputs: ProxyInputs) -> float:
    """Number of parameters: the baseline every proxy has to beat."""
    return float(count_params(inputs.network))


@stated(source="none needed", cost="one pass on the meta device", reads_labels=False)
def flops(inputs: ProxyInputs) -> float:
    """Multiply-adds for one image: the other baseline."""
    first = next(iter(inputs.batches()), None)
    return math.nan if first is None else float(count_flops(inputs.network, first))


@stated(
    source="dery: a ridge classifier in closed form, see core/stitching/probe.py",
    cost="one forward pass of all of the target's images, and a regression",
    reads_labels=True,
)
def probe(inputs: ProxyInputs) -> float:
    """Cross-validated accuracy of the closed-form classifier on the pre-logits.

    Raises:
        ValueError: There are no labels.
    """
    if inputs.labels is None or inputs.num_classes is None:
        raise ValueError("the proxy 'probe' needs labels")
    x_NC = network_outputs(inputs.network, inputs.batches())
    return probe_accuracy(x_NC, torch.tensor(list(inputs.labels)), inputs.num_classes)
