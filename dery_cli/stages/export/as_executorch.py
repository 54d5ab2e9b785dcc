"""``--format executorch``: a ``.pte`` for PyTorch's runtime on phones, by its XNNPACK backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from dery_cli.errors import DeryError
from dery_cli.stages.export.capture import converting
from dery_cli.stages.export.compare import Runnable

FILE = "model.pte"
MOST = 16
"""Largest batch: memory is planned for it when the file is written."""


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
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        # its default plans memory for the batch that was traced, not for the largest
        planned = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
        lowered = edge.to_executorch(planned).buffer
    (folder / FILE).write_bytes(lowered)


def load(folder: Path) -> Runnable:
    """The network as its own runtime reads it."""
    with converting("executorch"):
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(folder / FILE).load_method("forward")
    if method is None:
        raise DeryError("executorch finds no network in what it wrote")

    def run(x_NCHW: Tensor) -> Tensor:
        y_NK: Tensor = method.execute([x_NCHW.contiguous()])[0]
        return y_NK.clone()  # its memory is used again by the next batch

    return run
