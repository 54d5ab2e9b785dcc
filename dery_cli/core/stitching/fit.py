"""Fitting a stitch in closed form, and the batch norms behind it.

Legend: N images, G grid positions, T prefix tokens, C source channels, D target channels, H hidden
channels of the ``mlp`` stitch.

Ridge regression from what the assembled network really delivers at the source to what the target's
donor saw there on the same images; the normal equations are streamed, so that the images may be
many. Where the images have labels, what tells the classes apart may count more than the rest: plain
regression gives up what it cannot predict well, and on a task that is new to the donors that is
often what the task needs. ``class_weight`` says how much more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dery_cli.core.stitching.ridge import RidgeFit, RidgeStatistics
from dery_cli.core.stitching.stitch import Stitch, grid_size, prefix_inputs, split_tokens
from dery_cli.types import Node, StitchKind

FIT_POSITIONS = 196
"""Grid positions an image may add to a fit without position bias; more are thinned out."""

CELLS = 4
"""Class means are taken in each cell of a grid of at most so many cells a side."""

CLASS_BYTES = 256 << 20
"""Sums by class and cell may take so much memory; beyond it all positions are one cell."""

FOLDS = 4

MIN_BATCH = 16
"""Statistics of fewer images say little; smaller batches are joined."""


@dataclasses.dataclass(frozen=True)
class StitchFit:
    """How well a stitch was fitted.

    Args:
        kind: What was fitted.
        r2: Cross-validated R2 at the target's grid positions; None for random weights.
        prefix_r2: The same for its prefix tokens; None where it expects none.
        class_weight: How much more the class means counted.
        position: Whether a stitch into tokens kept its position biases; where it did not, one bias
            for all predicts better. None where it has none.
    """

    kind: StitchKind
    r2: float | None
    prefix_r2: float | None
    class_weight: float = 0.0
    position: bool | None = None


PairedBatches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over calibration batches: (source tensor, target tensor) of the same images."""


def fit_stitch(
    stitch: Stitch,
    batches: PairedBatches,
    *,
    labels: Sequence[int] | None = None,
    class_weight: float = 0.0,
    folds: int = FOLDS,
) -> StitchFit:
    """Fit a stitch in closed form, in place; ``paper`` keeps its random weights.

    Args:
        stitch: Layer to fit.
        batches: One pass gives pairs (what the network delivers at ``stitch.source``, what the
            target's donor has at ``stitch.target``), each with the batch first.
        labels: Class of each image of the pass; needed for a ``class_weight``.
        class_weight: b of the regression to y + b (mean of the image's class - mean of all).
        folds: Cross-validation folds; image i of the pass belongs to fold i mod ``folds``.

    Raises:
        ValueError: The pass gave no image, or there is a class weight without labels.
    """
    if class_weight and labels is None:
        raise ValueError("a class weight needs labels")
    if stitch.kind is StitchKind.PAPER:
        return StitchFit(stitch.kind, None, None)
    return StitchRegression(stitch, batches, labels=labels, folds=folds).fit(class_weight)


