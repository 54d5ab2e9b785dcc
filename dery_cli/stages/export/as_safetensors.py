"""``--format safetensors``: the weights, and the record that ``dery_cli.load_assembly`` reads.

A state dict holds no graph: to run it needs dery and the donors' plugins, but neither the workspace
nor the donors' weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.io.journal import transaction
from dery_cli.stages.export.compare import Runnable
from dery_cli.zoo.networks import MODEL_FILE, LoadedAssembly, load_assembly

FILE = MODEL_FILE


def write(assembly: LoadedAssembly, folder: Path) -> None:
    """Write the weights, and a record that names them alone.

    Raises:
        DeryError: The disk is full.
    """
    record = assembly.record
    with transaction(folder / f"{record.kind.name}.json") as work:
        work.write_tensors(FILE, assembly.network.state_dict())
        work.commit(dataclasses.replace(record, files={}))


def load(folder: Path) -> Runnable:
    """The network, built anew from what is in the folder."""
    return load_assembly(folder).network
