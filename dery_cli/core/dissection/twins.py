"""What differs between runs of one model: number of images, mode, device.

A trace fixes integers and flags that a block must not. They are found by comparing traces of
several runs, and put back as ``Batch``, ``Mode`` and ``DEVICE``. What two runs differ in could be
the number of images or the mode, and any two points lie on a line; so nothing is believed that a
third run does not confirm.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import torch

from dery_cli.core.dissection.trace import Ref
from dery_cli.core.dissection.trees import Shell, put_together


@dataclasses.dataclass(frozen=True)
class Batch:
    """An integer that grows with the batch: ``slope * N + offset``."""

    slope: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Mode:
    """A value (or a ``Batch``) that differs between evaluation and training."""

    evaluating: Any
    training: Any


class Special(enum.Enum):
    """What is only known when a block runs."""

    DEVICE = enum.auto()


DEVICE = Special.DEVICE


@dataclasses.dataclass(frozen=True)
class Run:
    """With how many images, and in which mode, a model was run."""

    batch: int
    training: bool


FIRST_RUN = Run(1, training=False)

TWIN_RUNS = (Run(2, training=False), Run(5, training=True))
"""Beside the first run: these tell the batch from the mode wherever just one of them matters."""

NO_TRAINING = (Run(2, training=False), Run(5, training=False))
"""Where training mode does other things: a donor of that kind trains as it evaluates."""

MORE_RUNS = (Run(3, training=False), Run(2, training=True), Run(3, training=True))
"""Where integers depend on the mode: three runs of each."""


class UnclearError(Exception):
    """Runs differ in a way that neither the number of images nor the mode explains."""


def merge(trees: Sequence[Any], runs: Sequence[Run]) -> Any:
    """The recorded arguments of one event in several runs as one, with what differs left open.

    Args:
        trees: The arguments in each run; values are numbered as in the first.
        runs: What the runs were.

    Raises:
        UnclearError: They differ otherwise than by the number of images or the mode, or more runs
            are needed to tell.
    """
    mine = trees[0]
    if isinstance(mine, Ref):
        return mine
    if isinstance(mine, torch.device):
        return DEVICE
    if any(type(tree) is not type(mine) for tree in trees):
        return _explained(trees, runs)
    if isinstance(mine, slice):
        return slice(*merge([(s.start, s.stop, s.step) for s in trees], runs))
    if isinstance(mine, Shell):
        return Shell(mine.like, merge([dict(tree.parts) for tree in trees], runs))
    if isinstance(mine, dict):
        if any(tree.keys() != mine.keys() for tree in trees):
            raise UnclearError(f"has the keys {list(mine)} in one run and not in another")
        merged = {key: merge([tree[key] for tree in trees], runs) for key in mine}
        return _like(mine, merged)
    if isinstance(mine, (list, tuple)):
        if len({len(tree) for tree in trees}) > 1:
            lengths = [len(tree) for tree in trees]
            raise UnclearError(f"is given {_listed(lengths, runs)} values")
        parts = [merge(part, runs) for part in zip(*trees, strict=True)]
        return _like(mine, dict(enumerate(parts)))
    return _explained(trees, runs)


def _like(mine: Any, parts: dict[Any, Any]) -> Any:
    """A dict, list or tuple of the same kind; a ``Shell`` where a kind of its own is left open."""
    if type(mine) is dict:
        return parts
    if type(mine) in (list, tuple):
        return type(mine)(parts.values())
    shell = Shell(mine, parts)
    return shell if varies(parts) else put_together(shell)


def varies(tree: Any) -> bool:
    """Whether anything in merged arguments is left open."""
    if isinstance(tree, (Batch, Mode, Special)):
        return True
    if isinstance(tree, slice):
        return varies((tree.start, tree.stop, tree.step))
    if isinstance(tree, Shell):
        return varies(dict(tree.parts))
    if isinstance(tree, dict):
        return any(map(varies, tree.values()))
    return isinstance(tree, (list, tuple)) and any(map(varies, tree))


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _explained(values: Sequence[Any], runs: Sequence[Run]) -> Any:
    """One value, a ``Batch`` or a ``Mode`` that gives what each run had."""
    if not all(isinstance(value, _PLAIN) for value in values) or _alike(values):
        return values[0]
    batch = _line(values, runs)
    if batch is not None:
        return batch
    sides = []
    for training in (False, True):
        places = [i for i, run in enumerate(runs) if run.training is training]
        sides.append(_in_one_mode([values[i] for i in places], [runs[i] for i in places]))
    return Mode(*sides)


def _in_one_mode(values: Sequence[Any], runs: Sequence[Run]) -> Any:
    """What explains the values of one mode: a single flag does, a single integer does not."""
    if len(values) > 1 or (len(values) == 1 and type(values[0]) is not int):
        if _alike(values):
            return values[0]
        batch = _line(values, runs)
        if batch is not None:
            return batch
    raise UnclearError(f"is given {_listed(values, runs)}")


def _alike(values: Sequence[Any]) -> bool:
    first = values[0]
    return all(value == first or (value != value and first != first) for value in values)


def _line(values: Sequence[Any], runs: Sequence[Run]) -> Batch | None:
    """The line through three or more integers, if there is one."""
    if len(values) < 3 or not all(type(value) is int for value in values):
        return None
    (first, second), (one, other) = values[:2], runs[:2]
    slope, rest = divmod(second - first, other.batch - one.batch)
    line = Batch(slope, first - slope * one.batch)
    fits = all(
        value == line.slope * run.batch + line.offset
        for value, run in zip(values, runs, strict=True)
    )
    return line if fits and slope and not rest else None


def _listed(values: Sequence[Any], runs: Sequence[Run]) -> str:
    return ", ".join(
        f"{value} for {run.batch} image{'s' if run.batch > 1 else ''}"
        f"{' in training mode' if run.training else ''}"
        for value, run in zip(values, runs, strict=True)
    )
