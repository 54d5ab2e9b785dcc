"""Ridge regression as a smoother: one decomposition of an input answers for any output.

Legend: N samples in the order of their folds, R rank, C input channels, D outputs, V groups of
outputs, P penalties.

With U the left singular vectors of the standardised input, a constant column among them, the fit to
any output y is H y = U diag(s) U' y, where a penalty decides the shares s. What a map fitted
without a fold says of that fold needs no other decomposition either: its residual is
(I - H_ff)^-1 (y - H y)_f, which holds exactly for every quadratic penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dery_cli.core.stitching.probe import standardised
from dery_cli.core.stitching.ridge import RIDGE_PENALTIES, few_threads

RANK_TOLERANCE = 1e-12
"""Eigenvalues of the Gram below this share of the largest are rounding errors."""

Spans = Sequence[tuple[int, int]]
"""(first, last + 1) sample of each fold."""


def in_folds(fold_N: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The order of samples in which folds lie in a row, and where each of them lies then."""
    order_N = fold_N.argsort(stable=True)
    sizes = [size for size in torch.bincount(fold_N).tolist() if size]
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return order_N, [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


@dataclasses.dataclass(frozen=True)
class Smoother:
    """Ridge regression from one input, in float64.

    Args:
        basis_NR: Orthonormal columns; the first is constant, and never shrunk.
        value_R: Eigenvalues of the Gram of the standardised input; infinite for the first.
        unit: The unit of penalties, the mean eigenvalue.
    """

    basis_NR: Tensor
    value_R: Tensor
    unit: float

    @classmethod
    def of(cls, x_NC: Tensor) -> Smoother:
        """Of an input, whose channels are standardised first; in kernel form where N < C."""
        z_NC, _, _ = standardised(x_NC)
        with few_threads(min(z_NC.shape)):
            kernel = len(z_NC) <= z_NC.shape[1]
            value_R, vector_RR = torch.linalg.eigh(z_NC @ z_NC.T if kernel else z_NC.T @ z_NC)
            kept_R = value_R > RANK_TOLERANCE * max(float(value_R[-1]), 1e-300)
            unit = float(value_R[kept_R].sum()) / max(1, min(z_NC.shape))
            value_R, vector_RR = value_R[kept_R], vector_RR[:, kept_R]
            basis_NR = vector_RR if kernel else z_NC @ (vector_RR / value_R.sqrt())
        constant_N1 = torch.full((len(z_NC), 1), len(z_NC) ** -0.5, dtype=torch.float64)
        infinite_1 = torch.tensor([torch.inf], dtype=torch.float64)
        return cls(torch.cat([constant_N1, basis_NR], 1), torch.cat([infinite_1, value_R]), unit)

    def _left_out(self, penalties: Sequence[float]) -> Tensor:
        """The share of each direction that a penalty takes away, (P, R)."""
        ridge_P1 = self.unit * torch.tensor(penalties, dtype=torch.float64)[:, None]
        return ridge_P1 / (self.value_R + ridge_P1)

    def fit(self, y_ND: Tensor, penalty: float) -> Tensor:
        """What the map fitted to all samples says of them."""
        share_R = 1 - self._left_out([penalty])[0]
        return self.basis_NR @ (share_R[:, None] * (self.basis_NR.T @ y_ND.double()))

    def best_penalties(
        self, y_NVD: Tensor, penalties: Sequence[float] = RIDGE_PENALTIES
    ) -> list[float]:
        """The penalty of each group of outputs, by generalised cross-validation.

        That is the residual's square over that of the share of degrees of freedom that are left
        (Golub, Heath and Wahba, 1979); the decomposition gives both for all penalties at once.
        """
        count, rank = self.basis_NR.shape
        basis_NR = self.basis_NR.to(y_NVD.dtype)
        a_RVD = (basis_NR.T @ y_NVD.flatten(1)).reshape(rank, *y_NVD.shape[1:])
        energy_RV = a_RVD.square().sum(-1).double()
        outside_V = y_NVD.square().sum((0, 2)).double() - energy_RV.sum(0)
        if rank >= count:  # else rounding errors would pass for what cannot be explained
            outside_V = torch.zeros_like(outside_V)
        left_PR = self._left_out(penalties)
        error_PV = left_PR.square() @ energy_RV + outside_V.clamp(min=0)
        free_P = (count - rank + left_PR.sum(1)) / count
        best_V = (error_PV / free_P.square()[:, None]).argmin(0)
        return [penalties[best] for best in best_V.tolist()]

    def held_out(self, penalty: float, spans: Spans) -> HeldOutMap:
        """What maps fitted without a fold say of it, for all folds."""
        share_R = 1 - self._left_out([penalty])[0]
        parts = []
        for start, stop in spans:
            basis_HR = self.basis_NR[start:stop]
            with few_threads(stop - start):
                inner_HH = (basis_HR * share_R) @ basis_HR.T
                identity_HH = torch.eye(stop - start, dtype=torch.float64)
                parts.append(torch.linalg.solve(identity_HH - inner_HH, basis_HR * share_R))
        return HeldOutMap.of(self.basis_NR, parts, spans)


@dataclasses.dataclass(frozen=True)
class HeldOutMap:
    """From outputs at all samples to what is said of each where its fold was held out, in float32.

    Args:
        basis_NR: Of the smoother; None where the maps are there in full.
        parts: Of each fold (samples in it, R), or in full (samples in it, samples outside).
        spans: Where the folds lie.
    """

    basis_NR: Tensor | None
    parts: Sequence[Tensor]
    spans: Spans

    @classmethod
    def of(cls, basis_NR: Tensor, parts: Sequence[Tensor], spans: Spans) -> HeldOutMap:
        """The cheaper form: through R coordinates, or in full where R is large.

        The parts are large then, and cancel in the product: they would lose too much in float32.
        """
        count, rank = basis_NR.shape
        if 2 * rank <= count - count // len(spans):
            return cls(basis_NR.float(), [part_HR.float() for part_HR in parts], spans)
        full = [
            (part_HR @ _outside(basis_NR, span).T).float()
            for part_HR, span in zip(parts, spans, strict=True)
        ]
        return cls(None, full, spans)

    def __call__(self, y_ND: Tensor) -> Tensor:
        """Held-out predictions of outputs (N, D)."""
        if self.basis_NR is None:
            told = [
                part_HT[:, :start] @ y_ND[:start] + part_HT[:, start:] @ y_ND[stop:]
                for part_HT, (start, stop) in zip(self.parts, self.spans, strict=True)
            ]
            return torch.cat(told)
        inside = [self.basis_NR[start:stop].T @ y_ND[start:stop] for start, stop in self.spans]
        total_RD = torch.stack(inside).sum(0)
        told = [
            part_HR @ (total_RD - inside_RD)
            for part_HR, inside_RD in zip(self.parts, inside, strict=True)
        ]
        return torch.cat(told)


def _outside(rows: Tensor, span: tuple[int, int]) -> Tensor:
    return torch.cat([rows[: span[0]], rows[span[1] :]])