class StitchRegression:
    """The normal equations of a stitch, from one pass; ``fit`` solves them, as often as asked.

    The first layer of an ``mlp`` stitch is set here, in a pass before.

    Args:
        stitch: Layer to fit.
        batches: See ``fit_stitch``.
        labels: Class of each image of the pass, or None.
        folds: Image i of the pass belongs to fold i mod ``folds``.

    Raises:
        ValueError: The pass gave no image.
    """

    def __init__(
        self,
        stitch: Stitch,
        batches: PairedBatches,
        *,
        labels: Sequence[int] | None = None,
        folds: int = FOLDS,
    ) -> None:
        self.stitch = stitch
        self._folds = folds
        self._label_N = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
        self._num_classes = 0 if self._label_N is None else int(self._label_N.max()) + 1
        self._tokens: RidgeStatistics | None = None
        prefix = stitch.prefix
        with torch.no_grad():
            if stitch.kind is StitchKind.MLP:
                _set_first_layer(
                    stitch, self._collect(Stitch(stitch.source, stitch.target), batches)
                )
            if prefix is not None:
                self._tokens = self._statistics(1, prefix.in_features, prefix.out_features, [0])
            self._rows = self._collect(stitch, batches)
            self._position = None if stitch.position is None else self._position_helps()

    def _position_helps(self) -> bool:
        """Whether held-out images are predicted better with a bias a position than with one."""
        own, shared = (self._rows.solve(position_bias=each).error for each in (True, False))
        return own <= shared

    def fit(
        self,
        class_weight: float = 0.0,
        *,
        only: Sequence[int] | None = None,
        judged: bool = True,
    ) -> StitchFit:
        """Set the stitch to the regression's solution.

        Args:
            class_weight: b of the regression to y + b (mean of the image's class - mean of all).
            only: Folds to fit on; None is all.
            judged: Whether the R2 are wanted; those of a fit with a class weight cost a
                cross-validation of their own.
        """
        stitch, position = self.stitch, bool(self._position)

        def solve(rows: RidgeStatistics, *, position_bias: bool) -> RidgeFit:
            return rows.solve(
                position_bias=position_bias, class_weight=class_weight, only=only, judged=judged
            )

        with torch.no_grad():
            fit = solve(self._rows, position_bias=position)
            _set_output(stitch, fit)
            if self._tokens is None or stitch.prefix is None:
                return StitchFit(stitch.kind, fit.r2, None, class_weight, self._position)
            tokens = solve(self._tokens, position_bias=False)
            _copy(stitch.prefix.weight, tokens.weight_CD.T)
            _copy(stitch.prefix.bias, tokens.bias_GD[0])
        return StitchFit(stitch.kind, fit.r2, tokens.r2, class_weight, self._position)

    def _collect(self, stitch: Stitch, batches: PairedBatches) -> RidgeStatistics:
        """One pass: what the stitch's last layer gets, against the target."""
        source, target = stitch.source, stitch.target
        kept = _kept_positions(target, stitch.position is not None)
        rows = self._statistics(
            len(kept), stitch.output.in_channels, target.num_chs, _cells(target, kept)
        )
        images = 0
        for source_x, target_x in batches():
            grid_NCHW, prefix_NTC = split_tokens(source_x, source)
            wanted_NDHW, wanted_NTD = split_tokens(target_x, target)
            after = images + len(source_x)
            fold_N = torch.arange(images, after) % self._folds
            label_N = None if self._label_N is None else self._label_N[images:after]
            x_NGH = stitch.hidden(grid_NCHW).flatten(2).transpose(1, 2)
            y_NGD = wanted_NDHW.flatten(2).transpose(1, 2)
            rows.update(x_NGH[:, kept], y_NGD[:, kept], fold_N, label_N)
            if self._tokens is not None:
                x_NC = prefix_inputs(grid_NCHW, prefix_NTC)
                self._tokens.update(x_NC[:, None], wanted_NTD.flatten(1)[:, None], fold_N, label_N)
            images = after
        if images == 0:
            raise ValueError("no calibration image to fit a stitch with")
        return rows

    def _statistics(
        self, groups: int, in_chs: int, out_chs: int, cells: Sequence[int]
    ) -> RidgeStatistics:
        """Empty statistics; class means by cell, unless there are too many classes for that."""
        sums = self._folds * self._num_classes * (max(cells) + 1) * (in_chs + out_chs)
        return RidgeStatistics(
            groups,
            in_chs,
            out_chs,
            folds=self._folds,
            classes=self._num_classes,
            cells=cells if 8 * sums <= CLASS_BYTES else None,
            device=self.stitch.output.weight.device,
        )


def _set_output(stitch: Stitch, fit: RidgeFit) -> None:
    layer = stitch.output
    assert layer.bias is not None
    _copy(layer.weight, fit.weight_CD.T[:, :, None, None])
    if stitch.position is None:
        _copy(layer.bias, fit.bias_GD[0])
        return
    mean_D = fit.bias_GD.mean(0)
    bias_GD = fit.bias_GD.expand(grid_size(stitch.target), -1)
    _copy(layer.bias, mean_D)
    _copy(stitch.position, (bias_GD - mean_D).T.reshape(1, -1, *stitch.target.grid))


