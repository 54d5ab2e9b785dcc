"""What a module costs: parameters and multiply-adds.

The reference for multiply-adds is torch's ``FlopCounterMode`` on the ``meta`` device, halved: it
counts convolutions, matrix products and attention (on the CPU it would miss fused attention).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(module: nn.Module) -> int:
    """Scalar parameters of ``module``, each tensor counted once however often it is used."""
    return sum(param.numel() for param in module.parameters())


def count_flops(module: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of ``module`` in eval mode for one image (the first of ``example``).

    Args:
        module: Any module taking one tensor; it is neither run nor changed.
        example: Input with the batch dimension first; only its shape and type matter.
    """
    twin = meta_copy(module).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty((1, *example.shape[1:]), dtype=example.dtype, device="meta"))
    return int(counter.get_total_flops()) // 2


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
