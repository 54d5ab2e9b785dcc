"""What a model does with an image, recorded while it runs on the ``meta`` device.

The model's own Python runs as it is, so neither control flow nor shape arithmetic stands in the
way. Every torch function it calls becomes an ``Op``, every submodule it calls a ``Call`` that
spans the ops made inside. ``Value`` is one tensor in one state: an operation that works in place
makes a new value of the same tensor. Time is the index of an op; a call spans [start, end).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dery_cli.core.dissection.meta import SHORTCUTS, FlopMeter, lstm_flops, meta_copy
from dery_cli.core.dissection.trees import Field, Shell, leaves, map_tensors


@dataclasses.dataclass(frozen=True)
class Ref:
    """Stands for value number ``value`` in recorded arguments."""

    value: int


@dataclasses.dataclass(frozen=True)
class Attr:
    """A tensor that the module at ``path`` keeps: ``keys`` leads to it, an attribute name first."""

    path: str
    keys: tuple[Any, ...]

    def __str__(self) -> str:
        names = (key.name if isinstance(key, Field) else str(key) for key in self.keys)
        return ".".join(filter(None, [self.path, *names]))


@dataclasses.dataclass
class Value:
    """One tensor in one state.

    Args:
        index: Its number in ``Trace.values``.
        tensor: The meta tensor.
        version: The tensor's version counter when this value was made.
        data: Whether it depends on the image.
        born: Time of the op that made it; -1 for the image and for what the model keeps.
        attr: Where the model keeps it, if it does.
    """

    index: int
    tensor: torch.Tensor
    version: int
    data: bool
    born: int = -1
    attr: Attr | None = None


Outputs = list[tuple[tuple[Any, ...], int]]
"""Keys into a result, and the value found there."""


@dataclasses.dataclass(eq=False)
class Op:
    """One call of a torch function. ``func`` is None where a tensor came from unseen code."""

    time: int
    owner: Call
    func: Callable[..., Any] | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[int]
    outputs: Outputs
    aliases: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    flops: int = 0


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a submodule. ``events`` are the ops and calls of its own forward, in order."""

    path: str
    module: nn.Module
    parent: Call | None
    start: int
    end: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    reads: list[int] = dataclasses.field(default_factory=list)
    outputs: Outputs = dataclasses.field(default_factory=list)
    aliases: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    events: list[Op | Call] = dataclasses.field(default_factory=list)

    def ancestors(self) -> Iterator[Call]:
        """This call, its caller, and so on up to the model's own."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent

    def calls(self) -> Iterator[Call]:
        """The calls made directly by this one."""
        for event in self.events:
            if isinstance(event, Call):
                yield event

    def walk(self) -> Iterator[Call]:
        """This call and all below it, callers first."""
        yield self
        for call in self.calls():
            yield from call.walk()


@dataclasses.dataclass
class Trace:
    """A recorded run: ``values[image]`` went in, ``values[output]`` came out."""

    root: Call
    ops: list[Op]
    values: list[Value]
    image: int
    output: int
    batch: int


def record(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    train: bool,
    count: bool,
    device: torch.device | None = None,
) -> Trace:
    """Run a copy of ``model`` on an input of ``shape`` and write down what happens.

    Args:
        model: Left untouched; its forward must work on the ``meta`` device, unless one is given.
        shape: (N, C, H, W).
        dtype: Type of the input.
        train: Whether to run in training mode.
        count: Whether to count each op's floating-point operations.
        device: Run with the model's own numbers there, on a random image; without numbers if None.

    Raises:
        Exception: Whatever the model's forward raises.
        ValueError: It returns no tensor.
    """
    if device is None:
        twin, image = meta_copy(model), torch.empty(shape, dtype=dtype, device="meta")
    else:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        twin, image = copy.deepcopy(model), drawn.to(device, dtype)
    twin = twin.train(train).requires_grad_(False)
    counter = FlopMeter() if count else None
    with torch.no_grad(), counter or contextlib.nullcontext():
        recorder = _Recorder(twin, image, counter, SHORTCUTS if device is None else {})
        with recorder:
            recorder.run(image)
    return recorder.trace()


_SHAPE_ONLY = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_empty", "new_full",
}  # fmt: skip
"""Functions that ask a tensor for its shape and type alone."""


_ASKING = {"size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "ndimension"}
"""Methods that answer a question about a tensor."""


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Recorder(TorchFunctionMode):
    def __init__(
        self,
        model: nn.Module,
        image: torch.Tensor,
        counter: FlopMeter | None,
        shortcuts: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__()
        self.model, self.counter, self.shortcuts = model, counter, shortcuts
        self.values: list[Value] = []
        self.current: dict[int, int] = {}  # id of a tensor object -> its latest value
        self.ops: list[Op] = []
        self.flops = 0
        self.root = Call("", model, None, 0)
        self.stack: list[Call] = []
        self.image = self._new(image, data=True).index
        self.output = -1
        self.paths = {id(module): path for path, module in model.named_modules()}
        for path, module in model.named_modules():
            self._register(module, path)
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)

    def run(self, image: torch.Tensor) -> None:
        result = self.model(image)
        found = [tensor for _, tensor in leaves(result)]
        if not found:
            raise ValueError(f"its forward returns {type(result).__name__}, no tensor")
        logits = next((tensor for tensor in found if tensor.ndim == 2), found[0])
        self.output = self._value(logits)

    def trace(self) -> Trace:
        batch = self.values[self.image].tensor.shape[0]
        return Trace(self.root, self.ops, self.values, self.image, self.output, batch)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.stack or getattr(func, "__name__", "") in _ASKING:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args)
            return (
                self._record(func, args, kwargs, result, [*args], [])
                if (isinstance(result, torch.Tensor) and result is not args[0])
                else result
            )
        inputs = [tensor for _, tensor in leaves([args, kwargs])]
        # a slice may hold tensors, but they index: they are read, never written
        versions = [tensor._version for tensor in inputs]
        result = self.shortcuts.get(func, func)(*args, **kwargs)
        if func is torch.lstm and self.counter is not None:
            self.counter.total += lstm_flops(args)
        produced = any(True for _ in leaves(result))
        written = [t for t, version in zip(inputs, versions, strict=True) if t._version != version]
        if produced or written:
            result = self._record(func, args, kwargs, result, inputs, written)
        return result

    def _record(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Any], written: list[Any]
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)
        template, options = self._template(args), self._template(kwargs)
        if name in _SHAPE_ONLY:
            func, template, options = _shape_only(name, args, kwargs)
        reads = _reads([template, options])
        known = {id(tensor) for tensor in inputs} - {id(tensor) for tensor in written}
        result = map_tensors(result, lambda t: t.view_as(t) if id(t) in known else t)
        op = Op(len(self.ops), self.stack[-1], func, name, template, options, reads, [])
        data = any(self.values[index].data for index in reads)
        self.ops.append(op)
        self.stack[-1].events.append(op)
        bases = [t._base for t in written if t._base is not None and id(t._base) in self.current]
        for tensor in {id(t): t for t in [*written, *bases]}.values():
            old = self._value(tensor)
            data = data or self.values[old].data
            op.aliases.append((old, self._new(tensor, data=data, born=op.time).index))
        for keys, tensor in leaves(result):
            fresh = id(tensor) not in self.current or all(tensor is not t for t in written)
            value = self._new(tensor, data=data, born=op.time).index if fresh else None
            op.outputs.append((keys, self.current[id(tensor)] if value is None else value))
        if self.counter is not None:
            op.flops, self.flops = self.counter.total - self.flops, self.counter.total
        return result

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self.stack[-1] if self.stack else None
        call = self.root if parent is None else Call(self.paths[id(module)], module, parent, 0)
        call.start = len(self.ops)
        call.args, call.kwargs = self._template(args), self._template(kwargs)
        call.reads = _reads([call.args, call.kwargs])
        if parent is not None:
            parent.events.append(call)
        self.stack.append(call)

    def _leave(self, _: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        call = self.stack[-1]
        known = {id(tensor) for _, tensor in leaves([args, kwargs])}
        result = map_tensors(result, lambda t: self._passed(t) if id(t) in known else t)
        call.outputs = [(keys, self._value(tensor)) for keys, tensor in leaves(result)]
        call.end = len(self.ops)
        for index in dict.fromkeys(call.reads):
            latest = self.current[id(self.values[index].tensor)]
            if latest != index:
                call.aliases.append((index, latest))
        self.stack.pop()
        return result

    def _passed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A module handed its input through: give the output an identity of its own."""
        with torch._C.DisableTorchFunction():
            twin = tensor.view_as(tensor)
        index = self._value(tensor)
        op = Op(len(self.ops), self.stack[-1], _same, "same", (Ref(index),), {}, [index], [])
        self.ops.append(op)
        self.stack[-1].events.append(op)
        made = self._new(twin, data=self.values[index].data, born=op.time)
        op.outputs.append(((), made.index))
        return twin

    def _new(
        self, tensor: torch.Tensor, *, data: bool, born: int = -1, attr: Attr | None = None
    ) -> Value:
        value = Value(len(self.values), tensor, tensor._version, data, born, attr)
        self.values.append(value)
        self.current[id(tensor)] = value.index
        return value

    def _value(self, tensor: torch.Tensor) -> int:
        index = self.current.get(id(tensor))
        if index is not None:
            return index
        call = self.stack[-1] if self.stack else self.root
        for keeper in call.ancestors():  # a tensor the module has put aside since it was built
            self._register(keeper.module, keeper.path)
        if id(tensor) not in self.current:  # made by code that torch functions do not see
            reads = [i for i in call.reads if self.values[i].data]
            op = Op(len(self.ops), call, None, "unseen", (), {}, reads, [])
            self.ops.append(op)
            call.events.append(op)
            op.outputs.append(((), self._new(tensor, data=bool(reads), born=op.time).index))
        return self.current[id(tensor)]

    def _register(self, module: nn.Module, path: str) -> None:
        own = vars(module)
        kept = {**own["_parameters"], **own["_buffers"]}
        kept.update({k: v for k, v in own.items() if not k.startswith("_")})
        kept.pop("training", None)
        for keys, tensor in leaves(kept):
            if id(tensor) not in self.current:
                self._new(tensor, data=False, attr=Attr(path, keys))

    def _template(self, tree: Any) -> Any:
        return map_tensors(tree, lambda tensor: Ref(self._value(tensor)))


def _reads(tree: Any) -> list[int]:
    found: dict[int, None] = {}

    def look(item: Any) -> None:
        if isinstance(item, Ref):
            found[item.value] = None
        elif isinstance(item, Shell):
            look(dict(item.parts))
        elif isinstance(item, dict):
            for part in item.values():
                look(part)
        elif isinstance(item, (list, tuple)):
            for part in item:
                look(part)
        elif isinstance(item, slice):
            look((item.start, item.stop, item.step))

    look(tree)
    return list(found)


def _shape_only(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The factory call that makes the same tensor without looking at ``args[0]``."""
    like, *rest = args
    options = {"dtype": like.dtype, "device": like.device}
    options |= {k: v for k, v in kwargs.items() if k != "memory_format" and v is not None}
    kind = name.removeprefix("new_").removesuffix("_like")
    factory: Callable[..., Any] = getattr(torch, kind)
    if name.startswith("new_"):
        size = rest if kind != "full" else rest[:1]
        shape = options.pop("size", None) or (
            size[0] if isinstance(size[0], (tuple, list)) else size
        )
        extra = tuple(rest[1:]) if kind == "full" else ()
    else:
        shape, extra = tuple(like.shape), tuple(rest)
    return factory, (tuple(shape), *extra), options
