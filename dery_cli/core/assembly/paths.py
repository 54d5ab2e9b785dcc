"""The free space: every network that is a path through the donors' nodes, as an assembly problem.

Legend: V nodes of all donors, G segments, J stitches, S most stitches, R resources.

A path is segment, stitch, segment, ... segment. A segment runs along at least one unit of a donor,
the first from node 0; a stitch leads from a segment's end to any node but 0: of another donor, or
of the same one further on (a slice) or where it left it (an adapter). A path may end at any node:
before its donor's last it is a truncation. The state is the stitches used and the node, so the
layers of the problem are, for each s = 0..S, the nodes that segment s begins at and the nodes it
ends at; what ends there for good goes to the one block of the last layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dery_cli.core.assembly.problem import (
    Assembly,
    AssemblyProblem,
    BoolArray,
    Filter,
    IntArray,
    Requirement,
    Resource,
)
from dery_cli.types import BlockRef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Segments or stitches between nodes, or heads on nodes, and what each costs.

    Args:
        src: Node each leads from; of a head, the node that it is on.
        dst: Node each leads to; of a head, the same node.
        score: Of each, in millionths.
        costs: Of each, by resource.
    """

    src: IntArray
    dst: IntArray
    score: IntArray
    costs: Mapping[str, IntArray]

    def __len__(self) -> int:
        return len(self.src)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Inclusive limits on one resource's total.

    Args:
        minimum: Least total, or None.
        maximum: Greatest total, or None.
    """

    minimum: int | None = None
    maximum: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """A limit on a sum over all parts plus the largest of what single segments need for themselves.

    Args:
        option: Name of the resource in the parts' costs, and of the option.
        peak_G: What each segment needs while it runs.
        last_G: The same where it is the last, with the head.
        maximum: Of the sum and the largest together.
    """

    option: str
    peak_G: IntArray
    last_G: IntArray
    maximum: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin:
    """A wish about one piece of a donor.

    Args:
        kind: ``start`` or ``end`` (the network begins, or ends, with the piece), ``require`` (one
            segment covers it) or ``exclude`` (no segment uses any unit of it).
        name: As the user gave it.
        donor: The piece's.
        start: Node it begins at; None where any of the donor's will do.
        stop: Node it ends at; None likewise.
    """

    kind: str
    name: str
    donor: str
    start: int | None = None
    stop: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What paths are made of.

    Args:
        donors: Names, in the order that decides ties.
        num_nodes: Of each donor, node 0 included.
        segments: All that may be used.
        stitches: Likewise; between two nodes there may be several.
        heads: One for every node that a path may end at.
        max_stitches: Of a path.
        last_score_G: What a segment is worth beside its score where it is a path's last, in
            millionths; None where that makes no difference.
    """

    donors: tuple[str, ...]
    num_nodes: tuple[int, ...]
    segments: Parts
    stitches: Parts
    heads: Parts
    max_stitches: int
    last_score_G: IntArray | None = None

    @property
    def first_D(self) -> IntArray:
        """Number of each donor's node 0; one more entry closes the row."""
        return np.concatenate([[0], np.cumsum(self.num_nodes)]).astype(np.int64)

    @property
    def donor_V(self) -> IntArray:
        """Number of each node's donor."""
        return np.repeat(np.arange(len(self.donors)), self.num_nodes)

    @property
    def index_V(self) -> IntArray:
        """Index of each node in its donor."""
        return np.arange(sum(self.num_nodes)) - self.first_D[self.donor_V]


