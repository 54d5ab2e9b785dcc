"""Which device a command computes on, and in which precision and memory layout.

torch is imported where it is used: a command with nothing to do needs none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from dery_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

AUTO = "auto"
FP32 = "fp32"
PRECISIONS = (AUTO, FP32, "bf16", "fp16")
"""``auto`` takes only what costs nothing: single precision, in the layout that is faster there."""


def pick_device(name: str | None) -> torch.device:
    """The device of ``--device``, or the best there is; its fp32 products are exact from now on.

    Raises:
        UsageError: No such device.
    """
    import torch

    forbid_tf32()
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {reason}") from error
    if device.type == "meta":
        raise UsageError("--device meta holds no data", "use cpu, cuda or mps")
    return device


def waiter(device: torch.device) -> Callable[[], None] | None:
    """Waits until the device has done what it was given; None where it is never behind."""
    if device.type == "cpu":
        return None
    import torch

    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: torch.accelerator.synchronize(device)


def forbid_tf32() -> None:
    """Products in single precision keep its 24 bits: no TF32, which has 11.

    torch's default has TF32 in convolutions and not in matrix products. Who wants the speed asks
    for half precision by ``--precision``, which is recorded.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How forward passes of a model are computed. Weights stay in single precision.

    Args:
        device: Where.
        precision: ``fp32``, ``bf16`` or ``fp16``: the type that autocast casts to.
        channels_last: Whether images and the weights of convolutions lie channels-last in memory.
    """

    device: torch.device
    precision: str = FP32
    channels_last: bool = False

    @property
    def layout(self) -> str:
        """The word for it in records."""
        return "channels_last" if self.channels_last else "contiguous"

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model itself, its weights laid out; their values do not change."""
        return model.to(memory_format=self._memory_format())

    def laid_out(self, x_NCHW: Tensor) -> Tensor:
        """A batch of images, laid out for the model."""
        return x_NCHW.contiguous(memory_format=self._memory_format())

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """A block in which the model's layers compute in ``precision``.

        Casts of weights are not kept: autocast would go on using one that was made before a weight
        was written to, and a stitch is fitted, and fitted again, between two passes.
        """
        import torch

        if self.precision == FP32:
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def _memory_format(self) -> torch.memory_format:
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format


def choose_arithmetic(precision: str, device: torch.device, model: nn.Module) -> Arithmetic:
    """What ``--precision`` comes to for a model on a device.

    It follows from the kind of device and the model alone, never from a clock, so that a rerun
    computes the same. ``auto`` is fp32: half precision changes features by about 1 %.

    Args:
        precision: One of ``PRECISIONS``.
        device: Where the model is.
        model: To look for convolutions in.
    """
    chosen = FP32 if precision == AUTO else precision
    return Arithmetic(
        device=device,
        precision=chosen,
        channels_last=channels_last_gains(chosen, device, model),
    )


def channels_last_gains(precision: str, device: torch.device, model: nn.Module) -> bool:
    """Whether convolutions are faster channels-last, by measurements of the kind of device.

    On CUDA that holds for half precision (tensor cores take NHWC). On CPUs with AVX2 or AVX-512 it
    holds for all models tried (``tests/bench/bench_precision.py``); other devices keep torch's own
    layout.
    """
    import torch
    from torch import nn

    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return False
    if device.type == "cuda":
        return precision != FP32
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512"))
