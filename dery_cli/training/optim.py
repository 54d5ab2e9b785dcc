"""What is trained, at which rate: parameter groups, freezing, schedule, averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dery_cli.core.dissection.block import units_of
from dery_cli.errors import UsageError
from dery_cli.training.plan import Phase, warmup_updates
from dery_cli.training.recipe import FinetuneConfig


def is_block(name: str) -> bool:
    """Whether a parameter or buffer belongs to a donor's block."""
    return name.startswith("blocks.")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay acts on a parameter: not on norms, biases and embeddings.

    These have one dimension, or a name of their own (``pos_embed``, ``class_token``,
    ``layer_scale``, a stitch's ``position``), where weights are called ``weight``.
    """
    return parameter.ndim > 1 and "weight" in name.rpartition(".")[2]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning rate factor of each block parameter: ``decay`` to the layers up to the head.

    A layer is a donor's unit, stem and last norm belonging to the first and the last one; a block
    that does not tell its ``units`` is one layer.
    """
    layers: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(getattr(model, "blocks", ())):
        units = units_of(block)
        for name, _ in block.named_parameters():
            layers[f"blocks.{index}.{name}"] = (index, units.get(name, 0))
    depths = {layer: depth for depth, layer in enumerate(sorted(set(layers.values())))}
    return {name: decay ** (len(depths) - depths[layer]) for name, layer in layers.items()}


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay, in a fixed order.

    The groups carry ``lr_scale``, which timm's schedulers multiply the rate by, and ``names``.

    Raises:
        UsageError: Nothing is left to train.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if config.mode == "frozen":
        named = [(name, p) for name, p in named if not is_block(name)]
    if not named:
        raise UsageError(
            f"--mode {config.mode} leaves no parameter to train", "use --mode full, or add a head"
        )
    scales = layer_scales(model, config.layer_decay)
    own = getattr(model, "no_weight_decay", None)
    skip = own() if callable(own) else ()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        scale = config.block_lr_scale * scales[name] if is_block(name) else 1.0
        wd = config.weight_decay if decays(name, parameter) and name not in skip else 0.0
        group = groups.setdefault(
            (scale, wd),
            {"params": [], "names": [], "lr": config.lr, "lr_scale": scale, "weight_decay": wd},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


UNSUITABLE = {
    "adahessian": "needs second derivatives, which the loop does not compute",
    "kron": "keeps a state that a checkpoint cannot hold",
}
"""Optimizers of timm, by the beginnings of their names, that a run cannot use."""


def make_optimizer(groups: list[dict[str, Any]], config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer timm has by that name, over the groups.

    Raises:
        UsageError: timm knows no such optimizer, or it cannot be used here.
    """
    name, hint = config.optimizer, "for example adamw, sgd, lamb, lion"
    for beginning, reason in UNSUITABLE.items():
        if name.lower().removeprefix("lookahead_").startswith(beginning):
            raise UsageError(f"the optimizer {name!r} {reason}", hint)
    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    try:
        return create_optimizer_v2(bare, opt=name, lr=config.lr, weight_decay=config.weight_decay)
    except ValueError as error:
        raise UsageError(f"timm has no optimizer {name!r}", hint) from error
    except (AssertionError, ImportError) as error:  # APEX's and bitsandbytes' want CUDA
        raise UsageError(f"the optimizer {name!r} cannot be used here: {error}", hint) from error


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: FinetuneConfig, phase: Phase, *, scale: float = 1.0
) -> CosineLRScheduler:
    """Cosine with warm-up over one phase (timm's); step it by the updates since its start.

    Args:
        optimizer: Its groups have their rates.
        config: The others.
        phase: Which.
        scale: Of all rates; the groups' have it already.
    """
    warmup = warmup_updates(config, phase)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(phase.steps - warmup, 2),  # of one, timm logs that it does nothing
        lr_min=scale * config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=scale * config.lr / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def head_rate(optimizer: torch.optim.Optimizer) -> float:
    """The present learning rate of stitches and head; groups of blocks carry a scale."""
    for group in optimizer.param_groups:
        if scale := group.get("lr_scale", 1.0):
            return float(group["lr"] / scale)
    return 0.0


class AveragedWeights(ModelEmaV3):
    """timm's averaged weights, the same to the bit, without walking two state dicts an update.

    The walk takes longer than the averaging. Modules are remembered, not tensors: DDP gives
    parameters other memory.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        tensors = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tensors |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._places = [
            (_holder(self.module, name), _holder(model, name), name.rpartition(".")[2])
            for name in model.state_dict()
            if name in tensors
        ]

    def apply_update_(self, _model: nn.Module, decay: float) -> None:
        pairs = [(own[key], other[key]) for own, other, key in self._places]
        averages, values = zip(
            *(pair for pair in pairs if pair[0].is_floating_point()), strict=True
        )
        torch._foreach_lerp_(averages, values, weight=1.0 - decay)
        for count, value in pairs:
            if not count.is_floating_point():
                count.copy_(value)


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """The dict, of a submodule, in which the parameter or buffer of that name is."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner._parameters if key in owner._parameters else owner._buffers


def make_ema(model: nn.Module, config: FinetuneConfig) -> AveragedWeights | None:
    """Averaged weights (timm's); decay 1 - n^(-2/3) after n updates until it reaches the config's.

    So after 150 updates it averages over the last 28 or so, and the initial weights are forgotten.
    """
    return AveragedWeights(model, config.ema_decay) if config.ema_decay else None


def set_trainable(model: nn.Module, *, frozen: bool, trainable: frozenset[str]) -> None:
    """Let gradients reach the parameters named, under ``frozen`` only those outside blocks."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable and not (frozen and is_block(name)))


def set_train_mode(model: nn.Module, *, frozen: bool, fixed: frozenset[str]) -> None:
    """Training mode, except for frozen blocks and the batch norms named ``fixed``."""
    model.train()
    for name, module in model.named_modules():
        if name in fixed or (frozen and (name == "blocks" or is_block(name))):
            module.training = False


def norms_to_fix(model: nn.Module, config: FinetuneConfig) -> frozenset[str]:
    """Batch norms of blocks that keep their statistics under ``batch_norm="fixed"``.

    Statistics still at 0 and 1 are of a network that was never trained: those are not kept.
    """
    if config.batch_norm != "fixed":
        return frozenset()
    return frozenset(
        name
        for name, module in model.named_modules()
        if is_block(name) and isinstance(module, _BatchNorm) and not _is_fresh(module)
    )


def _is_fresh(norm: _BatchNorm) -> bool:
    mean_C, var_C = norm.running_mean, norm.running_var
    return mean_C is None or var_C is None or bool((mean_C == 0).all() and (var_C == 1).all())


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms that are normalising by the batch now."""
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
