"""The free space of a zoo: its nodes, segments, stitches and heads, with their exact costs.

Legend: V nodes of all donors, node 0 of each included; G segments; J stitches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dery_cli.core.assembly.paths import Parts, Space
from dery_cli.core.assembly.problem import IntArray
from dery_cli.core.stitching.head import head_inputs
from dery_cli.core.stitching.stitch import stitch_cost
from dery_cli.stages.assemble.problem import MICRO
from dery_cli.types import Anatomy, Node, StitchKind
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import head_cost

FloatArray = npt.NDArray[np.float64]

MOST_PAIRS = 4_000_000
"""Beyond so many pairs of nodes each node keeps its best partners only."""

PARTNERS = 16
"""Best-scored nodes that a stitch may lead to, from each node, in a zoo beyond ``MOST_PAIRS``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathScores:
    """What the parts of a path are thought to be worth; node 0 of every donor counts too.

    Args:
        head_V: Of a path that ends at a node.
        stitch_VV: Of a stitch from a node (row) to a node (column).
        stitches: Of every stitch, whichever it is.
    """

    head_V: FloatArray
    stitch_VV: FloatArray
    stitches: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeSpace:
    """A zoo's paths, for ``core.assembly.paths``.

    Args:
        space: Donors, segments, stitches, heads.
        nodes: Of every donor, one after another.
        dropped: The best score of a stitch that was left out for its number; None where none was.
    """

    space: Space
    nodes: tuple[Node, ...]
    dropped: float | None


def build_space(
    zoo: Zoo,
    *,
    max_stitches: int,
    kind: StitchKind,
    num_classes: int | None,
    scores: PathScores | None = None,
) -> FreeSpace:
    """All that paths through a zoo are made of.

    Args:
        zoo: The donors.
        max_stitches: Of a path.
        kind: What stitches are made of.
        num_classes: Of the head; None without one.
        scores: Of the parts; zero everywhere by default.
    """
    anatomies = [zoo[name].anatomy for name in zoo.names()]
    nodes = tuple(node for anatomy in anatomies for node in anatomy.nodes)
    counts = [len(anatomy.nodes) for anatomy in anatomies]
    first_D = np.concatenate([[0], np.cumsum(counts)])
    donor_V = np.repeat(np.arange(len(counts)), counts)
    index_V = np.arange(len(nodes)) - first_D[donor_V]
    if scores is None:
        scores = PathScores(head_V=np.zeros(len(nodes)), stitch_VV=np.zeros((len(nodes),) * 2))
    src_J, dst_J = _pairs(donor_V, index_V, np.array(counts)[donor_V] - 1)
    src_J, dst_J, dropped = _best_partners(src_J, dst_J, scores.stitch_VV)
    space = Space(
        donors=tuple(zoo.names()),
        num_nodes=tuple(counts),
        segments=_segments(anatomies, first_D),
        stitches=_stitches(nodes, src_J, dst_J, kind, scores),
        heads=_heads(nodes, np.flatnonzero(index_V > 0), num_classes, scores.head_V),
        max_stitches=max_stitches,
    )
    return FreeSpace(space=space, nodes=nodes, dropped=dropped)


def _pairs(donor_V: IntArray, index_V: IntArray, last_V: IntArray) -> tuple[IntArray, IntArray]:
    """From any node but the image to any node that a segment can begin at, never backward."""
    src_J, dst_J = (
        axis.ravel() for axis in np.meshgrid(*[np.arange(len(donor_V))] * 2, indexing="ij")
    )
    usable = (index_V[src_J] > 0) & (index_V[dst_J] > 0) & (index_V[dst_J] < last_V[dst_J])
    usable &= (donor_V[src_J] != donor_V[dst_J]) | (dst_J >= src_J)
    return src_J[usable], dst_J[usable]


def _best_partners(
    src_J: IntArray, dst_J: IntArray, score_VV: FloatArray
) -> tuple[IntArray, IntArray, float | None]:
    """All pairs of a small zoo; of a large one the best of each source, and the best left out."""
    if len(src_J) <= MOST_PAIRS:
        return src_J, dst_J, None
    order = np.lexsort([dst_J, -score_VV[src_J, dst_J], src_J])
    src_J, dst_J = src_J[order], dst_J[order]
    begins = np.flatnonzero(np.diff(src_J, prepend=-1))
    rank = np.arange(len(src_J)) - np.repeat(begins, np.diff(np.append(begins, len(src_J))))
    kept = rank < PARTNERS
    dropped = float(score_VV[src_J[~kept], dst_J[~kept]].max())
    return src_J[kept], dst_J[kept], dropped


def _segments(anatomies: Sequence[Anatomy], first_D: IntArray) -> Parts:
    src, dst, params, flops = [], [], [], []
    for anatomy, first in zip(anatomies, first_D.tolist(), strict=False):
        start, stop = np.triu_indices(len(anatomy.nodes), 1)
        src.append(first + start)
        dst.append(first + stop)
        of_units = np.cumsum([node.params for node in anatomy.nodes])
        work = np.cumsum([node.flops for node in anatomy.nodes])
        cost = of_units[stop] - of_units[start]
        if anatomy.shared:
            pairs = zip(start.tolist(), stop.tolist(), strict=True)
            cost = np.array([anatomy.params(i, j) for i, j in pairs])
        params.append(cost)
        flops.append(work[stop] - work[start])
    src_G = np.concatenate(src)
    return Parts(
        src=src_G,
        dst=np.concatenate(dst),
        score=np.zeros(len(src_G), dtype=np.int64),
        costs={
            "params": np.concatenate(params).astype(np.int64),
            "flops": np.concatenate(flops).astype(np.int64),
        },
    )


def _stitches(
    nodes: Sequence[Node], src_J: IntArray, dst_J: IntArray, kind: StitchKind, scores: PathScores
) -> Parts:
    shape_V, examples = shapes_of(nodes)
    table = [[stitch_cost(a, b, kind) for b in examples] for a in examples]
    params = np.array([[cost.params for cost in row] for row in table], dtype=np.int64)
    flops = np.array([[cost.flops for cost in row] for row in table], dtype=np.int64)
    cells = (shape_V[src_J], shape_V[dst_J])
    score_J = scores.stitch_VV[src_J, dst_J] + scores.stitches
    return Parts(
        src=src_J,
        dst=dst_J,
        score=np.round(MICRO * score_J).astype(np.int64),
        costs={"params": params[cells], "flops": flops[cells]},
    )


def shapes_of(nodes: Sequence[Node]) -> tuple[IntArray, list[Node]]:
    """The number of each node's shape, and one node of every shape.

    Stitches between nodes of the same shapes cost the same.
    """
    numbers: dict[object, int] = {}
    examples: list[Node] = []
    shape_V = np.zeros(len(nodes), dtype=np.int64)
    for place, node in enumerate(nodes):
        key = (node.layout, node.shape, node.grid, node.num_prefix_tokens)
        if key not in numbers:
            numbers[key] = len(examples)
            examples.append(node)
        shape_V[place] = numbers[key]
    return shape_V, examples


def _heads(
    nodes: Sequence[Node], places: IntArray, num_classes: int | None, score_V: FloatArray
) -> Parts:
    costs = [head_cost(head_inputs(nodes[v]), num_classes) for v in places.tolist()]
    return Parts(
        src=places,
        dst=places,
        score=np.round(MICRO * score_V[places]).astype(np.int64),
        costs={
            "params": np.array([cost.params for cost in costs], dtype=np.int64),
            "flops": np.array([cost.flops for cost in costs], dtype=np.int64),
        },
    )
