"""Running a model on the ``meta`` device: shapes without memory, flops without arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dery_cli.core.dissection.trees import take_apart


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose tensors are all on the ``meta`` device: structure without memory.

    Parameters, buffers and tensors kept as plain attributes are replaced; tensors that are one
    object in ``module`` are one object in the copy.
    """
    memo: dict[int, Any] = {}
    for submodule in module.modules():
        for tensor in _tensors(vars(submodule)):
            if id(tensor) not in memo:
                memo[id(tensor)] = _meta_like(tensor)
    return copy.deepcopy(module, memo)


def has_numbers(module: nn.Module) -> bool:
    """Whether a module can be run: none of its tensors is on the ``meta`` device."""
    return not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def run_copy(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Run a copy of a module in eval mode on zeros, where the module is."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    copy.deepcopy(module).eval()(torch.zeros(shape, dtype=dtype, device=device))


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors in ``value`` and in the containers it is made of, other modules left out."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4 and not isinstance(value, nn.Module):
        if isinstance(value, dict):
            for item in value.values():
                yield from _tensors(item, depth + 1)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                yield from _tensors(item, depth + 1)
        elif (shell := take_apart(value)) is not None:
            yield from _tensors(dict(shell.parts), depth + 1)


class FlopMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own flop formulas, as ``FlopCounterMode`` does, without its bookkeeping."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _norm(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: A002 (torch's name)
    return torch.empty_like(input)


def _interpolate(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: A002
    size, scale = [*args, None, None][:2]
    return functional.interpolate(
        input, kwargs.get("size", size), kwargs.get("scale_factor", scale), mode="nearest"
    )


def _lstm(input: torch.Tensor, state: Any, *args: Any) -> Any:  # noqa: A002
    if not isinstance(state, (tuple, list)):
        return torch.lstm(input, state, *args)  # packed sequences: the original will do
    weights, both = args[0], args[5]
    width = weights[1].shape[1] * (2 if both else 1)
    return (input.new_empty(*input.shape[:-1], width), *(torch.empty_like(s) for s in state))


def lstm_flops(args: tuple[Any, ...]) -> int:
    """Twice the multiply-adds of an LSTM: every matrix once for every step of every sequence."""
    if not isinstance(args[1], (tuple, list)):
        return 0
    steps = args[0].shape[:-1].numel()
    weights: list[torch.Tensor] = args[2]
    return 2 * int(steps) * sum(weight.numel() for weight in weights if weight.ndim == 2)


SHORTCUTS: dict[Any, Callable[..., Any]] = {
    functional.batch_norm: _norm,
    functional.layer_norm: _norm,
    functional.group_norm: _norm,
    functional.instance_norm: _norm,
    functional.rms_norm: _norm,
    functional.interpolate: _interpolate,
    torch.lstm: _lstm,
}
"""What gives a result of the same shape on the meta device, where the original is very slow."""
