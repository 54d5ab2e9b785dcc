"""The loss: labels, and where there is a teacher its logits and its last features.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional

from dery_cli.errors import UsageError
from dery_cli.training.augment import make_mixup
from dery_cli.training.evaluate import check_logits
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import InputSpec


class Teacher(nn.Module):
    """A network that expects other images, shown the student's.

    Args:
        module: The teacher, with its last linear layer at ``head``.
        student: How the student's images are normalised.
        teacher: Size and normalisation the teacher expects.
    """

    def __init__(self, module: nn.Module, *, student: InputSpec, teacher: InputSpec) -> None:
        super().__init__()
        self.module = module
        self.student = student
        self.teacher = teacher

    @property
    def head(self) -> nn.Module:
        return self.module.head  # type: ignore[return-value]

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if self.student != self.teacher:
            mean, std = _per_channel(self.student, images_BCHW)
            images_BCHW = images_BCHW * std + mean
            if self.student.in_chans != self.teacher.in_chans:
                images_BCHW = images_BCHW.mean(1, keepdim=True).expand(
                    -1, self.teacher.in_chans, -1, -1
                )
            if tuple(images_BCHW.shape[-2:]) != self.teacher.image_size:
                images_BCHW = functional.interpolate(
                    images_BCHW, self.teacher.image_size, mode="bilinear", antialias=True
                )
            mean, std = _per_channel(self.teacher, images_BCHW)
            images_BCHW = (images_BCHW - mean) / std
        return self.module(images_BCHW)  # type: ignore[no-any-return]


def _per_channel(spec: InputSpec, like: torch.Tensor) -> torch.Tensor:
    """Mean and deviation, (2, C, 1, 1)."""
    values = (spec.mean, spec.std)
    return torch.tensor(values, dtype=like.dtype, device=like.device)[..., None, None]


class Trainee(nn.Module):
    """The network and, to match a teacher's features, a linear map from its own pre-logits.

    Args:
        model: The network, with its last linear layer at ``head`` where ``adapter`` is given.
        adapter: From the network's pre-logits to the teacher's, or None.
    """

    def __init__(self, model: nn.Module, adapter: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter

    def forward(self, images_BCHW: torch.Tensor) -> Any:
        if self.adapter is None:
            return self.model(images_BCHW)
        logits_BK, feat_BC = with_prelogits(self.model, images_BCHW)
        return logits_BK, self.adapter(feat_BC)


class Objective:
    """The loss of one batch.

    Cross entropy with smoothed labels (of mixed images, with mixed labels); with a teacher
    (1 - a) CE + a T^2 KL(teacher / T || student / T) + f |adapter(feat) - layer_norm(feat of the
    teacher)|^2, averaged over channels.

    Args:
        config: Smoothing, mixing, and the weights a, T and f.
        classes: Of the head.
        teacher: Maps the student's images to logits; its pre-logits are read before ``head``.
    """

    def __init__(
        self, config: FinetuneConfig, classes: int, teacher: nn.Module | None = None
    ) -> None:
        self.config = config
        self.classes = classes
        self.teacher = teacher
        self.mixup = make_mixup(config, classes)
        self.hard: nn.Module
        if self.mixup is not None:
            self.hard = SoftTargetCrossEntropy()
        elif config.label_smoothing:
            self.hard = LabelSmoothingCrossEntropy(config.label_smoothing)
        else:
            self.hard = nn.CrossEntropyLoss()

    def __call__(
        self, trainee: nn.Module, images_BCHW: torch.Tensor, labels_B: torch.Tensor
    ) -> torch.Tensor:
        """The loss, averaged over the batch.

        Args:
            trainee: Gives logits, or logits and mapped features; see ``Trainee``.
            images_BCHW: Normalised images; mixing changes them in place.
            labels_B: Class indices.

        Raises:
            UsageError: The network or the teacher has another number of classes.
        """
        config, target = self.config, labels_B
        if self.mixup is not None:
            images_BCHW, target = self.mixup(images_BCHW, labels_B)
        output = trainee(images_BCHW)
        logits_BK, mapped_BC = output if isinstance(output, tuple) else (output, None)
        check_logits(logits_BK, self.classes)
        hard: torch.Tensor = self.hard(logits_BK, target)
        if self.teacher is None:
            return hard
        with torch.no_grad():
            if mapped_BC is None:
                taught_BK, taught_BC = self.teacher(images_BCHW), None
            else:
                taught_BK, taught_BC = with_prelogits(self.teacher, images_BCHW)
        share, loss = config.distill_logits, hard
        if share:
            _check_taught(logits_BK, taught_BK)
            soft = soft_loss(logits_BK, taught_BK.float(), config.distill_temperature)
            loss = (1 - share) * hard + share * soft
        if mapped_BC is not None and taught_BC is not None:
            goal_BC = functional.layer_norm(taught_BC.float(), taught_BC.shape[1:])
            loss = loss + config.distill_features * functional.mse_loss(mapped_BC, goal_BC)
        return loss


def soft_loss(logits_BK: torch.Tensor, taught_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(taught / T) || softmax(logits / T)), averaged over images."""
    divergence = functional.kl_div(
        functional.log_softmax(logits_BK / temperature, dim=-1),
        functional.log_softmax(taught_BK / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def with_prelogits(model: nn.Module, images_BCHW: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Logits and what went into ``head``."""
    seen: list[torch.Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        return model(images_BCHW), seen[0]
    finally:
        hook.remove()


def check_head(model: nn.Module, classes: int) -> None:
    """Refuse a network whose head, where it has one, is for another number of classes.

    Raises:
        UsageError: The numbers differ.
    """
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear) and head.out_features != classes:
        raise UsageError(
            f"the network's head tells {head.out_features} classes apart, the data have {classes}",
            "use the data the network was assembled for, or assemble for these: "
            "dery assemble --data ...",
        )


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer.

    Raises:
        UsageError: There is none at ``head``.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"{type(model).__name__} has no linear layer `head` to take features before",
            "distil logits only: set distill_features to 0",
        )
    return head


def _check_taught(logits_BK: torch.Tensor, taught_BK: torch.Tensor) -> None:
    if taught_BK.shape != logits_BK.shape:
        raise UsageError(
            f"the teacher tells {taught_BK.shape[-1]} classes apart, the target has "
            f"{logits_BK.shape[-1]}",
            "fine-tune the teacher on the target first, or use its features only: "
            "distill_logits 0, distill_features 1",
        )


def make_trainee(model: nn.Module, config: FinetuneConfig, teacher: nn.Module | None) -> Trainee:
    """The network as it is trained, with an adapter where a teacher's features are matched.

    Raises:
        UsageError: Nothing is to be learned from the teacher, or there are no pre-logits.
    """
    if teacher is None:
        return Trainee(model)
    if not config.distill_features:
        if not config.distill_logits:
            raise UsageError("a teacher is given, but distill_logits and distill_features are 0")
        return Trainee(model)
    own, taught = head_of(model).in_features, head_of(teacher).in_features
    return Trainee(model, nn.Linear(own, taught))
