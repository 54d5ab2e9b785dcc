"""The closed-form linear classifier: the probe at a node, and the head of an assembly.

Legend: N samples, R rank, C input channels, D output channels (classes), P penalties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dery_cli.core.scoring import top1
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


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What held-out samples say of a network, and of how its classifier should be fitted.

    Args:
        accuracy: Top-1 on the samples asked about, each by a map that was neither fitted on it
            nor chosen with it.
        penalty: Of the ridge regression, the best on all of them.
        temperature: Factor of the logits, likewise.
        cross_entropy: In nats, of the same samples as the accuracy and nested as it is.
    """

    accuracy: float
    penalty: float
    temperature: float
    cross_entropy: float


def stratified_folds(label_N: Tensor, folds: int) -> Tensor:
    """A fold index a sample, round robin within each class: deterministic and balanced."""
    fold_N = torch.zeros(len(label_N), dtype=torch.int64)
    offset = 0
    for label in sorted(set(label_N.tolist())):
        members = (label_N == label).nonzero().flatten()
        fold_N[members] = (torch.arange(len(members)) + offset) % folds
        offset += len(members)
    return fold_N


def fit_classifier(
    x_NC: Tensor,
    label_N: Tensor,
    num_classes: int,
    *,
    folds: int = 5,
    chosen: Judgement | None = None,
) -> LinearClassifier:
    """Ridge regression to one-hot targets, penalty and temperature by cross-validation.

    Channels are standardised first, so that one penalty suits them all; the temperature scales the
    logits to the lowest cross-validated cross-entropy, which leaves fine-tuning a sane start.

    Where labels have gone into the features (stitches fitted with them), folds of the samples are
    no judges: every sample is known. Then ``judge`` chooses, on networks that do not know them.

    Args:
        x_NC: Features.
        label_N: Class indices.
        num_classes: D.
        folds: Cross-validation folds, each with its share of every class.
        chosen: In place of folds of ``x_NC``: what samples that nothing was fitted on came to.
    """
    with few_threads(min(x_NC.shape)):
        label_N = label_N.cpu()
        z_NC, mean_C, scale_C = standardised(x_NC)
        target_ND = torch.nn.functional.one_hot(label_N, num_classes).double()
        if chosen is None:
            score_PND = _held_out_scores(_parts(z_NC, label_N, folds), target_ND)
            best = _best_penalty(score_PND, target_ND)
            score_ND = score_PND[best]
            chosen = Judgement(
                accuracy=float(top1(score_ND, label_N)),
                penalty=RIDGE_PENALTIES[best],
                temperature=best_temperature(score_ND, label_N),
                cross_entropy=math.nan,
            )
        weight_CD, offset_D = _kernel_ridge(z_NC, target_ND, (chosen.penalty,))[0]
        weight_CD = chosen.temperature * weight_CD * scale_C[:, None]
        bias_D = chosen.temperature * offset_D - mean_C @ weight_CD
    return LinearClassifier(weight_CD, bias_D, chosen.accuracy)


def judge(parts: Sequence[HeldOut], label_N: Tensor, num_classes: int) -> Judgement:
    """Choose penalty and temperature on samples that were kept from what made the features.

    The accuracy is nested: the samples asked about are divided in halves of each class, and each
    half is judged with the penalty that the other chooses. So it flatters neither by the labels in
    the features nor by the choice.

    Args:
        parts: Features by one network or several, each made without the samples it is asked about;
            no sample is asked about twice.
        label_N: Class indices of all samples.
        num_classes: D.

    Raises:
        ValueError: No sample is asked about.
    """
    label_N = label_N.cpu()
    asked_N = torch.stack([part.asked_N.cpu() for part in parts]).any(0)
    if not asked_N.any():
        raise ValueError("no sample was held out from what made the features")
    target_ND = torch.nn.functional.one_hot(label_N, num_classes).double()
    with few_threads(min(parts[0].x_NC.shape)):
        scaled = [_scaled_by_the_others(part) for part in parts]
        score_PND = _held_out_scores(scaled, target_ND)[:, asked_N]
        wanted_ND, asked_label_N = target_ND[asked_N], label_N[asked_N]
        best = _best_penalty(score_PND, wanted_ND)
        logits_ND = torch.zeros_like(wanted_ND)
        half_N = stratified_folds(asked_label_N, 2)
        for half in range(2):
            inside_N = half_N == half
            if inside_N.any():
                others_N = ~inside_N if (~inside_N).any() else inside_N
                chosen = _best_penalty(score_PND[:, others_N], wanted_ND[others_N])
                factor = best_temperature(score_PND[chosen, others_N], asked_label_N[others_N])
                logits_ND[inside_N] = factor * score_PND[chosen, inside_N]
        return Judgement(
            accuracy=float(top1(logits_ND, asked_label_N)),
            penalty=RIDGE_PENALTIES[best],
            temperature=best_temperature(score_PND[best], asked_label_N),
            cross_entropy=float(torch.nn.functional.cross_entropy(logits_ND, asked_label_N)),
        )


def _scaled_by_the_others(part: HeldOut) -> HeldOut:
    """Channels standardised by the samples that a map is fitted on."""
    asked_N = part.asked_N.cpu()
    known_N = ~asked_N if (~asked_N).any() else asked_N
    _, mean_C, scale_C = standardised(part.x_NC[known_N])
    return HeldOut((part.x_NC.double().cpu() - mean_C) * scale_C, asked_N)


def _parts(z_NC: Tensor, label_N: Tensor, folds: int) -> list[HeldOut]:
    fold_N = stratified_folds(label_N, folds)
    return [HeldOut(z_NC, fold_N == fold) for fold in range(folds)]


def _best_penalty(score_PND: Tensor, target_ND: Tensor) -> int:
    """The number of the most accurate penalty; among equals, of the smallest squared error."""
    hits_P = top1(score_PND, target_ND.argmax(-1))
    loss_P = (score_PND - target_ND).square().mean((-1, -2))
    return min(
        range(len(RIDGE_PENALTIES)), key=lambda p: (-round(float(hits_P[p]), 9), float(loss_P[p]))
    )


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
