"""What inference takes beside params and multiply-adds: measured latency, and computed memory.

Latencies are those of this device, batch size and thread count, and are kept as an artifact: of
every unit of every donor, of a head of every width, and of a stitch between any two shapes. Memory
is that of the weights plus the largest activation peak of any single block, on no machine at all.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dery_cli.core.assembly.notation import needs_stitch
from dery_cli.core.assembly.paths import Space
from dery_cli.core.assembly.problem import IntArray, Resource, peak_resources
from dery_cli.core.cost.latency import (
    all_stitches,
    interleaved_medians,
    shapes_of,
    timed_pairs,
)
from dery_cli.core.cost.memory import Memo, activation_peak, peak_on_meta, weight_bytes
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.stitching.network import (
    AssembledNetwork,
    Donors,
    ending_pool,
    head_inputs,
)
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.stages.assemble.config import Budget
from dery_cli.stages.latency.store import Times, stitch_key
from dery_cli.types import BlockRef, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import zoo_nodes

REPEATS = 15
"""Rounds that a latency is the median of."""

WARMUP = 3
"""Rounds before these."""


class LatencyTable:
    """Nanoseconds of the parts that networks of a zoo are made of; they add up.

    Args:
        zoo: The donors.
        num_classes: Of heads; None without.
        units: Of each donor's units, in order.
        heads: Of a head, by its inputs.
        stitches: From a shape (row) to a shape (column) of ``shapes_of(zoo_nodes(zoo))``.
        error: Of the stitches that were not timed: the line's median relative error on those that
            were. None where all were timed.
    """

    def __init__(
        self,
        zoo: Zoo,
        num_classes: int | None,
        units: Mapping[str, Sequence[int]],
        heads: Mapping[int, int],
        stitches: Sequence[Sequence[int]],
        error: float | None,
    ) -> None:
        self.units, self.heads, self.error = dict(units), dict(heads), error
        self._zoo, self._num_classes = zoo, num_classes
        self._stitch_SS = np.array(stitches, dtype=np.int64)
        nodes = zoo_nodes(zoo)
        shape_V, _ = shapes_of(nodes)
        places = [(name, node.index) for name in zoo.names() for node in zoo[name].anatomy.nodes]
        self._shape_V, self._shape = shape_V, dict(zip(places, shape_V.tolist(), strict=True))

    def block(self, ref: BlockRef) -> int:
        """Of a stretch of a donor."""
        return sum(self.units[ref.donor][ref.start : ref.stop])

    def head(self, donor: str, node: int) -> int:
        """Of the head on a node."""
        if self._num_classes is None:
            return 0
        return self.heads[head_inputs(self._zoo[donor].anatomy.nodes[node])]

    def stitch(self, before: BlockRef, after: BlockRef) -> int:
        """Of what joins two blocks; 0 where nothing has to."""
        if not needs_stitch(before, after):
            return 0
        ends = (self._shape[before.donor, before.stop], self._shape[after.donor, after.start])
        return int(self._stitch_SS[ends])

    def network(self, refs: Sequence[BlockRef]) -> int:
        """The sum over a network's parts."""
        joints = sum(self.stitch(*pair) for pair in itertools.pairwise(refs))
        return sum(map(self.block, refs)) + joints + self.head(refs[-1].donor, refs[-1].stop)

    def parts(self, space: Space) -> tuple[IntArray, IntArray, IntArray]:
        """Of every segment, stitch and head of the free space."""
        units_V = np.concatenate([[0, *self.units[name]] for name in space.donors])
        total_V = np.cumsum(units_V)
        segments, stitches = space.segments, space.stitches
        heads = [
            self.head(space.donors[d], i)
            for d, i in zip(
                space.donor_V[space.heads.src].tolist(),
                space.index_V[space.heads.src].tolist(),
                strict=True,
            )
        ]
        return (
            total_V[segments.dst] - total_V[segments.src],
            self._stitch_SS[self._shape_V[stitches.src], self._shape_V[stitches.dst]],
            np.array(heads, dtype=np.int64),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "units": {name: list(times) for name, times in self.units.items()},
            "heads": [[inputs, time] for inputs, time in sorted(self.heads.items())],
            "stitches": self._stitch_SS.tolist(),
            "error": self.error,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], zoo: Zoo, num_classes: int | None) -> LatencyTable:
        heads = {int(inputs): int(time) for inputs, time in data["heads"]}
        return cls(zoo, num_classes, data["units"], heads, data["stitches"], data["error"])

    @staticmethod
    def fits(data: Mapping[str, Any], zoo: Zoo, num_classes: int | None) -> bool:
        """Whether a record's data are of these donors, all of them."""
        nodes = zoo_nodes(zoo)
        shapes = len(shapes_of(nodes)[1])
        widths = {head_inputs(node) for node in nodes if node.index} if num_classes else set()
        units = {name: zoo[name].anatomy.num_units for name in zoo.names()}
        return (
            {name: len(times) for name, times in data["units"].items()} == units
            and {inputs for inputs, _ in data["heads"]} == widths
            and [len(row) for row in data["stitches"]] == [shapes] * shapes
        )


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
    device: torch.device,
    *,
    kind: StitchKind,
    batch_size: int,
    num_classes: int | None,
    advance: Callable[[], None],
) -> LatencyTable:
    """Time every unit, a head of every width and stitches between all shapes, in turns.

    Each part gets what a donor delivers for random images. Beyond ``MOST_TIMED`` pairs of shapes
    those evenly spread over the multiply-adds are timed, and a line in multiply-adds and in numbers
    read and written stands for the others.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        device: Where the donors are.
        kind: What stitches are made of.
        batch_size: Images.
        num_classes: Of heads, or None.
        advance: Called once a round, ``WARMUP + REPEATS`` times.
    """
    nodes = zoo_nodes(zoo)
    _, examples = shapes_of(nodes)
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn((batch_size, *shape), generator=generator).to(device)

    calls: dict[object, Callable[[], object]] = {}
    for name in zoo.names():
        dissection = donors[name]
        spec = zoo[name].input
        with torch.inference_mode():
            images = random((spec.in_chans, *spec.image_size))
            features = [x.clone() for x in dissection.features(images)]
        for unit in range(len(features) - 1):
            block = dissection.block(unit, unit + 1).eval().to(device)
            calls["unit", name, unit] = _call(block, features[unit])
    widths = {head_inputs(node) for node in nodes if node.index} if num_classes else set()
    for inputs in sorted(widths):
        assert num_classes is not None
        calls["head", inputs] = _call(nn.Linear(inputs, num_classes).to(device), random((inputs,)))
    pairs = timed_pairs(examples, kind)
    inputs_S = [random(node.shape) for node in examples]
    for a, b in pairs:
        stitch = Stitch(examples[a], examples[b], kind).eval().to(device)
        calls["stitch", a, b] = _call(stitch, inputs_S[a])
    with torch.inference_mode():
        found = interleaved_medians(
            calls, repeats=REPEATS, warmup=WARMUP, synchronise=_waiter(device), advance=advance
        )
    timed = {pair: found["stitch", *pair] for pair in pairs}
    units = {
        name: [found["unit", name, unit] for unit in range(zoo[name].anatomy.num_units)]
        for name in zoo.names()
    }
    stitches, error = all_stitches(examples, timed, kind)
    heads = {inputs: found["head", inputs] for inputs in widths}
    return LatencyTable(zoo, num_classes, units, heads, stitches, error)


