"""``--format safetensors``: a folder that timm, ``dery_cli.load_assembly`` and the hub read.

A state dict holds no graph: to run it needs dery and the donors' plugins, but neither the workspace
nor the donors' weights. After ``import dery_cli.timm``, ``timm.create_model("local-dir:FOLDER")``
builds it.
"""

from __future__ import annotations

from pathlib import Path

from dery_cli.io.files import not_written
from dery_cli.stages.export.compare import Runnable
from dery_cli.zoo.networks import MODEL_FILE, LoadedAssembly, load_assembly
from dery_cli.zoo.timm_folder import write_files

FILE = MODEL_FILE


def write(assembly: LoadedAssembly, folder: Path, *, name: str) -> None:
    """Write the weights, timm's configuration, a card, and a record that names the weights alone.

    Raises:
        DeryError: The disk is full.
    """
    try:
        write_files(assembly, folder, name=name, repo=name)
    except OSError as error:
        raise not_written(folder, error) from error


def load(folder: Path) -> Runnable:
    """The network, built anew from what is in the folder."""
    return load_assembly(folder).network
