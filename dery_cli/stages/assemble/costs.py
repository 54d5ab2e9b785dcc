"""What inference takes beside params and multiply-adds: measured latency, and computed memory.

Latencies are those of this device, batch size and thread count, and are kept as an artifact. Memory
is that of the weights plus the largest activation peak of any single block, on no machine at all.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dery_cli.core.assembly.solve import Resource, peak_resources
from dery_cli.core.cost.latency import interleaved_medians
from dery_cli.core.cost.memory import activation_peak, weight_bytes
from dery_cli.core.stitching.network import AssembledNetwork, Donors, needs_stitch
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.stages.assemble.problem import PlacedBlock, node_of
from dery_cli.types import BlockRef, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import whole_block

REPEATS = 15
"""Rounds that a latency is the median of."""

WARMUP = 3
"""Rounds before these."""

Ends = tuple[str, int, str, int]
"""A stitch: source donor and node, target donor and node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCosts:
    """What each part of a network costs, the head counted to what ends in it.

    Args:
        blocks: Candidate blocks.
        stitches: Between blocks of consecutive stages.
        wholes: Whole donors by name.
    """

    blocks: Mapping[BlockRef, int]
    stitches: Mapping[Ends, int]
    wholes: Mapping[str, int]

    def network(self, refs: Sequence[BlockRef]) -> int:
        """The sum over an assembly's parts."""
        total = self.blocks[refs[0]]
        for before, after in itertools.pairwise(refs):
            total += self.blocks[after]
            if needs_stitch(before, after):
                total += self.stitches[ends_of(before, after)]
        return total

    def cost_B(self, blocks: Sequence[PlacedBlock]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """By block number."""
        return np.array([self.blocks[block.ref] for block in blocks], dtype=np.int64)

    def cost_E(
        self, blocks: Sequence[PlacedBlock], pairs: Sequence[tuple[int, int]]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """By pair of block numbers."""
        refs = [(blocks[a].ref, blocks[b].ref) for a, b in pairs]
        costs = [self.stitches[ends_of(*p)] if needs_stitch(*p) else 0 for p in refs]
        return np.array(costs, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {
            "blocks": [[*_key(ref), cost] for ref, cost in self.blocks.items()],
            "stitches": [[*ends, cost] for ends, cost in self.stitches.items()],
            "wholes": dict(self.wholes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PartCosts:
        return cls(
            blocks={BlockRef(*entry[:3]): entry[3] for entry in data["blocks"]},
            stitches={(a, b, c, d): cost for a, b, c, d, cost in data["stitches"]},
            wholes=dict(data["wholes"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCosts:
    """Bytes of weights, and each block's peak of live activations.

    Args:
        weights: Of the parts; of whole donors the weights and the peak together.
        peaks: Of the candidate blocks.
    """

    weights: PartCosts
    peaks: Mapping[BlockRef, int]

    def network(self, refs: Sequence[BlockRef]) -> int:
        """Weights of an assembly plus the largest of its blocks' peaks."""
        return self.weights.network(refs) + max(self.peaks[ref] for ref in refs)


def _key(ref: BlockRef) -> tuple[str, int, int]:
    return (ref.donor, ref.start, ref.stop)


def ends_of(before: BlockRef, after: BlockRef) -> Ends:
    """The stitch between two blocks."""
    return (before.donor, before.stop, after.donor, after.start)


def device_name(device: torch.device) -> str:
    """What latencies were measured on, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{device.type} {platform.processor() or platform.machine()}"


def latency_options(
    device: torch.device, kind: StitchKind, batch_size: int, classes: int | None
) -> dict[str, Any]:
    """What measured latencies hold for, as their artifact records it."""
    return {
        "device": device_name(device),
        "stitch": str(kind),
        "batch_size": batch_size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "repeats": REPEATS,
        "warmup": WARMUP,
        "classes": classes,
    }


def measure_latency(
    zoo: Zoo,
    donors: Donors,
    blocks: Sequence[PlacedBlock],
    device: torch.device,
    *,
    kind: StitchKind,
    batch_size: int,
    num_classes: int | None,
    advance: Callable[[], None],
) -> PartCosts:
    """Nanoseconds of every block, every distinct stitch and every whole donor, in turns.

    Each part gets what its donor delivers for random images. Stitches between nodes of the same
    shapes do the same work; one of them is timed.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        blocks: Candidate blocks.
        device: Where the donors are.
        kind: What stitches are made of.
        batch_size: Images.
        num_classes: Of the head that the last stage's blocks and whole donors get, or None.
        advance: Called once a round, ``WARMUP + REPEATS`` times.
    """
    generator = torch.Generator().manual_seed(0)
    images: dict[tuple[int, ...], Tensor] = {}
    features: dict[tuple[str, int], Tensor] = {}
    wanted: dict[str, set[int]] = {name: {0} for name in zoo.names()}
    dissections = {name: donors[name] for name in zoo.names()}  # built outside inference mode
    for block in blocks:
        wanted[block.ref.donor] |= {block.ref.start, block.ref.stop}
    with torch.inference_mode():
        for name, nodes in wanted.items():
            spec = zoo[name].input
            shape = (batch_size, spec.in_chans, *spec.image_size)
            if shape not in images:
                images[shape] = torch.randn(shape, generator=generator).to(device)
            for index, x in enumerate(dissections[name].features(images[shape])):
                if index in nodes:
                    features[name, index] = x.clone()
    calls: dict[object, Callable[[], object]] = {}
    for ref, module, _ in _parts(zoo, donors, blocks, num_classes):
        calls[ref] = _call(module.to(device), features[ref.donor, ref.start])
    stitches = stitch_ends(blocks)
    shapes = {ends: _stitch_shape(zoo, ends) for ends in stitches}
    for ends, key in shapes.items():
        if key not in calls:
            stitch = _stitch(zoo, ends, kind).eval().to(device)
            calls[key] = _call(stitch, features[ends[:2]])

    with torch.inference_mode():
        found = interleaved_medians(
            calls, repeats=REPEATS, warmup=WARMUP, synchronise=_waiter(device), advance=advance
        )
    return PartCosts(
        blocks={block.ref: found[block.ref] for block in blocks},
        stitches={ends: found[key] for ends, key in shapes.items()},
        wholes={name: found[whole_block(zoo, name)] for name in zoo.names()},
    )


def time_network(
    network: AssembledNetwork, input_shape: tuple[int, ...], device: torch.device, batch_size: int
) -> int:
    """Nanoseconds of a built network for random images, measured as its parts were."""
    x = torch.randn((batch_size, *input_shape), generator=torch.Generator().manual_seed(0))
    call = _call(network, x.to(device))

    with torch.inference_mode():
        times = interleaved_medians(
            {"network": call}, repeats=REPEATS, warmup=WARMUP, synchronise=_waiter(device)
        )
    return times["network"]


def compute_memory(
    zoo: Zoo,
    donors: Donors,
    blocks: Sequence[PlacedBlock],
    *,
    kind: StitchKind,
    batch_size: int,
    num_classes: int | None,
    advance: Callable[[], None],
) -> MemoryCosts:
    """Weights and activation peaks of every block, stitch and whole donor.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        blocks: Candidate blocks.
        kind: What stitches are made of.
        batch_size: Images.
        num_classes: Of the head, or None.
        advance: Called once a block and once a whole donor.
    """
    weights: dict[BlockRef, int] = {}
    peaks: dict[BlockRef, int] = {}
    for ref, module, shape in _parts(zoo, donors, blocks, num_classes):
        weights[ref] = weight_bytes(module)
        peaks[ref] = activation_peak(module, shape, batch_size)
        advance()
    sizes: dict[object, int] = {}
    stitches: dict[Ends, int] = {}
    for ends in stitch_ends(blocks):
        key = _stitch_shape(zoo, ends)
        if key not in sizes:
            sizes[key] = weight_bytes(_stitch(zoo, ends, kind))
        stitches[ends] = sizes[key]
    whole = {name: whole_block(zoo, name) for name in zoo.names()}
    return MemoryCosts(
        weights=PartCosts(
            blocks={block.ref: weights[block.ref] for block in blocks},
            stitches=stitches,
            wholes={name: weights[ref] + peaks[ref] for name, ref in whole.items()},
        ),
        peaks={block.ref: peaks[block.ref] for block in blocks},
    )


def network_memory(network: AssembledNetwork, input_shape: tuple[int, ...], batch_size: int) -> int:
    """The memory of a built network: its weights plus its largest single block's peak.

    Weights that two blocks share are counted with both, as the program does.
    """
    weights, peaks = 0, []
    shape = input_shape
    with torch.inference_mode():
        x = torch.zeros((1, *shape), device=next(network.parameters()).device)
        for index, block in enumerate(network.blocks):
            if str(index) in network.stitches:
                x = network.stitches[str(index)](x)
                weights += weight_bytes(network.stitches[str(index)])
            last = index == len(network.blocks) - 1
            module = _with_head(block, network.head if last else None)
            weights += weight_bytes(module)
            peaks.append(activation_peak(module, tuple(x.shape[1:]), batch_size))
            x = block(x)
    return weights + max(peaks)


def more_resources(
    blocks: Sequence[PlacedBlock],
    pairs: Sequence[tuple[int, int]],
    latency: tuple[PartCosts, int] | None,
    memory: tuple[MemoryCosts, int] | None,
) -> list[Resource]:
    """The program's resources beside params and flops.

    Args:
        blocks: Candidate blocks by number.
        pairs: The edges, as pairs of block numbers.
        latency: Nanoseconds of the parts, and the most allowed.
        memory: Bytes of the parts, and the most allowed.
    """
    found: list[Resource] = []
    if latency is not None:
        costs, maximum = latency
        found.append(
            Resource(
                name="latency",
                cost_B=costs.cost_B(blocks),
                cost_E=costs.cost_E(blocks, pairs),
                maximum=maximum,
            )
        )
    if memory is not None:
        bytes_, maximum = memory
        found += peak_resources(
            "memory",
            bytes_.weights.cost_B(blocks),
            bytes_.weights.cost_E(blocks, pairs),
            np.array([bytes_.peaks[block.ref] for block in blocks], dtype=np.int64),
            np.array([block.stage for block in blocks], dtype=np.int64),
            maximum,
        )
    return found


def stitch_ends(blocks: Sequence[PlacedBlock]) -> list[Ends]:
    """Every stitch between blocks of consecutive stages, once."""
    return sorted(
        {
            ends_of(before.ref, after.ref)
            for before in blocks
            for after in blocks
            if after.stage == before.stage + 1 and needs_stitch(before.ref, after.ref)
        }
    )


def _parts(
    zoo: Zoo, donors: Donors, blocks: Sequence[PlacedBlock], num_classes: int | None
) -> Iterator[tuple[BlockRef, nn.Module, tuple[int, ...]]]:
    """Candidate blocks and whole donors, as modules, with the shape each takes for one image."""
    last_stage = max(block.stage for block in blocks)
    ends = {block.ref: block.stage == last_stage for block in blocks}
    ends.update({whole_block(zoo, name): True for name in zoo.names()})
    for ref, ending in ends.items():
        anatomy = zoo[ref.donor].anatomy
        module: nn.Module = donors[ref.donor].block(ref.start, ref.stop).eval()
        if ending and num_classes is not None:
            module = _with_head(module, nn.Linear(anatomy.nodes[ref.stop].num_chs, num_classes))
        yield ref, module, tuple(anatomy.nodes[ref.start].shape)


def _with_head(module: nn.Module, head: nn.Module | None) -> nn.Module:
    return module if head is None else nn.Sequential(module, head).eval()


def _stitch(zoo: Zoo, ends: Ends, kind: StitchKind) -> Stitch:
    return Stitch(node_of(zoo, *ends[:2]), node_of(zoo, *ends[2:]), kind)


def _stitch_shape(zoo: Zoo, ends: Ends) -> object:
    def shape(node: Node) -> tuple[object, ...]:
        return (node.layout, node.shape, node.grid, node.num_prefix_tokens)

    return ("stitch", shape(node_of(zoo, *ends[:2])), shape(node_of(zoo, *ends[2:])))


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _waiter(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None
