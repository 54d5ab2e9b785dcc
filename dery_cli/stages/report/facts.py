"""The words and tables of a report: figures at a glance, controls, licences, provenance."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from dery_cli.io.records import Artifact, library_versions
from dery_cli.runtime.printable import printable
from dery_cli.sizes import show_count, show_decimals, show_time
from dery_cli.stages.report.gather import Gathered
from dery_cli.zoo.licences import licence_conflicts
from dery_cli.zoo.registry import Zoo

FLAGS = {
    "assemble": (
        "max_params", "min_params", "max_flops", "min_flops", "max_latency", "max_memory", "data",
        "space", "blocks", "start", "end", "require", "max_donors", "max_stitches", "for",
        "effort", "proxy", "stitch", "match", "fit_samples", "target_samples", "seed",
    ),
    "finetune": (
        "epochs", "steps", "mode", "lr", "batch_size", "block_lr_scale", "optimizer",
        "weight_decay", "valid_fraction", "seed",
    ),
    "embed": ("data", "samples", "crop", "grid", "seed"),
    "partition": ("blocks", "eps", "size", "seed"),
    "sim": ("metric", "minibatch"),
}  # fmt: skip
"""Options of a command that its record holds under the option's own name, and that shape what it
made; the record's hash covers all of them."""


def facts(found: Gathered) -> Iterator[tuple[str, str]]:
    """Figures at a glance, each with its name."""
    if found.assembly is not None:
        data = found.assembly.data
        yield show_count(data["params"]), "parameters"
        yield show_count(data["flops"]), "multiply-adds an image"
        if data["latency_ns"] is not None:
            yield show_time(data["latency_ns"]), "an image or batch, summed"
        if data["test_top1"] is not None:
            yield f"{data['test_top1']:.4f}", "test top-1 untrained"
    if found.run is not None and found.run.data["test_top1"] is not None:
        yield f"{found.run.data['test_top1']:.4f}", "test top-1 fine-tuned"
    if found.assembly is not None:
        learning = found.assembly.data["learning"]
        if learning is not None and learning["tau"] is not None:
            yield f"{learning['tau']:.2f}", "tau of foreseen and measured"


def comparison(record: Artifact) -> Iterator[dict[str, str]]:
    """The pick and its controls, a row each."""
    for row in record.data["comparison"]:
        yield {
            "role": printable(row["role"]),
            "network": printable(row["network"]),
            "params": show_count(row["params"]),
            "flops": show_count(row["flops"]),
            "trial": show_decimals(row["held_out"]) or "-",
            "test": show_decimals(row["test_top1"]) or "-",
        }


def donors(zoo: Zoo) -> Iterator[dict[str, str]]:
    """The zoo, a row each."""
    for name, donor in zoo.donors.items():
        anatomy = donor.anatomy
        yield {
            "name": printable(name),
            "params": show_count(anatomy.params(0, anatomy.num_units)),
            "flops": show_count(anatomy.flops(0, anatomy.num_units)),
            "licence": printable(donor.card.license),
            "task": printable(donor.card.task),
        }


def licence_warnings(found: Gathered) -> list[str]:
    """What the licences of the network's donors mean for it, as far as their names tell."""
    if found.assembly is None:
        return []
    return [printable(words) for words in licence_conflicts(found.assembly.data["licenses"])]


def refusal(found: Gathered) -> dict[str, Any] | None:
    """Why the last try fitted nothing: sentences, what to do, and how far each limit is off."""
    why = found.refusal
    if why is None:
        return None
    details = why["details"] if isinstance(why["details"], Mapping) else {}
    limits = details.get("limits")
    return {
        "message": printable(why["message"]),
        "hint": printable(why["hint"] or ""),
        "limits": [
            {
                "option": printable(str(limit.get("option"))),
                "limit": _count(limit.get("limit")),
                "alone": _count(limit.get("alone")),
                "rest": _count(limit.get("with_other_limits")),
                "excess": _count(limit.get("excess")),
            }
            for limit in (limits if isinstance(limits, list) else [])
            if isinstance(limit, Mapping)
        ],
    }


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def commands(found: Gathered) -> Iterator[str]:
    """Command lines that made what is shown, as their records tell."""
    specs = [donor.spec for donor in found.zoo.donors.values()]
    yield shlex.join(["dery", "zoo", "add", *specs])
    if found.embeddings is not None:
        yield command_line("embed", found.embeddings.options, found.embeddings.seed)
    similarity = None if found.similarity is None else found.similarity.record
    partition = None if found.partition is None else found.partition.record
    made = (
        ("sim", similarity),
        ("partition", partition),
        ("assemble", found.assembly),
        ("finetune", found.run),
    )
    for command, record in made:
        if record is not None:
            named = command in ("assemble", "finetune") and found.name != "default"
            line = command_line(command, record.options, record.seed)
            yield f"{line} --name {found.name}" if named else line


def command_line(command: str, held: Mapping[str, Any], seed: int | None) -> str:
    """A command with the options that a record holds, as they may be typed.

    Example:
        >>> command_line("sim", {"metric": "cka", "minibatch": 256}, None)
        'dery sim --metric cka --minibatch 256'
    """
    options = {**held, **held.get("budget", {}), "seed": seed}
    words = ["dery", command]
    for name in FLAGS[command]:
        value, flag = options.get(name), f"--{name.replace('_', '-')}"
        if value is None or value is False or value == []:
            continue
        if value is True:
            words.append(flag)
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            shown = f"{one / 1000:g}us" if name == "max_latency" else str(one)
            words += [flag, shown]
    return shlex.join(words)


def provenance(found: Gathered) -> Iterator[tuple[str, str]]:
    """Hashes, seeds, versions, licences and sources."""
    records = (
        ("similarity", None if found.similarity is None else found.similarity.record),
        ("partition", None if found.partition is None else found.partition.record),
        ("assembly", found.assembly),
        ("run", found.run),
    )
    for what, record in records:
        if record is not None:
            seed = "" if record.seed is None else f", seed {record.seed}"
            other = {**record.libraries} != library_versions()
            made = f"; made with {_versions(record.libraries)}" if other else ""
            yield what, f"sha256 {record.sha256}{seed}{made}"
    if found.assembly is not None:
        blocks = {b["donor"]: b for b in found.assembly.data["network"]["blocks"]}
        for name, block in blocks.items():
            yield (
                name,
                f"{block['spec']}, {block['license']}; {block['source']}; "
                f"weights sha256 {block['weights_sha256']}",
            )
    yield "versions", _versions(library_versions())


def _versions(libraries: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items())
