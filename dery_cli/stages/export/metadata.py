"""What is written beside, and where the format has a place for it into, an exported network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dery_cli.core.assembly.notation import format_network
from dery_cli.io.records import library_versions
from dery_cli.types import BlockRef
from dery_cli.zoo.networks import LoadedAssembly

METADATA, SCHEMA = "metadata.json", "dery/export"

VERSION = 1


def describe(assembly: LoadedAssembly, *, format: str, model: str) -> dict[str, Any]:  # noqa: A002
    """What whoever runs the network has to know: its input, classes, licences and provenance.

    Args:
        assembly: The network.
        format: It is exported in.
        model: Name of its file.
    """
    record, network = assembly.record, assembly.record.data["network"]
    licences: dict[str, list[str]] = {}
    for block in network["blocks"]:
        names = licences.setdefault(block["license"], [])
        if block["donor"] not in names:
            names.append(block["donor"])
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "format": format,
        "model": model,
        "input": {**network["input"], "crop": network["crop"], "layout": "NCHW", "batch": "any"},
        "output": "pre-logits" if assembly.classes is None else "logits",
        "classes": network["classes"],
        "params": record.data["params"],
        "flops": record.data["flops"],
        "licenses": licences,
        "provenance": {
            "kind": record.kind.name,
            "sha256": record.sha256,
            "target": _without_folders(record.data["target"]),
            "network": _notation(network),
            "blocks": [{key: block[key] for key in _OF_A_BLOCK} for block in network["blocks"]],
            "libraries": library_versions(),
        },
    }


_OF_A_BLOCK = ("donor", "start", "stop", "spec", "weights_sha256", "license", "task", "source")


def _without_folders(spec: str) -> str:
    """A data spec; of a folder its name alone, since the file may be given away."""
    return Path(spec).name if Path(spec).is_absolute() else spec


def _notation(network: Mapping[str, Any]) -> str:
    refs: list[BlockRef] = []
    for block, joint in zip(network["blocks"], network["joints"], strict=True):
        ref = BlockRef(block["donor"], block["start"], block["stop"])
        before = refs[-1] if refs else None
        follows = before is not None and (before.donor, before.stop) == (ref.donor, ref.start)
        adapter = joint is not None and follows
        refs.append(BlockRef(ref.donor, ref.start, ref.stop, adapter=adapter))
    return format_network(refs)


def as_text(metadata: Mapping[str, Any]) -> str:
    """The metadata as the JSON file that is written."""
    return json.dumps(metadata, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def as_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The same as texts, for formats that hold texts by name; what is no text is JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
