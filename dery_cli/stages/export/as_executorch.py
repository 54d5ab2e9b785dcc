"""``--format executorch``: a ``.pte`` for PyTorch's runtime on phones, by its XNNPACK backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dery_cli.errors import DeryError
from dery_cli.stages.export.capture import converting
from dery_cli.stages.export.compare import Runnable

FILE = "model.pte"
MOST = 16
"""Largest batch that is asked for: memory is planned when the file is written."""


def check_installed() -> None:
    """Find the library before anything is computed.

    Raises:
        DeryError: It is not installed.
    """
    if importlib.util.find_spec("executorch") is None:
        raise DeryError(
            "--format executorch needs executorch, which is not installed",
            "pip install 'dery-cli[executorch]'",
        )


def write(program: ExportedProgram, folder: Path) -> None:
    """Lower the graph and write it.

    Raises:
        DeryError: An operator has no counterpart.
        OSError: The disk is full.
    """
    with converting("executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        lowered = edge.to_executorch().buffer
    (folder / FILE).write_bytes(lowered)


def load(folder: Path) -> tuple[Runnable, int]:
    """The network as its own runtime reads it, and the largest batch that it takes.

    That is read from the file: executorch 1.5 plans for 15 images where 16 are asked for.
    """
    with converting("executorch"):
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(folder / FILE).load_method("forward")
        most = int(method.metadata.input_tensor_meta(0).sizes()[0])

    def run(x_NCHW: Tensor) -> Tensor:
        parts = [method.execute([x.contiguous()])[0].clone() for x in torch.split(x_NCHW, most)]
        return torch.cat(parts)  # cloned: the memory is used again by the next batch

    return run, most
