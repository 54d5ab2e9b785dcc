"""The figures of a zoo and of a network: where it comes from, and what it is made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from dery_cli.core.assembly.notation import format_network
from dery_cli.core.similarity.metric import Similarity
from dery_cli.io.records import Artifact
from dery_cli.runtime.printable import printable
from dery_cli.sizes import show_count
from dery_cli.stages.partition.store import StoredPartition
from dery_cli.stages.report.drawn import WIDTH, Drawn, colours, count_ticks, short
from dery_cli.types import BlockRef
from dery_cli.zoo.registry import Zoo

SHAPES = "osD^vP*X"
"""A licence each, in order of their names; the last stands for all further ones."""
HOVERED = 40
"""Donors up to which every pair of them answers to pointing."""
UNSEEN = 0.004
"""Opacity of what is only there to be pointed at: matplotlib leaves out what has none."""
LABEL = 8.0
"""Points."""
NARROW = 0.15
"""Share of a network's width up to which every second block's name is set lower."""


def draw_zoo(zoo: Zoo) -> Drawn:
    """Donors by cost; the shape is the licence."""
    donors = list(zoo.donors.values())
    colour = colours([donor.name for donor in donors])
    licences = sorted({donor.card.license for donor in donors})
    shape = {one: SHAPES[min(place, len(SHAPES) - 1)] for place, one in enumerate(licences)}
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    drawn = Drawn(
        name="zoo",
        heading="The zoo",
        words=f"{len(donors)} donors by parameters and multiply-adds",
        figure=figure,
    )
    places = []
    for donor in donors:
        anatomy, card = donor.anatomy, donor.card
        params, flops = (cost(0, anatomy.num_units) for cost in (anatomy.params, anatomy.flops))
        places.append((params, flops))
        mark = shape[card.license]
        (point,) = axes.plot([params], [flops], mark, color=colour[donor.name], markersize=8)
        drawn.hover(
            point,
            f"{donor.name}: {show_count(params)} params, {show_count(flops)} multiply-adds, "
            f"{card.license}, {card.task}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.12)
    for axis in (axes.xaxis, axes.yaxis):
        count_ticks(axis, log=True)
    axes.set_xlabel("parameters")
    axes.set_ylabel("multiply-adds an image")
    _name_points(figure, axes, places, [printable(short(donor.name))[:28] for donor in donors])
    if len(licences) > 1:
        marks = [
            Line2D([], [], marker=shape[one], color="grey", linestyle="", label=printable(one)[:40])
            for one in licences[: len(SHAPES)]
        ]
        axes.legend(handles=marks, fontsize=8, loc="upper left")
    return drawn


def _name_points(
    figure: Figure, axes: Axes, places: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Write the names beside their points, where there is room; pointing tells the others."""
    axes.autoscale_view()
    points = axes.transData.transform(places) * 72 / figure.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    right = axes.transAxes.transform((1, 1))[0] * 72 / figure.dpi
    for (x, y), place, name in zip(points, places, names, strict=True):
        wide = 0.6 * LABEL * len(name)
        for side, up in itertools.product((6, -6 - wide), (3, -9, 9, -15)):
            box = (x + side, y + up, x + side + wide, y + up + LABEL)
            if box[2] > right + 30 or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                name, place, xytext=(side, up), textcoords="offset points", fontsize=LABEL
            )
            break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_similarity(found: Similarity, index: Sequence[tuple[str, int]]) -> Drawn:
    """The matrix, donor by donor; every pair of donors says how alike they are.

    Args:
        found: Similarity of nodes.
        index: (donor, node) of each row.
    """
    sim_PP = found.sim_PP.double().numpy().clip(0, 1)
    owners = [donor for donor, _ in index]
    names = list(dict.fromkeys(owners))
    edges = [*(owners.index(name) for name in names), len(owners)]
    figure = Figure(figsize=(WIDTH, WIDTH))
    axes = figure.subplots()
    image = axes.imshow(sim_PP, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    drawn = Drawn(
        name="similarity",
        heading="How alike the donors' nodes are",
        words=f"{len(owners)} nodes of {len(names)} donors, each from its first node to its last",
        figure=figure,
    )
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
    size = min(8.0, 200 / len(names))
    labels = [printable(short(name))[:28] for name in names]
    axes.set_xticks(middles, labels, rotation=90, fontsize=size)
    axes.set_yticks(middles, labels, fontsize=size)
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label=found.metric)
    bar.outline.set_visible(False)
    if len(names) <= HOVERED:
        spans = list(zip(names, itertools.pairwise(edges), strict=True))
        for (one, rows), (other, columns) in itertools.product(spans, spans):
            _hover_pair(drawn, axes, sim_PP, (one, *rows), (other, *columns))
    return drawn


def _hover_pair(
    drawn: Drawn,
    axes: Axes,
    sim_PP: np.ndarray,
    one: tuple[str, int, int],
    other: tuple[str, int, int],
) -> None:
    """Something to point at over the nodes of two donors."""
    (a, top, bottom), (b, left, right) = one, other
    part = sim_PP[top:bottom, left:right]
    row, column = np.unravel_index(int(part.argmax()), part.shape)
    cover = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, alpha=UNSEEN)
    cover.set_linewidth(0)
    axes.add_patch(cover)
    most = "" if a == b else f"; most {part.max():.2f}, nodes {row + 1} and {column + 1}"
    drawn.hover(cover, f"{a} and {b}: {part.mean():.2f} on average{most}")


