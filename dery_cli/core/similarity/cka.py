"""Centred kernel alignment of all nodes, with a linear or an RBF kernel.

CKA(i, j) = HSIC(K_i, K_j) / sqrt(HSIC(K_i, K_i) HSIC(K_j, K_j)) (Kornblith et al. 2019,
arXiv 1905.00414). The default estimator divides sums over minibatches of the unbiased HSIC_1
(Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327, eq. 3). HSIC_1 is an inner product of
U-centred Grams (Szekely & Rizzo 2014): with K's diagonal set to zero, r its row sums, s its sum,

    A_ij = K_ij - (r_i + r_j) / (m - 2) + s / ((m - 1)(m - 2)) for i != j, A_ii = 0
    HSIC_1(K, L) = <A, B> / (m (m - 3))

Of a linear kernel on centred features r_i = -|x_i|^2, so any part of A comes from the features
without the rest of K. A minibatch weighs m (m - 3): full ones alike, a shorter last one less.

Legend: N samples, M samples of a minibatch, C channels, P nodes, K packed entries of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dery_cli.core.similarity.gram import (
    SQRT2,
    Chunk,
    Factored,
    RowBuilder,
    inner_products,
    mirror_,
    pack_dense,
    pack_factored,
)
from dery_cli.core.similarity.metric import Known, MetricOptions, Progress, Rows, Similarity
from dery_cli.errors import DeryError, UsageError

_SAFE = 1e-2
"""Where U-centring leaves less than this of a Gram's norm, float32 is not enough."""

_NOTHING = 1e-11
"""Where it leaves less than this in float64, what is left is rounding."""


