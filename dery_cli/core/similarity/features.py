"""Features at every node of a donor, pooled as they come (DESIGN.md, *Embed*).

Legend: N samples, C channels, H x W positions of a feature map, G = g_h * g_w positions after
pooling, L grid tokens, T prefix tokens (class and register tokens).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dery_cli.errors import DeryError
from dery_cli.types import Anatomy, Layout, Node


class Dissected(Protocol):
    """What is asked of a ``Dissection``: its nodes, and their features in order."""

    @property
    def anatomy(self) -> Anatomy: ...

    def features(self, x: Tensor) -> Iterator[Tensor]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledFeatures:
    """One batch at one node.

    Args:
        feat_NC: Mean over grid positions; prefix tokens are left out.
        feat_NGC: Means over the cells of the pooled grid, in raster order. N here is the number of
            samples the grid was asked for, which may be less than in ``feat_NC``.
        prefix_NTC: Prefix tokens of the same samples as ``feat_NGC``; T may be 0.
    """

    feat_NC: Tensor
    feat_NGC: Tensor
    prefix_NTC: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFeatures:
    """One batch at all nodes.

    Args:
        start: Index of the batch's first sample.
        nodes: Pooled features of node 0, 1, ..., on the CPU.
    """

    start: int
    nodes: Sequence[PooledFeatures]


def pool_node(
    x: Tensor, node: Node, grid: int, *, grid_samples: int | None = None
) -> PooledFeatures:
    """Pool the raw features of one node.

    Positions are averaged by area over min(grid, H) x min(grid, W) cells; where the cells do not
    divide the map they overlap by a position, as in ``adaptive_avg_pool2d``.

    Args:
        x: Features of a batch, laid out as ``node.layout`` says.
        node: The node they belong to.
        grid: Cells along each side.
        grid_samples: How many samples of the batch get ``feat_NGC`` and ``prefix_NTC``; all by
            default.

    Raises:
        DeryError: ``x`` has not the shape that the node was registered with.
    """
    if tuple(x.shape[1:]) != tuple(node.shape):
        raise DeryError(
            f"node {node.index} ({node.name}) gave features of shape {tuple(x.shape[1:])}, "
            f"registered with {tuple(node.shape)}",
            "register the model again with `dery zoo add`",
        )
    if not torch.finfo(x.dtype).bits >= 32:
        x = x.float()
    if node.layout is Layout.NC:
        some = x[:grid_samples]
        return PooledFeatures(feat_NC=x, feat_NGC=some[:, None], prefix_NTC=some[:, None][:, :0])
    prefix_NTC = x.new_empty(x.shape[0], 0, node.num_chs)
    if node.layout is Layout.NCHW:
        feat_NCHW = x
        feat_NC = x.mean((2, 3))
    elif node.layout is Layout.NHWC:
        feat_NCHW = x.permute(0, 3, 1, 2)
        feat_NC = x.mean((1, 2))
    else:
        prefix_NTC, tokens_NLC = x.tensor_split([node.num_prefix_tokens], dim=1)
        feat_NCHW = torch.unflatten(tokens_NLC.transpose(1, 2), 2, node.grid)
        feat_NC = tokens_NLC.mean(1)
    height, width = feat_NCHW.shape[2:]
    cells = (min(grid, height), min(grid, width))
    pooled_NCHW = adaptive_avg_pool2d(feat_NCHW[:grid_samples], cells)
    return PooledFeatures(
        feat_NC=feat_NC,
        feat_NGC=pooled_NCHW.flatten(2).transpose(1, 2).contiguous(),
        prefix_NTC=prefix_NTC[:grid_samples].contiguous(),
    )


@torch.inference_mode()
def probe_features(x: Tensor, node: Node) -> Tensor:
    """What a probe sees of a node: the mean over positions and the prefix tokens, on the CPU."""
    pooled = pool_node(x, node, grid=1)
    return torch.cat([pooled.feat_NC, pooled.prefix_NTC.flatten(1)], dim=1).float().cpu()


@torch.inference_mode()
def embed_batches(
    dissection: Dissected,
    batches: Iterable[Tensor],
    *,
    grid: int = 4,
    grid_samples: int = 256,
    dtype: torch.dtype = torch.float32,
    computing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[BatchFeatures]:
    """Pooled features of every node, batch by batch.

    One pass of the model a batch; each node is pooled as soon as it is there, so that raw feature
    maps never pile up, and nothing is kept from one batch to the next.

    Args:
        dissection: A dissected model in eval mode.
        batches: Images [N, C, H, W], normalised, on the model's device.
        grid: Cells along each side of the pooled grid.
        grid_samples: The first so many samples get grid features and prefix tokens.
        dtype: Type of the features returned.
        computing: Gives the context of each batch's pass, such as autocast.

    Raises:
        DeryError: Features are NaN or infinite, or too large for ``dtype``; the node is named.
    """
    start = 0
    for x in batches:
        with_grid = max(0, min(x.shape[0], grid_samples - start))
        with computing():
            pooled = [
                pool_node(raw, node, grid, grid_samples=with_grid)
                for node, raw in zip(dissection.anatomy.nodes, dissection.features(x), strict=True)
            ]
        yield BatchFeatures(
            start=start,
            nodes=[
                _delivered(features, node, dtype)
                for node, features in zip(dissection.anatomy.nodes, pooled, strict=True)
            ],
        )
        start += x.shape[0]


def feature_specs(
    nodes: Sequence[Node],
    num_samples: int,
    *,
    grid: int = 4,
    grid_samples: int = 256,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of every tensor that embedding ``num_samples`` images gives.

    Names are ``<node index>.feat_NC``, ``.feat_NGC`` and, for nodes that have prefix tokens,
    ``.prefix_NTC``.
    """
    some = min(num_samples, grid_samples)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for node in nodes:
        cells = min(grid, node.grid[0]) * min(grid, node.grid[1])
        specs[f"{node.index}.feat_NC"] = (dtype, (num_samples, node.num_chs))
        specs[f"{node.index}.feat_NGC"] = (dtype, (some, cells, node.num_chs))
        if node.num_prefix_tokens:
            shape = (some, node.num_prefix_tokens, node.num_chs)
            specs[f"{node.index}.prefix_NTC"] = (dtype, shape)
    return specs


def _delivered(features: PooledFeatures, node: Node, dtype: torch.dtype) -> PooledFeatures:
    """``features`` on the CPU in ``dtype``, all of them finite."""
    delivered = {}
    for field in dataclasses.fields(features):
        tensor: Tensor = getattr(features, field.name).cpu()
        if not bool(torch.isfinite(tensor).all()):
            raise DeryError(
                f"node {node.index} ({node.name}) gives NaN or infinite features",
                "check the model's weights and its input normalisation, or leave it out with "
                "--skip-bad",
                details={"node": node.index},
            )
        cast = tensor.to(dtype)
        if not bool(torch.isfinite(cast).all()):
            raise DeryError(
                f"node {node.index} ({node.name}) gives features up to "
                f"{float(tensor.abs().max()):.3g}, too large for {str(dtype).split('.')[-1]}",
                "use --dtype fp32",
                details={"node": node.index, "too_large": True},
            )
        delivered[field.name] = cast
    return PooledFeatures(**delivered)
