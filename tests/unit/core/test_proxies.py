"""Training-free proxies against hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dery_cli.core.proxies import ProxyInputs, naswot, params, probe
from dery_cli.core.stitching.probe import probe_accuracy


def inputs(network: nn.Module, x: torch.Tensor, labels=None, classes=None) -> ProxyInputs:
    return ProxyInputs(
        network=network.eval(),
        batches=lambda: iter(x.split(20)),
        labels=labels,
        num_classes=classes,
    )


def test_params_counts_them():
    assert params(inputs(nn.Linear(5, 3), torch.zeros(1, 5))) == 18


def test_probe_is_the_cross_validated_accuracy_of_the_pre_logits():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    labels = torch.arange(60) % 3
    x = torch.randn(60, 6) + 2 * torch.eye(3, 6)[labels]
    with torch.no_grad():
        expected = probe_accuracy(network(x), labels, 3)
    assert probe(inputs(network, x, labels.tolist(), 3)) == expected
    with pytest.raises(ValueError, match="needs labels"):
        probe(inputs(network, x))


def test_naswot_is_the_log_determinant_of_the_code_kernel():
    torch.manual_seed(0)
    linear = nn.Linear(6, 64)
    network = nn.Sequential(linear, nn.ReLU(inplace=True))
    x = torch.randn(64, 6)
    scores = []
    for batch in x.split(32):
        code = (linear(batch) > 0).double()
        kernel = torch.zeros(32, 32, dtype=torch.float64)
        for i in range(32):
            for j in range(32):
                kernel[i, j] = (code[i] == code[j]).sum()
        scores.append(float(torch.linalg.slogdet(kernel)[1]))
    assert naswot(inputs(network, x)) == pytest.approx(sum(scores) / 2, rel=1e-9)


def test_naswot_leaves_no_hook_and_no_mode_behind():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.GELU())
    naswot(inputs(network, torch.randn(40, 6)))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module.training
    assert network[1].inplace is True


def test_naswot_prefers_codes_that_differ():
    x = torch.randn(32, 16)
    same = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
    with torch.no_grad():
        same[0].weight.zero_()
        same[0].bias.fill_(1.0)
    different = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
    assert naswot(inputs(different, x)) > naswot(inputs(same, x))


def test_naswot_without_activations_is_minus_infinity():
    assert naswot(inputs(nn.Linear(6, 3), torch.randn(32, 6))) == -math.inf