def stitches_to_time(zoo: Zoo, kind: StitchKind) -> list[str]:
    """The keys of the stitches that a pack of a zoo has at least."""
    _, examples = shapes_of(zoo_nodes(zoo))
    return [stitch_key(examples[a], examples[b]) for a, b in timed_pairs(examples, kind)]


def latency_elsewhere(
    zoo: Zoo, times: Times, *, kind: StitchKind, num_classes: int | None
) -> LatencyTable:
    """The table of times that another machine measured, see ``stages/latency/store.py``."""
    nodes = zoo_nodes(zoo)
    _, examples = shapes_of(nodes)
    timed = {
        (a, b): time
        for a, before in enumerate(examples)
        for b, after in enumerate(examples)
        if (time := times.stitch(before, after)) is not None
    }
    units = {
        name: [times.unit(name, unit) for unit in range(zoo[name].anatomy.num_units)]
        for name in zoo.names()
    }
    widths = {head_inputs(node) for node in nodes if node.index} if num_classes else set()
    stitches, error = all_stitches(examples, timed, kind)
    heads = {inputs: times.head(inputs) for inputs in sorted(widths)}
    return LatencyTable(zoo, num_classes, units, heads, stitches, error)


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


class MemoryTable:
    """Bytes of the parts that networks of a zoo are made of, each found when it is asked for.

    A network takes the weights of all parts, and the largest of its blocks' activation peaks; the
    last block's is with the head.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        kind: What stitches are made of.
        batch_size: Images.
        num_classes: Of the head, or None.
    """

    def __init__(
        self,
        zoo: Zoo,
        donors: Donors,
        *,
        kind: StitchKind,
        batch_size: int,
        num_classes: int | None,
    ) -> None:
        self._zoo, self._donors, self._kind = zoo, donors, kind
        self._batch_size, self._num_classes = batch_size, num_classes
        self._twins: dict[str, Dissection] = {}
        self._memo: Memo = {}
        self._blocks: dict[tuple[str, int, int, bool], tuple[int, int]] = {}
        self._stitches: dict[object, int] = {}

    def _block(self, ref: BlockRef, last: bool) -> tuple[int, int]:
        key = (ref.donor, ref.start, ref.stop, last)
        if key not in self._blocks:
            self._blocks[key] = self._counted(ref, last)
        return self._blocks[key]

    def _counted(self, ref: BlockRef, last: bool) -> tuple[int, int]:
        """Weights and peak, on the ``meta`` device where the donor runs there: no copy then."""
        donor = self._donors[ref.donor]
        shape = tuple(self._zoo[ref.donor].anatomy.nodes[ref.start].shape)
        if ref.donor not in self._twins:
            self._twins[ref.donor] = donor.on_meta()
        with contextlib.suppress(Exception), torch.device("meta"):
            twin = self._module(self._twins[ref.donor], ref, last)
            return weight_bytes(twin), peak_on_meta(twin, shape, self._batch_size, self._memo)
        module = self._module(donor, ref, last)
        return weight_bytes(module), activation_peak(module, shape, self._batch_size)

    def _module(self, donor: Dissection, ref: BlockRef, last: bool) -> nn.Module:
        block = donor.block(ref.start, ref.stop).eval()
        node = self._zoo[ref.donor].anatomy.nodes[ref.stop]
        return _ended(block, node, self._num_classes) if last else block

    def weights(self, ref: BlockRef, *, last: bool) -> int:
        """Of a block, the head included where it is the last."""
        return self._block(ref, last)[0]

    def peak(self, ref: BlockRef, *, last: bool) -> int:
        """The most activations of a block, likewise."""
        return self._block(ref, last)[1]

    def stitch(self, before: BlockRef, after: BlockRef) -> int:
        """Weights of what joins two blocks; 0 where nothing has to."""
        if not needs_stitch(before, after):
            return 0
        source = self._zoo[before.donor].anatomy.nodes[before.stop]
        return self._between(source, self._zoo[after.donor].anatomy.nodes[after.start])

    def _between(self, source: Node, target: Node) -> int:
        key = tuple((n.layout, n.shape, n.grid, n.num_prefix_tokens) for n in (source, target))
        if key not in self._stitches:
            with torch.device("meta"):
                self._stitches[key] = weight_bytes(Stitch(source, target, self._kind))
        return self._stitches[key]

    def network(self, refs: Sequence[BlockRef]) -> int:
        """Of a network's parts together."""
        ends = [place == len(refs) - 1 for place in range(len(refs))]
        weights = sum(self.weights(ref, last=end) for ref, end in zip(refs, ends, strict=True))
        weights += sum(self.stitch(*pair) for pair in itertools.pairwise(refs))
        return weights + max(self.peak(ref, last=end) for ref, end in zip(refs, ends, strict=True))

    def parts(
        self,
        space: Space,
        nodes: Sequence[Node],
        left_out: Collection[str],
        advance: Callable[[], None],
    ) -> tuple[tuple[IntArray, IntArray, IntArray], IntArray, IntArray]:
        """Weights of every segment, stitch and head of the free space; the segments' peaks.

        Args:
            space: The free space.
            nodes: Its nodes.
            left_out: Donors that no path may use: nothing is counted for them.
            advance: Called once a segment.

        Returns:
            The weights, the peaks, and the peaks of segments that are the last.
        """
        weights: list[int] = []
        peaks: list[int] = []
        lasts: list[int] = []
        head_V = np.zeros(len(nodes), dtype=np.int64)
        for ref, stop in _segment_refs(space):
            if ref.donor in left_out:
                for counts in (weights, peaks, lasts):
                    counts.append(0)
                continue
            weights.append(self.weights(ref, last=False))
            peaks.append(self.peak(ref, last=False))
            lasts.append(self.peak(ref, last=True))
            head_V[stop] = self.weights(ref, last=True) - weights[-1]
            advance()
        shape_V, examples = shapes_of(nodes)
        table = [
            [self._between(a, b) if a.index and b.index else 0 for b in examples] for a in examples
        ]
        ends = (shape_V[space.stitches.src], shape_V[space.stitches.dst])
        stitches = np.array(table, dtype=np.int64)[ends]
        costs = (np.array(weights, dtype=np.int64), stitches, head_V[space.heads.src])
        return costs, np.array(peaks, dtype=np.int64), np.array(lasts, dtype=np.int64)


