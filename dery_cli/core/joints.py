"""How well a linear stitch could join two nodes, for many pairs at once, before anything is built.

Legend: N images, G grid positions, R = N*G rows, C source channels, D target channels, P penalties,
F folds.

For a source node the Gram of its features is decomposed once a fold; every target node is then a
few columns of the same matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dery_cli.core.ridge import RIDGE_PENALTIES
from dery_cli.core.stitch import resample
from dery_cli.types import Layout, Node

MIN_R2 = 0.01


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


def _grouped_r2(
    x_NGC: Tensor, outputs: Sequence[Tensor], *, position_bias: bool, folds: int
) -> list[float]:
    x_NGC = x_NGC.double()
    y_NGD = torch.cat([y.double() for y in outputs], dim=2)
    widths = [y.shape[2] for y in outputs]
    fold_N = torch.arange(len(x_NGC)) % folds
    error_PD = torch.zeros(len(RIDGE_PENALTIES), y_NGD.shape[2], dtype=torch.float64)
    spread_D = torch.zeros(y_NGD.shape[2], dtype=torch.float64)
    axes = (0,) if position_bias else (0, 1)
    for fold in range(folds):
        test = fold_N == fold
        if not test.any() or test.all():
            continue
        mean_x = x_NGC[~test].mean(axes, keepdim=True)
        mean_y = y_NGD[~test].mean(axes, keepdim=True)
        x_RC = (x_NGC[~test] - mean_x).flatten(0, 1)
        y_RD = (y_NGD[~test] - mean_y).flatten(0, 1)
        x_TC = (x_NGC[test] - mean_x).flatten(0, 1)
        y_TD = (y_NGD[test] - mean_y).flatten(0, 1)
        values_C, vectors_CC = torch.linalg.eigh(x_RC.T @ x_RC)
        values_C = values_C.clamp(min=0)
        scale = float(values_C.mean())
        spread_D += y_TD.square().sum(0)
        if scale == 0:
            error_PD += y_TD.square().sum(0)
            continue
        rotated_CD = vectors_CC.T @ (x_RC.T @ y_RD)
        rotated_TC = x_TC @ vectors_CC
        for index, penalty in enumerate(RIDGE_PENALTIES):
            weight_CD = rotated_CD / (values_C + penalty * scale)[:, None]
            error_PD[index] += (y_TD - rotated_TC @ weight_CD).square().sum(0)
    values = []
    for errors_PD, spreads_D in zip(
        torch.split(error_PD, widths, dim=1), torch.split(spread_D, widths), strict=True
    ):
        spread = float(spreads_D.sum())
        values.append(1 - float(errors_PD.sum(1).min()) / spread if spread > 0 else 0.0)
    return values


def joint_score(r2: float) -> float:
    """What a joint adds to the assembly's objective: log max(R2, 0.01)."""
    return math.log(max(r2, MIN_R2))
