"""dery: Deep Model Reassembly on the command line and from Python.

The core is a library::

    from dery_cli import dissect, similarity, partition, load_assembly

Names are loaded when they are first used, so that ``import dery_cli`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dery_cli.assembly_store import LoadedAssembly, load_assembly
    from dery_cli.core import proxies
    from dery_cli.core.dissect import Dissection, dissect
    from dery_cli.core.network import AssembledNetwork, NetworkBuilder
    from dery_cli.core.partition import Partition, PartitionProblem, partition
    from dery_cli.core.similarity import similarity
    from dery_cli.core.stitch import Stitch
    from dery_cli.core.stitch_fit import fit_stitch

__version__ = "0.1.0"

_HOMES = {
    "AssembledNetwork": "dery_cli.core.network",
    "Dissection": "dery_cli.core.dissect",
    "LoadedAssembly": "dery_cli.assembly_store",
    "NetworkBuilder": "dery_cli.core.network",
    "Partition": "dery_cli.core.partition",
    "PartitionProblem": "dery_cli.core.partition",
    "Stitch": "dery_cli.core.stitch",
    "dissect": "dery_cli.core.dissect",
    "fit_stitch": "dery_cli.core.stitch_fit",
    "load_assembly": "dery_cli.assembly_store",
    "partition": "dery_cli.core.partition",
    "similarity": "dery_cli.core.similarity",
}

__all__ = [
    "AssembledNetwork",
    "Dissection",
    "LoadedAssembly",
    "NetworkBuilder",
    "Partition",
    "PartitionProblem",
    "Stitch",
    "__version__",
    "dissect",
    "fit_stitch",
    "load_assembly",
    "partition",
    "proxies",
    "similarity",
]


def __getattr__(name: str) -> Any:
    if name == "proxies":
        return importlib.import_module("dery_cli.core.proxies")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dery_cli' has no attribute '{name}'")
