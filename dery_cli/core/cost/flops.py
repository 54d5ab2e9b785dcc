"""What a module costs: parameters and multiply-adds.

The reference for multiply-adds is torch's ``FlopCounterMode`` on the ``meta`` device, halved: it
counts convolutions, matrix products and attention (on the CPU it would miss fused attention).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dery_cli.core.dissection.meta import meta_copy


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
