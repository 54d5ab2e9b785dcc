"""Which device a command computes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dery_cli.errors import UsageError


def pick_device(name: str | None) -> torch.device:
    """The device of ``--device``, or the best there is.

    Raises:
        UsageError: No such device.
    """
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
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: torch.accelerator.synchronize(device)