def draw_sets(stored: StoredPartition) -> Drawn:
    """Every donor in blocks, coloured by set."""
    partition = stored.partition
    palette = colormaps["Set2" if len(partition.anchors) <= 8 else "tab20"]
    figure = Figure(figsize=(WIDTH, 0.3 * len(stored.names) + 1))
    axes = figure.subplots()
    drawn = Drawn(
        name="sets",
        heading="Equivalence sets",
        words="Every donor in blocks. Blocks of one colour and number can stand for one another; "
        "a thick edge marks the set's anchor",
        figure=figure,
    )
    anchors = set(partition.anchors)
    for row, name in enumerate(stored.names):
        cuts = partition.cuts[row]
        for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
            member, anchor = partition.sets[row][k], (row, start, stop) in anchors
            left, width = start / cuts[-1], (stop - start) / cuts[-1]
            (bar,) = axes.barh(
                row,
                width,
                left=left,
                color=palette(member % palette.N),
                edgecolor="black",
                linewidth=1.8 if anchor else 0.3,
                zorder=3 if anchor else 2,
            )
            alike = partition.similarity[row][k]
            said = ", its anchor" if anchor else f", {alike:.2f} of 2 alike to its anchor"
            drawn.hover(bar, f"{name}[{start}:{stop}], set {member + 1}{said}")
            axes.text(
                left + width / 2,
                row,
                str(member + 1),
                ha="center",
                va="center",
                fontsize=LABEL,
                color="#222222",
                zorder=4,
            )
    axes.set_yticks(range(len(stored.names)), [printable(short(n))[:28] for n in stored.names])
    axes.tick_params(axis="y", length=0, labelsize=LABEL)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(stored.names) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the donor's units")
    return drawn


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A block where it is drawn."""

    ref: BlockRef
    params: int | None
    flops: int | None
    left: float
    width: float


def _pieces(zoo: Zoo, refs: Sequence[BlockRef]) -> Iterator[_Piece]:
    """Blocks from left to right; the least is wide enough to be seen."""
    costs = [
        (zoo[r.donor].anatomy.params(r.start, r.stop), zoo[r.donor].anatomy.flops(r.start, r.stop))
        if r.donor in zoo.donors
        else (None, None)
        for r in refs
    ]
    total = sum(flops or 0 for _, flops in costs) or 1
    left = 0.0
    for ref, (params, flops) in zip(refs, costs, strict=True):
        width = max((flops or 0) / total, 0.05)
        yield _Piece(ref, params, flops, left, width)
        left += width


def draw_network(zoo: Zoo, record: Artifact) -> Drawn:
    """Blocks from left to right, as wide as they cost, and the joints between them."""
    data, network = record.data, record.data["network"]
    refs = [BlockRef(b["donor"], b["start"], b["stop"]) for b in network["blocks"]]
    colour = colours(zoo.names())
    figure = Figure(figsize=(WIDTH, 2.1))
    axes = figure.subplots()
    drawn = Drawn(
        name="network",
        heading="The pick",
        words=f"{data['name']}: {show_count(data['params'])} params, {show_count(data['flops'])} "
        f"multiply-adds, within the budget of {data['budget']}. A block is as wide as its "
        "multiply-adds, its colour is its donor's; a diamond is a stitch",
        figure=figure,
    )
    pieces = list(_pieces(zoo, refs))
    lowered = {n for n, piece in enumerate(pieces) if n % 2 and piece.width <= NARROW}
    for place, piece in enumerate(pieces):
        ref = piece.ref
        (bar,) = axes.barh(
            0.5,
            piece.width,
            left=piece.left,
            height=0.7,
            color=colour.get(ref.donor, "grey"),
            edgecolor="white",
        )
        costs = "not in the zoo any more"
        if piece.params is not None and piece.flops is not None:
            costs = f"{show_count(piece.params)} params, {show_count(piece.flops)} multiply-adds"
        drawn.hover(bar, f"{format_network([ref])}: {costs}")
        name = printable(short(ref.donor))
        room = max(4, int(piece.width * WIDTH * 72 / (0.62 * LABEL)))
        name = name if len(name) <= room else f"{name[: room - 1]}…"
        axes.annotate(
            f"{name}\n[{ref.start}:{ref.stop}]",
            (piece.left + piece.width / 2, -0.34 if place in lowered else 0.06),
            ha="center",
            va="top",
            fontsize=LABEL,
        )
        _draw_joint(drawn, axes, network["joints"][place], piece.left)
    right = pieces[-1].left + pieces[-1].width
    axes.set_axis_off()
    axes.set_xlim(-0.03 * right, 1.03 * right)
    axes.set_ylim(-0.75 if lowered else -0.35, 1.15)
    return drawn


def _draw_joint(drawn: Drawn, axes: Axes, joint: dict[str, object] | None, left: float) -> None:
    if joint is None:
        return
    r2 = joint["r2"]
    (mark,) = axes.plot(
        [left], [0.5], "D", color="white", markeredgecolor="#222222", markersize=8, zorder=4
    )
    quality = "not fitted" if r2 is None else f"R2 {r2:.3f}"
    drawn.hover(mark, f"{joint['stitch']} stitch, {quality}")
    if r2 is not None:
        axes.annotate(f"R2 {r2:.2f}", (left, 0.9), ha="center", fontsize=LABEL)
