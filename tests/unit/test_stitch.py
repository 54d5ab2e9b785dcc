"""Stitches between every pair of layouts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from dery_cli.core.cost import count_flops, count_params
from dery_cli.core.stitch import (
    Stitch,
    fit_stitch,
    join_tokens,
    reestimate_batch_norm,
    resample,
    split_tokens,
    stitch_cost,
)
from dery_cli.types import Layout, Node


def node(layout: str, channels: int, grid: tuple[int, int], prefix: int = 0) -> Node:
    height, width = grid
    shape = {
        "NCHW": (channels, height, width),
        "NHWC": (height, width, channels),
        "NLC": (height * width + prefix, channels),
        "NC": (channels,),
    }[layout]
    return Node(
        index=1,
        name="node",
        layout=Layout(layout),
        shape=shape,
        grid=(1, 1) if layout == "NC" else grid,
        num_prefix_tokens=prefix,
    )


SOURCES = [
    node("NCHW", 6, (4, 4)),
    node("NHWC", 5, (2, 2)),
    node("NLC", 7, (3, 3)),
    node("NLC", 6, (4, 4), prefix=1),
    node("NC", 4, (1, 1)),
]
TARGETS = [
    node("NCHW", 3, (2, 2)),
    node("NCHW", 3, (8, 8)),
    node("NHWC", 4, (4, 4)),
    node("NLC", 5, (4, 4)),
    node("NLC", 5, (2, 2), prefix=1),
    node("NLC", 3, (3, 3), prefix=3),
    node("NC", 6, (1, 1)),
]
PAIRS = list(itertools.product(SOURCES, TARGETS))


@pytest.mark.parametrize("place", SOURCES + TARGETS, ids=lambda n: f"{n.layout}{n.shape}")
def test_split_and_join_are_inverse(place):
    x = torch.randn(2, *place.shape)
    grid, prefix = split_tokens(x, place)
    assert grid.shape == (2, place.num_chs, *place.grid)
    assert prefix.shape == (2, place.num_prefix_tokens, place.num_chs)
    assert torch.equal(join_tokens(grid, prefix, place), x)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_stitch_gives_the_targets_shape_and_the_promised_cost(source, target):
    stitch = Stitch(source, target)
    assert stitch(torch.randn(2, *source.shape)).shape == (2, *target.shape)
    cost = stitch_cost(source, target)
    assert cost.params == count_params(stitch)
    assert cost.flops == count_flops(stitch, torch.zeros(1, *source.shape))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_fit_recovers_a_map_that_a_stitch_can_express(source, target):
    torch.manual_seed(0)
    truth = Stitch(source, target)
    for parameter in truth.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(160, *source.shape)
    y = truth(x).detach()
    fitted = Stitch(source, target)
    batches = [(x[i : i + 48], y[i : i + 48]) for i in range(0, 160, 48)]
    fit = fit_stitch(fitted, lambda: batches)
    assert fit.r2 > 0.999
    assert (fit.prefix_r2 is None) == (target.num_prefix_tokens == 0)
    assert torch.allclose(fitted(x), y, atol=0.02 * float(y.std()))


def test_resampling_averages_down_and_interpolates_up():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(resample(x, (2, 2)), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert torch.equal(resample(x, (4, 4)), x)
    up = resample(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))
    assert torch.allclose(up, torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))
    mixed = resample(x, (2, 8))
    assert mixed.shape == (1, 1, 2, 8)


def test_convolving_before_upsampling_changes_nothing():
    small, large = node("NCHW", 3, (2, 2)), node("NCHW", 4, (6, 6))
    stitch = Stitch(small, large)
    x = torch.randn(2, 3, 2, 2)
    assert torch.allclose(stitch(x), stitch.channels(resample(x, (6, 6))), atol=1e-6)
    assert stitch_cost(small, large).flops == 3 * 4 * 4


def test_no_image_is_an_error():
    stitch = Stitch(SOURCES[0], TARGETS[0])
    with pytest.raises(ValueError, match="no calibration image"):
        fit_stitch(stitch, list)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4, momentum=0.1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


def test_batch_norm_takes_the_statistics_of_its_present_inputs():
    block = _Block().eval()
    weights = copy.deepcopy(block.state_dict())
    x = 5 + 3 * torch.randn(40, 3, 4, 4)
    touched = reestimate_batch_norm(block, lambda: [x[:20], x[20:]])
    assert touched == 1
    features = block.conv(x).detach()
    assert torch.allclose(block.norm.running_mean, features.mean((0, 2, 3)), atol=1e-4)
    halves = torch.stack([features[:20].var((0, 2, 3)), features[20:].var((0, 2, 3))]).mean(0)
    assert torch.allclose(block.norm.running_var, halves, atol=1e-4)
    assert block.norm.momentum == 0.1
    assert not any(module.training for module in block.modules())
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        assert torch.equal(block.state_dict()[name], weights[name])


def test_no_pass_is_made_without_batch_norm():
    def never():
        raise AssertionError("a pass was made")

    assert reestimate_batch_norm(nn.Conv2d(3, 3, 1), never) == 0