@dataclasses.dataclass(frozen=True)
class PathProblem:
    """The program over a space's paths, and the way back from its answers.

    Args:
        problem: For ``n_best``, ``solve``, ``pareto``, ``explain``.
        space: What it was made of.
        segment_E: Segment of each edge, -1 for stitches and what only waits for the last layer.
        last_E: Whether an edge is a path's last segment.
        layer_E: How many stitches lie before each edge.
    """

    problem: AssemblyProblem
    space: Space
    segment_E: IntArray
    last_E: BoolArray
    layer_E: IntArray

    def ending_in(self, donor: str) -> AssemblyProblem:
        """The same program over the paths that end in a donor."""
        number = self.space.donors.index(donor)
        mine_G = self.space.donor_V[self.space.segments.src] == number
        return self._with(f"ending in {donor}", ~self.last_E | _true(mine_G, self.segment_E))

    def without(self, donor: str) -> AssemblyProblem:
        """The same program over the paths that have no piece of a donor."""
        number = self.space.donors.index(donor)
        mine_G = self.space.donor_V[self.space.segments.src] == number
        return self._with(f"without {donor}", ~_true(mine_G, self.segment_E))

    def with_stitches(self, most: int) -> AssemblyProblem:
        """The same program over the paths of at most so many stitches."""
        return self._with(f"at most {most} stitches", ~self.last_E | (self.layer_E <= most))

    def within_one_donor(self) -> AssemblyProblem:
        """The same program over slices and whole donors."""
        return dataclasses.replace(self.problem, max_donors=1)

    def _with(self, name: str, allowed_E: BoolArray) -> AssemblyProblem:
        wish = Filter(name=name, allowed_E=allowed_E)
        return dataclasses.replace(self.problem, filters=(*self.problem.filters, wish))

    def network(self, assembly: Assembly) -> tuple[BlockRef, ...]:
        """The path of an answer as segments of donors."""
        space = self.space
        refs: list[BlockRef] = []
        for segment in self.segment_E[list(assembly.edges)].tolist():
            if segment < 0:
                continue
            src, dst = int(space.segments.src[segment]), int(space.segments.dst[segment])
            donor = int(space.donor_V[src])
            start, stop = src - int(space.first_D[donor]), dst - int(space.first_D[donor])
            name = space.donors[donor]
            follows = bool(refs) and (refs[-1].donor, refs[-1].stop) == (name, start)
            refs.append(BlockRef(name, start, stop, adapter=follows))
        return tuple(refs)


@dataclasses.dataclass(frozen=True)
class _Edges:
    """Edges of one kind between two layers.

    Args:
        src: Block each leads from.
        dst: Block each leads to.
        part: The segment or stitch; -1 for none.
        head: The head behind it; -1 for none.
        stitched: Whether ``part`` is a stitch.
        layer: Which segment of the path it belongs to (0..S).
    """

    src: IntArray
    dst: IntArray
    part: IntArray
    head: IntArray
    stitched: bool
    layer: int


