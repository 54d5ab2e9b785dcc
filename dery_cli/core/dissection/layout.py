"""Where on the image each element of a feature tensor comes from, followed through the trace.

Every tensor gets a companion of its shape that holds grid positions (y, x packed in one integer,
-1 for class and register tokens). Operations that move elements move the companion with them;
operations that mix channels keep it; convolutions and pools that change the grid start a new one.
The layout of a node is then read off its companion, never guessed from its shape.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional

from dery_cli.core.dissection.trace import Op, Ref, Trace
from dery_cli.types import Layout

_ROW = 1 << 15
"""A position is y * _ROW + x."""

_MOVES = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze",
    "contiguous", "__getitem__", "roll", "cat", "concat", "concatenate", "stack", "chunk", "split",
    "unbind", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "T", "mT", "clone", "narrow",
    "select", "flip", "tile", "repeat", "tensor_split", "split_with_sizes", "ravel", "same",
    "t", "pad", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
}  # fmt: skip
_FLOATING = {"unfold"}
"""Moves that torch offers for floating-point tensors only."""
_SPATIAL = ("conv", "pool", "interpolate", "upsample")
_REDUCES = {"max", "amax", "min", "amin", "mean", "sum"}
_ROWWISE = {"linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "scaled_dot_product_attention"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a node's tensor is laid out.

    Args:
        layout: Its layout.
        grid: (height, width); (1, 1) for a vector.
        num_prefix_tokens: Tokens in front of the grid's (NLC only).
        order: For tokens that are not in raster order: token i holds grid position ``order[i]``.
    """

    layout: Layout
    grid: tuple[int, int]
    num_prefix_tokens: int = 0
    order: tuple[int, ...] | None = None


