"""Publish trained donors: half-precision weights, their index, the zoo manifest made from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_demo.donors import DONORS, IMAGE_SIZE, DemoDonor
from dery_demo.zoo import INDEX_NAME, LICENSE, SOURCE, WEIGHTS_DIR, read_index

if TYPE_CHECKING:
    from torch import Tensor, nn

MANIFEST = Path(__file__).parents[2] / "zoo_manifests" / "demo.toml"
"""The manifest of the source checkout."""

DESCRIPTION = (
    "Ten small networks of eight families, trained on Fashion-MNIST at 32 x 32 by this project: "
    "convolutional, token and channels-last layouts, 0.2 to 2.3 M parameters, about 9 M together."
)


def checkpoint_state(path: Path) -> dict[str, Any] | None:
    """The JSON state of a checkpoint of ``pretrain``, or None where there is none."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return state


def to_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in half precision, but for those that would overflow there."""
    import torch

    halved = {}
    for name, tensor in weights.items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        halved[name] = half.contiguous() if torch.isfinite(half).all() else tensor
    return halved


def publish(
    name: str,
    checkpoint: Path,
    evaluate: Callable[[nn.Module, DemoDonor], float],
    folder: Path = WEIGHTS_DIR,
    manifest: Path = MANIFEST,
) -> dict[str, Any]:
    """Write one donor's weights, then the index, then the manifest; returns the donor's entry.

    Args:
        name: The donor.
        checkpoint: Its checkpoint of ``pretrain``.
        evaluate: Top-1 accuracy of the reloaded half-precision model on the test images.
        folder: Where weights and index go.
        manifest: Zoo manifest to write.
    """
    from safetensors.torch import load, load_file, save

    state = checkpoint_state(checkpoint)
    if state is None:
        raise SystemExit(f"{name} has no checkpoint at {checkpoint}; train it first")
    donor = DONORS[name]
    weights = {
        key.removeprefix("model."): value
        for key, value in load_file(checkpoint).items()
        if key.startswith("model.")
    }
    raw = save(to_half(weights))
    model = donor.construct(donor.num_classes, IMAGE_SIZE)
    model.load_state_dict(load(raw))
    entry = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "top1": round(evaluate(model, donor), 4),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "family": donor.family,
        "task": donor.task_text,
        "epochs": state["epoch"],
        "training": state["config"],
    }
    index = {**read_index(folder), name: entry}
    ordered = {known: index[known] for known in DONORS if known in index}
    _replace(folder / f"{name}.safetensors", raw)
    _replace(folder / INDEX_NAME, (json.dumps(ordered, indent=1) + "\n").encode())
    read_index.cache_clear()
    _replace(manifest, manifest_text(ordered).encode())
    return entry


def manifest_text(index: Mapping[str, Mapping[str, Any]]) -> str:
    """The zoo manifest (TOML) that says what the index says."""
    lines = [
        "# Written by `python -m dery_demo.pretrain --publish`; do not edit by hand.",
        "",
        "[zoo]",
        'name = "demo"',
        'title = "The embedded demo zoo"',
        f"description = {json.dumps(DESCRIPTION)}",
    ]
    for name in DONORS:
        if name not in index:
            continue
        entry = index[name]
        lines += [
            "",
            "[[model]]",
            f'spec = "demo/{name}"',
            f'sha256 = "{entry["sha256"]}"',
            f"params = {entry['params']}",
            f"top1 = {entry['top1']}",
            f"task = {json.dumps(entry['task'])}",
            f"source = {json.dumps(SOURCE)}",
            f'license = "{LICENSE}"',
        ]
    return "\n".join(lines) + "\n"


def _replace(path: Path, raw: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(raw)
    os.replace(temporary, path)
