"""The ``README.md`` beside an assembly: what it is made of, its size, its licences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dery_cli.runtime.printable import markdown
from dery_cli.sizes import show_count, show_shape


def model_card(name: str, data: Mapping[str, Any]) -> str:
    """A model card in Markdown.

    Args:
        name: The assembly's name.
        data: Data of its record.
    """
    network = data["network"]
    lines = [
        f"# {markdown(name)}",
        "",
        "A network assembled by `dery` (Deep Model Reassembly, Yang et al., NeurIPS 2022) from "
        "blocks of pretrained models.",
        "",
        f"- parameters: {data['params']:,} ({show_count(data['params'])})",
        f"- multiply-adds for one image: {data['flops']:,} ({show_count(data['flops'])})",
        f"- input: {show_shape(network['input']['image_size'])}, crop {network['crop']}",
        f"- budget: {data['budget']}",
        f"- chosen by: {_reason(data)}",
    ]
    if data["test_top1"] is not None:
        lines.append(f"- top-1 on {markdown(data['target'])}, untrained: {data['test_top1']:.4f}")
    lines += [
        "",
        "| block | donor | nodes | pretrained on | licence | stitch R2 |",
        "|---|---|---|---|---|---|",
    ]
    for block, joint in zip(network["blocks"], network["joints"], strict=True):
        r2 = "" if joint is None or joint["r2"] is None else f"{joint['r2']:.3f}"
        donor = markdown(block["donor"])
        lines.append(
            f"| {block['stage'] + 1} | {donor} | {block['start']}-{block['stop']} "
            f"| {markdown(block['task'])} | {markdown(block['license'])} | {r2} |"
        )
    lines += [
        "",
        "The licences are those of the donors' weights; the network has parts of all of them.",
        "",
        "```python",
        "import dery_cli",
        "",
        'network, transform = dery_cli.load_assembly("path/to/this/folder")',
        "output = network(transform(image)[None])",
        "```",
        "",
    ]
    return "\n".join(lines)


def _reason(data: Mapping[str, Any]) -> str:
    if data["held_out"] is None:
        return f"{data['proxy']['name']}, {data['proxy']['score']:.4f}"
    target = markdown(data["target"])
    return f"accuracy on held-out training images of {target}, {data['held_out']:.4f}"
