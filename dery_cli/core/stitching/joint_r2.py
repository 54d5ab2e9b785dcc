"""How well a linear stitch could join two nodes, for many pairs at once, before anything is built.

Legend: N images, G grid positions, C source channels, D target channels.

For a source node the Gram of its features is decomposed once a fold; every target node is then a
few columns of the same moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dery_cli.core.stitching.ridge import RidgeStatistics, few_threads
from dery_cli.core.stitching.stitch import resample
from dery_cli.types import Layout, Node

MIN_R2 = 0.01

MOMENT_BYTES = 512 << 20
"""Moments of a source with several targets at once may take so much memory."""


def joint_r2(
    source: Node,
    source_NGC: Tensor,
    targets: Mapping[int, tuple[Node, Tensor]],
    *,
    folds: int = 4,
) -> dict[int, float]:
    """Cross-validated R2 of the linear stitch from one node to each of several.

    The features are those of the pooled grid, on the same images; the source is resampled to each
    target's pooled grid as the stitch would do, and token targets have a bias a position.

    Args:
        source: Source node.
        source_NGC: Its grid features.
        targets: Target nodes with their grid features, by any key.
        folds: Image i belongs to fold i mod ``folds``.

    Returns:
        R2 by the keys of ``targets``: 1 is exact, 0 no better than the mean, negative worse.
    """
    answer: dict[int, float] = {}
    groups: dict[tuple[int, bool], list[int]] = {}
    for key, (node, y_NGD) in targets.items():
        groups.setdefault((y_NGD.shape[1], node.layout is Layout.NLC), []).append(key)
    for (positions, with_position), keys in groups.items():
        x_NGC = _on_grid(source, source_NGC, targets[keys[0]][0], positions)
        outputs = [targets[key][1] for key in keys]
        values = _grouped_r2(x_NGC, outputs, position_bias=with_position, folds=folds)
        answer.update(zip(keys, values, strict=True))
    return answer


def _pooled_grid(node: Node, positions: int) -> tuple[int, int]:
    """The (height, width) that a node's ``positions`` pooled cells form."""
    if positions == 1:
        return (1, 1)
    cells = math.isqrt(positions)
    height = min(node.grid[0], cells) if cells * cells != positions else cells
    return (height, positions // height)


def _on_grid(source: Node, source_NGC: Tensor, target: Node, positions: int) -> Tensor:
    have = _pooled_grid(source, source_NGC.shape[1])
    want = _pooled_grid(target, positions)
    if have == want:
        return source_NGC
    grid_NCHW = source_NGC.transpose(1, 2).reshape(len(source_NGC), -1, *have)
    return resample(grid_NCHW, want).flatten(2).transpose(1, 2)


def _chunks(outputs: Sequence[Tensor], rank: int, folds: int) -> list[list[int]]:
    """Runs of outputs whose moments with the inputs take ``MOMENT_BYTES`` at most, or one alone."""
    limit = MOMENT_BYTES // (8 * rank * (folds + 2))
    chunks: list[list[int]] = []
    room = 0
    for number, y_NGD in enumerate(outputs):
        if y_NGD.shape[2] > room:
            chunks.append([])
            room = limit
        chunks[-1].append(number)
        room -= y_NGD.shape[2]
    return chunks


def _grouped_r2(
    x_NGC: Tensor, outputs: Sequence[Tensor], *, position_bias: bool, folds: int
) -> list[float]:
    fold_N = torch.arange(len(x_NGC)) % folds
    values: list[float] = []
    rank = min(x_NGC.shape[2], len(x_NGC) * x_NGC.shape[1])
    with few_threads(rank):
        for chunk in _chunks(outputs, rank, folds):
            y_NGD = torch.cat([outputs[number] for number in chunk], dim=2)
            widths = [outputs[number].shape[2] for number in chunk]
            moments = RidgeStatistics(x_NGC.shape[1], x_NGC.shape[2], y_NGD.shape[2], folds=folds)
            moments.update(x_NGC, y_NGD, fold_N)
            values += moments.r2(widths, position_bias=position_bias)
    return values


def joint_score(r2: float) -> float:
    """What a joint adds to the assembly's objective: log max(R2, 0.01)."""
    return math.log(max(r2, MIN_R2))
