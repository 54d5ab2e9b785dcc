"""The ``README.md`` of a network on the Hugging Face hub: metadata, and what people should know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dery_cli.runtime.printable import markdown
from dery_cli.sizes import show_count, show_shape
from dery_cli.zoo.licences import hub_licence, licence_conflicts

_REPO = re.compile(r"hf:([\w.-]+/[\w.-]+)")


def hub_card(name: str, data: Mapping[str, Any], libraries: Mapping[str, str], repo: str) -> str:
    """A model card in the hub's format.

    Args:
        name: Of the network.
        data: Of its record.
        libraries: Versions of the libraries that wrote it.
        repo: ``OWNER/NAME`` on the hub, or a folder's name, for the examples.
    """
    return "\n".join([*_front_matter(name, data), *_body(name, data, libraries, repo), ""])


def card_metadata(name: str, data: Mapping[str, Any]) -> ModelCardData:
    """The card's metadata, as the hub reads it."""
    licences = [block["license"] for block in data["network"]["blocks"]]
    licence = hub_licence(licences)
    on_hub = _REPO.match(data["target"])
    has_head = data["network"]["classes"] is not None
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=on_hub[1] if on_hub else "imagefolder",
            dataset_name=data["target"],
            dataset_split="test",
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=round(value, 6),
        )
        for value in [data.get("test_top1")]
        if value is not None
    ]
    more: Any = {"license_name": " and ".join(sorted(set(licences)))} if licence == "other" else {}
    return ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification" if has_head else "image-feature-extraction",
        tags=["dery", "deep-model-reassembly", "timm"],
        datasets=[on_hub[1]] if on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def _front_matter(name: str, data: Mapping[str, Any]) -> list[str]:
    return ["---", card_metadata(name, data).to_yaml(), "---", ""]


def _body(name: str, data: Mapping[str, Any], libraries: Mapping[str, str], repo: str) -> list[str]:
    network = data["network"]
    versions = ", ".join(f"{markdown(n)} {markdown(v)}" for n, v in sorted(libraries.items()))
    return [
        f"# {markdown(name)}",
        "",
        "A network assembled by `dery` (Deep Model Reassembly, Yang et al., NeurIPS 2022) from "
        "blocks of pretrained models.",
        "",
        f"- parameters: {data['params']:,} ({show_count(data['params'])})",
        f"- multiply-adds for one image: {data['flops']:,} ({show_count(data['flops'])})",
        f"- input: {show_shape(network['input']['image_size'])}, crop {network['crop']}",
        *([f"- budget: {markdown(data['budget'])}"] if "budget" in data else []),
        *_figures(data),
        f"- written with: {versions}",
        "",
        "## What it is made of",
        "",
        *_blocks(network),
        "",
        "## Licences",
        "",
        *_licences(network),
        "",
        "## How to use it",
        "",
        *_usage(repo),
    ]


def _figures(data: Mapping[str, Any]) -> list[str]:
    """Measured accuracy; each with what it was measured on."""
    target, lines = markdown(data["target"]), []
    for key, what in (
        ("held_out", "on training images held out to choose on, before any training"),
        ("test_top1_before", "on test images, before fine-tuning"),
        ("test_top1", "on test images"),
    ):
        if data.get(key) is not None:
            lines.append(f"- top-1 of {target} {what}: {data[key]:.4f}")
    return lines


def _blocks(network: Mapping[str, Any]) -> list[str]:
    lines = [
        "| block | donor | weights from | nodes | pretrained on | licence | stitch R2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for block, joint in zip(network["blocks"], network["joints"], strict=True):
        r2 = "" if joint is None or joint["r2"] is None else f"{joint['r2']:.3f}"
        cells = [
            str(block["stage"] + 1),
            f"{markdown(block['spec'])} (sha256 {block['weights_sha256'][:12]})",
            markdown(block["source"]),
            f"{block['start']}-{block['stop']}",
            markdown(block["task"]),
            markdown(block["license"]),
            r2,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _licences(network: Mapping[str, Any]) -> list[str]:
    donors: dict[str, list[str]] = {}
    for block in network["blocks"]:
        held = donors.setdefault(block["license"], [])
        if block["spec"] not in held:
            held.append(block["spec"])
    lines = ["The licences are those of the donors' weights; the network has parts of all of them."]
    lines += ["", *(f"- {markdown(n)}: {markdown(', '.join(of))}" for n, of in donors.items())]
    conflicts = licence_conflicts(donors)
    if conflicts:
        lines += ["", "**To be cleared before it is used or passed on:**", ""]
        lines += [f"- {markdown(conflict)}" for conflict in conflicts]
    return lines


def _usage(repo: str) -> list[str]:
    return [
        "```python",
        "import dery_cli",
        "",
        f'network, transform = dery_cli.load_assembly("hf:{repo}")',
        "output = network(transform(image)[None])",
        "```",
        "",
        "or as a timm model, with `num_classes`, `in_chans` and `features_only` of your own:",
        "",
        "```python",
        "import timm",
        "import dery_cli.timm",
        "",
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True)',
        "```",
    ]
