"""What ``dery latency pack`` does: the parts of a zoo's networks, to be measured elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dery_cli.core.cost.latency import shapes_of, timed_pairs
from dery_cli.core.stitching.network import head_inputs
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.errors import StaleError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import replace_text
from dery_cli.io.folders import check_place, new_folder
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.embed.store import read_embeddings
from dery_cli.stages.latency.as_onnx import check_installed, chunks, write_parts
from dery_cli.stages.latency.config import PackConfig
from dery_cli.stages.latency.store import (
    PACK_FILE,
    PACK_FORMAT,
    PACK_SCHEMA,
    SCRIPT_FILE,
    head_key,
    made_for,
    stitch_key,
    unit_key,
)
from dery_cli.types import Node, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.found import find_record
from dery_cli.zoo.networks import read_network
from dery_cli.zoo.registry import Zoo, require_zoo
from dery_cli.zoo.whole import zoo_nodes

PARTS, NETWORKS = "parts", "networks"


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to be measured.

    Args:
        key: What its time is called.
        module: On the CPU, in eval mode.
        example: Of its input.
    """

    key: str
    module: nn.Module
    example: Tensor


@dataclasses.dataclass(frozen=True)
class PackedNetwork:
    """An assembly that is measured whole, beside the keys of its parts."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    joints: tuple[tuple[Node, Node], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """What was packed.

    Args:
        folder: Where.
        units: Of donors.
        heads: Of different widths.
        stitches: Between different shapes.
        all_stitches: That there are; a line through those packed stands for the others.
        networks: Names of assemblies that are there whole.
        classes: Of heads.
        bytes: On disk.
    """

    folder: Path
    units: int
    heads: int
    stitches: int
    all_stitches: int
    networks: tuple[str, ...]
    classes: int | None
    bytes: int


def pack_parts(terminal: Terminal, space: Workspace, config: PackConfig) -> Pack:
    """Write the pack; there is nothing new where it fails.

    Raises:
        StaleError: There is no zoo or no such assembly, or it is of other donors.
        UsageError: The folder is there, or no number of classes is known.
        DeryError: A part has no counterpart in ONNX, or the disk is full.
    """
    check_installed()
    place = check_place(
        config.to,
        force=config.force,
        command="dery latency pack",
        file=PACK_FILE,
        schema=PACK_SCHEMA,
        hint="give another DIR",
    )
    zoo = require_zoo(space)
    kind = StitchKind(config.stitch)
    classes = config.classes
    if classes is None:
        classes = _embedded_classes(space, zoo)
    networks = [_network(space, zoo, name, kind, classes) for name in config.networks]
    with new_folder(place) as work:
        return _write(terminal, space, zoo, networks, config, classes, work)


def _embedded_classes(space: Workspace, zoo: Zoo) -> int | None:
    """Of the data that were embedded, which assemblies are made for by default."""
    try:
        classes = read_embeddings(space, zoo).calibration.classes
    except StaleError as error:
        raise UsageError(
            f"how many classes heads are to have is not known: {error.message}", "--classes N"
        ) from error
    return None if classes is None else len(classes)


def _network(
    space: Workspace, zoo: Zoo, name: str, kind: StitchKind, classes: int | None
) -> PackedNetwork:
    """An assembly, and the keys of its parts.

    Raises:
        StaleError: There is none, or its donors are others now.
        UsageError: It has stitches or a head of another kind.
    """
    loaded = read_network(*find_record(space.assembly(name).parent))
    description = loaded.record.data["network"]
    keys: list[str] = []
    joints: list[tuple[Node, Node]] = []
    for block, joint in zip(description["blocks"], description["joints"], strict=True):
        donor = zoo.donors.get(block["donor"])
        if donor is None or donor.weights_sha256 != block["weights_sha256"]:
            raise StaleError(
                f"the assembly '{name}' is of another {block['donor']} than the zoo has",
                f"dery assemble --name {name}",
            )
        if joint is not None:
            if joint["stitch"] != kind:
                raise UsageError(
                    f"the assembly '{name}' has {joint['stitch']} stitches, not {kind}",
                    f"--stitch {joint['stitch']}",
                )
            ends = (Node.from_json(joint["source"]), Node.from_json(joint["target"]))
            joints.append(ends)
            keys.append(stitch_key(*ends))
        keys += [unit_key(donor.name, unit) for unit in range(block["start"], block["stop"])]
    if "stem" in description:
        raise UsageError(
            f"the assembly '{name}' has a fresh stem, which is no part of a donor",
            "leave out --network, or assemble with --stem donor",
        )
    own = None if loaded.classes is None else len(loaded.classes)
    if own is not None:
        if own != classes:
            raise UsageError(
                f"the assembly '{name}' has {own} classes, heads have {classes}", f"--classes {own}"
            )
        keys.append(head_key(head_inputs(Node.from_json(description["end"]))))
    spec = zoo[description["blocks"][0]["donor"]].input
    return PackedNetwork(
        name, loaded.network, (spec.in_chans, *spec.image_size), tuple(keys), tuple(joints)
    )


def _stitches(
    nodes: list[Node], networks: list[PackedNetwork], kind: StitchKind
) -> tuple[dict[str, tuple[Node, Node]], int]:
    """The stitches to measure by key, those of the networks among them; how many there are."""
    _, examples = shapes_of(nodes)
    pairs = [(examples[a], examples[b]) for a, b in timed_pairs(examples, kind)]
    pairs += itertools.chain.from_iterable(network.joints for network in networks)
    usable = sum(1 for node in examples if node.index)
    return {stitch_key(a, b): (a, b) for a, b in pairs}, usable * usable


def _write(
    terminal: Terminal,
    space: Workspace,
    zoo: Zoo,
    networks: list[PackedNetwork],
    config: PackConfig,
    classes: int | None,
    work: Path,
) -> Pack:
    nodes, kind = zoo_nodes(zoo), StitchKind(config.stitch)
    widths = {head_inputs(node) for node in nodes if node.index} if classes else set()
    stitches, all_stitches = _stitches(nodes, networks, kind)
    units = len(nodes) - len(zoo)
    listed: dict[str, Mapping[str, Any]] = {}
    total = units + len(widths) + len(stitches) + len(networks)
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn((config.batch_size, *shape), generator=generator)

    pool = DonorPool(zoo, space, torch.device("cpu"))
    (work / PARTS).mkdir()
    with terminal.progress("writing parts", total) as bar:
        for group in _groups(pool, zoo, random, (widths, classes or 1), stitches, kind):
            listed.update(_write_group(group, len(listed), work, bar.advance))
        whole = _write_networks(networks, random, work, bar.advance)
    replace_text(
        work / PACK_FILE,
        json.dumps(
            {
                "schema": PACK_FORMAT,
                "for": made_for(zoo, kind=kind, batch_size=config.batch_size, classes=classes),
                "parts": listed,
                "networks": whole,
            },
            indent=1,
        )
        + "\n",
    )
    script = Path(__file__).parent / "scripts" / SCRIPT_FILE
    replace_text(work / SCRIPT_FILE, script.read_text(encoding="utf-8"))
    return Pack(
        folder=config.to,
        units=units,
        heads=len(widths),
        stitches=len(stitches),
        all_stitches=all_stitches,
        networks=config.networks,
        classes=classes,
        bytes=sum(path.stat().st_size for path in work.rglob("*") if path.is_file()),
    )


def _groups(
    pool: DonorPool,
    zoo: Zoo,
    random: Callable[[tuple[int, ...]], Tensor],
    heads: tuple[set[int], int],
    stitches: Mapping[str, tuple[Node, Node]],
    kind: StitchKind,
) -> Iterator[list[Part]]:
    """The parts: one donor's units after another's, the heads, the stitches."""
    widths, classes = heads
    for name in zoo.names():
        spec = zoo[name].input
        with torch.no_grad():
            images = random((spec.in_chans, *spec.image_size))
            features = [x.clone() for x in pool[name].features(images)]
        yield [
            Part(unit_key(name, unit), pool[name].block(unit, unit + 1).eval(), features[unit])
            for unit in range(len(features) - 1)
        ]
    yield [
        Part(head_key(inputs), nn.Linear(inputs, classes), random((inputs,)))
        for inputs in sorted(widths)
    ]
    yield [
        Part(key, Stitch(a, b, kind).eval(), random(a.shape)) for key, (a, b) in stitches.items()
    ]


def _write_group(
    group: list[Part], first: int, work: Path, advance: Any
) -> dict[str, Mapping[str, Any]]:
    """Write parts, numbered from ``first``; what the pack says of each."""
    found: dict[str, Mapping[str, Any]] = {}
    files = []
    for place, part in enumerate(group, start=first):
        file = f"{PARTS}/{place:05d}.onnx"
        found[part.key] = {"file": file, "shape": list(part.example.shape)}
        files.append((part.key, part.module, part.example, work / file))
    for chunk in chunks(files):
        write_parts(chunk)
        advance(len(chunk))
    return found


def _write_networks(
    networks: list[PackedNetwork], random: Any, work: Path, advance: Any
) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    if networks:
        (work / NETWORKS).mkdir()
    for network in networks:
        file = f"{NETWORKS}/{network.name}.onnx"
        example = random(network.shape)
        write_parts([(network.name, network.module, example, work / file)])
        found[network.name] = {
            "file": file,
            "shape": list(example.shape),
            "parts": list(network.parts),
        }
        advance()
    return found