def path_problem(
    space: Space,
    limits: Mapping[str, Limits],
    *,
    peak: Peak | None = None,
    pins: Sequence[Pin] = (),
    excluded: Mapping[str, Sequence[str]] | None = None,
    whole: bool = True,
    max_donors: int | None = None,
) -> PathProblem:
    """State the paths of a space as an assembly problem.

    Args:
        space: Donors, segments, stitches, heads.
        limits: On the resources, in the order in which ties go to the cheaper.
        peak: A limit on a sum and a largest part.
        pins: Wishes about pieces.
        excluded: Donors that an option leaves out, by the option's words.
        whole: Whether whole donors count as paths.
        max_donors: Greatest number of different donors, or None.

    Raises:
        UsageError: A limit makes no sense, or totals would not be exact.
    """
    layers, groups = _laid_out(space)
    stage_B = np.concatenate([np.full(len(nodes_V), k) for k, nodes_V in enumerate(layers)])
    node_B = np.concatenate(layers)
    donor_B = np.where(node_B < 0, -1, space.donor_V[np.maximum(node_B, 0)])
    part_E = np.concatenate([g.part for g in groups])
    stitched_E = np.concatenate([np.full(len(g.part), g.stitched) for g in groups])
    layer_E = np.concatenate([np.full(len(g.part), g.layer) for g in groups])
    head_E = np.concatenate([g.head for g in groups])
    segment_E = np.where(stitched_E, -1, part_E)
    stitch_E = np.where(stitched_E, part_E, -1)

    def total_E(segment_G: IntArray, stitch_J: IntArray, head_X: IntArray) -> IntArray:
        return _of(segment_G, segment_E) + _of(stitch_J, stitch_E) + _of(head_X, head_E)

    def cost_E(name: str) -> IntArray:
        parts = (space.segments, space.stitches, space.heads)
        return total_E(*(p.costs[name] for p in parts))

    zero_B = np.zeros(len(node_B), dtype=np.int64)
    resources = [
        Resource(
            name=name,
            cost_B=zero_B,
            cost_E=cost_E(name),
            minimum=limit.minimum,
            maximum=limit.maximum,
        )
        for name, limit in limits.items()
    ]
    if peak is not None:
        peak_E = np.where(head_E >= 0, _of(peak.last_G, segment_E), _of(peak.peak_G, segment_E))
        needs = [np.where(layer_E == s, peak_E, 0) for s in range(space.max_stitches + 1)]
        resources += _peaks(peak, cost_E(peak.option), needs, zero_B)
    score_E = total_E(space.segments.score, space.stitches.score, space.heads.score)
    if space.last_score_G is not None:
        score_E = score_E + np.where(head_E >= 0, _of(space.last_score_G, segment_E), 0)
    filters, requirements = _wishes(
        space, pins, excluded or {}, whole, segment_E=segment_E, head_E=head_E, layer_E=layer_E,
        donor_B=donor_B,
    )  # fmt: skip
    problem = AssemblyProblem(
        num_stages=len(layers),
        num_sets=0,
        stage_B=stage_B,
        set_B=np.full(len(node_B), -1),
        donor_B=donor_B,
        score_B=zero_B,
        src_E=np.concatenate([g.src for g in groups]),
        dst_E=np.concatenate([g.dst for g in groups]),
        score_E=score_E,
        resources=tuple(resources),
        filters=filters,
        requirements=requirements,
        max_donors=max_donors,
    )
    return PathProblem(problem, space, segment_E, head_E >= 0, layer_E)


def _peaks(
    peak: Peak, weight_E: IntArray, needs: Sequence[IntArray], zero_B: IntArray
) -> list[Resource]:
    """The sum with each segment's own need beside it: so it is with the largest where all fit."""
    return [
        Resource(
            name=f"{peak.option} of segment {number}",
            cost_B=zero_B,
            cost_E=weight_E + need_E,
            maximum=peak.maximum,
            option=peak.option,
        )
        for number, need_E in enumerate(needs, 1)
    ]


def _of(value_X: IntArray, index_E: IntArray) -> IntArray:
    """The value of each edge's part, 0 where it has none."""
    if not len(value_X):
        return np.zeros(len(index_E), dtype=np.int64)
    return np.where(index_E < 0, 0, value_X[np.maximum(index_E, 0)]).astype(np.int64)


def _laid_out(space: Space) -> tuple[list[IntArray], list[_Edges]]:
    """The node of each block, layer by layer (-1 for the end), and the edges between them."""
    index_V = space.index_V
    zeros_V = np.flatnonzero(index_V == 0)
    inner_V = np.flatnonzero(index_V > 0)
    last = 2 * space.max_stitches + 1
    layers: list[IntArray] = []
    for layer in range(last):
        nodes_V = zeros_V if layer == 0 else inner_V
        waits = layer % 2 == 0 and layer > 0
        layers.append(np.append(nodes_V, -1) if layer % 2 or waits else nodes_V)
    layers.append(np.array([-1], dtype=np.int64))
    first_L = np.concatenate([[0], np.cumsum([len(nodes_V) for nodes_V in layers])])

    def block(layer: int, node_X: IntArray) -> IntArray:
        place_V = np.full(len(index_V) + 1, -1, dtype=np.int64)  # the end, -1, is the last entry
        place_V[layers[layer]] = np.arange(len(layers[layer]))
        found_X: IntArray = first_L[layer] + place_V[node_X]
        return found_X

    ended = np.array([-1])
    head_V = np.full(len(index_V), -1, dtype=np.int64)
    head_V[space.heads.src] = np.arange(len(space.heads))
    segments, stitches = space.segments, space.stitches
    groups: list[_Edges] = []
    for s in range(space.max_stitches + 1):
        begin, end = 2 * s, 2 * s + 1
        usable_G = np.flatnonzero((index_V[segments.src] == 0) == (s == 0))
        head_G = head_V[segments.dst[usable_G]]
        final_G = usable_G[head_G >= 0]
        src, dst = block(begin, segments.src[final_G]), block(end, np.full(len(final_G), -1))
        groups.append(_edges(src, dst, final_G, s, head=head_G[head_G >= 0]))
        if s > 0:
            groups.append(_edges(block(begin, ended), block(end, ended), ended, s))
        if s == space.max_stitches:
            break
        src, dst = block(begin, segments.src[usable_G]), block(end, segments.dst[usable_G])
        groups.append(_edges(src, dst, usable_G, s))
        src, dst = block(end, stitches.src), block(end + 1, stitches.dst)
        groups.append(_edges(src, dst, np.arange(len(stitches)), s, stitched=True))
        groups.append(_edges(block(end, ended), block(end + 1, ended), ended, s))
    return layers, groups


