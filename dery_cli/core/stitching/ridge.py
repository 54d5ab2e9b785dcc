"""Ridge regression from streamed normal equations; ``probe`` has the classifier built on the same.

Legend: N samples, R rows (samples times positions), G grid positions, C input channels, D output
channels, F folds, K classes, Z cells of positions.

Everything is accumulated in float64. A fold keeps its own sums, so that leave-one-fold-out
cross-validation needs no second pass over the data: the statistics of the training part are the
total less the fold's.

Where there are fewer rows than channels, the map that ridge finds is a combination of the rows.
They are kept then, and the sums are those of their R coordinates in an orthonormal basis of their
span: the kernel form of the same regression, with R x R matrices in place of C x C ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dery_cli.core.numerics import double, solving_device
from dery_cli.core.stitching.moments import Basis, Centred, Sums, added

RIDGE_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate penalties, in units of the mean eigenvalue of the centred input Gram."""

ONE_THREAD = 256
"""Rows of a square matrix up to which one thread works on it.

A second gains little there, and where other processes are busy the threads mostly wait for one
another: the many small problems of a zoo then take several times as long.
"""


@contextmanager
def few_threads(rows: int) -> Iterator[None]:
    """Work on square matrices of so many rows, with one thread where they are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rows <= ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class RidgeFit:
    """A fitted affine map y = x W + b.

    Args:
        weight_CD: The map W.
        bias_GD: The offset b, one row a position, or a single row shared by all.
        r2: Cross-validated R2 of the plain regression over all outputs, 1 - SSE/SST; at least -1.
        error: The SSE of it, which fits with and without position biases share the scale of.
        penalty: The chosen penalty in units of the mean eigenvalue.
    """

    weight_CD: Tensor
    bias_GD: Tensor
    r2: float
    error: float
    penalty: float


@dataclasses.dataclass(frozen=True)
class _Samples:
    """What was given at once."""

    x_NGC: Tensor
    y_NGD: Tensor
    fold_N: Tensor
    label_N: Tensor | None

    @property
    def rows(self) -> int:
        return len(self.x_NGC) * self.x_NGC.shape[1]

    def double(self, device: torch.device, *, copy: bool = False) -> _Samples:
        x_NGC, y_NGD = (double(t, device, copy=copy) for t in (self.x_NGC, self.y_NGD))
        return dataclasses.replace(self, x_NGC=x_NGC, y_NGD=y_NGD)


class RidgeStatistics:
    """Normal equations of a multi-output ridge regression, one set a fold.

    Args:
        groups: Positions G that may have a bias of their own.
        in_chs: C.
        out_chs: D.
        folds: F; a sample belongs to one fold with all its positions.
        classes: K of the samples' labels; 0 where they have none.
        cells: The cell (from 0) of each position, in which class means are taken; None is one cell.
        device: Where the sums are kept; the CPU keeps those of a device that has no float64.
    """

    def __init__(
        self,
        groups: int,
        in_chs: int,
        out_chs: int,
        *,
        folds: int = 4,
        classes: int = 0,
        cells: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = solving_device(device or "cpu")
        self.groups, self.in_chs, self.out_chs = groups, in_chs, out_chs
        self.cell_G = torch.tensor(cells or [0] * groups, device=self.device)
        self._num_folds, self._classes = folds, classes
        self._kept: list[_Samples] | None = []  # None once there are more rows than channels
        self._folds: list[Sums] = []
        self._span_CR: Tensor | None = None
        self._bases: dict[tuple[tuple[int, ...], int | None, bool], Basis] = {}

    def update(
        self, x_NGC: Tensor, y_NGD: Tensor, fold_N: Tensor, label_N: Tensor | None = None
    ) -> None:
        """Add samples; ``fold_N`` says which fold each belongs to, ``label_N`` which class."""
        self._bases.clear()
        samples = _Samples(x_NGC, y_NGD, fold_N, label_N)
        if self._kept is not None:
            if sum(each.rows for each in self._kept) + samples.rows <= self.in_chs:
                self._kept.append(samples.double(self.device, copy=True))
                self._folds, self._span_CR = [], None
                return
            self._folds, self._span_CR = self._empty(self.in_chs), None
            for kept in self._kept:
                self._add(kept)
            self._kept = None
        self._add(samples.double(self.device))

    @property
    def folds(self) -> list[Sums]:
        """The sums of each fold, of the inputs or of their coordinates in the rows' span."""
        if self._kept and not self._folds:
            x_RC = torch.cat([kept.x_NGC.flatten(0, 1) for kept in self._kept])
            self._span_CR, coordinates_RR = torch.linalg.qr(x_RC.T)
            self._folds = self._empty(len(coordinates_RR))
            parts = torch.split(coordinates_RR.T, [kept.rows for kept in self._kept])
            for kept, z_RR in zip(self._kept, parts, strict=True):
                self._add(dataclasses.replace(kept, x_NGC=z_RR.reshape(*kept.x_NGC.shape[:2], -1)))
        return self._folds or self._empty(self.in_chs)

    def _empty(self, channels: int) -> list[Sums]:
        cells = int(self.cell_G.max()) + 1
        return [
            Sums.zeros(self.groups, channels, self.out_chs, self._classes, cells, self.device)
            for _ in range(self._num_folds)
        ]

    def _add(self, samples: _Samples) -> None:
        for index, sums in enumerate(self._folds):
            chosen = (samples.fold_N == index).nonzero().flatten()
            if len(chosen) == 0:
                continue
            here = chosen.to(self.device)
            x, y = samples.x_NGC[here], samples.y_NGD[here]
            x_RC, y_RD = x.flatten(0, 1), y.flatten(0, 1)
            sums.gram_CC += x_RC.T @ x_RC
            sums.cross_CD += x_RC.T @ y_RD
            sums.square_D += y_RD.square().sum(0)
            sums.sum_x_GC += x.sum(0)
            sums.sum_y_GD += y.sum(0)
            sums.images += len(chosen)
            if samples.label_N is not None:
                label = samples.label_N[chosen].to(self.device)
                sums.class_x_KZC.index_add_(0, label, self._by_cell(x))
                sums.class_y_KZD.index_add_(0, label, self._by_cell(y))
                sums.images_K += torch.bincount(label, minlength=len(sums.images_K))

    def _by_cell(self, x_NGC: Tensor) -> Tensor:
        """Sums over the positions of each cell."""
        shape = (len(x_NGC), int(self.cell_G.max()) + 1, x_NGC.shape[2])
        return x_NGC.new_zeros(shape).index_add_(1, self.cell_G, x_NGC)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (C) and covariance (C, C) of the inputs, positions not told apart."""
        total = added(self.folds)
        centred = Centred.of(total, position_bias=False)
        mean_C, gram_CC = centred.mean_x_GC[0], centred.gram_CC
        if self._span_CR is not None:
            mean_C, gram_CC = self._span_CR @ mean_C, self._span_CR @ gram_CC @ self._span_CR.T
        return mean_C, gram_CC / (total.images * self.groups)

    def solve(
        self,
        *,
        position_bias: bool,
        penalties: Sequence[float] = RIDGE_PENALTIES,
        class_weight: float = 0.0,
        only: Sequence[int] | None = None,
        judged: bool = True,
    ) -> RidgeFit:
        """The ridge map, its penalty chosen by cross-validation over the folds.

        With a ``class_weight`` b the map is fitted to y + b (mean of the sample's class - mean of
        all) instead of y, the means those of the folds it is fitted on: what tells the classes
        apart then counts 1 + b times, and is not regressed away where y is hard to predict.

        Args:
            position_bias: One offset a position instead of one for all.
            penalties: Candidates, in units of the mean eigenvalue of the centred Gram.
            class_weight: b; anything but 0 needs labels.
            only: The folds to use; None is all.
            judged: Whether ``r2`` and ``error`` are wanted too; with a ``class_weight`` they are
                those of another regression, and NaN where they are not.
        """
        chosen = tuple(range(len(self.folds)) if only is None else only)
        judged = judged or not class_weight
        with few_threads(len(self.folds[0].gram_CC)):
            plain_P, moved_P, spread = self._held_out(
                chosen, position_bias, penalties, class_weight, judged=judged
            )
            best, r2 = len(penalties) // 2, 0.0
            if spread is not None:
                best = int((moved_P if class_weight else plain_P).argmin())
                r2 = 1 - float(plain_P.min()) / spread if spread > 0 else 0.0
            total = added([self.folds[index] for index in chosen])
            if class_weight:
                total = total.moved(class_weight * total.class_offsets(self.cell_G), self.cell_G)
            centred = Centred.of(total, position_bias)
            basis = self._basis((chosen, None, position_bias), centred)
            weight_CD = basis.weights(centred.cross_CD, penalties[best])
            bias_GD = centred.mean_y_GD - centred.mean_x_GC @ weight_CD
            if self._span_CR is not None:
                weight_CD = self._span_CR @ weight_CD
        r2, error = (max(r2, -1.0), float(plain_P.min())) if judged else (math.nan, math.nan)
        return RidgeFit(weight_CD, bias_GD, r2, error, penalties[best])

    def _held_out(
        self,
        chosen: tuple[int, ...],
        position_bias: bool,
        penalties: Sequence[float],
        class_weight: float,
        *,
        judged: bool,
    ) -> tuple[Tensor, Tensor, float | None]:
        """Squared errors on the folds held out in turn, by penalty, and what there is to explain.

        Returns:
            Of y (0 unless ``judged``); of y with its class offsets (0 without a ``class_weight``);
            the squares of y about
            the mean of the other folds, None where there are no two folds with images.
        """
        total = added([self.folds[index] for index in chosen])
        used = [index for index in chosen if self.folds[index].images > 0]
        plain_P, moved_P = (torch.zeros(len(penalties), dtype=torch.float64) for _ in range(2))
        if len(used) < 2:
            return plain_P, moved_P, None
        spread = 0.0
        for index in used:
            held_out = self.folds[index]
            train = total.combine(held_out, -1.0)
            centred = Centred.of(train, position_bias)
            basis = self._basis((chosen, index, position_bias), centred)
            if judged:
                test = Centred.of(held_out, position_bias, centre=centred)
                plain_P += basis.errors(centred, test, penalties)[:, 0]
                spread += float(test.square_D.sum())
            if class_weight:
                offset_KZD = class_weight * train.class_offsets(self.cell_G)
                centred = Centred.of(train.moved(offset_KZD, self.cell_G), position_bias)
                other = held_out.moved(offset_KZD, self.cell_G)
                test = Centred.of(other, position_bias, centre=centred)
                moved_P += basis.errors(centred, test, penalties)[:, 0]
        return plain_P, moved_P, spread

    def r2(
        self,
        widths: Sequence[int],
        *,
        position_bias: bool,
        penalties: Sequence[float] = RIDGE_PENALTIES,
    ) -> list[float]:
        """Cross-validated R2 of so many outputs in a row each, a penalty chosen for each.

        Args:
            widths: How the output channels are parted.
            position_bias: One offset a position instead of one for all.
            penalties: Candidates, in units of the mean eigenvalue of the centred Gram.
        """
        total = added(self.folds)
        used = [index for index, sums in enumerate(self.folds) if sums.images > 0]
        error_PW = torch.zeros(len(penalties), len(widths), dtype=torch.float64)
        spread_W = torch.zeros(len(widths), dtype=torch.float64)
        for index in used if len(used) > 1 else ():
            centred = Centred.of(total.combine(self.folds[index], -1.0), position_bias)
            test = Centred.of(self.folds[index], position_bias, centre=centred)
            basis = self._basis((tuple(range(len(self.folds))), index, position_bias), centred)
            error_PW += basis.errors(centred, test, penalties, widths)
            parts = torch.split(test.square_D.cpu(), list(widths))
            spread_W += torch.stack([part.sum() for part in parts])
        share_W = error_PW.min(0).values / spread_W
        return torch.where(spread_W > 0, 1 - share_W, 0.0).tolist()

    def _basis(self, key: tuple[tuple[int, ...], int | None, bool], centred: Centred) -> Basis:
        """Of some folds, one left out; the inputs alone decide it, whatever the class weight."""
        if key not in self._bases:
            self._bases[key] = Basis.of(centred.gram_CC, self.in_chs)
        return self._bases[key]
