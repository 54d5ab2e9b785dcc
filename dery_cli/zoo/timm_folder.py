"""A network as a folder that timm, the Hugging Face hub and ``load_assembly`` all read.

It holds ``model.safetensors``, timm's ``config.json``, the record (``assembly.json`` or
``run.json``) and a model card, and can be moved: no file names a place outside.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import dery_cli
from dery_cli.errors import UsageError
from dery_cli.io.files import file_sha256
from dery_cli.io.folders import new_folder
from dery_cli.io.records import Artifact, library_versions
from dery_cli.types import Layout
from dery_cli.zoo.hub_card import hub_card
from dery_cli.zoo.networks import MODEL_FILE, LoadedAssembly
from dery_cli.zoo.timm_model import ARCHITECTURE, TimmAssembly

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"


def timm_config(network: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The ``config.json`` of timm for a described network.

    The description itself stands in ``model_args``, not the folder's place: so the folder can be
    moved, and uploaded. timm resizes the short side and crops; ``EvalTransform`` crops the same
    field of view and resizes.

    Args:
        network: As in a record's data.
        name: Of the network, for people.
    """
    model = TimmAssembly(network)
    spec, classes = network["input"], network["classes"]
    end = model.output_node
    grid = None if end.layout is Layout.NC else list(end.grid)
    licences = sorted({block["license"] for block in network["blocks"]})
    return {
        "architecture": ARCHITECTURE,
        "num_classes": len(classes or ()),
        "num_features": model.num_features,
        "label_names": classes,
        "model_args": {"network": dict(network)},
        "pretrained_cfg": {
            "tag": name,
            "custom_load": False,
            "input_size": [spec["in_chans"], *spec["image_size"]],
            "fixed_input_size": True,
            "interpolation": spec["interpolation"],
            "crop_pct": network["crop"],
            "crop_mode": "center",
            "mean": list(spec["mean"]),
            "std": list(spec["std"]),
            "num_classes": len(classes or ()),
            "pool_size": grid,
            "first_conv": model.first_conv,
            "classifier": "head",
            "license": " and ".join(licences),
        },
        "dery": {"version": dery_cli.__version__, "libraries": library_versions()},
    }


def write_timm_folder(
    assembly: LoadedAssembly,
    folder: str | Path,
    *,
    name: str | None = None,
    repo: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a network so that timm, the hub and ``load_assembly`` can load it.

    Args:
        assembly: From ``load_assembly``.
        folder: To be made.
        name: Of the network; the folder's where None.
        repo: ``OWNER/NAME`` on the hub, for the examples in the card; the folder's name where None.
        force: Replace a folder that is there.

    Returns:
        The files, in the order of their names.

    Raises:
        UsageError: The folder is there already.
        DeryError: It could not be written; nothing is left half done.
    """
    folder = Path(folder)
    name = name or folder.name
    if folder.exists() and not force:
        raise UsageError(f"{folder} is there already", "choose another, or replace it with force")
    with new_folder(folder) as work:
        write_files(assembly, work, name=name, repo=repo or folder.name)
    return sorted(folder.iterdir())


def write_files(assembly: LoadedAssembly, folder: Path, *, name: str, repo: str) -> None:
    """Write what ``write_timm_folder`` does into the folder of a ``new_folder`` block."""
    record = public_record(assembly.record)
    weights = folder / MODEL_FILE
    state = assembly.network.state_dict()
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in state.items()}, weights,
              metadata={"format": "pt"})  # fmt: skip
    config = timm_config(record.data["network"], name=name)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    card = hub_card(name, record.data, record.libraries or library_versions(), repo)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    record = dataclasses.replace(record, files={MODEL_FILE: file_sha256(weights)})
    (folder / f"{record.kind.name}.json").write_bytes(record.to_bytes())


def public_record(record: Artifact) -> Artifact:
    """The record without absolute paths: of each the last part alone is left."""
    return dataclasses.replace(
        record, data=_without_places(record.data), options=_without_places(record.options)
    )


def _without_places(value: Any) -> Any:
    if isinstance(value, str):
        before, slash, rest = value.partition(os.sep)
        place = not before or before.endswith((":", "="))
        local = slash and rest and place and not rest.startswith("/")  # not https://
        return before + Path(rest).name if local else value
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    return [_without_places(item) for item in value] if isinstance(value, (list, tuple)) else value