def _set_first_layer(stitch: Stitch, rows: RidgeStatistics) -> None:
    """Pairs of opposite hidden units, each pair along one direction of unit variance.

    The directions are those of the linear stitch, or, where the source has fewer channels than the
    target, the source's principal ones.
    """
    mean_C, covariance_CC = rows.moments()
    if stitch.source.num_chs > stitch.target.num_chs:
        direction_CP = rows.solve(position_bias=False).weight_CD
    else:
        direction_CP = torch.linalg.eigh(covariance_CC)[1]
    variance_P = (direction_CP * (covariance_CC @ direction_CP)).sum(0)
    floor = 1e-12 * variance_P.max().clamp(min=1e-30)
    direction_CP = torch.where(variance_P > floor, direction_CP * variance_P.rsqrt(), 0.0)
    first = stitch.channels[0]  # type: ignore[index]
    _copy(first.weight, torch.cat([direction_CP, -direction_CP], dim=1).T[:, :, None, None])
    offset_P = -mean_C @ direction_CP
    _copy(first.bias, torch.cat([offset_P, -offset_P]))


def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _kept_positions(target: Node, use_position: bool) -> list[int]:
    """Position biases need every position; otherwise large grids are thinned evenly."""
    count = grid_size(target)
    if use_position or count <= FIT_POSITIONS:
        return list(range(count))
    return spread_positions(target.grid, FIT_POSITIONS)


def spread_positions(grid: tuple[int, int], count: int) -> list[int]:
    """``count`` positions of a larger grid, in raster order, that fall on all rows and columns.

    Every stride has its period; so these follow the lattice of points (i / count, i g mod 1), g the
    golden ratio: each row and each column gets the same share, and no direction is preferred.
    """
    height, width = grid
    step_N = torch.arange(count, dtype=torch.float64) * ((5**0.5 - 1) / 2)
    rank_N = step_N.frac().argsort().argsort()
    chosen: set[int] = set()
    for i, rank in enumerate(rank_N.tolist()):
        row, column = i * height // count, rank * width // count
        while row * width + column in chosen:
            column = (column + 1) % width
        chosen.add(row * width + column)
    return sorted(chosen)


def _cells(target: Node, kept: Sequence[int]) -> list[int]:
    """The cell that each kept position of the target's grid lies in."""
    height, width = target.grid
    rows, columns = min(height, CELLS), min(width, CELLS)
    return [
        (place // width) * rows // height * columns + (place % width) * columns // width
        for place in kept
    ]


def batch_norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers of a module that keep running statistics."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats:
            yield child


def reestimate_batch_norm(block: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> int:
    """Set the running statistics of a block's batch norms to those of its present inputs.

    One pass in which only the batch norms are in training mode, their averages cumulative; they
    stay as they are where there are not two images.

    Returns:
        The number of layers touched; 0 means that no pass was made.
    """
    layers = list(batch_norms(block))
    if not layers:
        return 0
    before = [(layer.momentum, _statistics(layer)) for layer in layers]
    block.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    passes = 0
    try:
        with torch.no_grad():
            for x in _at_least(MIN_BATCH, batches()):
                block(x)
                passes += 1
    finally:
        for layer, (momentum, state) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.eval()
            if not passes:
                for name, value in state.items():
                    layer.get_buffer(name).copy_(value)
    return len(layers)


def _statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def _at_least(count: int, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Small batches joined; the last may have less than ``count`` images, but not one alone."""
    waiting: list[Tensor] = []
    for x in batches:
        waiting.append(x)
        if sum(map(len, waiting)) >= count:
            yield torch.cat(waiting)
            waiting = []
    if sum(map(len, waiting)) > 1:
        yield torch.cat(waiting)
