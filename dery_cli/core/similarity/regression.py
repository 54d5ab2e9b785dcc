"""How well a linear map of one node's features gives another's: ``lr`` and ``ridge``.

Both are directional: entry (i, j) is the R^2 of predicting node j from node i, over all channels
of j together. Both are inner products of N x N matrices, so all pairs cost one matrix product:

    lr     R^2 = |Q_i^T Y_j|^2 / |Y_j|^2 = <Q_i Q_i^T, Y_j Y_j^T> / |Y_j|^2, Q_i an orthonormal
           basis of node i's centred features (Kornblith et al. 2019, arXiv 1905.00414, eq. 14)
    ridge  R^2 = 1 - <E_i^T E_i, Y_j Y_j^T> / SST_j, row n of E_i Y being the error at sample n of
           the ridge regression that was fitted without n's fold

Legend: N samples, C channels, P nodes, R rank, K packed entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dery_cli.core.similarity.cka import centred, common_samples, constant_warnings, snap_
from dery_cli.core.similarity.gram import Chunk, Factored, RowBuilder, inner_products, pack_factored
from dery_cli.core.similarity.metric import Known, MetricOptions, Progress, Rows, Similarity
from dery_cli.errors import UsageError

SAMPLES_PER_CHANNEL = 4
"""Below this the R^2 of unrelated features is no longer small: it is C / N."""


def lr(
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """R^2 of the linear regression of every node on every other.

    With ``options.projection`` predictors that are wider are first reduced to so many random
    directions; targets never are.

    Raises:
        UsageError: A node has fewer than four samples a channel.
    """
    num_samples = common_samples(features)
    widest = max(range(len(features)), key=lambda p: features[p].shape[1])
    width = features[widest].shape[1]
    if options.projection is not None:
        width = min(width, options.projection)
    if num_samples < SAMPLES_PER_CHANNEL * width:
        raise UsageError(
            f"lr needs {SAMPLES_PER_CHANNEL} samples a channel: node {widest} is regressed on with "
            f"{width} channels and {num_samples} samples",
            f"embed {SAMPLES_PER_CHANNEL * width} samples, or use "
            f"--projection {max(1, num_samples // SAMPLES_PER_CHANNEL)}",
        )
    left = Projectors(features, options)
    work_bytes = 8 * num_samples * (5 * width + 4 * features[widest].shape[1])
    return _regressed("lr", left, features, options, known, progress, work_bytes)


def ridge(
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Cross-validated R^2 of the ridge regression of every node on every other.

    Sample n is in fold n modulo ``options.folds``. The penalty is ``options.penalty`` times the
    mean over channels of their summed squares in the training part. R^2 may be negative.

    Raises:
        UsageError: There are fewer than two samples a fold.
    """
    num_samples = common_samples(features)
    if num_samples < 2 * options.folds:
        raise UsageError(
            f"{num_samples} samples are too few for {options.folds} folds",
            "embed more with `dery embed --samples`",
        )
    left = HeldOutErrors(features, options)
    widest = max(rows.shape[1] for rows in features)
    work_bytes = 8 * num_samples * (4 * num_samples + 4 * widest)
    return _regressed("ridge", left, features, options, known, progress, work_bytes)


def _regressed(
    name: str,
    left: RowBuilder,
    features: Sequence[Rows],
    options: MetricOptions,
    known: Known | None,
    progress: Progress | None,
    work_bytes: int,
) -> Similarity:
    num_samples = common_samples(features)
    numer_PP, unit_P = inner_products(
        left,
        Targets(features, options, held_out=name == "ridge"),
        [(0, num_samples)],
        num_nodes=len(features),
        memory=options.memory,
        device=torch.device(options.device),
        work_bytes=work_bytes,
        known=known,
        progress=progress,
    )
    constant_P = unit_P == 0
    sim_PP = 1.0 - numer_PP if name == "ridge" else numer_PP.clone()
    sim_PP[constant_P] = 0.0
    sim_PP[:, constant_P] = 0.0
    if name == "lr":
        snap_(sim_PP, 1e-5)
    return Similarity(
        metric=name,
        sim_PP=sim_PP,
        numer_PP=numer_PP,
        unit_P=unit_P,
        constant_nodes=tuple(constant_P.nonzero().flatten().tolist()),
        warnings=constant_warnings(constant_P),
    )


