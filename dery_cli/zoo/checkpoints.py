"""Reading a user's checkpoint: safetensors, or ``.pt``/``.pth`` through ``weights_only=True``.

What a file is, its first bytes say, not its name. Which of several state dicts in it is taken, is
told.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dery_cli.errors import DeryError, UsageError
from dery_cli.sizes import some_of

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema")
_PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "module", "weights")
_OF_SEVERAL = ("teacher", "student", "backbone", "encoder")
_WRAPPERS = (*_AVERAGED, *_PLAIN, *_OF_SEVERAL)
"""Keys of a checkpoint that lead to its weights, the preferred ones first (as timm's)."""
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|hyper|callback|loops|rng", re.IGNORECASE)
TRIVIAL = {"module", "model", "_orig_mod", "state_dict", "net", "backbone"}
"""Wrappers that are no choice between two."""
_DEPTH = 3
_AS_SAFETENSORS = "save it as safetensors, or torch.save(model.state_dict(), FILE)"
_SCALAR = type(np.float64(0)).__reduce__(np.float64(0))[0]
_INERT: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    collections.defaultdict,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(code)) for code in "?bBhHiIqQefd"),
]
"""Beside torch's own, what trainers put beside the weights; making one does nothing else."""
_OTHER_FILES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"<!doctype", "is a web page, not a checkpoint", "download the file itself"),
    (b"<html", "is a web page, not a checkpoint", "download the file itself"),
    (b"\x89hdf", "is an HDF5 file", _AS_SAFETENSORS),
    (b"\x1f\x8b", "is packed by gzip", "unpack it first: gunzip"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Args:
        tensors: By name, wrappers such as ``state_dict`` removed.
        choice: Which part of the file they are, in words, where that was a choice.
    """

    tensors: dict[str, Tensor]
    choice: str | None = None


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """The tensors of a checkpoint file; runs no code.

    Of several state dicts an averaged one (EMA) is taken before a raw one, and a teacher's before a
    student's.

    Args:
        path: Of the file.
        key: Where in the file the state dict is, as ``model`` or ``ema.module``.

    Raises:
        UsageError: No such file, one that is no checkpoint, or no such key.
        DeryError: The file is damaged, or would need unpickling to be read.
    """
    if not path.is_file():
        raise UsageError(f"no such weights file: {path}")
    loaded = _load(path)
    if key is not None:
        return Checkpoint(_of_key(path, loaded, key))
    found = _unwrap(loaded)
    if found is None:
        several = sorted(".".join(keys) for keys, _ in _state_dicts(loaded))
        if several:
            raise UsageError(
                f"{path} holds several state dicts: {some_of(several)}",
                f"choose one: --weights-key {several[0]}",
            )
        raise UsageError(f"{path} holds no tensors", "expected is a state dict")
    keys, tensors = found
    others = [".".join(other) for other, _ in _state_dicts(loaded) if other[:1] != keys[:1]]
    choice = None
    if keys and (others or not TRIVIAL.issuperset(keys)):
        choice = f"'{'.'.join(keys)}' of {path.name} is loaded"
        if others:
            choice += f", not {some_of(others)} (--weights-key chooses)"
    return Checkpoint(tensors, choice)


def _load(path: Path) -> object:
    """Whatever the file holds."""
    try:
        with path.open("rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DeryError(f"cannot read {path}: {error.strerror}") from error
    # a header of 128 bytes begins as a pickle does, but no pickle has its length in front
    whole = head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size
    packed = head.startswith((b"PK\x03\x04", b"\x80"))
    if whole or (not packed and (head[8:9] == b"{" or path.suffix == ".safetensors")):
        return _load_safetensors(path, head)
    _refuse_other_files(path, head)
    try:
        # opened here: torch would take the name's word for what the file is
        with path.open("rb") as file, torch.serialization.safe_globals(_INERT):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip reader or unpickler met
        raise _unreadable(path, error) from error


def _load_safetensors(path: Path, head: bytes) -> object:
    try:
        return load_file(path)
    except Exception as error:  # a damaged header makes the library raise what it will
        _refuse_other_files(path, head)
        raise DeryError(f"{path} is not a whole safetensors file: {error}") from error


def _refuse_other_files(path: Path, head: bytes) -> None:
    for start, what, hint in _OTHER_FILES:
        if head.lstrip().lower().startswith(start):
            raise UsageError(f"{path} {what}", hint)
    if not head:
        raise UsageError(f"{path} is empty")


def _unreadable(path: Path, error: Exception) -> DeryError:
    """The error for a file that torch refuses: classes are named, its own advice is left out."""
    classes: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        try:
            classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # of files in the old format
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            classes = [named[1]] if named else []
    if classes:
        reason = f"it holds more than tensors: {some_of(classes)}"
    else:
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
        reason = text.splitlines()[0][:200] if text else type(error).__name__
    return DeryError(f"{path} cannot be read with weights_only=True: {reason}", _AS_SAFETENSORS)


def _tensors(loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _unwrap(loaded: object, depth: int = 0) -> tuple[tuple[str, ...], dict[str, Tensor]] | None:
    """The keys that lead to the state dict, and its tensors; None where none is preferred."""
    if depth > _DEPTH or not isinstance(loaded, Mapping):  # a pickle may hold itself
        return None
    for key in _WRAPPERS:
        inner = _unwrap(loaded.get(key), depth + 1)
        if inner is not None:
            return (key, *inner[0]), inner[1]
    own = _tensors(loaded)
    if own:
        return (), own
    found = _state_dicts(loaded)
    return found[0] if len(found) == 1 else None


def _state_dicts(
    loaded: object, keys: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping below the top that holds tensors by name, optimisers and the like left out."""
    found = []
    for key, value in loaded.items() if isinstance(loaded, Mapping) else ():
        if not isinstance(key, str) or _NOT_WEIGHTS.search(key) or len(keys) >= _DEPTH:
            continue
        tensors = _tensors(value)
        if tensors:
            found.append(((*keys, key), tensors))
        else:
            found += _state_dicts(value, (*keys, key))
    return found


def _of_key(path: Path, loaded: object, key: str) -> dict[str, Tensor]:
    known = {".".join(keys): tensors for keys, tensors in _state_dicts(loaded)}
    inner: object = loaded
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    found = known.get(key) or _tensors(inner)
    if not found:
        wrapped = _unwrap(inner)
        found = {} if wrapped is None else wrapped[1]
    if not found:
        hint = (
            f"there are {some_of(sorted(known))}" if known else "it is a state dict; leave it out"
        )
        raise UsageError(f"{path} has no tensors under '{key}'", hint)
    return found
