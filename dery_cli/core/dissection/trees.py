"""Arguments and results with tensors in them: tuples, lists, dicts, slices, and other containers.

What is neither of the first four is a container all the same if it holds tensors: a subclass of
these with attributes of its own, a dataclass, an object with tensors for attributes (the outputs of
Hugging Face's models are an ``OrderedDict`` and a dataclass at once). It is taken apart as a
``Shell`` and put together again as what it was.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_DEPTH = 8
"""Objects may hold one another in circles."""
_ATOMS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)


@dataclasses.dataclass(frozen=True)
class Field:
    """A key that is an attribute's name."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Shell:
    """A container of its own kind, taken apart.

    Args:
        like: An object of that kind, whose parts do not count.
        parts: What it holds, by index, key or ``Field``.
    """

    like: Any
    parts: Mapping[Any, Any]


def pick(tree: Any, key: Any) -> Any:
    """The part of a container under one key."""
    return getattr(tree, key.name) if isinstance(key, Field) else tree[key]


def take_apart(tree: Any) -> Shell | None:
    """A container of its own kind as a ``Shell``; None for all else."""
    if type(tree) in (tuple, list, dict, slice) or isinstance(tree, _ATOMS):
        return None
    if isinstance(tree, (torch.Tensor, nn.Module, type)) or callable(tree):
        return None
    parts: dict[Any, Any] = {}
    if isinstance(tree, dict):
        parts.update(tree.items())
    elif isinstance(tree, (list, tuple)):
        parts.update(enumerate(tree))
    held = {id(part) for part in parts.values() if isinstance(part, torch.Tensor)}
    fields = dict(getattr(tree, "__dict__", {}))
    if dataclasses.is_dataclass(tree):
        slots = [f.name for f in dataclasses.fields(tree) if hasattr(tree, f.name)]
        fields.update((name, getattr(tree, name)) for name in slots)
    parts.update((Field(k), part) for k, part in fields.items() if id(part) not in held)
    is_container = isinstance(tree, (dict, list, tuple)) or dataclasses.is_dataclass(tree)
    if not is_container and not any(isinstance(p, torch.Tensor) for p in parts.values()):
        return None
    return Shell(tree, parts)


def put_together(shell: Shell) -> Any:
    """An object like the one that was taken apart, with the shell's parts."""
    like, parts = shell.like, shell.parts
    items = {key: part for key, part in parts.items() if not isinstance(key, Field)}
    made: Any
    if isinstance(like, tuple):
        values = tuple(items.values())
        if hasattr(like, "_fields"):
            made = type(like)(*values)
        elif hasattr(like, "n_fields") or isinstance(like, torch.Size):  # torch.max's result
            made = type(like)(values)
        else:
            made = tuple.__new__(type(like), values)
            getattr(made, "__dict__", {}).update(getattr(like, "__dict__", {}))
    else:
        made = copy.copy(like)
        for key, part in items.items():
            made[key] = part
    old = {id(before): items[k] for k, before in _items(like) if k in items}
    for name, before in getattr(like, "__dict__", {}).items():
        if id(before) in old:  # an attribute that is one of the items too
            _put(made, name, old[id(before)])
    for key, part in parts.items():
        if isinstance(key, Field):
            _put(made, key.name, part)
    return made


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from ((k, v) for k, v in tree.items() if isinstance(v, torch.Tensor))
    elif isinstance(tree, (list, tuple)):
        yield from ((k, v) for k, v in enumerate(tree) if isinstance(v, torch.Tensor))


def _put(made: Any, name: str, part: Any) -> None:
    with contextlib.suppress(AttributeError):  # one that is computed cannot be set
        object.__setattr__(made, name, part)  # frozen dataclasses too


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any], depth: int = 0) -> Any:
    """``tree`` with every tensor in it replaced; what holds none is the same object as before.

    Other containers with other things than tensors in the places of tensors are a ``Shell``.
    """
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, slice):
        ends = (tree.start, tree.stop, tree.step)
        return slice(*(map_tensors(end, change, depth) for end in ends))
    if type(tree) is dict:
        return {key: map_tensors(item, change, depth) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(item, change, depth) for item in tree)
    shell = take_apart(tree) if depth < _DEPTH else None
    if shell is None:
        return tree
    parts = {key: map_tensors(part, change, depth + 1) for key, part in shell.parts.items()}
    before, after = ([t for _, t in leaves(p)] for p in (dict(shell.parts), parts))
    if len(before) != len(after):
        return Shell(tree, parts)
    same = all(one is other for one, other in zip(before, after, strict=True))
    return tree if same else put_together(Shell(tree, parts))


def leaves(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in ``tree`` with the keys that lead to them."""
    if isinstance(tree, torch.Tensor):
        yield keys, tree
    elif type(tree) is dict:
        for key, item in tree.items():
            yield from leaves(item, (*keys, key))
    elif type(tree) in (list, tuple):
        for index, item in enumerate(tree):
            yield from leaves(item, (*keys, index))
    elif len(keys) < _DEPTH and (shell := take_apart(tree)) is not None:
        for key, part in shell.parts.items():
            yield from leaves(part, (*keys, key))
