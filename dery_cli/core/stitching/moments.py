"""Moments of inputs and outputs, and ridge maps from them alone.

Legend: N samples, R rows (samples times positions), G grid positions, C input channels, D output
channels, K classes, Z cells of positions, P penalties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class Sums:
    """Sufficient statistics of one fold, in float64."""

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
    ) -> Sums:
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

    def combine(self, other: Sums, sign: float) -> Sums:
        pairs = {
            field.name: getattr(self, field.name) + sign * getattr(other, field.name)
            for field in dataclasses.fields(self)
        }
        return Sums(**pairs)

    def class_offsets(self, cell_G: Tensor) -> Tensor:
        """In each cell a class's mean output less that of all, (K, Z, D); 0 for an empty class."""
        size_Z = torch.bincount(cell_G, minlength=self.class_y_KZD.shape[1])[:, None]
        mean_ZD = self.class_y_KZD.sum(0) / (self.images * size_Z)
        mean_KZD = self.class_y_KZD / (self.images_K.clamp(min=1)[:, None, None] * size_Z)
        return torch.where(self.images_K[:, None, None] > 0, mean_KZD - mean_ZD, 0.0)

    def moved(self, offset_KZD: Tensor, cell_G: Tensor) -> Sums:
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


def added(folds: Sequence[Sums]) -> Sums:
    """The statistics of several folds together."""
    total = folds[0]
    for sums in folds[1:]:
        total = total.combine(sums, 1.0)
    return total


@dataclasses.dataclass
class Centred:
    """Centred second moments."""

    gram_CC: Tensor
    cross_CD: Tensor
    square_D: Tensor
    mean_x_GC: Tensor
    mean_y_GD: Tensor

    @classmethod
    def of(cls, sums: Sums, position_bias: bool, centre: Centred | None = None) -> Centred:
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
class Basis:
    """Eigenbasis of a centred input Gram, in which ridge maps of any penalty are one division.

    Args:
        values_C: Eigenvalues.
        vectors_CC: Eigenvectors, as columns.
        scale: Their mean, the unit of penalties.
    """

    values_C: Tensor
    vectors_CC: Tensor
    scale: float

    @classmethod
    def of(cls, gram_CC: Tensor, channels: int) -> Basis:
        """The basis, penalties in units of the mean of so many eigenvalues (others are 0)."""
        values, vectors = torch.linalg.eigh(gram_CC)
        values = values.clamp(min=0)
        return cls(values, vectors, float(values.sum()) / channels)

    def weights(self, cross_CD: Tensor, penalty: float) -> Tensor:
        """The ridge map of these cross moments."""
        if self.scale == 0:
            return torch.zeros_like(cross_CD)
        shrunk_CD = (self.vectors_CC.T @ cross_CD) / (self.values_C + penalty * self.scale)[:, None]
        return self.vectors_CC @ shrunk_CD

    def errors(
        self,
        train: Centred,
        test: Centred,
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