class Targets:
    """Packed Y Y^T of centred features, divided by the sum of squares they are to explain.

    Args:
        features: Of all nodes.
        options: ``folds`` and ``device`` are read.
        held_out: Squares are about the mean of the other folds rather than about the whole mean.
    """

    def __init__(self, features: Sequence[Rows], options: MetricOptions, *, held_out: bool) -> None:
        self._features = features
        self._options = options
        self._held_out = held_out
        self.widths_P = [rows.shape[1] for rows in features]

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        y = centred(_load(self._features[node], start, stop, self._options), node)
        if y is None:
            return 0.0
        y_NC = y.x_MC
        if self._held_out:
            total = 0.0
            for fold in range(self._options.folds):
                held, rest = _split(y_NC, fold, self._options.folds)
                total += float((held - rest.mean(0)).square().sum(dtype=torch.float64))
            y_NC = y_NC / math.sqrt(total)
        pack_factored(out_K, Factored.gram(y_NC.float()), chunk)
        return 1.0


class Projectors:
    """Packed Q Q^T, the projector on the span of centred features."""

    def __init__(self, features: Sequence[Rows], options: MetricOptions) -> None:
        self._features = features
        self._options = options
        limit = options.projection
        self.widths_P = [
            rows.shape[1] if limit is None else min(limit, rows.shape[1]) for rows in features
        ]

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        x = centred(_load(self._features[node], start, stop, self._options), node, exact=True)
        if x is None:
            return 0.0
        x_NC = x.x_MC
        if self.widths_P[node] < x_NC.shape[1]:
            x_NC = x_NC @ _directions(x_NC, self.widths_P[node], self._options.seed)
        pack_factored(out_K, Factored.gram(orthonormal_basis(x_NC).float()), chunk)
        return 1.0


def orthonormal_basis(x_NC: Tensor) -> Tensor:
    """Orthonormal basis [N, R] of the span of the columns, by QR.

    Dependent columns (duplicates, dead channels) show as small diagonal entries of the triangular
    factor; then its singular vectors leave the dependent directions out.
    """
    norm_C = torch.linalg.vector_norm(x_NC, dim=0)
    x_NC = x_NC[:, norm_C > 0] / norm_C[norm_C > 0]
    q_NC: Tensor
    r_CC: Tensor
    q_NC, r_CC = torch.linalg.qr(x_NC)
    if float(r_CC.diagonal().abs().min()) > 1e-6:
        return q_NC
    u_CC: Tensor
    value_C: Tensor
    u_CC, value_C, _ = torch.linalg.svd(r_CC)
    tolerance = max(x_NC.shape) * torch.finfo(x_NC.dtype).eps * float(value_C[0])
    return q_NC @ u_CC[:, value_C > tolerance]


def _directions(x_NC: Tensor, width: int, seed: int) -> Tensor:
    """Gaussian directions [C, width]; the same for all nodes with C channels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (x_NC.shape[1], width)
    return torch.randn(shape, generator=generator, dtype=x_NC.dtype).to(x_NC.device)


class HeldOutErrors:
    """Packed E^T E, row n of E Y being the cross-validated ridge regression's error at sample n."""

    def __init__(self, features: Sequence[Rows], options: MetricOptions) -> None:
        self._features = features
        self._options = options
        self.widths_P = [features[0].shape[0] for _ in features]

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        x = centred(_load(self._features[node], start, stop, self._options), node, exact=True)
        if x is None:
            return 0.0
        errors_NN = held_out_errors(x.x_MC, self._options.folds, self._options.penalty)
        pack_factored(out_K, Factored.gram(errors_NN.T.float()), chunk)
        return 1.0


def held_out_errors(x_NC: Tensor, folds: int, penalty: float) -> Tensor:
    """E [N, N] such that E Y are the errors of the ridge regression of any Y on ``x_NC``."""
    num_samples = x_NC.shape[0]
    errors_NN = torch.eye(num_samples, dtype=x_NC.dtype, device=x_NC.device)
    index_N = torch.arange(num_samples, device=x_NC.device)
    for fold in range(folds):
        held, rest = _split(x_NC, fold, folds)
        held_N, rest_N = _split(index_N, fold, folds)
        mean_C = rest.mean(0)
        held, rest = held - mean_C, rest - mean_C
        strength = penalty * float(rest.square().sum()) / x_NC.shape[1]
        if strength == 0.0:
            weights = torch.zeros(len(held), len(rest), dtype=x_NC.dtype, device=x_NC.device)
        elif rest.shape[1] <= rest.shape[0]:
            weights = held @ _solve(rest.T @ rest, rest.T, strength)
        else:
            weights = _solve(rest @ rest.T, rest @ held.T, strength).T
        errors_NN[held_N[:, None], rest_N] = -(weights + 1.0 / len(rest))
    return errors_NN


def _solve(gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """(gram + strength I)^-1 right."""
    gram.diagonal().add_(strength)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _split(rows: Tensor, fold: int, folds: int) -> tuple[Tensor, Tensor]:
    """Rows of one fold, and the others."""
    held = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    held[fold::folds] = True
    return rows[held], rows[~held]


def _load(rows: Rows, start: int, stop: int, options: MetricOptions) -> Tensor:
    return rows[start:stop].to(torch.device(options.device))
