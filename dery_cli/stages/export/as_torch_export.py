"""``--format torch-export``: a ``.pt2`` of ``torch.export``, which torch alone runs."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from dery_cli.stages.export.capture import converting
from dery_cli.stages.export.compare import Runnable

FILE = "model.pt2"


def write(program: ExportedProgram, folder: Path, metadata: str) -> None:
    """Write the graph, with the metadata among its extra files.

    Raises:
        DeryError: It cannot be serialised.
        OSError: The disk is full.
    """
    memory = io.BytesIO()  # torch tells of a full disk in its own words
    with converting("torch.export"):
        torch.export.save(program, memory, extra_files={"metadata.json": metadata})
    (folder / FILE).write_bytes(memory.getbuffer())


def load(folder: Path) -> Runnable:
    """The network as torch reads it."""
    with converting("torch.export"):
        module: Runnable = torch.export.load(folder / FILE).module()
    return module