def _edges(
    src: IntArray,
    dst: IntArray,
    part: IntArray,
    layer: int,
    *,
    head: IntArray | None = None,
    stitched: bool = False,
) -> _Edges:
    """Edges of one layer; without a head unless one is given. A part of -1 only waits."""
    head = np.full(len(part), -1) if head is None else head
    return _Edges(src=src, dst=dst, part=part, head=head, stitched=stitched, layer=layer)


def _wishes(
    space: Space,
    pins: Sequence[Pin],
    excluded: Mapping[str, Sequence[str]],
    whole: bool,
    *,
    segment_E: IntArray,
    head_E: IntArray,
    layer_E: IntArray,
    donor_B: IntArray,
) -> tuple[tuple[Filter, ...], tuple[Requirement, ...]]:
    """Pins, left-out donors and ``--no-whole`` as filters and requirements."""
    segments, index_V = space.segments, space.index_V
    is_segment_E, is_last_E = segment_E >= 0, head_E >= 0
    donor_G, start_G, stop_G = (
        space.donor_V[segments.src], index_V[segments.src], index_V[segments.dst],
    )  # fmt: skip
    filters = []
    for words, names in excluded.items():
        numbers = [space.donors.index(name) for name in names]
        filters.append(Filter(name=words, allowed_B=~np.isin(donor_B, numbers)))
    if not whole:
        length_G = np.array(space.num_nodes)[donor_G] - 1
        whole_G = (start_G == 0) & (stop_G == length_G)
        whole_E = is_last_E & (layer_E == 0) & _true(whole_G, segment_E)
        filters.append(Filter(name="--no-whole", allowed_E=~whole_E))
    requirements = []
    for pin in pins:
        mine_G = donor_G == space.donors.index(pin.donor)
        begins_G = mine_G if pin.start is None else mine_G & (start_G <= pin.start)
        covers_G = begins_G if pin.stop is None else begins_G & (stop_G >= pin.stop)
        if pin.kind == "start":
            wanted_E = _true(covers_G, segment_E)
            allowed_E = ~is_segment_E | (layer_E > 0) | wanted_E
        elif pin.kind == "end":
            ends_G = begins_G if pin.stop is None else begins_G & (stop_G == pin.stop)
            allowed_E = ~is_last_E | _true(ends_G, segment_E)
        elif pin.kind == "exclude":
            touches_G = mine_G if pin.stop is None else mine_G & (start_G < pin.stop)
            touches_G = touches_G if pin.start is None else touches_G & (stop_G > pin.start)
            allowed_E = ~_true(touches_G, segment_E)
        else:
            requirements.append(Requirement(name=pin.name, gives_E=_true(covers_G, segment_E)))
            continue
        filters.append(Filter(name=pin.name, allowed_E=allowed_E))
    return tuple(filters), tuple(requirements)


def _true(member_G: BoolArray, segment_E: IntArray) -> BoolArray:
    """Whether an edge has a segment, and that is a member."""
    found_E: BoolArray = (segment_E >= 0) & member_G[np.maximum(segment_E, 0)]
    return found_E
