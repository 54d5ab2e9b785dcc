"""Stitches: the layer that joins two blocks of different donors. ``fit`` fits it.

Legend: N images, G grid positions, T prefix tokens, C source channels, D target channels.

A stitch takes the tensor at a node of one donor to the tensor another donor expects at one of its
own nodes, between any two layouts: resample to the target's grid (area average down, bilinear up),
map channels with a 1x1 convolution, predict the prefix tokens the target expects from the pooled
features and the source's own prefix tokens, and, into token blocks, add one bias a position, since
position embeddings live in the stem that was left behind.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from dery_cli.types import Layout, Node, StitchKind


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
    """The stitch from ``source`` to ``target``.

    ``linear``: a 1x1 convolution C -> D. ``mlp``: two of them with a GELU between, 2 min(C, D)
    channels wide. ``paper``: batch norm, 1x1 convolution, LeakyReLU(0.1), and into tokens layer
    norm and a linear map (Yang et al., NeurIPS 2022), meant to be trained from random weights.

    Parameters: ``channels`` (the map above), ``position`` (one bias a grid position, for token
    targets, but under ``paper``) and ``prefix`` (linear map to the target's prefix tokens).

    Args:
        source: Node the stitch begins at.
        target: Node it ends at.
        kind: Of the channel map.
    """

    def __init__(self, source: Node, target: Node, kind: StitchKind = StitchKind.LINEAR) -> None:
        super().__init__()
        self.source, self.target, self.kind = source, target, kind
        self.channels = _channel_map(source, target, kind)
        self.position: nn.Parameter | None = None
        self.prefix: nn.Linear | None = None
        if _has_position(target, kind):
            self.position = nn.Parameter(torch.zeros(1, target.num_chs, *target.grid))
        if target.num_prefix_tokens:
            self.prefix = nn.Linear(
                source.num_chs * (1 + source.num_prefix_tokens),
                target.num_chs * target.num_prefix_tokens,
            )

    @property
    def output(self) -> nn.Conv2d:
        """The last 1x1 convolution: what a closed-form fit sets."""
        layer = self.channels
        if isinstance(layer, nn.Sequential):
            layer = next(m for m in reversed(layer) if isinstance(m, nn.Conv2d))
        assert isinstance(layer, nn.Conv2d)
        return layer

    def hidden(self, grid_NCHW: Tensor) -> Tensor:
        """What ``output`` is applied to, on the target's grid."""
        before = nn.Sequential()
        if isinstance(self.channels, nn.Sequential):
            before = self.channels[: list(self.channels).index(self.output)]
        if _convolve_first(self.source, self.target):
            return resample(before(grid_NCHW), self.target.grid)
        hidden: Tensor = before(resample(grid_NCHW, self.target.grid))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        grid_NCHW, prefix_NTC = split_tokens(x, self.source)
        if _convolve_first(self.source, self.target):
            y_NDHW = resample(self.channels(grid_NCHW), self.target.grid)
        else:
            y_NDHW = self.channels(resample(grid_NCHW, self.target.grid))
        if self.position is not None:
            y_NDHW = y_NDHW + self.position
        tokens_NTD = y_NDHW.new_zeros(x.shape[0], 0, self.target.num_chs)
        if self.prefix is not None:
            summary_NC = prefix_inputs(grid_NCHW, prefix_NTC)
            tokens_NTD = self.prefix(summary_NC)
            tokens_NTD = tokens_NTD.reshape(-1, self.target.num_prefix_tokens, self.target.num_chs)
        return join_tokens(y_NDHW, tokens_NTD, self.target)

    def extra_repr(self) -> str:
        return f"{self.kind}: {_brief(self.source)} -> {_brief(self.target)}"


def _channel_map(source: Node, target: Node, kind: StitchKind) -> nn.Module:
    c, d = source.num_chs, target.num_chs
    if kind is StitchKind.MLP:
        width = mlp_width(source, target)
        return nn.Sequential(nn.Conv2d(c, width, 1), nn.GELU(), nn.Conv2d(width, d, 1))
    if kind is StitchKind.PAPER:
        if target.layout is Layout.NCHW:
            return nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, d, 1), nn.LeakyReLU(0.1))
        from timm.layers import LayerNorm2d  # takes two seconds, and only this kind needs it

        return nn.Sequential(LayerNorm2d(c), nn.Conv2d(c, d, 1))
    return nn.Conv2d(c, d, 1)


def mlp_width(source: Node, target: Node) -> int:
    """Hidden channels of the ``mlp`` stitch: a pair for each of min(C, D) directions.

    GELU(u) - GELU(-u) = u, so a pair of opposite units passes a direction on unchanged, and the
    two layers can do whatever the linear stitch can.
    """
    return 2 * min(source.num_chs, target.num_chs)


def _brief(node: Node) -> str:
    return f"{node.layout}{node.shape}"


def _has_position(target: Node, kind: StitchKind) -> bool:
    return target.layout is Layout.NLC and kind is not StitchKind.PAPER


def _convolve_first(source: Node, target: Node) -> bool:
    """A 1x1 convolution and the resampling commute; convolve on the smaller grid."""
    return grid_size(source) < grid_size(target)


def prefix_inputs(grid_NCHW: Tensor, prefix_NTC: Tensor) -> Tensor:
    """What prefix tokens are predicted from: the pooled grid and the source's own prefix tokens."""
    return torch.cat([grid_NCHW.mean((2, 3)), prefix_NTC.flatten(1)], dim=1)


@dataclasses.dataclass(frozen=True)
class StitchCost:
    """Parameters and multiply-adds (one image) of a stitch."""

    params: int
    flops: int


def stitch_cost(source: Node, target: Node, kind: StitchKind = StitchKind.LINEAR) -> StitchCost:
    """Cost of ``Stitch(source, target, kind)``, without building it."""
    c, d = source.num_chs, target.num_chs
    cells = min(grid_size(source), grid_size(target))
    if kind is StitchKind.MLP:
        width = mlp_width(source, target)
        params, flops = (c + 1) * width + (width + 1) * d, (c + d) * width * cells
    else:
        params, flops = c * d + d, c * d * cells
        if kind is StitchKind.PAPER:
            params += 2 * c
    if _has_position(target, kind):
        params += d * grid_size(target)
    if target.num_prefix_tokens:
        inputs = c * (1 + source.num_prefix_tokens)
        outputs = d * target.num_prefix_tokens
        params += inputs * outputs + outputs
        flops += inputs * outputs
    return StitchCost(params, flops)
