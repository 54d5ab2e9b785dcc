"""Training stitches to give the last donor's features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dery_cli.core.stitching.match import match_features
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.types import Layout, Node


def _node(channels: int) -> Node:
    return Node(
        index=1, name="node", layout=Layout.NCHW, shape=(channels, 4, 4), grid=(4, 4), params=0
    )


class _Second(nn.Module):
    """A block with a batch norm, from (N, 5, 4, 4) to pre-logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.conv = nn.Conv2d(5, 6, 1)

    def forward(self, x):
        return torch.tanh(self.conv(self.norm(x))).mean((2, 3))


@pytest.fixture
def parts():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 1), _Second()
    x = torch.randn(150, 3, 4, 4)
    truth = Stitch(_node(4), _node(5))
    network = AssembledNetwork([first, second], [None, truth]).eval()
    with torch.no_grad():
        wanted = network.forward_features(x)
    network.stitches["1"] = Stitch(_node(4), _node(5))
    network.head = nn.Linear(6, 2)
    return network.eval(), x, wanted


def test_the_stitch_learns_what_gives_the_wanted_features(parts):
    network, x, wanted = parts
    before = copy.deepcopy(network.state_dict())
    match = match_features(network, x, wanted, steps=200, lr=0.03)
    assert match.before < 0.5
    assert match.after > 0.95
    assert match.kept
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"stitches.1.channels.weight", "stitches.1.channels.bias"}
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not network.training


def test_the_same_seed_gives_the_same_stitch_and_another_seed_another(parts):
    network, x, wanted = parts
    found = []
    for seed in (1, 1, 2):
        copied = copy.deepcopy(network)
        match_features(copied, x, wanted, steps=5, seed=seed)
        found.append(copied.stitches["1"].channels.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_stitches_that_got_worse_are_put_back(parts):
    network, x, wanted = parts
    before = copy.deepcopy(network.stitches.state_dict())
    match = match_features(network, x, wanted, steps=20, lr=100.0)
    assert not match.kept
    assert match.after <= match.before
    assert all(torch.equal(v, before[n]) for n, v in network.stitches.state_dict().items())


def test_nothing_to_train_is_an_error(parts):
    network, x, wanted = parts
    with pytest.raises(ValueError, match="needs a network with stitches"):
        match_features(AssembledNetwork(list(network.blocks)[:1], [None]), x, wanted)
