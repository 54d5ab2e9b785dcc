"""dery: Deep Model Reassembly on the command line and from Python.

The core is a library::

    from dery_cli import dissect, similarity, partition, load_assembly

Names are loaded when they are first used, so that ``import dery_cli`` stays light. Where timm was
imported before, its ``create_model`` knows assemblies afterwards; ``import dery_cli.timm`` always
sees to that.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dery_cli.core import proxies
    from dery_cli.core.dissection.dissect import Dissection, dissect
    from dery_cli.core.partition.solve import Partition, PartitionProblem, partition
    from dery_cli.core.similarity.compare import similarity
    from dery_cli.core.stitching.fit import fit_stitch
    from dery_cli.core.stitching.network import AssembledNetwork, NetworkBuilder
    from dery_cli.core.stitching.stitch import Stitch
    from dery_cli.zoo.networks import LoadedAssembly, load_assembly

__version__ = "0.1.0"

_HOMES = {
    "AssembledNetwork": "dery_cli.core.stitching.network",
    "Dissection": "dery_cli.core.dissection.dissect",
    "LoadedAssembly": "dery_cli.zoo.networks",
    "NetworkBuilder": "dery_cli.core.stitching.network",
    "Partition": "dery_cli.core.partition.solve",
    "PartitionProblem": "dery_cli.core.partition.solve",
    "Stitch": "dery_cli.core.stitching.stitch",
    "dissect": "dery_cli.core.dissection.dissect",
    "fit_stitch": "dery_cli.core.stitching.fit",
    "load_assembly": "dery_cli.zoo.networks",
    "partition": "dery_cli.core.partition.solve",
    "similarity": "dery_cli.core.similarity.compare",
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


if "timm" in sys.modules:  # else `import dery_cli.timm`: importing timm takes seconds
    importlib.import_module("dery_cli.timm")
