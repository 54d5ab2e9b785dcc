"""Stitches between every pair of layouts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.fit import (
    FIT_POSITIONS,
    fit_stitch,
    reestimate_batch_norm,
    spread_positions,
)
from dery_cli.core.stitching.stitch import (
    Stitch,
    join_tokens,
    resample,
    split_tokens,
    stitch_cost,
)
from dery_cli.types import Layout, Node, StitchKind


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


@pytest.mark.parametrize("kind", list(StitchKind))
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_stitch_gives_the_targets_shape_and_the_promised_cost(source, target, kind):
    stitch = Stitch(source, target, kind).eval()
    assert stitch(torch.randn(2, *source.shape)).shape == (2, *target.shape)
    cost = stitch_cost(source, target, kind)
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


@pytest.mark.parametrize(
    ("source", "target"),
    [(SOURCES[0], TARGETS[0]), (SOURCES[1], node("NCHW", 9, (4, 4))), (SOURCES[3], TARGETS[4])],
)
def test_the_mlp_stitch_can_do_what_the_linear_one_can(source, target):
    torch.manual_seed(0)
    truth = Stitch(source, target)
    x = torch.randn(400, *source.shape)
    y = truth(x).detach()
    fitted = Stitch(source, target, StitchKind.MLP)
    fit = fit_stitch(fitted, lambda: [(x, y)])
    assert fit.r2 > 0.999
    assert torch.allclose(fitted(x), y, atol=0.03 * float(y.std()))


def test_the_mlp_stitch_fits_what_no_linear_one_can():
    torch.manual_seed(0)
    source, target = node("NCHW", 4, (3, 3)), node("NCHW", 4, (3, 3))
    x = torch.randn(500, 4, 3, 3)
    y = x.abs()
    linear, mlp = Stitch(source, target), Stitch(source, target, StitchKind.MLP)
    assert fit_stitch(linear, lambda: [(x, y)]).r2 < 0.1
    assert fit_stitch(mlp, lambda: [(x, y)]).r2 > 0.1


def test_the_papers_stitch_keeps_its_random_weights():
    torch.manual_seed(0)
    cnn = Stitch(SOURCES[0], TARGETS[0], StitchKind.PAPER)
    kinds = [type(layer).__name__ for layer in cnn.channels]
    assert kinds == ["BatchNorm2d", "Conv2d", "LeakyReLU"]
    assert cnn.channels[2].negative_slope == 0.1
    tokens = Stitch(SOURCES[0], TARGETS[3], StitchKind.PAPER)
    assert [type(layer).__name__ for layer in tokens.channels] == ["LayerNorm2d", "Conv2d"]
    before = copy.deepcopy(cnn.state_dict())
    fit = fit_stitch(cnn, lambda: pytest.fail("a pass was made"))
    assert (fit.kind, fit.r2) == (StitchKind.PAPER, None)
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())


def test_with_labels_what_tells_the_classes_apart_comes_through():
    """Channel 0 of the source shifts with the class; the target hardly depends on it."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 2
    x = torch.randn(200, 4, 2, 2, generator=generator)
    x[:, 0] += 3.0 * label[:, None, None]
    y = torch.randn(200, 3, 2, 2, generator=generator) + x[:, 1:4]
    y[:, 0] += 0.5 * label[:, None, None]
    source, target = node("NCHW", 4, (2, 2)), node("NCHW", 3, (2, 2))

    def gap(labels, weight):
        stitch = Stitch(source, target)
        fit = fit_stitch(stitch, lambda: [(x, y)], labels=labels, class_weight=weight)
        out = stitch(x).detach().mean((2, 3))[:, 0]
        return float(out[label == 1].mean() - out[label == 0].mean()), fit.r2

    plain, labelled = gap(None, 0.0), gap(label.tolist(), 4.0)
    assert labelled[0] == pytest.approx(5 * plain[0], rel=0.25)
    assert labelled[1] == plain[1], "R2 is that of the plain regression"
    assert gap(label.tolist(), 0.0) == plain


