"""A device that is not there: tensors that say they are on ``mps`` and are computed on the CPU.

Inside ``pretending()`` what a real device refuses is refused: float64, and operations that mix
tensors of it with tensors of the CPU (single numbers and indices may be mixed). Everything else
gives the numbers of the CPU, so that results can be compared to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps")
_MOVES = ("_to_copy", "copy_", "_copy_from")
_TAKES_INDICES = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")


_REFUSED = (Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous)


class There(Tensor):
    """A tensor that pretends; ``numbers`` is what it holds."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> There:
        _check_type(real)
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.numbers = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"There({self.numbers!r})"


def _check_type(real: Tensor) -> None:
    if real.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    target = kwargs.get("device")
    if there and name not in _MOVES:
        here = [t for t in tensors if not isinstance(t, There) and t.ndim]
        if name in _TAKES_INDICES:
            here = [t for t in here if t.is_floating_point()]
        if here:
            raise RuntimeError(f"{name}: expected all tensors on one device, found mps and cpu")
    known = {id(tensor.numbers): tensor for tensor in there}
    plain_args, plain_kwargs = _plain((args, kwargs))
    if target is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    on_device = bool(there) if target is None else torch.device(target).type == DEVICE.type
    if name in ("copy_", "_copy_from"):
        on_device = isinstance(args[0], There)
    if name == "_to_copy" and there and plain_kwargs.get("dtype") == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    result = func(*plain_args, **plain_kwargs)
    if not on_device:
        return result

    def there_now(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else There(leaf)

    return tree_map(there_now, result)


class _Mode(TorchDispatchMode):
    """Catches what makes a tensor on the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Catches moves and copies to the device, which a build of torch without it refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to and not isinstance(args[0], There):
            wanted = [kwargs.get("device"), *(a for a in args[1:] if not isinstance(a, Tensor))]
            if any(_is_there(each) for each in wanted):
                words = ["cpu" if _is_there(a) else a for a in args[1:]]
                if "device" in kwargs:
                    kwargs["device"] = "cpu"
                return There(args[0].detach().to(*words, **{**kwargs, "copy": True}))
        if func in _REFUSED and isinstance(args[0], There):
            found = func(*_plain(args), **kwargs)
            return There(found) if isinstance(found, Tensor) else found
        if func in (Tensor.__float__, Tensor.__int__, Tensor.__bool__):
            return func(*_plain(args))
        if func is Tensor.copy_ and isinstance(args[0], There):
            args[0].numbers.copy_(_plain(args[1]))
            return args[0]
        return func(*args, **kwargs)


def _plain(words: Any) -> Any:
    return tree_map(lambda leaf: leaf.numbers if isinstance(leaf, There) else leaf, words)


def _is_there(word: Any) -> bool:
    return isinstance(word, str | torch.device) and torch.device(word).type == DEVICE.type


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """A block in which ``device="mps"`` is there."""
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # in place they cannot pretend
    try:
        with _Moves(), _Mode():
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(before)


def moved(module: nn.Module) -> nn.Module:
    """The module itself, its weights and buffers on the device that is not there."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(There(parameter.detach()), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = There(buffer)
    return module
