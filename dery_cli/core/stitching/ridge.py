"""Ridge regression from streamed normal equations; ``probe`` has the classifier built on the same.

Legend: N samples, R rows (samples times positions), G grid positions, C input channels, D output
channels, F folds, K classes, Z cells of positions.

Everything is accumulated in float64. A fold keeps its own sums, so that leave-one-fold-out
cross-validation needs no second pass over the data: the statistics of the training part are the
total less the fold's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

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


@dataclasses.dataclass
class _Sums:
    """Sufficient statistics of one fold."""

    gram_CC: Tensor
    cross_CD: Tensor
    square_D: Tensor
    sum_x_GC: Tensor
    sum_y_GD: Tensor
    class_x_KZC: Tensor
    class_y_KZD: Tensor
    images_K: Tensor
    images: float = 0.0

    @classmethod
    def zeros(
        cls, groups: int, c: int, d: int, classes: int, cells: int, device: torch.device
    ) -> _Sums:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            gram_CC=empty(c, c),
            cross_CD=empty(c, d),
            square_D=empty(d),
            sum_x_GC=empty(groups, c),
            sum_y_GD=empty(groups, d),
            class_x_KZC=empty(classes, cells, c),
            class_y_KZD=empty(classes, cells, d),
            images_K=empty(classes),
        )

    def combine(self, other: _Sums, sign: float) -> _Sums:
        pairs = {
            field.name: getattr(self, field.name) + sign * getattr(other, field.name)
            for field in dataclasses.fields(self)
        }
        return _Sums(**pairs)

    def class_offsets(self, cell_G: Tensor) -> Tensor:
        """In each cell a class's mean output less that of all, (K, Z, D); 0 for an empty class."""
        size_Z = torch.bincount(cell_G, minlength=self.class_y_KZD.shape[1])[:, None]
        mean_ZD = self.class_y_KZD.sum(0) / (self.images * size_Z)
        mean_KZD = self.class_y_KZD / (self.images_K.clamp(min=1)[:, None, None] * size_Z)
        return torch.where(self.images_K[:, None, None] > 0, mean_KZD - mean_ZD, 0.0)

    def moved(self, offset_KZD: Tensor, cell_G: Tensor) -> _Sums:
        """The statistics with ``offset_KZD[class, cell]`` added to every output."""
        size_Z = torch.bincount(cell_G, minlength=self.class_y_KZD.shape[1])
        added_D = 2 * (self.class_y_KZD * offset_KZD).sum((0, 1))
        weights = (self.images_K, offset_KZD.square(), size_Z.double())
        added_D = added_D + torch.einsum("k,kzd,z->d", *weights)
        total_ZD = torch.einsum("k,kzd->zd", self.images_K, offset_KZD)
        return dataclasses.replace(
            self,
            cross_CD=self.cross_CD + self.class_x_KZC.flatten(0, 1).T @ offset_KZD.flatten(0, 1),
            square_D=self.square_D + added_D,
            sum_y_GD=self.sum_y_GD + total_ZD[cell_G],
        )


def _added(folds: Sequence[_Sums]) -> _Sums:
    total = folds[0]
    for sums in folds[1:]:
        total = total.combine(sums, 1.0)
    return total


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