@pytest.mark.parametrize("differ", [True, False], ids=["positions differ", "positions are alike"])
def test_position_biases_are_kept_where_they_predict_better(differ):
    source, target = node("NLC", 3, (4, 4)), node("NLC", 5, (4, 4), prefix=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, *source.shape, generator=generator)
    y = torch.randn(24, *target.shape, generator=generator)
    if differ:
        y[:, 1:] += 2 * torch.randn(16, 5, generator=generator)
    stitch = Stitch(source, target)
    nn.init.normal_(stitch.position)
    fit = fit_stitch(stitch, lambda: [(x, y)])
    assert fit.position is differ
    grid = y[:, 1:].mean(0).T.reshape(1, 5, 4, 4)
    if differ:
        own = stitch.position + stitch.output.bias[:, None, None]
        assert torch.allclose(own, grid, atol=0.6)
    else:
        assert not stitch.position.any()
        assert torch.allclose(stitch.output.bias, grid.mean((0, 2, 3)), atol=0.1)


def test_a_stitch_without_tokens_says_nothing_of_positions():
    x = torch.randn(20, *SOURCES[0].shape)
    y = torch.randn(20, *TARGETS[0].shape)
    assert fit_stitch(Stitch(SOURCES[0], TARGETS[0]), lambda: [(x, y)]).position is None


@pytest.mark.parametrize(
    "grid", [(56, 56), (28, 28), (15, 14), (17, 53), (112, 112), (400, 1), (1, 400), (98, 3)]
)
def test_a_thinned_grid_falls_on_every_row_and_column_alike(grid):
    kept = spread_positions(grid, FIT_POSITIONS)
    assert len(set(kept)) == len(kept) == FIT_POSITIONS
    assert kept == sorted(kept)
    assert kept[-1] < grid[0] * grid[1]
    roomy = min(grid) > 14  # elsewhere points that meet have to move
    rows, columns = torch.tensor(kept) // grid[1], torch.tensor(kept) % grid[1]
    for lines, side in ((rows, grid[0]), (columns, grid[1])):
        counts = torch.bincount(lines, minlength=side)
        assert int(counts.max() - counts.min()) <= (1 if roomy else 2)
    if roomy:  # and on every ninth of the map
        ninth = torch.bincount(rows * 3 // grid[0] * 3 + columns * 3 // grid[1], minlength=9)
        assert 9 * int(ninth.min()) / FIT_POSITIONS > 0.6
        assert 9 * int(ninth.max()) / FIT_POSITIONS < 1.4


def test_a_pattern_of_columns_does_not_mislead_the_fit_of_a_large_grid():
    """y = x in every eighth column and -x elsewhere: the best factor is -3/4."""
    place = node("NCHW", 1, (56, 56))
    x = torch.randn(40, 1, 56, 56, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(56) % 8 == 0, x, -x)
    stitch = Stitch(place, place)
    fit_stitch(stitch, lambda: [(x, y)])
    assert float(stitch.output.weight.detach()) == pytest.approx(-0.75, abs=0.08)


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


def test_small_batches_are_joined_before_their_statistics_are_taken():
    one, many = _Block().eval(), _Block().eval()
    many.load_state_dict(one.state_dict())
    x = 5 + 3 * torch.randn(32, 3, 4, 4)
    reestimate_batch_norm(one, lambda: x.split(1))
    reestimate_batch_norm(many, lambda: x.split(16))
    assert torch.equal(one.norm.running_var, many.norm.running_var)


def test_statistics_stay_where_there_are_no_two_images():
    block = _Block().eval()
    block.norm.running_mean.fill_(3.0)
    before = copy.deepcopy(block.state_dict())
    assert reestimate_batch_norm(block, lambda: [torch.randn(1, 3, 4, 4)]) == 1
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert block.norm.momentum == 0.1
