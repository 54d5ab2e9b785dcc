"""What a joint between any two nodes would lose, for all pairs of a zoo, before anything is built.

Legend: N images, C source channels, D classes, K dimensions of logits that are kept, V target
nodes, S images that distributions are compared on, M mixtures of logits.

A stitch regresses a target node's features on a source node's. Ridge followed by a linear probe is
linear, so the source may be regressed on the *logits* of the target's probe at once: a few columns
a node in place of all its channels. A source is decomposed once (``smoother``) and asked about all
targets. Beside R2, which weighs every direction of the logits by its variance, stands the KL
divergence between what the target's probe says of its own features and of the predicted ones (KLAS,
arXiv 2605.29259).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dery_cli.core.scoring import top1
from dery_cli.core.stitching.probe import best_temperature, stratified_folds
from dery_cli.core.stitching.ridge import few_threads
from dery_cli.core.stitching.smoother import HeldOutMap, Smoother, Spans, in_folds

PROBE_FOLDS = 5
JOINT_FOLDS = 4
"""Image i is in fold i mod ``JOINT_FOLDS`` of the regressions."""
MAX_DIMS = 64
"""Logits of more classes are projected on so many principal components, for both measures."""
MAX_MIXTURES = 8
"""A penalty is chosen on so many random mixtures of a target's logits, or on all if these are few.
"""
KL_ENTRIES = 1 << 16
MIN_KL_IMAGES = 256
"""Distributions are compared on all images, or on as many as have ``KL_ENTRIES`` logits."""


@dataclasses.dataclass(frozen=True)
class NodeProbe:
    """The closed-form linear classifier at a node, by what it says of the images.

    Args:
        logits_ND: Of all images, by the probe fitted to all of them; float32, scaled to the lowest
            cross-validated cross-entropy.
        accuracy: Cross-validated top-1.
        cross_entropy: Cross-validated, in nats.
    """

    logits_ND: Tensor
    accuracy: float
    cross_entropy: float


def probe_node(x_NC: Tensor, label_N: Tensor, num_classes: int) -> NodeProbe:
    """Fit the probe at a node: ridge regression to one-hot targets.

    As ``probe.fit_classifier``, with one decomposition for all folds and penalties; the penalty is
    that of the lowest squared error.

    Args:
        x_NC: Pooled features, ``features.probe_features``.
        label_N: Class indices.
        num_classes: D.
    """
    with few_threads(len(x_NC) // 2):
        return _probe(x_NC, label_N, num_classes)


def _probe(x_NC: Tensor, label_N: Tensor, num_classes: int) -> NodeProbe:
    order_N, spans = in_folds(stratified_folds(label_N, PROBE_FOLDS))
    smoother, label_N = Smoother.of(x_NC[order_N]), label_N[order_N]
    target_ND = torch.nn.functional.one_hot(label_N, num_classes).float()
    [penalty] = smoother.best_penalties(target_ND[:, None].double())
    score_ND = smoother.held_out(penalty, spans)(target_ND).double()
    temperature = best_temperature(score_ND, label_N)
    logits_ND = torch.empty(target_ND.shape)
    logits_ND[order_N] = (temperature * smoother.fit(target_ND, penalty)).float()
    loss = torch.nn.functional.cross_entropy(temperature * score_ND, label_N)
    return NodeProbe(logits_ND, float(top1(score_ND, label_N)), float(loss))


def chance(num_classes: int) -> tuple[float, float]:
    """Accuracy and cross-entropy of who knows nothing: those of node 0, the image itself."""
    return 1 / num_classes, math.log(num_classes)


@dataclasses.dataclass(frozen=True)
class JointTargets:
    """The logits of some target nodes, prepared for any source; images in the order of folds.

    Args:
        code_NVK: Centred logits, projected where there are more than ``MAX_DIMS`` classes.
        mixture_NVM: Columns whose squared errors stand for those of all.
        mean_VD: What was taken from the logits.
        basis_VKD: What they were projected on; None where they were not.
        spread_V: Squares of the codes about the means of the other folds: what R2 is a share of.
        chosen_S: The images on which distributions are compared.
        own_VSD: The targets' own distributions there.
        label_S: Classes there.
        spans: The folds.
    """

    code_NVK: Tensor
    mixture_NVM: Tensor
    mean_VD: Tensor
    basis_VKD: Tensor | None
    spread_V: Tensor
    own_VSD: Tensor
    chosen_S: Tensor
    label_S: Tensor
    spans: Spans

    @classmethod
    def of(cls, logits: Sequence[Tensor], label_N: Tensor) -> JointTargets:
        """Of the logits (N, D) of V nodes, images as they come."""
        count, num_classes = logits[0].shape
        order_N, spans = _joint_folds(count)
        logits_NVD = torch.stack([each[order_N] for each in logits], 1).float()
        mean_VD = logits_NVD.double().mean(0).float()
        code_NVK, basis_VKD = logits_NVD - mean_VD, None
        if num_classes > MAX_DIMS:
            basis_VKD = torch.stack([_principal(each_ND) for each_ND in code_NVK.unbind(1)])
            code_NVK = torch.einsum("nvd,vkd->nvk", code_NVK, basis_VKD)
        spread_V = torch.zeros(len(logits), dtype=torch.float64)
        total_VK = code_NVK.double().sum(0)
        for start, stop in spans:
            fold_HVK = code_NVK[start:stop].double()
            others_VK = (total_VK - fold_HVK.sum(0)) / (count - (stop - start))
            spread_V += (fold_HVK - others_VK).square().sum((0, 2))
        compared = min(count, max(MIN_KL_IMAGES, KL_ENTRIES // num_classes))
        chosen_S = torch.arange(compared) * count // compared
        told_VSD = _logits(code_NVK[chosen_S], mean_VD, basis_VKD)
        return cls(
            code_NVK=code_NVK,
            mixture_NVM=_mixtures(code_NVK),
            mean_VD=mean_VD,
            basis_VKD=basis_VKD,
            spread_V=spread_V,
            own_VSD=told_VSD.softmax(-1),
            chosen_S=chosen_S,
            label_S=label_N[order_N][chosen_S],
            spans=spans,
        )


@dataclasses.dataclass(frozen=True)
class JointLosses:
    """What joints from one source to several targets would lose, in float64.

    Args:
        r2_V: Held-out R2 of the target's logits, over all classes; 1 is exact, 0 no better than the
            mean.
        kl_V: Mean over held-out images of KL(target's distribution || predicted one), in nats.
        cross_entropy_V: Mean cross-entropy of the predicted logits, in nats.
    """

    r2_V: Tensor
    kl_V: Tensor
    cross_entropy_V: Tensor


def joint_losses(x_NC: Tensor, chunks: Iterable[JointTargets]) -> JointLosses:
    """Score the joints from one source node to all targets, chunk by chunk.

    The penalty of each pair is that of the lowest generalised cross-validation error.

    Args:
        x_NC: The source's pooled features, ``features.probe_features``, images as they come.
        chunks: Targets, of the same images.
    """
    order_N, _ = _joint_folds(len(x_NC))
    maps: dict[float, HeldOutMap] = {}
    with few_threads(len(x_NC) // 2):
        smoother = Smoother.of(x_NC[order_N])
        found = [_asked(smoother, maps, targets) for targets in chunks]
    return JointLosses(
        r2_V=torch.cat([each.r2_V for each in found]),
        kl_V=torch.cat([each.kl_V for each in found]),
        cross_entropy_V=torch.cat([each.cross_entropy_V for each in found]),
    )


def _asked(smoother: Smoother, maps: dict[float, HeldOutMap], targets: JointTargets) -> JointLosses:
    """The joints from a source; ``maps`` keeps its maps by their penalty."""
    penalties = smoother.best_penalties(targets.mixture_NVM)
    told_NVK = torch.empty_like(targets.code_NVK)
    for penalty in sorted(set(penalties)):
        if penalty not in maps:
            maps[penalty] = smoother.held_out(penalty, targets.spans)
        same_V = [v for v, own in enumerate(penalties) if own == penalty]
        y_NVK = targets.code_NVK[:, same_V]
        told_NVK[:, same_V] = maps[penalty](y_NVK.flatten(1)).reshape(y_NVK.shape)
    return _losses(told_NVK, targets)


def _losses(told_NVK: Tensor, targets: JointTargets) -> JointLosses:
    error_V = (told_NVK - targets.code_NVK).square_().sum(0).double().sum(1)
    r2_V = torch.where(targets.spread_V > 0, 1 - error_V / targets.spread_V, 0.0)
    told_VSD = _logits(told_NVK[targets.chosen_S], targets.mean_VD, targets.basis_VKD)
    log_VSD = told_VSD.log_softmax(-1)
    own_V = torch.special.entr(targets.own_VSD).sum((1, 2)).double()
    crossed_V = -(targets.own_VSD * log_VSD).sum((1, 2)).double()
    images_S = torch.arange(len(targets.label_S))
    return JointLosses(
        r2_V=r2_V,
        kl_V=((crossed_V - own_V) / len(images_S)).clamp(min=0),
        cross_entropy_V=-log_VSD[:, images_S, targets.label_S].double().mean(1),
    )


def _joint_folds(count: int) -> tuple[Tensor, list[tuple[int, int]]]:
    return in_folds(torch.arange(count) % JOINT_FOLDS)


def _principal(centred_ND: Tensor) -> Tensor:
    """The first ``MAX_DIMS`` principal components, as rows."""
    wide_ND = centred_ND.double()
    _, vector_DD = torch.linalg.eigh(wide_ND.T @ wide_ND)
    principal_KD: Tensor = vector_DD[:, -MAX_DIMS:].T.float()
    return principal_KD


def _logits(code_SVK: Tensor, mean_VD: Tensor, basis_VKD: Tensor | None) -> Tensor:
    """(V, S, D)."""
    code_VSK = code_SVK.transpose(0, 1).contiguous()
    logits_VSD = code_VSK if basis_VKD is None else torch.bmm(code_VSK, basis_VKD)
    return logits_VSD + mean_VD[:, None]


def _mixtures(code_NVK: Tensor) -> Tensor:
    """Few columns, random mixtures of all."""
    dims = code_NVK.shape[2]
    if dims <= MAX_MIXTURES:
        return code_NVK
    generator = torch.Generator().manual_seed(0)
    return code_NVK @ torch.randn(dims, MAX_MIXTURES, generator=generator)
