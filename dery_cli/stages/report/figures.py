"""The figures of a report, as SVG that follows the page's colours and tells names on hovering.

Each function draws one matplotlib figure. What has a ``gid`` gets a ``<title>``; black becomes the
page's text colour, so that one figure serves light and dark.
"""

from __future__ import annotations

import dataclasses
import html
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from dery_cli.core.assembly.notation import format_network
from dery_cli.runtime.printable import printable
from dery_cli.sizes import show_count
from dery_cli.stages.report.gather import Gathered
from dery_cli.types import BlockRef

STYLE: Any = {
    "svg.hashsalt": "dery",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
WIDTH = 7.2
"""Inches; the page scales figures to its own width."""

_TEXT = ("#000000", "black")


@dataclasses.dataclass
class Drawn:
    """One figure.

    Args:
        name: Of its files.
        heading: Above it.
        words: Below the heading.
        figure: Of matplotlib.
        titles: What hovering says, by ``gid``.
    """

    name: str
    heading: str
    words: str
    figure: Figure
    titles: dict[str, str] = dataclasses.field(default_factory=dict)

    def hover(self, artist: Any, words: str) -> None:
        """Let an artist say something when it is pointed at."""
        gid = f"{self.name}-{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = printable(words)

    def svg(self) -> str:
        """For the page: scalable, in the page's text colour, with its titles."""
        stream = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        for colour in _TEXT:
            text = text.replace(f"fill: {colour}", "fill: currentColor")
            text = text.replace(f"stroke: {colour}", "stroke: currentColor")
        text = text.replace("<text ", '<text fill="currentColor" ')
        for gid, words in self.titles.items():
            title = f"<title>{html.escape(words)}</title>"
            text = text.replace(f'<g id="{gid}">', f'<g id="{gid}">{title}', 1)
        # identifiers must differ between the figures of one page
        for identifier in sorted(set(re.findall(r'id="([^"]+)"', text))):
            if not identifier.startswith(self.name):
                mine = f"{self.name}--{identifier}"
                text = text.replace(f'id="{identifier}"', f'id="{mine}"')
                text = text.replace(f'"#{identifier}"', f'"#{mine}"')
                text = text.replace(f"url(#{identifier})", f"url(#{mine})")
        label = html.escape(f"{self.heading}: {self.words}")
        return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """The same on white, 150 dots an inch."""
        stream = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(
                stream,
                format="png",
                dpi=150,
                facecolor="white",
                bbox_inches="tight",
                metadata={"Software": None},
            )
        return stream.getvalue()


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for every donor, the same in all figures."""
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(place % palette.N) for place, name in enumerate(names)}


def draw_all(found: Gathered) -> list[Drawn]:
    """Every figure that there is something for, in the order of the page."""
    with rc_context(STYLE):
        drawn = [_zoo(found)]
        if found.similarity is not None:
            drawn.append(_similarity(found))
        if found.partition is not None:
            drawn.append(_sets(found))
        if found.assembly is not None:
            drawn.append(_network(found))
            drawn += _built(found)
        if found.metrics:
            drawn.append(_training(found))
    return drawn


def _zoo(found: Gathered) -> Drawn:
    donors = list(found.zoo.donors.values())
    colour = colours([donor.name for donor in donors])
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    drawn = Drawn(
        name="zoo",
        heading="The zoo",
        words=f"{len(donors)} donors by parameters and multiply-adds",
        figure=figure,
    )
    for donor in donors:
        anatomy = donor.anatomy
        params, flops = (
            anatomy.params(0, anatomy.num_units),
            anatomy.flops(0, anatomy.num_units),
        )
        (point,) = axes.plot([params], [flops], "o", color=colour[donor.name], markersize=8)
        card = donor.card
        drawn.hover(
            point,
            f"{donor.name}: {show_count(params)} params, {show_count(flops)} multiply-adds, "
            f"{card.license}, {card.task}",
        )
        if len(donors) <= 30:
            axes.annotate(
                printable(_short(donor.name)),
                (params, flops),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("multiply-adds an image")
    return drawn


def _short(name: str) -> str:
    """A donor's name without its plugin."""
    return name.partition("__")[2] or name


def _similarity(found: Gathered) -> Drawn:
    assert found.similarity is not None
    sim_PP = found.similarity.result.sim_PP.double().numpy().clip(0, 1)
    index = found.similarity.index
    owners = [donor for donor, _ in index]
    names = list(dict.fromkeys(owners))
    edges = [owners.index(name) for name in names] + [len(owners)]
    figure = Figure(figsize=(WIDTH, WIDTH))
    axes = figure.subplots()
    image = axes.imshow(sim_PP, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
    short = [printable(_short(name)) for name in names]
    axes.set_xticks(middles, short, rotation=90, fontsize=8)
    axes.set_yticks(middles, short, fontsize=8)
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    figure.colorbar(image, ax=axes, shrink=0.7, label=found.similarity.result.metric)
    return Drawn(
        name="similarity",
        heading="How alike the donors' nodes are",
        words=f"{len(index)} nodes of {len(names)} donors, from the image to the last node of each",
        figure=figure,
    )


def _sets(found: Gathered) -> Drawn:
    assert found.partition is not None
    stored = found.partition
    partition = stored.partition
    palette = colormaps["Set2"]
    figure = Figure(figsize=(WIDTH, 0.32 * len(stored.names) + 0.8))
    axes = figure.subplots()
    drawn = Drawn(
        name="sets",
        heading="Equivalence sets",
        words="every donor in blocks; blocks of one colour can stand for one another, "
        "anchors have a thick edge",
        figure=figure,
    )
    anchors = set(partition.anchors)
    for row, name in enumerate(stored.names):
        cuts = partition.cuts[row]
        for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
            member = partition.sets[row][k]
            thick = 1.8 if (row, start, stop) in anchors else 0.3
            bars = axes.barh(
                row,
                (stop - start) / cuts[-1],
                left=start / cuts[-1],
                color=palette(member % palette.N),
                edgecolor="black",
                linewidth=thick,
            )
            drawn.hover(bars[0], f"{name}[{start}:{stop}], set {member + 1}")
    axes.set_yticks(range(len(stored.names)), [printable(_short(n)) for n in stored.names])
    axes.invert_yaxis()
    axes.set_xlabel("share of the donor's units")
    return drawn


def _network(found: Gathered) -> Drawn:
    """Blocks from left to right, as wide as they cost, and the joints between them."""
    assert found.assembly is not None
    data = found.assembly.data
    network = data["network"]
    refs = [BlockRef(b["donor"], b["start"], b["stop"]) for b in network["blocks"]]
    colour = colours(found.zoo.names())
    figure = Figure(figsize=(WIDTH, 1.9))
    axes = figure.subplots()
    drawn = Drawn(
        name="network",
        heading="The pick",
        words=f"{data['name']}: {show_count(data['params'])} params, {show_count(data['flops'])} "
        f"multiply-adds, within {data['budget']}; width is multiply-adds",
        figure=figure,
    )
    flops = [
        found.zoo[ref.donor].anatomy.flops(ref.start, ref.stop)
        if ref.donor in found.zoo.donors
        else 1
        for ref in refs
    ]
    least = 0.06 * sum(flops)
    left = 0.0
    for place, ref in enumerate(refs):
        width = max(flops[place], least)
        joint = network["joints"][place]
        if joint is not None:
            r2 = joint["r2"]
            (mark,) = axes.plot([left], [0.5], marker="D", color="black", markersize=7)
            drawn.hover(mark, f"stitch, R2 {'-' if r2 is None else f'{r2:.3f}'}")
            if r2 is not None:
                axes.annotate(f"R2 {r2:.2f}", (left, 0.98), ha="center", fontsize=7)
        bars = axes.barh(
            0.5,
            width,
            left=left,
            height=0.7,
            color=colour.get(ref.donor, "grey"),
            edgecolor="white",
        )
        drawn.hover(bars[0], f"{format_network([ref])}: {show_count(flops[place])} multiply-adds")
        axes.annotate(
            f"{printable(_short(ref.donor))}\n[{ref.start}:{ref.stop}]",
            (left + width / 2, 0.06),
            ha="center",
            va="top",
            fontsize=8,
        )
        left += width
    axes.set_axis_off()
    axes.set_xlim(-0.03 * left, 1.03 * left)
    axes.set_ylim(-0.45, 1.15)
    return drawn


def _built(found: Gathered) -> list[Drawn]:
    drawn = []
    foreseen = [
        c for c in found.candidates if c["predicted"] is not None and c["proxy"] is not None
    ]
    if len(foreseen) > 2:
        drawn.append(_foreseen(foreseen))
    if [c for c in found.candidates if c["proxy"] is not None]:
        drawn.append(_costs(found))
    return drawn


def _foreseen(entries: Sequence[Mapping[str, Any]]) -> Drawn:
    said = [entry["predicted"] for entry in entries]
    came = [entry["proxy"] for entry in entries]
    tau = float(kendalltau(said, came).statistic)
    figure = Figure(figsize=(WIDTH, 3.8))
    axes = figure.subplots()
    drawn = Drawn(
        name="foreseen",
        heading="Foreseen and measured",
        words=f"{len(entries)} networks that were built after something was learnt; "
        f"Kendall's tau {tau:.2f}",
        figure=figure,
    )
    for entry, x, y in zip(entries, said, came, strict=True):
        (point,) = axes.plot([x], [y], "o", color="tab:blue", alpha=0.7)
        drawn.hover(point, f"{entry['network']}: foreseen {x:.3f}, measured {y:.3f}")
    low, high = min(*said, *came), max(*said, *came)
    axes.plot([low, high], [low, high], linewidth=0.7, color="black")
    axes.set_xlabel("foreseen probe of the built network")
    axes.set_ylabel("measured")
    return drawn


MARKS = {"picked": "*", "best whole donor": "s", "best slice": "^", "random path": "v"}


def _costs(found: Gathered) -> Drawn:
    assert found.assembly is not None
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    drawn = Drawn(
        name="costs",
        heading="Accuracy and cost",
        words="every built network; the line joins those that no other beats in both. "
        "Accuracy is the cross-validated probe, which chose among them: a little optimistic",
        figure=figure,
    )
    entries = [c for c in found.candidates if c["proxy"] is not None]
    for entry in entries:
        (point,) = axes.plot([entry["params"]], [entry["proxy"]], "o", color="grey", alpha=0.6)
        drawn.hover(
            point,
            f"{entry['network']}: {show_count(entry['params'])} params, probe {entry['proxy']:.3f}",
        )
    front = list(_frontier((entry["params"], entry["proxy"]) for entry in entries))
    axes.plot(*zip(*front, strict=True), linewidth=0.8, color="grey", drawstyle="steps-post")
    for row in found.assembly.data["comparison"]:
        if row["proxy"] is None:
            continue
        (point,) = axes.plot(
            [row["params"]],
            [row["proxy"]],
            MARKS.get(row["role"], "D"),
            markersize=12 if row["role"] == "picked" else 8,
            label=row["role"],
        )
        drawn.hover(point, f"{row['role']}: {row['network']}")
    axes.set_xlabel("parameters")
    axes.set_ylabel("probe of the built network")
    axes.legend(fontsize=8, loc="lower right")
    return drawn


def _frontier(points: Iterable[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    best = -np.inf
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            best = score
            yield cost, score


def _training(found: Gathered) -> Drawn:
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    steps = [line["step"] for line in found.metrics]
    losses = [line.get("train_loss") for line in found.metrics]
    axes.plot(steps, [np.nan if v is None else v for v in losses], "o-", label="training loss")
    scores = [line.get("valid_top1") for line in found.metrics]
    if any(score is not None for score in scores):
        other = axes.twinx()
        values = [np.nan if score is None else score for score in scores]
        other.plot(steps, values, "s--", color="tab:green", label="validation top-1")
        other.set_ylabel("validation top-1 (it chose the weights)")
        other.legend(fontsize=8, loc="center right")
    axes.set_xlabel("updates")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=8, loc="upper right")
    return Drawn(
        name="training",
        heading="Fine-tuning",
        words=f"{len(steps)} reports",
        figure=figure,
    )


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Drawn:
    """Rows are true classes, columns answers."""
    count_KK = np.array(confusion, dtype=float)
    share_KK = count_KK / count_KK.sum(1, keepdims=True).clip(min=1)
    side = min(WIDTH, 1.5 + 0.35 * len(classes))
    with rc_context(STYLE):
        figure = Figure(figsize=(side + 1, side))
        axes = figure.subplots()
        image = axes.imshow(share_KK, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        if len(classes) <= 40:
            names = [printable(name)[:20] for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        if len(classes) <= 15:
            for row, column in np.argwhere(count_KK > 0).tolist():
                shade = "white" if share_KK[row, column] > 0.5 else "#333333"
                axes.text(
                    column,
                    row,
                    str(int(count_KK[row, column])),
                    ha="center",
                    va="center",
                    color=shade,
                    fontsize=7,
                )
        axes.set_xlabel("answer")
        axes.set_ylabel("class")
        figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    top1 = float(np.trace(count_KK) / max(count_KK.sum(), 1))
    return Drawn(
        name="confusion",
        heading="Confusion on the test images",
        words=f"{int(count_KK.sum()):,} images that nothing was chosen on; top-1 {top1:.4f}",
        figure=figure,
    )
