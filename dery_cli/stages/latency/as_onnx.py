"""Parts of networks as ONNX files, many exported at a time: each call costs more than a part."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.onnx
from torch import Tensor, nn

from dery_cli.errors import DeryError

_NEEDED = ("onnx", "onnxscript")
_MOST_PARTS = 64
_MOST_BYTES = 512 << 20
"""Of weights in one export: a graph is written to memory, and holds less than 2 GiB."""


def check_installed() -> None:
    """Find the libraries before anything is computed.

    Raises:
        DeryError: One is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DeryError(
            f"dery latency pack needs {', '.join(missing)}, which is not installed",
            "pip install 'dery-cli[onnx]'",
        )


NamedPart = tuple[str, nn.Module, Tensor, Path]
"""What messages call it, the module, an example of its input, the file to write."""


class _Side(nn.Module):
    """Parts side by side: each takes an input of its own and has an output of its own."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


def chunks(parts: Sequence[NamedPart]) -> Iterator[list[Any]]:
    """The parts in lists that one export can take."""
    waiting: list[Any] = []
    size = 0
    for part in parts:
        own = sum(t.nbytes for t in (*part[1].parameters(), *part[1].buffers()))
        if waiting and (len(waiting) == _MOST_PARTS or size + own > _MOST_BYTES):
            yield waiting
            waiting, size = [], 0
        waiting.append(part)
        size += own
    if waiting:
        yield waiting


def write_parts(parts: Sequence[NamedPart]) -> None:
    """Write modules, each with an example of its input, to a file each.

    The file's input is ``x``, its output ``y``; the batch is that of the example.

    Raises:
        DeryError: One has an operator without counterpart in ONNX; it is named.
        OSError: The disk is full.
    """
    try:
        _write_together(parts)
    except DeryError:
        if len(parts) > 1:  # one by one, to name the one that it is
            for part in parts:
                _write_together([part])
        raise


def _write_together(parts: Sequence[NamedPart]) -> None:
    import onnx

    names = [(f"x{place}", f"y{place}") for place in range(len(parts))]
    modules = _Side([module for _, module, _, _ in parts]).eval()
    with torch.no_grad(), _converting(parts[0][0]):
        program = torch.onnx.export(
            modules,
            tuple(x for _, _, x, _ in parts),
            dynamo=True,
            verbose=False,
            input_names=[name for name, _ in names],
            output_names=[name for _, name in names],
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # they name folders of this machine
        whole = program.model_proto
    for (source, target), (_, _, _, path) in zip(names, parts, strict=True):
        onnx.save(_cut_out(whole, source, target), path)


def _cut_out(whole: Any, source: str, target: str) -> Any:
    """The part of a graph that leads from an input to an output, as a model of its own."""
    import onnx

    graph = whole.graph
    maker = {name: node for node in graph.node for name in node.output}
    needed, todo, seen = set(), [target], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        node = maker.get(name)
        if node is not None:
            needed.add(id(node))
            todo += [one for one in node.input if one]
    nodes = [_renamed(node, source, target) for node in graph.node if id(node) in needed]
    (given,) = [_called(value, "x") for value in graph.input if value.name == source]
    (result,) = [_called(value, "y") for value in graph.output if value.name == target]
    kept = [tensor for tensor in graph.initializer if tensor.name in seen]
    part = onnx.helper.make_graph(nodes, "part", [given], [result], kept)
    return onnx.helper.make_model(
        part,
        opset_imports=list(whole.opset_import),
        functions=list(whole.functions),
        ir_version=whole.ir_version,
        producer_name="dery",
    )


def _renamed(node: Any, source: str, target: str) -> Any:
    new = type(node)()
    new.CopyFrom(node)
    names = {source: "x", target: "y"}
    for slots in (new.input, new.output):
        for place, name in enumerate(slots):
            slots[place] = names.get(name, name)
    return new


def _called(value: Any, name: str) -> Any:
    new = type(value)()
    new.CopyFrom(value)
    new.name = name
    return new


@contextlib.contextmanager
def _converting(what: str) -> Iterator[None]:
    """A block in which torch converts: it prints nothing, and what it raises is told in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    except (DeryError, OSError, MemoryError):
        raise
    except Exception as error:
        lines = (line.strip() for line in str(error).splitlines())
        first = next((line for line in lines if line), "")
        raise DeryError(
            f"torch.onnx cannot take {what}: {type(error).__name__}: {first[:200]}",
            "leave the donor out: dery zoo remove; nothing was written",
        ) from error
    finally:
        logging.disable(before)
