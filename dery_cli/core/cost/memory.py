"""Inference memory as numbers: bytes of weights, and the peak of live activations.

The peak is computed, not measured: the module runs on the ``meta`` device, where tensors have sizes
and lifetimes but no contents, so the answer is the same on every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from dery_cli.core.dissection.meta import has_numbers, meta_copy, run_copy

Memo = dict[Any, tuple[Any, ...]]
"""Shape, strides and type of what an operator made, by the operator and what it was given."""


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made inside held at any time; a view holds none of its own.

    Args:
        known: Tensors made before that are not to be counted, nor views of them.
        memo: Of earlier runs on the ``meta`` device, and for later ones: an operator's outputs
            there are made anew from their shapes, many times faster than the operator finds them.
            None calls every operator.
    """

    def __init__(self, known: Iterable[Tensor] = (), memo: Memo | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._memo = memo
        self._alive = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self._called(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        key = None if self._memo is None else _key(func, args, kwargs)
        if key is None or self._memo is None:
            return func(*args, **kwargs)
        if key in self._memo:
            made = [
                torch.empty_strided(shape, strides, dtype=dtype, device="meta")
                for shape, strides, dtype in self._memo[key]
            ]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else out
        if isinstance(made, (list, tuple)) and all(isinstance(one, Tensor) for one in made):
            given = tree_leaves((args, kwargs))
            before = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
            after = {t.untyped_storage()._cdata for t in made}
            if len(after) == len(made) and not before & after:
                self._memo[key] = tuple((t.shape, t.stride(), t.dtype) for t in made)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self._alive += nbytes
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._storages.discard(key)
        self._alive -= nbytes


def _key(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator's outputs depend on; None where it changes inputs, or that is not known."""
    if func._schema.is_mutable:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    told: list[Any] = [func, spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.device.type != "meta":
                return None
            told.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.storage_offset()))
        else:
            told.append((type(leaf), leaf))
    key = tuple(told)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each tensor counted once."""
    tensors = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def activation_peak(module: nn.Module, shape: tuple[int, ...], batch_size: int) -> int:
    """Most bytes of activations alive at once while ``module`` runs in eval mode, its input too.

    Args:
        module: Takes one float32 tensor; it is not changed. A copy of it is run only where its
            forward asks for numbers, which the ``meta`` device has not.
        shape: Of the input for one image.
        batch_size: Images.
    """
    try:
        return peak_on_meta(meta_copy(module).eval().requires_grad_(False), shape, batch_size)
    except Exception:
        if not has_numbers(module):
            raise
    known = [*module.parameters(), *module.buffers()]
    with torch.inference_mode(), PeakBytes(known) as peak:
        run_copy(module, (batch_size, *shape), torch.float32)
    return int(max(0, peak.peak - sum(tensor.nbytes for tensor in known)))  # those of the copy


def peak_on_meta(
    twin: nn.Module, shape: tuple[int, ...], batch_size: int, memo: Memo | None = None
) -> int:
    """``activation_peak`` of a module that is on the ``meta`` device, in eval mode.

    Args:
        twin: Takes one float32 tensor.
        shape: Of the input for one image.
        batch_size: Images.
        memo: Shared by calls for modules with the same operators (``PeakBytes``).
    """
    x = torch.empty((batch_size, *shape), device="meta")
    with torch.inference_mode(), PeakBytes([x, *twin.parameters(), *twin.buffers()], memo) as peak:
        twin(x)
    return int(peak.peak + x.nbytes)
