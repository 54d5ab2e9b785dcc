"""The closed-form linear classifier: the probe at a node, and the head of an assembly.

Legend: N samples, R rank, C input channels, D output channels (classes), P penalties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dery_cli.core.stitching.ridge import RIDGE_PENALTIES, few_threads


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A closed-form linear classifier: logits = x W + b.

    Args:
        weight_CD: (C, classes).
        bias_D: (classes,).
        accuracy: Top-1 accuracy of maps fitted in the same way, on the samples held out from them.
    """

    weight_CD: Tensor
    bias_D: Tensor
    accuracy: float


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Features of all samples, by a network that has not seen the labels of some of them.

    Args:
        x_NC: Features; they may differ from those of other networks in all but their shape.
        asked_N: The samples whose labels were kept from the network: a map fitted on the others is
            asked about these.
    """

    x_NC: Tensor
    asked_N: Tensor


def stratified_folds(label_N: Tensor, folds: int) -> Tensor:
    """A fold index a sample, round robin within each class: deterministic and balanced."""
    fold_N = torch.zeros(len(label_N), dtype=torch.int64)
    offset = 0
    for label in sorted(set(label_N.tolist())):
        members = (label_N == label).nonzero().flatten()
        fold_N[members] = (torch.arange(len(members)) + offset) % folds
        offset += len(members)
    return fold_N


def outside_folds(
    x_NC: Tensor, label_N: Tensor, outside_N: Tensor, *, folds: int = 5
) -> list[HeldOut]:
    """Folds of the samples whose labels the network has not seen; the others are always fitted on.

    Args:
        x_NC: Features of all samples.
        label_N: Their class indices.
        outside_N: The samples that what made the features was not fitted on.
        folds: Parts of those.
    """
    fold_N = torch.full((len(label_N),), -1)
    fold_N[outside_N] = stratified_folds(label_N[outside_N], folds)
    return [HeldOut(x_NC, fold_N == fold) for fold in range(folds)]


def fit_classifier(
    x_NC: Tensor,
    label_N: Tensor,
    num_classes: int,
    *,
    folds: int = 5,
    held_out: Sequence[HeldOut] | None = None,
) -> LinearClassifier:
    """Ridge regression to one-hot targets, penalty and temperature by cross-validation.

    Channels are standardised first, so that one penalty suits them all; the temperature scales the
    logits to the lowest cross-validated cross-entropy, which leaves fine-tuning a sane start.

    Where labels have gone into the features (stitches fitted with them), folds of the samples are
    no judges: every sample is known. Then ``held_out`` says which samples were kept from what.

    Args:
        x_NC: Features.
        label_N: Class indices.
        num_classes: D.
        folds: Cross-validation folds, each with its share of every class.
        held_out: In place of folds of ``x_NC``: ``outside_folds`` of a network that was fitted on
            some of the samples, or the features by several networks, each made without a part.

    Raises:
        ValueError: ``held_out`` asks about no sample.
    """
    with few_threads(min(x_NC.shape)):
        label_N = label_N.cpu()
        z_NC, mean_C, scale_C = standardised(x_NC)
        target_ND = torch.nn.functional.one_hot(label_N, num_classes).double()
        parts = _parts(z_NC, label_N, folds)
        asked_N = torch.ones(len(label_N), dtype=torch.bool)
        if held_out is not None:
            parts = [HeldOut(standardised(part.x_NC)[0], part.asked_N.cpu()) for part in held_out]
            asked_N = torch.stack([part.asked_N for part in parts]).any(0)
            if not asked_N.any():
                raise ValueError("no sample was held out from what made the features")
        best, score_ND, accuracy = _chosen(parts, target_ND, asked_N)
        temperature = best_temperature(score_ND, label_N[asked_N])
        weight_CD, offset_D = _kernel_ridge(z_NC, target_ND, (RIDGE_PENALTIES[best],))[0]
        weight_CD = temperature * weight_CD * scale_C[:, None]
        bias_D = temperature * offset_D - mean_C @ weight_CD
    return LinearClassifier(weight_CD, bias_D, accuracy)


def _parts(z_NC: Tensor, label_N: Tensor, folds: int) -> list[HeldOut]:
    fold_N = stratified_folds(label_N, folds)
    return [HeldOut(z_NC, fold_N == fold) for fold in range(folds)]


def _chosen(
    parts: Sequence[HeldOut], target_ND: Tensor, asked_N: Tensor
) -> tuple[int, Tensor, float]:
    """The best penalty's number, its scores of the samples asked about, and its accuracy there."""
    wanted_ND = target_ND[asked_N]
    score_PND = _held_out_scores(parts, target_ND)[:, asked_N]
    hits_P = (score_PND.argmax(-1) == wanted_ND.argmax(-1)).double().mean(-1)
    loss_P = (score_PND - wanted_ND).square().mean((-1, -2))
    # most accurate first; among equals the smallest squared error
    best = min(
        range(len(RIDGE_PENALTIES)), key=lambda p: (-round(float(hits_P[p]), 9), float(loss_P[p]))
    )
    return best, score_PND[best], float(hits_P[best])


