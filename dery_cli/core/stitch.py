"""Stitches: the layer that joins two blocks of different donors, fitted in closed form.

Legend: N images, G grid positions, T prefix tokens, C source channels, D target channels.

A stitch takes the tensor at a node of one donor to the tensor another donor expects at one of its
own nodes, between any two layouts: resample to the target's grid (area average down, bilinear up),
map channels with a 1x1 convolution, predict the prefix tokens the target expects from the pooled
features and the source's own prefix tokens, and, into token blocks, add one bias a position, since
position embeddings live in the stem that was left behind.

The fit is ridge regression from what the assembled network really delivers at the source to what
the target's donor saw there on the same images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from dery_cli.core.ridge import RidgeStatistics
from dery_cli.types import Layout, Node

FIT_POSITIONS = 196
"""Grid positions an image may add to a fit without position bias; more are thinned out evenly."""


def grid_size(node: Node) -> int:
    """Number of grid positions G of a node."""
    return node.grid[0] * node.grid[1]


def split_tokens(x: Tensor, node: Node) -> tuple[Tensor, Tensor]:
    """A node's tensor as (grid_NCHW, prefix_NTC), whatever its layout."""
    if node.layout is Layout.NCHW:
        return x, x.new_zeros(x.shape[0], 0, x.shape[1])
    if node.layout is Layout.NHWC:
        return x.permute(0, 3, 1, 2), x.new_zeros(x.shape[0], 0, x.shape[3])
    if node.layout is Layout.NC:
        return x[:, :, None, None], x.new_zeros(x.shape[0], 0, x.shape[1])
    prefix_NTC = x[:, : node.num_prefix_tokens]
    grid_NGC = x[:, node.num_prefix_tokens :]
    grid_NCG = grid_NGC.transpose(1, 2)
    return grid_NCG.reshape(*grid_NCG.shape[:2], *node.grid), prefix_NTC


def join_tokens(grid_NCHW: Tensor, prefix_NTC: Tensor, node: Node) -> Tensor:
    """The inverse of ``split_tokens``."""
    if node.layout is Layout.NCHW:
        return grid_NCHW.contiguous()
    if node.layout is Layout.NHWC:
        return grid_NCHW.permute(0, 2, 3, 1).contiguous()
    if node.layout is Layout.NC:
        return grid_NCHW.flatten(1)
    return torch.cat([prefix_NTC, grid_NCHW.flatten(2).transpose(1, 2)], dim=1)