class RidgeStatistics:
    """Normal equations of a multi-output ridge regression, one set a fold.

    Args:
        groups: Positions G that may have a bias of their own.
        in_chs: C.
        out_chs: D.
        folds: F; a sample belongs to one fold with all its positions.
        classes: K of the samples' labels; 0 where they have none.
        cells: The cell (from 0) of each position, in which class means are taken; None is one cell.
        device: Where the sums are kept.
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
        self.device = device or torch.device("cpu")
        self.groups, self.in_chs = groups, in_chs
        self.cell_G = torch.tensor(cells or [0] * groups, device=self.device)
        num_cells = int(self.cell_G.max()) + 1
        self.folds = [
            _Sums.zeros(groups, in_chs, out_chs, classes, num_cells, self.device)
            for _ in range(folds)
        ]
        self._bases: dict[tuple[tuple[int, ...], int | None, bool], _Basis] = {}

    def update(
        self, x_NGC: Tensor, y_NGD: Tensor, fold_N: Tensor, label_N: Tensor | None = None
    ) -> None:
        """Add samples; ``fold_N`` says which fold each belongs to, ``label_N`` which class."""
        self._bases.clear()
        x_NGC = x_NGC.to(self.device, torch.float64)
        y_NGD = y_NGD.to(self.device, torch.float64)
        for index, sums in enumerate(self.folds):
            rows = (fold_N == index).nonzero().flatten()
            if len(rows) == 0:
                continue
            x, y = x_NGC[rows.to(self.device)], y_NGD[rows.to(self.device)]
            x_RC, y_RD = x.flatten(0, 1), y.flatten(0, 1)
            sums.gram_CC += x_RC.T @ x_RC
            sums.cross_CD += x_RC.T @ y_RD
            sums.square_D += y_RD.square().sum(0)
            sums.sum_x_GC += x.sum(0)
            sums.sum_y_GD += y.sum(0)
            sums.images += len(rows)
            if label_N is not None:
                label = label_N[rows].to(self.device)
                sums.class_x_KZC.index_add_(0, label, self._by_cell(x))
                sums.class_y_KZD.index_add_(0, label, self._by_cell(y))
                sums.images_K += torch.bincount(label, minlength=len(sums.images_K))

    def _by_cell(self, x_NGC: Tensor) -> Tensor:
        """Sums over the positions of each cell."""
        shape = (len(x_NGC), int(self.cell_G.max()) + 1, x_NGC.shape[2])
        return x_NGC.new_zeros(shape).index_add_(1, self.cell_G, x_NGC)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (C) and covariance (C, C) of the inputs, positions not told apart."""
        total = _added(self.folds)
        centred = _Centred.of(total, position_bias=False)
        return centred.mean_x_GC[0], centred.gram_CC / (total.images * self.groups)

    def solve(
        self,
        *,
        position_bias: bool,
        penalties: Sequence[float] = RIDGE_PENALTIES,
        class_weight: float = 0.0,
        only: Sequence[int] | None = None,
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
        """
        chosen = tuple(range(len(self.folds)) if only is None else only)
        with few_threads(self.in_chs):
            plain_P, moved_P, spread = self._held_out(
                chosen, position_bias, penalties, class_weight
            )
            best, r2 = len(penalties) // 2, 0.0
            if spread is not None:
                best = int((moved_P if class_weight else plain_P).argmin())
                r2 = 1 - float(plain_P.min()) / spread if spread > 0 else 0.0
            total = _added([self.folds[index] for index in chosen])
            if class_weight:
                total = total.moved(class_weight * total.class_offsets(self.cell_G), self.cell_G)
            centred = _Centred.of(total, position_bias)
            basis = self._basis((chosen, None, position_bias), centred)
            weight_CD = basis.weights(centred.cross_CD, penalties[best])
            bias_GD = centred.mean_y_GD - centred.mean_x_GC @ weight_CD
        error = float(plain_P.min())
        return RidgeFit(weight_CD, bias_GD, max(r2, -1.0), error, penalties[best])

    def _held_out(
        self,
        chosen: tuple[int, ...],
        position_bias: bool,
        penalties: Sequence[float],
        class_weight: float,
    ) -> tuple[Tensor, Tensor, float | None]:
        """Squared errors on the folds held out in turn, by penalty, and what there is to explain.

        Returns:
            Of y; of y with its class offsets (0 without a ``class_weight``); the squares of y about
            the mean of the other folds, None where there are no two folds with images.
        """
        total = _added([self.folds[index] for index in chosen])
        used = [index for index in chosen if self.folds[index].images > 0]
        plain_P, moved_P = (torch.zeros(len(penalties), dtype=torch.float64) for _ in range(2))
        if len(used) < 2:
            return plain_P, moved_P, None
        spread = 0.0
        for index in used:
            held_out = self.folds[index]
            train = total.combine(held_out, -1.0)
            centred = _Centred.of(train, position_bias)
            basis = self._basis((chosen, index, position_bias), centred)
            test = _Centred.of(held_out, position_bias, centre=centred)
            plain_P += basis.errors(centred, test, penalties)[:, 0]
            spread += float(test.square_D.sum())
            if class_weight:
                offset_KZD = class_weight * train.class_offsets(self.cell_G)
                centred = _Centred.of(train.moved(offset_KZD, self.cell_G), position_bias)
                other = held_out.moved(offset_KZD, self.cell_G)
                test = _Centred.of(other, position_bias, centre=centred)
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
        total = _added(self.folds)
        used = [index for index, sums in enumerate(self.folds) if sums.images > 0]
        error_PW = torch.zeros(len(penalties), len(widths), dtype=torch.float64)
        spread_W = torch.zeros(len(widths), dtype=torch.float64)
        for index in used if len(used) > 1 else ():
            centred = _Centred.of(total.combine(self.folds[index], -1.0), position_bias)
            test = _Centred.of(self.folds[index], position_bias, centre=centred)
            basis = self._basis((tuple(range(len(self.folds))), index, position_bias), centred)
            error_PW += basis.errors(centred, test, penalties, widths)
            parts = torch.split(test.square_D.cpu(), list(widths))
            spread_W += torch.stack([part.sum() for part in parts])
        share_W = error_PW.min(0).values / spread_W
        return torch.where(spread_W > 0, 1 - share_W, 0.0).tolist()

    def _basis(self, key: tuple[tuple[int, ...], int | None, bool], centred: _Centred) -> _Basis:
        """Of some folds, one left out; the inputs alone decide it, whatever the class weight."""
        if key not in self._bases:
            self._bases[key] = _Basis.of(centred.gram_CC)
        return self._bases[key]


@dataclasses.dataclass
class _Centred:
    """Centred second moments."""

    gram_CC: Tensor
    cross_CD: Tensor
    square_D: Tensor
    mean_x_GC: Tensor
    mean_y_GD: Tensor

    @classmethod
    def of(cls, sums: _Sums, position_bias: bool, centre: _Centred | None = None) -> _Centred:
        """Moments about the own means, or about ``centre``'s where given (held-out data)."""
        groups = sums.sum_x_GC.shape[0]
        count = sums.images if position_bias else sums.images * groups
        sum_x, sum_y = sums.sum_x_GC, sums.sum_y_GD
        if not position_bias:
            sum_x, sum_y = sum_x.sum(0, keepdim=True), sum_y.sum(0, keepdim=True)
        if centre is None:
            mean_x, mean_y = sum_x / count, sum_y / count
        else:
            mean_x, mean_y = centre.mean_x_GC, centre.mean_y_GD
        gram = sums.gram_CC - sum_x.T @ mean_x - mean_x.T @ sum_x + count * (mean_x.T @ mean_x)
        cross = sums.cross_CD - sum_x.T @ mean_y - mean_x.T @ sum_y + count * (mean_x.T @ mean_y)
        square = sums.square_D - 2 * (sum_y * mean_y).sum(0) + count * mean_y.square().sum(0)
        return cls(gram, cross, square, mean_x, mean_y)


@dataclasses.dataclass
class _Basis:
    """Eigenbasis of a centred input Gram, in which ridge maps of any penalty are one division."""

    values_C: Tensor
    vectors_CC: Tensor
    scale: float

    @classmethod
    def of(cls, gram_CC: Tensor) -> _Basis:
        values, vectors = torch.linalg.eigh(gram_CC)
        values = values.clamp(min=0)
        return cls(values, vectors, float(values.mean()))

    def weights(self, cross_CD: Tensor, penalty: float) -> Tensor:
        if self.scale == 0:
            return torch.zeros_like(cross_CD)
        shrunk_CD = (self.vectors_CC.T @ cross_CD) / (self.values_C + penalty * self.scale)[:, None]
        return self.vectors_CC @ shrunk_CD

    def errors(
        self,
        train: _Centred,
        test: _Centred,
        penalties: Sequence[float],
        widths: Sequence[int] | None = None,
    ) -> Tensor:
        """Squared error on ``test`` of the maps fitted to ``train``, (P, outputs).

        For W = diag(s) A, A the rotated cross moments of the training part and s the shrinkage of
        a penalty, the error |y|^2 - 2 tr(W' B) + tr(W' G W) needs A only in the diagonal of A B'
        and in A A': one product each, whatever the number of penalties.

        Args:
            train: Moments that the basis is of.
            test: Moments of what was held out, about the training part's means.
            penalties: P of them.
            widths: Outputs in a row whose errors are summed apart; None is all of them.
        """
        widths = [len(test.square_D)] if widths is None else list(widths)
        square_W = torch.stack([part.sum() for part in torch.split(test.square_D, widths)])
        if self.scale == 0:
            return square_W.expand(len(penalties), -1).cpu()
        rotate_CC = self.vectors_CC.T
        shrink_PC = 1 / (self.values_C + self.scale * self.values_C.new_tensor(penalties)[:, None])
        test_gram_CC = rotate_CC @ test.gram_CC @ self.vectors_CC
        answer = []
        for square, train_CD, test_CD in zip(
            square_W,
            torch.split(rotate_CC @ train.cross_CD, widths, dim=1),
            torch.split(rotate_CC @ test.cross_CD, widths, dim=1),
            strict=True,
        ):
            fitted_CC = test_gram_CC * (train_CD @ train_CD.T)
            quadratic_P = ((shrink_PC @ fitted_CC) * shrink_PC).sum(1)
            answer.append(square - 2 * shrink_PC @ (train_CD * test_CD).sum(1) + quadratic_P)
        return torch.stack(answer, dim=1).cpu()