def standardised(x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel less its mean over its deviation; the means and the factors."""
    x_NC = x_NC.cpu().double()
    mean_C, std_C = x_NC.mean(0), x_NC.std(0, correction=0)
    scale_C = torch.where(std_C > 1e-8 * std_C.max().clamp(min=1e-30), 1 / std_C, 0.0)
    return (x_NC - mean_C) * scale_C, mean_C, scale_C


def _kernel_ridge(
    x_NC: Tensor, y_ND: Tensor, penalties: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Ridge maps and offsets for each penalty, through the thin SVD of the centred input."""
    mean_x, mean_y = x_NC.mean(0), y_ND.mean(0)
    u_NR, s_R, vh_RC = torch.linalg.svd(x_NC - mean_x, full_matrices=False)
    unit = float(s_R.square().sum()) / max(1, min(x_NC.shape)) or 1.0
    uy_RD = u_NR.T @ (y_ND - mean_y)
    maps = []
    for penalty in penalties:
        weight_CD = vh_RC.T @ ((s_R / (s_R.square() + penalty * unit))[:, None] * uy_RD)
        maps.append((weight_CD, mean_y - mean_x @ weight_CD))
    return maps


def _held_out_scores(parts: Sequence[HeldOut], y_ND: Tensor) -> Tensor:
    """What maps fitted on the other samples of a part say of those asked about, by penalty."""
    score_PND = torch.zeros((len(RIDGE_PENALTIES), *y_ND.shape), dtype=torch.float64)
    for part in parts:
        x_NC, asked_N = part.x_NC, part.asked_N
        if not asked_N.any() or asked_N.all():
            continue
        maps = _kernel_ridge(x_NC[~asked_N], y_ND[~asked_N], RIDGE_PENALTIES)
        for index, (weight_CD, offset_D) in enumerate(maps):
            score_PND[index, asked_N] = x_NC[asked_N] @ weight_CD + offset_D
    return score_PND


def best_temperature(score_ND: Tensor, label_N: Tensor) -> float:
    """The factor from 1 to 100 of the lowest cross-entropy, which is convex in it."""

    def loss(factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(score_ND * factor, label_N))

    found = minimize_scalar(loss, bounds=(1.0, 100.0), method="bounded", options={"xatol": 1e-3})
    return float(found.x)


def probe_accuracy(x_NC: Tensor, label_N: Tensor, num_classes: int, *, folds: int = 5) -> float:
    """Cross-validated accuracy of the closed-form classifier: the probe q at a node."""
    return fit_classifier(x_NC, label_N, num_classes, folds=folds).accuracy


def probe_error(x_NC: Tensor, label_N: Tensor, num_classes: int, *, folds: int = 5) -> float:
    """Cross-validated squared error of the closed-form classifier, summed over classes.

    Finer than the accuracy: it tells two feature sets apart on a few hundred samples.
    """
    with few_threads(min(x_NC.shape)):
        z_NC, _, _ = standardised(x_NC)
        label_N = label_N.cpu()
        target_ND = torch.nn.functional.one_hot(label_N, num_classes).double()
        score_PND = _held_out_scores(_parts(z_NC, label_N, folds), target_ND)
    return float((score_PND - target_ND).square().sum(-1).mean(-1).min())