class Positions:
    """The companions of a trace's values, worked out on demand.

    Where paths join, the oldest tensor of the result's shape is asked first: that is the residual
    path, which keeps positions, so what happens inside attention is mostly never looked at.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.maker = {value: op for op in trace.ops for _, value in op.outputs}
        self.older = {new: old for op in trace.ops for old, new in op.aliases}
        image = trace.values[trace.image].tensor
        self.found: dict[int, torch.Tensor | None] = {trace.image: _raster(image.shape)}

    def of(self, value: int) -> torch.Tensor | None:
        """The companion of ``value``, or None where positions cannot be followed."""
        todo = [value]
        while todo:
            wanted = todo[-1]
            if wanted in self.found:
                todo.pop()
                continue
            with torch.no_grad():
                missing = self._work_out(wanted)
            todo += missing
        return self.found[value]

    def _work_out(self, value: int) -> list[int]:
        """Find the companion of ``value``, or say which others are needed before."""
        older, op = self.older.get(value), self.maker.get(value)
        if older is not None or op is None:
            if older is not None and older not in self.found:
                return [older]
            self.found[value] = self.found[older] if older is not None else None
            return []
        shape = self.trace.values[value].tensor.shape
        reads = [i for i in op.reads if self.trace.values[i].data]
        if op.name in _MOVES:
            missing = [i for i in reads if i not in self.found]
            if not missing:
                self.found.update((v, None) for _, v in op.outputs)
                self._move(op)
            return missing
        reads.sort(key=lambda i: (self._shape(i) != shape, self._origin(i)))
        kept = None
        for index in reads:
            if index not in self.found:
                return [index]
            source = self.found[index]
            if source is not None:
                companion = _reduced(source, op) if op.name in _REDUCES else (
                    _mix(op.name, source, shape, self.trace.batch)
                )  # fmt: skip
                kept = companion if kept is None else kept
                if companion is not None and geometry(tuple(shape), companion) is not None:
                    kept = companion
                    break
        self.found[value] = kept
        return []

    def _origin(self, value: int) -> int:
        """The value that ``value`` merely passes on."""
        while value in self.maker and self.maker[value].name == "same":
            value = self.maker[value].reads[0]
        return value

    def _shape(self, value: int) -> torch.Size:
        return self.trace.values[value].tensor.shape

    def _move(self, op: Op) -> None:
        def fill(item: Any) -> Any:
            if isinstance(item, Ref):
                companion = self.found.get(item.value)
                if companion is not None:
                    return companion
                value = self.trace.values[item.value]
                if value.data or not value.tensor.is_floating_point():
                    raise LookupError  # unknown positions, or an index whose numbers are unknown
                return torch.full(value.tensor.shape, -1, dtype=torch.int32)
            if isinstance(item, dict):
                return {key: fill(part) for key, part in item.items()}
            if isinstance(item, (list, tuple)):
                parts = [fill(part) for part in item]
                return parts if isinstance(item, list) else tuple(parts)
            return item

        assert op.func is not None
        try:
            args = fill(op.args)
            if op.name in _FLOATING:
                args = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
                result: Any = op.func(*args, **fill(op.kwargs)).to(torch.int32)
            elif op.name == "pad":  # padding is 0; positions are >= 0 and nothing is -1
                sizes = op.kwargs["pad"] if "pad" in op.kwargs else args[1]
                result = functional.pad(args[0] + 1, sizes) - 1
            else:
                result = op.func(*args, **fill(op.kwargs))
        except (LookupError, RuntimeError, TypeError):
            return
        for keys, value in op.outputs:
            item = result
            for key in keys:
                item = item[key]
            self.found[value] = item


def geometry(shape: tuple[int, ...], companion: torch.Tensor | None) -> Geometry | None:
    """The layout of a tensor of ``shape`` (N, ...), or None where it is not one that joins know."""
    if len(shape) == 2:
        return Geometry(Layout.NC, (1, 1))
    if companion is None:
        return None
    pos = companion[0]
    if len(shape) == 4:
        if shape[2:] == (1, 1) or (_is_raster(pos[0]) and _constant(pos, 0)):
            return Geometry(Layout.NCHW, (shape[2], shape[3]))
        if _is_raster(pos[..., 0]) and _constant(pos, 2):
            return Geometry(Layout.NHWC, (shape[1], shape[2]))
    if len(shape) == 3 and _constant(pos, 1):
        return _tokens(pos[:, 0])
    return None


def _constant(pos: torch.Tensor, dim: int) -> bool:
    """Whether all elements along ``dim`` come from the same place, as those of one feature do."""
    return pos.stride(dim) == 0 or bool((pos == pos.narrow(dim, 0, 1)).all())


def _tokens(pos_L: torch.Tensor) -> Geometry | None:
    prefix = int((pos_L < 0).sum())
    grid_L = pos_L[prefix:]
    if bool((grid_L < 0).any()) or not len(grid_L):
        return None
    height, width = len(torch.unique(grid_L // _ROW)), len(torch.unique(grid_L % _ROW))
    order_L = torch.argsort(torch.argsort(grid_L))
    if height * width != len(grid_L) or len(torch.unique(grid_L)) != len(grid_L):
        return None
    in_order = bool((order_L == torch.arange(len(grid_L))).all())
    order = None if in_order else tuple(order_L.tolist())
    return Geometry(Layout.NLC, (height, width), prefix, order)


def _is_raster(pos_HW: torch.Tensor) -> bool:
    """Whether y depends on the row alone, x on the column alone, and both grow."""
    if bool((pos_HW < 0).any()):
        return False
    y_HW, x_HW = pos_HW // _ROW, pos_HW % _ROW
    same = bool((y_HW == y_HW[:, :1]).all()) and bool((x_HW == x_HW[:1]).all())
    return same and bool((y_HW[:, 0].diff() > 0).all()) and bool((x_HW[0].diff() > 0).all())


def _unpadded(pos_HW: torch.Tensor) -> torch.Tensor:
    real = pos_HW >= 0
    return pos_HW[real.any(1)][:, real.any(0)]


def _raster(shape: torch.Size) -> torch.Tensor:
    y, x = torch.arange(shape[-2], dtype=torch.int32), torch.arange(shape[-1], dtype=torch.int32)
    return (y[:, None] * _ROW + x).expand(shape)


def _reduced(source: torch.Tensor, op: Op) -> torch.Tensor | None:
    """The companion of a maximum or mean over one dimension: that of the first element."""
    dim = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
    keep = op.kwargs.get("keepdim", op.args[2] if len(op.args) > 2 else False)
    if not isinstance(dim, int) or not isinstance(keep, bool):
        return None
    return source.narrow(dim, 0, 1) if keep else source.select(dim, 0)


def _mix(name: str, source: torch.Tensor, shape: torch.Size, batch: int) -> torch.Tensor | None:
    """The companion of an output that is computed, not moved."""
    if any(word in name for word in _SPATIAL):
        if len(shape) != 4 or source.ndim != 4:
            return None
        if source.shape[2:] == shape[2:]:
            return source[:, :1].expand(shape)
        mapped = shape[0] == batch and (shape[2:] == (1, 1) or _is_raster(_unpadded(source[0, 0])))
        return _raster(shape) if mapped else None
    if name in _ROWWISE and source.shape[:-1] == shape[:-1]:
        return source[..., :1].expand(shape)
    try:
        return source.expand(shape)  # the same shape, or broadcast against a constant
    except RuntimeError:
        return None