def cka(
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Linear CKA between all nodes."""
    return _aligned("cka", LinearGrams(features, options), features, options, known, progress)


def rbf_cka(
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """CKA between all nodes with the kernel exp(-|x - y|^2 / (2 b^2)).

    b is ``options.bandwidth`` times the median distance between two samples of the minibatch at
    the node (the median of the non-zero distances where more than half of them are zero).
    """
    return _aligned("rbf_cka", RbfGrams(features, options), features, options, known, progress)


def minibatches(
    num_samples: int, options: MetricOptions
) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """(first, last + 1) sample of each minibatch, and warnings.

    A shorter last minibatch is used if the estimator is defined on it, else left out.

    Raises:
        UsageError: There are fewer samples than a minibatch has.
    """
    size = options.minibatch
    least = 2 if options.biased else 4
    if num_samples < least:
        raise UsageError(
            f"{num_samples} sample{'' if num_samples == 1 else 's'} cannot be compared",
            f"CKA needs at least {least}; embed more with `dery embed --samples`",
        )
    if num_samples < size:
        raise UsageError(
            f"{num_samples} samples are fewer than the minibatch of {size}",
            f"use --minibatch {num_samples}, or embed more with `dery embed --samples`",
        )
    spans = [
        (start, min(start + size, num_samples))
        for start in range(0, num_samples, size)
        if min(start + size, num_samples) - start >= least
    ]
    left_out = num_samples - spans[-1][1]
    if left_out:
        return spans, (f"the last {left_out} of {num_samples} samples are left out",)
    return spans, ()


def _aligned(
    name: str,
    grams: RowBuilder,
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None,
    progress: Progress | None,
) -> Similarity:
    spans, warnings = minibatches(common_samples(features), options)
    widest = max(rows.shape[1] for rows in features)
    m = options.minibatch
    work_bytes = 4 * m * (6 * widest + (8 * m if name == "rbf_cka" else 0))
    numer_PP, unit_P = inner_products(
        grams,
        None,
        spans,
        num_nodes=len(features),
        memory=options.memory,
        device=torch.device(options.device),
        work_bytes=work_bytes,
        known=known,
        progress=progress,
    )
    norm_P = numer_PP.diagonal().double().sqrt()
    constant_P = norm_P == 0
    inverse_P = torch.where(constant_P, 0.0, 1.0 / norm_P).to(numer_PP.dtype)
    sim_PP = numer_PP * inverse_P[:, None]
    sim_PP *= inverse_P[None, :]
    mirror_(sim_PP, len(features))  # the two products above round differently
    snap_(sim_PP)
    sim_PP.diagonal().copy_((~constant_P).to(sim_PP.dtype))
    return Similarity(
        metric=name,
        sim_PP=sim_PP,
        numer_PP=numer_PP,
        unit_P=unit_P,
        constant_nodes=tuple(constant_P.nonzero().flatten().tolist()),
        warnings=warnings + constant_warnings(constant_P),
    )


def snap_(sim_PP: Tensor, tolerance: float = 2e-6) -> None:
    """Set values that float32 cannot tell from 1 to 1, in place: |CKA| <= 1 by Cauchy-Schwarz."""
    sim_PP[sim_PP > 1.0 - tolerance] = 1.0


def constant_warnings(constant_P: Tensor) -> tuple[str, ...]:
    """One line where nodes have constant features, naming them by index."""
    nodes = constant_P.nonzero().flatten().tolist()
    if not nodes:
        return ()
    named = ", ".join(str(node) for node in nodes[:8]) + (", ..." if len(nodes) > 8 else "")
    return (f"constant features at {len(nodes)} nodes ({named}): similarity 0 to all",)


def common_samples(features: Sequence[Rows]) -> int:
    """N, the same at every node.

    Raises:
        UsageError: There are no nodes, or they differ.
    """
    counts = sorted({rows.shape[0] for rows in features})
    if not counts:
        raise UsageError("there are no nodes to compare", "add models with `dery zoo add`")
    if len(counts) > 1:
        raise UsageError(
            f"nodes have features of {counts[0]} and of {counts[-1]} samples",
            "embed all models on the same images with `dery embed`",
        )
    return counts[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Centred:
    """Features with their mean taken off, divided by their Frobenius norm ``size``."""

    x_MC: Tensor
    size: float


def centred(x_MC: Tensor, node: int, *, exact: bool = False) -> Centred | None:
    """Centre and normalise features of node ``node``; None where they are constant.

    In float32, with the mean in float64 and taken off in two parts, so that a large offset costs
    no digits; in float64 if ``exact``, if they come so, or if their scale is extreme.

    Raises:
        DeryError: Features are NaN or infinite.
    """
    if not exact and x_MC.dtype != torch.float64:
        mean_C = x_MC.mean(0, dtype=torch.float64)
        coarse_C = mean_C.float()
        shifted_MC = x_MC.float() - coarse_C
        shifted_MC -= (mean_C - coarse_C).float()
        size = float(torch.linalg.vector_norm(shifted_MC, dtype=torch.float64))
        if size == 0.0:
            return None
        if 1e-30 < size < 1e30:
            shifted_MC *= 1.0 / size
            return Centred(x_MC=shifted_MC, size=size)
    x_MC = x_MC.double()
    peak = float(x_MC.abs().max())
    if not math.isfinite(peak):
        raise DeryError(
            f"the features of node {node} hold NaN or infinity",
            "embed the model again with `dery embed`",
            details={"node": node},
        )
    if peak == 0.0:
        return None
    x_MC = x_MC / peak
    shifted_MC = x_MC - x_MC.mean(0)
    shifted_MC -= shifted_MC.mean(0)
    size = float(torch.linalg.vector_norm(shifted_MC))
    if size <= 8 * torch.finfo(torch.float64).eps * math.sqrt(x_MC.numel()):
        return None
    return Centred(x_MC=shifted_MC / size, size=size * peak)


class LinearGrams:
    """Packed, centred linear Grams, of norm about 1; the scale is |X|^2."""

    def __init__(self, features: Sequence[Rows], options: MetricOptions) -> None:
        self._features = features
        self._biased = options.biased
        self._device = torch.device(options.device)
        self.widths_P = [rows.shape[1] for rows in features]
        scratch = options.minibatch * (max(self.widths_P, default=0) + 2)
        self._left, self._right = (torch.empty(scratch, device=self._device) for _ in range(2))

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        raw_MC = self._features[node][start:stop].to(self._device)
        size = self._write_float32(out_K, raw_MC, chunk)
        if size is None:
            size = self._write_float64(out_K, raw_MC, node, chunk)
        return size**2

    def _write_float32(self, out_K: Tensor, raw_MC: Tensor, chunk: Chunk) -> float | None:
        """Pack in float32 and return |X|; None where that is not safe.

        The mean is taken off twice, so that a large offset costs no digits.
        """
        if raw_MC.dtype == torch.float64:
            return None
        m, channels = raw_MC.shape
        left_MR = self._left[: m * (channels + 2)].view(m, channels + 2)
        right_MR = self._right[: m * (channels + 2)].view(m, channels + 2)
        x_MC = left_MR[:, :channels]
        x_MC.copy_(raw_MC)
        x_MC -= x_MC.mean(0)
        x_MC -= x_MC.mean(0)
        square_M = torch.linalg.vector_norm(x_MC, dim=1).double().square()
        square = float(square_M.sum())
        if not 1e-24 < square < 1e36:
            return None
        torch.mul(x_MC, SQRT2 / square, out=right_MR[:, :channels])
        if self._biased:
            pack_factored(out_K, Factored(left_MR=x_MC, right_MR=right_MR[:, :channels]), chunk)
            return math.sqrt(square)
        square_M /= square
        _append_shift(left_MR, right_MR, _shift(square_M))
        pack_factored(out_K, Factored(left_MR=left_MR, right_MR=right_MR, hollow=True), chunk)
        if float(torch.linalg.vector_norm(out_K)) < _SAFE * _expected_norm(square_M, chunk):
            return None
        return math.sqrt(square)

    def _write_float64(self, out_K: Tensor, raw_MC: Tensor, node: int, chunk: Chunk) -> float:
        """Pack by way of float64 and return |X|; 0 where nothing but rounding is left."""
        x = centred(raw_MC, node, exact=True)
        if x is None:
            return 0.0
        if self._biased:
            pack_factored(out_K, Factored.gram(x.x_MC), chunk)
            return x.size
        square_M = x.x_MC.square().sum(1)
        left_MR = torch.cat([x.x_MC, x.x_MC[:, :1], x.x_MC[:, :1]], 1)
        right_MR = left_MR * SQRT2
        _append_shift(left_MR, right_MR, _shift(square_M))
        pack_factored(out_K, Factored(left_MR=left_MR, right_MR=right_MR, hollow=True), chunk)
        left = float(torch.linalg.vector_norm(out_K, dtype=torch.float64))
        return x.size if left > _NOTHING * _expected_norm(square_M, chunk) else 0.0


def _shift(square_M: Tensor) -> Tensor:
    """What U-centring adds to row (and column) i, from |x_i|^2 of centred features."""
    m = square_M.shape[0]
    return square_M / (m - 2) - square_M.sum() / (2 * (m - 1) * (m - 2))


def _append_shift(left_MR: Tensor, right_MR: Tensor, shift_M: Tensor) -> None:
    """Fill the last two columns: (x_i, a_i, 1) . (x_j, 1, a_j) = x_i . x_j + a_i + a_j."""
    left_MR[:, -2] = shift_M
    left_MR[:, -1] = 1.0
    right_MR[:, -2] = SQRT2
    right_MR[:, -1] = shift_M * SQRT2


def _expected_norm(square_M: Tensor, chunk: Chunk) -> float:
    """Norm of |x_i| |x_j|, i != j, were it spread evenly: rounding is proportional to it."""
    fourth = float(square_M.square().sum())
    pairs = float(square_M.sum()) ** 2 - fourth + fourth / chunk.size
    return math.sqrt(max(pairs, 0.0) * 2 * chunk.area / (chunk.size * (chunk.size + 1)))


class RbfGrams:
    """Packed, centred Grams of the RBF kernel.

    Centring takes off any constant, so K - 1 is built in place of K: for a wide bandwidth that
    keeps the digits that K would lose.
    """

    def __init__(self, features: Sequence[Rows], options: MetricOptions) -> None:
        self._features = features
        self._options = options
        self._device = torch.device(options.device)
        self.widths_P = [rows.shape[1] * 2 for rows in features]

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        raw_MC = self._features[node][start:stop].to(self._device)
        for exact in (False, True):
            x = centred(raw_MC, node, exact=exact)
            if x is None:
                return 0.0
            matrix_MM = self._kernel(x.x_MC)
            if matrix_MM is None:
                continue
            whole = float(torch.linalg.vector_norm(matrix_MM))
            _centre_(matrix_MM, hollow=not self._options.biased)
            left = float(torch.linalg.vector_norm(matrix_MM))
            if left > _SAFE * whole:
                break
        else:
            if matrix_MM is None or left <= _NOTHING * whole:
                return 0.0
        pack_dense(out_K, matrix_MM, chunk)
        return 1.0

    def _kernel(self, x_MC: Tensor) -> Tensor | None:
        """exp(-|x_i - x_j|^2 / (2 b^2)) - 1; None where float32 cannot tell the distances."""
        m = x_MC.shape[0]
        square_M = x_MC.square().sum(1)
        distance_MM = torch.addmm(square_M[:, None] + square_M, x_MC, x_MC.T, alpha=-2)
        distance_MM.clamp_(min=0).fill_diagonal_(0)
        rows, columns = torch.triu_indices(m, m, 1, device=x_MC.device)
        pair_distances = distance_MM[rows, columns]
        median = pair_distances.median()
        if float(median) == 0.0:
            positive = pair_distances[pair_distances > 0]
            if not positive.numel():
                return None
            median = positive.median()
        rounding = 4 * torch.finfo(x_MC.dtype).eps * float(square_M.max())
        if x_MC.dtype == torch.float32 and rounding > 1e-5 * float(median):
            return None
        return distance_MM.mul_(-0.5 / (float(median) * self._options.bandwidth**2)).expm1_()


def _centre_(matrix_MM: Tensor, *, hollow: bool) -> None:
    """Centre a symmetric matrix in place: H K H, or U-centring where ``hollow``."""
    m = matrix_MM.shape[0]
    if hollow:
        matrix_MM.fill_diagonal_(0)
        sum_M = matrix_MM.sum(1, dtype=torch.float64)
        shift_M = sum_M / (m - 2) - sum_M.sum() / (2 * (m - 1) * (m - 2))
    else:
        mean_M = matrix_MM.mean(1, dtype=torch.float64)
        shift_M = mean_M - mean_M.mean() / 2
    shift_M = shift_M.to(matrix_MM.dtype)
    matrix_MM -= shift_M[:, None]
    matrix_MM -= shift_M[None, :]
    if hollow:
        matrix_MM.fill_diagonal_(0)
