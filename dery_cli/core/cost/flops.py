"""What a module costs: parameters and multiply-adds.

The reference for multiply-adds is torch's ``FlopCounterMode`` on the ``meta`` device, halved: it
counts convolutions, matrix products and attention (on the CPU it would miss fused attention).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dery_cli.core.dissection.meta import has_numbers, meta_copy, run_copy


def count_params(module: nn.Module) -> int:
    """Scalar parameters of ``module``, each tensor counted once however often it is used."""
    return sum(param.numel() for param in module.parameters())


def count_flops(module: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of ``module`` in eval mode for one image (the first of ``example``).

    Args:
        module: Any module taking one tensor; it is not changed. A copy of it is run only where its
            forward asks for numbers, which the ``meta`` device has not.
        example: Input with the batch dimension first; only its shape and type matter.
    """
    shape = (1, *example.shape[1:])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            meta_copy(module).eval()(torch.empty(shape, dtype=example.dtype, device="meta"))
        except Exception:
            if not has_numbers(module):
                raise
        else:
            return int(counter.get_total_flops()) // 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_copy(module, shape, example.dtype)
    return int(counter.get_total_flops()) // 2
