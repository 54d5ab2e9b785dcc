"""Where double precision is computed, and draws that leave the caller's random states alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

NO_FLOAT64 = ("mps",)
"""Kinds of device without float64."""


def solving_device(device: torch.device | str) -> torch.device:
    """Where float64 work on a device's tensors is done: there, or on the CPU where it cannot be."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def double(x: Tensor, device: torch.device | None = None, *, copy: bool = False) -> Tensor:
    """``x`` in float64, on the solving device of ``device``, by default its own.

    It is moved first and cast then, so that no device is asked for a cast that it has not.
    """
    moved = x.to(solving_device(x.device if device is None else device))
    return moved.to(torch.float64, copy=copy)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block that draws on the CPU from ``seed``; no generator's state is changed by it.

    ``torch.manual_seed`` would seed the generators of all devices too, and forking only some of
    them leaves the others so.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
