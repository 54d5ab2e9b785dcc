"""From a trace to modules that run: steps, and blocks made of steps.

Calls that no cut falls inside stay whole and run as the donor's own modules. The others are
opened: their events become steps of their own. What the trace fixed but a block must not (batch
size, device, training mode) is left open, as ``twins`` finds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dery_cli.core.dissection.trace import Attr, Call, Op, Outputs, Ref, Trace
from dery_cli.core.dissection.trees import Shell, pick, put_together
from dery_cli.core.dissection.twins import (
    DEVICE,
    Batch,
    Mode,
    Run,
    UnclearError,
    merge,
    varies,
)
from dery_cli.core.dissection.units import Cut


@dataclasses.dataclass(eq=False)
class Step:
    """One instruction: call ``target`` (a function, or a module) or fetch a kept tensor.

    Args:
        target: The function; None for a module and for a fetch.
        path: Name of the module, for a module call and a fetch.
        keys: Keys of the tensor kept at ``path``, for a fetch.
        args: Arguments with ``Ref``, ``Batch``, ``Mode`` and ``DEVICE`` to be filled in.
        kwargs: The same by name.
        reads: Values it needs.
        outputs: Values it makes.
        aliases: (old, new): the tensor of value ``old`` has changed in place and is now ``new``.
        start: Time at which it starts in the trace; -1 for a fetch.
    """

    target: Callable[..., Any] | None
    path: str
    keys: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    outputs: Outputs
    aliases: list[tuple[int, int]]
    start: int
    drops: tuple[int, ...] = ()
    fixed: bool = False
    """Whether all arguments are plain references and constants."""

    def makes(self) -> list[int]:
        return [value for _, value in self.outputs] + [new for _, new in self.aliases]

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self  # never changed once a block holds it


def events(trace: Trace, opened: set[Call]) -> list[Op | Call]:
    """The trace in order with the calls in ``opened`` (callers of one another) taken apart."""

    def walk(call: Call) -> Iterator[Op | Call]:
        for event in call.events:
            if isinstance(event, Call) and event in opened:
                yield from walk(event)
            else:
                yield event

    return list(walk(trace.root))


def open_calls(trace: Trace, cuts: Sequence[Cut], values: Iterable[int]) -> set[Call]:
    """The calls that must be opened so that ``cuts`` fall between events.

    Calls are opened as well whose inside is needed outside: a value of ``values`` or of a later
    event that is none of the call's results, a call that reads the image but has a result that
    does not depend on it, and a call that is handed a tensor from before the last cut which it does
    not use.
    """
    opened = {trace.root}
    for call in trace.root.walk():
        if any(call.start < cut.time < call.end for cut in cuts):
            opened.update(call.ancestors())
    while True:
        made = {trace.image} | {v.index for v in trace.values if v.attr is not None}
        missing: set[int] = set()
        more: set[Call] = set()
        listed = events(trace, opened)
        for event in listed:
            missing.update(index for index in event.reads if index not in made)
            made.update(value for _, value in event.outputs)
            made.update(new for _, new in event.aliases)
            if isinstance(event, Call) and (
                _hides_constant(event, trace) or _reaches_back(event, trace, cuts)
            ):
                more.add(event)
        missing.update(index for index in values if index not in made)
        for index in missing:
            born = trace.values[index].born
            more.update(e for e in listed if isinstance(e, Call) and e.start <= born < e.end)
        if not more:
            return opened
        for call in more:
            opened.update(call.ancestors())


def _hides_constant(call: Call, trace: Trace) -> bool:
    results = [trace.values[value] for _, value in call.outputs]
    reads_data = any(trace.values[index].data for index in call.reads)
    return reads_data and any(not value.data and value.attr is None for value in results)


def _reaches_back(call: Call, trace: Trace, cuts: Sequence[Cut]) -> bool:
    before = [cut for cut in cuts if cut.time <= call.start]
    if not before:
        return False
    read = (trace.values[index] for index in call.reads if index != before[-1].value)
    return any(value.data and value.born < before[-1].time for value in read)


def twin_events(trace: Trace, opened: set[Call], twin: Trace) -> list[Op | Call] | None:
    """The events of ``twin``, opened the same way; None where the two do not correspond."""

    def key(call: Call) -> tuple[str, ...]:
        return tuple(c.path for c in call.ancestors())

    keys = {key(call) for call in opened}
    mine = events(trace, opened)
    theirs = events(twin, {call for call in twin.root.walk() if key(call) in keys})
    same = len(mine) == len(theirs) and all(
        type(a) is type(b) and _label(a) == _label(b) for a, b in zip(mine, theirs, strict=True)
    )
    return theirs if same else None


def _label(event: Op | Call) -> str:
    return event.name if isinstance(event, Op) else event.path


def build_steps(
    listed: Sequence[Op | Call],
    twins: Sequence[Sequence[Op | Call]],
    runs: Sequence[Run],
) -> list[Step]:
    """Steps for the events of a trace, with what differs between runs left open.

    Args:
        listed: The events.
        twins: The same events in each of the other runs.
        runs: The trace's own run and the others.

    Raises:
        UnclearError: What differs is explained neither by the number of images nor by the mode.
    """
    steps = []
    for event, *others in zip(listed, *twins, strict=True):
        try:
            args = merge([event.args, *(other.args for other in others)], runs)
            kwargs = merge([event.kwargs, *(other.kwargs for other in others)], runs)
        except UnclearError as reason:
            raise UnclearError(f"{_label(event)} {reason}") from None
        op = event if isinstance(event, Op) else None
        steps.append(
            Step(
                target=op.func if op else None,
                path="" if isinstance(event, Op) else event.path,
                keys=(),
                args=args,
                kwargs=kwargs,
                reads=tuple(event.reads),
                outputs=event.outputs,
                aliases=event.aliases,
                start=event.time if isinstance(event, Op) else event.start,
                fixed=not varies((args, kwargs)),
            )
        )
    return steps


def cut_out(trace: Trace, steps: Sequence[Step], source: int, targets: Sequence[int]) -> list[Step]:
    """The steps that lead from value ``source`` to ``targets``, constants and fetches included.

    Raises:
        LookupError: They need an image-dependent value from before ``source``.
    """
    maker = {value: step for step in steps for value in step.makes()}
    needed: dict[int, Step] = {}
    fetched: dict[int, Step] = {}
    todo = list(targets)
    while todo:
        index = todo.pop()
        if index == source or index in fetched:
            continue
        attr = trace.values[index].attr
        if attr is not None:
            fetched[index] = _fetch(attr, index)
            continue
        if index not in maker or (trace.values[source].born >= trace.values[index].born and (
            trace.values[index].data
        )):  # fmt: skip
            raise LookupError(f"value {index} is not to be had after value {source}")
        step = maker[index]
        if id(step) not in needed:
            needed[id(step)] = step
            todo += step.reads
            todo += [old for old, new in step.aliases if old not in step.reads]
    ordered = sorted(needed.values(), key=lambda step: step.start)
    return [*fetched.values(), *ordered]


def _fetch(attr: Attr, index: int) -> Step:
    return Step(None, attr.path, attr.keys, (), {}, (), [((), index)], [], -1, fixed=True)


def with_drops(steps: Sequence[Step], keep: Iterable[int]) -> list[Step]:
    """The same steps, each forgetting the values that no later step reads."""
    seen = set(keep)
    result: list[Step] = []
    for step in reversed(steps):
        used = {*step.reads, *step.makes(), *(old for old, _ in step.aliases)}
        result.append(dataclasses.replace(step, drops=tuple(used - seen)))
        seen |= used
    return result[::-1]


class Runner:
    """Runs steps over an environment of values."""

    def __init__(self, steps: Sequence[Step], modules: Mapping[str, nn.Module]) -> None:
        self.steps = steps
        self.modules = modules

    def run(self, env: dict[int, Any], batch: int, device: torch.device, training: bool) -> None:
        """Execute all steps; ``env`` (values by number) is changed."""
        for step in self.steps:
            if step.start < 0:
                result = _kept(self.modules[step.path], step.keys)
            else:
                if step.fixed:
                    args = tuple(_refill(a, env) for a in step.args)
                    kwargs = {k: _refill(a, env) for k, a in step.kwargs.items()}
                else:
                    args = _fill(step.args, env, batch, device, training)
                    kwargs = _fill(step.kwargs, env, batch, device, training)
                target = step.target if step.target is not None else self.modules[step.path]
                result = target(*args, **kwargs)
            for old, new in step.aliases:
                env[new] = env[old]
            for keys, value in step.outputs:
                item = result
                for key in keys:
                    item = pick(item, key)
                env[value] = item
            for value in step.drops:
                env.pop(value, None)


def _kept(module: nn.Module, keys: tuple[Any, ...]) -> Any:
    item = getattr(module, keys[0])
    for key in keys[1:]:
        item = pick(item, key)
    return item


def _refill(tree: Any, env: Mapping[int, Any]) -> Any:
    if isinstance(tree, Ref):
        return env[tree.value]
    if isinstance(tree, (list, tuple, dict, slice, Shell)):
        return _fill(tree, env, 0, None, False)
    return tree


def _fill(
    tree: Any, env: Mapping[int, Any], batch: int, device: torch.device | None, training: bool
) -> Any:
    if isinstance(tree, Ref):
        return env[tree.value]
    if isinstance(tree, Batch):
        return tree.slope * batch + tree.offset
    if isinstance(tree, Mode):
        return _fill(tree.training if training else tree.evaluating, env, batch, device, training)
    if tree is DEVICE:
        return device
    if isinstance(tree, slice):
        ends = (tree.start, tree.stop, tree.step)
        return slice(*(_fill(end, env, batch, device, training) for end in ends))
    if isinstance(tree, Shell):
        parts = {k: _fill(v, env, batch, device, training) for k, v in tree.parts.items()}
        return put_together(Shell(tree.like, parts))
    if type(tree) is dict:
        return {k: _fill(v, env, batch, device, training) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_fill(item, env, batch, device, training) for item in tree)
    return tree