def resample(grid_NCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Area average where an axis shrinks, bilinear where it grows."""
    height, width = grid_NCHW.shape[-2:]
    down = (min(height, grid[0]), min(width, grid[1]))
    if down != (height, width):
        grid_NCHW = functional.adaptive_avg_pool2d(grid_NCHW, down)
    if down != tuple(grid):
        grid_NCHW = functional.interpolate(
            grid_NCHW, size=grid, mode="bilinear", align_corners=False
        )
    return grid_NCHW


class Stitch(nn.Module):
    """The linear stitch from ``source`` to ``target``.

    Parameters: ``channels`` (1x1 convolution C -> D with bias), ``position`` (one bias a grid
    position, for token targets) and ``prefix`` (linear map to the target's prefix tokens).
    """

    def __init__(self, source: Node, target: Node) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.channels = nn.Conv2d(source.num_chs, target.num_chs, kernel_size=1)
        self.position: nn.Parameter | None = None
        self.prefix: nn.Linear | None = None
        if _has_position(target):
            self.position = nn.Parameter(torch.zeros(1, target.num_chs, *target.grid))
        if target.num_prefix_tokens:
            self.prefix = nn.Linear(
                source.num_chs * (1 + source.num_prefix_tokens),
                target.num_chs * target.num_prefix_tokens,
            )

    def forward(self, x: Tensor) -> Tensor:
        grid_NCHW, prefix_NTC = split_tokens(x, self.source)
        if _convolve_first(self.source, self.target):
            y_NDHW = resample(self.channels(grid_NCHW), self.target.grid)
        else:
            y_NDHW = self.channels(resample(grid_NCHW, self.target.grid))
        if self.position is not None:
            y_NDHW = y_NDHW + self.position
        tokens_NTD = y_NDHW.new_zeros(len(x), 0, self.target.num_chs)
        if self.prefix is not None:
            summary_NC = prefix_inputs(grid_NCHW, prefix_NTC)
            tokens_NTD = self.prefix(summary_NC).reshape(len(x), self.target.num_prefix_tokens, -1)
        return join_tokens(y_NDHW, tokens_NTD, self.target)

    def extra_repr(self) -> str:
        return f"{_brief(self.source)} -> {_brief(self.target)}"


def _brief(node: Node) -> str:
    return f"{node.layout}{node.shape}"


def _has_position(target: Node) -> bool:
    return target.layout is Layout.NLC


def _convolve_first(source: Node, target: Node) -> bool:
    """The 1x1 convolution and the resampling commute; convolve on the smaller grid."""
    return grid_size(source) < grid_size(target)


def prefix_inputs(grid_NCHW: Tensor, prefix_NTC: Tensor) -> Tensor:
    """What prefix tokens are predicted from: the pooled grid and the source's own prefix tokens."""
    return torch.cat([grid_NCHW.mean((2, 3)), prefix_NTC.flatten(1)], dim=1)


@dataclasses.dataclass(frozen=True)
class StitchCost:
    """Parameters and multiply-adds (one image) of a stitch."""

    params: int
    flops: int


def stitch_cost(source: Node, target: Node) -> StitchCost:
    """Cost of ``Stitch(source, target)``, without building it."""
    c, d = source.num_chs, target.num_chs
    params = c * d + d
    flops = c * d * min(grid_size(source), grid_size(target))
    if _has_position(target):
        params += d * grid_size(target)
    if target.num_prefix_tokens:
        inputs = c * (1 + source.num_prefix_tokens)
        outputs = d * target.num_prefix_tokens
        params += inputs * outputs + outputs
        flops += inputs * outputs
    return StitchCost(params, flops)


@dataclasses.dataclass(frozen=True)
class StitchFit:
    """How well a stitch was fitted.

    Args:
        r2: Cross-validated R2 at the target's grid positions.
        prefix_r2: The same for its prefix tokens; None where it expects none.
    """

    r2: float
    prefix_r2: float | None


PairedBatches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over calibration batches: (source tensor, target tensor) of the same images."""


def fit_stitch(stitch: Stitch, batches: PairedBatches, *, folds: int = 4) -> StitchFit:
    """Fit a stitch in closed form, in place.

    Args:
        stitch: Layer to fit.
        batches: One pass gives pairs (what the network delivers at ``stitch.source``, what the
            target's donor has at ``stitch.target``), each with the batch first.
        folds: Cross-validation folds; image i of the pass belongs to fold i mod ``folds``.

    Raises:
        ValueError: The pass gave no image.
    """
    source, target = stitch.source, stitch.target
    device = stitch.channels.weight.device
    use_position = stitch.position is not None
    kept = _kept_positions(target, use_position)
    rows = RidgeStatistics(len(kept), source.num_chs, target.num_chs, folds=folds, device=device)
    tokens: RidgeStatistics | None = None
    if stitch.prefix is not None:
        tokens = RidgeStatistics(
            1, stitch.prefix.in_features, stitch.prefix.out_features, folds=folds, device=device
        )
    counter = itertools.count()
    images = 0
    with torch.no_grad():
        for source_x, target_x in batches():
            grid_NCHW, prefix_NTC = split_tokens(source_x, source)
            wanted_NDHW, wanted_NTD = split_tokens(target_x, target)
            fold_N = torch.tensor([next(counter) % folds for _ in range(len(source_x))])
            x_NGC = resample(grid_NCHW, target.grid).flatten(2).transpose(1, 2)
            y_NGD = wanted_NDHW.flatten(2).transpose(1, 2)
            rows.update(x_NGC[:, kept], y_NGD[:, kept], fold_N)
            if tokens is not None:
                x_NC = prefix_inputs(grid_NCHW, prefix_NTC)
                tokens.update(x_NC[:, None], wanted_NTD.flatten(1)[:, None], fold_N)
            images += len(source_x)
        if images == 0:
            raise ValueError("no calibration image to fit a stitch with")
        fit = rows.solve(position_bias=use_position)
        _copy(stitch.channels.weight, fit.weight_CD.T[:, :, None, None])
        if stitch.position is not None:
            mean_D = fit.bias_GD.mean(0)
            _copy(_required(stitch.channels.bias), mean_D)
            _copy(stitch.position, (fit.bias_GD - mean_D).T.reshape(1, -1, *target.grid))
        else:
            _copy(_required(stitch.channels.bias), fit.bias_GD[0])
        prefix_r2 = None
        if tokens is not None and stitch.prefix is not None:
            token_fit = tokens.solve(position_bias=False)
            _copy(stitch.prefix.weight, token_fit.weight_CD.T)
            _copy(stitch.prefix.bias, token_fit.bias_GD[0])
            prefix_r2 = token_fit.r2
    return StitchFit(fit.r2, prefix_r2)


def _required(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _kept_positions(target: Node, use_position: bool) -> list[int]:
    """Position biases need every position; otherwise large grids are thinned evenly."""
    count = grid_size(target)
    if use_position or count <= FIT_POSITIONS:
        return list(range(count))
    return [(i * count) // FIT_POSITIONS for i in range(FIT_POSITIONS)]


def batch_norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers of a module that keep running statistics."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats:
            yield child


def reestimate_batch_norm(block: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> int:
    """Set the running statistics of a block's batch norms to those of its present inputs.

    One pass in which only the batch norms are in training mode, their averages cumulative.

    Returns:
        The number of layers touched; 0 means that no pass was made.
    """
    layers = list(batch_norms(block))
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    block.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        with torch.no_grad():
            for x in batches():
                if len(x) > 1:
                    block(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
    return len(layers)