def block_resources(
    latency: LatencyTable | None,
    memory: MemoryTable | None,
    budget: Budget,
    refs: Sequence[BlockRef],
    stage_B: IntArray,
    pairs: Sequence[tuple[int, int]],
) -> list[Resource]:
    """The resources of the paper's program beside params and flops.

    Args:
        latency: Of the parts; None where there is no such budget.
        memory: Likewise.
        budget: The limits.
        refs: Candidate blocks by number.
        stage_B: 0-based stage of each.
        pairs: The edges, as pairs of block numbers.
    """
    found: list[Resource] = []
    last_B = (stage_B == stage_B.max()).tolist()
    numbered = list(zip(refs, last_B, strict=True))
    joined = [(refs[a], refs[b]) for a, b in pairs]
    if latency is not None:
        heads = [latency.head(ref.donor, ref.stop) if last else 0 for ref, last in numbered]
        costs = [latency.block(ref) + head for ref, head in zip(refs, heads, strict=True)]
        found.append(
            Resource(
                name="latency",
                cost_B=np.array(costs, dtype=np.int64),
                cost_E=np.array([latency.stitch(*pair) for pair in joined], dtype=np.int64),
                maximum=budget.max_latency,
            )
        )
    if memory is not None:
        found += peak_resources(
            "memory",
            np.array([memory.weights(ref, last=last) for ref, last in numbered], dtype=np.int64),
            np.array([memory.stitch(*pair) for pair in joined], dtype=np.int64),
            np.array([memory.peak(ref, last=last) for ref, last in numbered], dtype=np.int64),
            stage_B,
            budget.max_memory,
        )
    return found


def _segment_refs(space: Space) -> Iterator[tuple[BlockRef, int]]:
    """The segments of a space as stretches of donors, each with the node it ends at."""
    donor_V, first_D = space.donor_V, space.first_D
    pairs = zip(space.segments.src.tolist(), space.segments.dst.tolist(), strict=True)
    for src, dst in pairs:
        donor = int(donor_V[src])
        first = int(first_D[donor])
        yield BlockRef(space.donors[donor], src - first, dst - first), dst


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
            module: nn.Module = block
            if index == len(network.blocks) - 1:
                module = nn.Sequential(block, *network.ending).eval()
            weights += weight_bytes(module)
            peaks.append(activation_peak(module, tuple(x.shape[1:]), batch_size))
            x = block(x)
    return weights + max(peaks)


def _ended(block: nn.Module, node: Node, num_classes: int | None) -> nn.Module:
    """A last block with what comes after it."""
    pool = ending_pool(node)
    ending: list[nn.Module] = [] if pool is None else [pool]
    if num_classes is not None:
        ending.append(nn.Linear(head_inputs(node), num_classes))
    return nn.Sequential(block, *ending).eval()


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _waiter(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None
