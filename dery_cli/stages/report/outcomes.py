"""The figures of what came of it: built networks, fine-tuning, the answers on test images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from dery_cli.runtime.printable import printable
from dery_cli.sizes import show_count
from dery_cli.stages.report.drawn import WIDTH, Drawn, count_ticks

MARKS = {
    "picked": "*",
    "best whole donor": "s",
    "the same with an adapter": "D",
    "best slice": "^",
    "best of the paper's space": "P",
    "random path": "v",
    "largest candidate": "X",
}
COSTS = (("params", "parameters"), ("flops", "multiply-adds an image"))
ROTATED, COUNTED, NAMED = 4, 15, 40
"""Letters of a class from which names stand upright; classes that are counted, and named."""


def draw_foreseen(entries: Sequence[Mapping[str, Any]]) -> Drawn | None:
    """Predicted against measured; None where there are too few to tell."""
    entries = [e for e in entries if e["predicted"] is not None and e["proxy"] is not None]
    if len(entries) < 3:
        return None
    said = [entry["predicted"] for entry in entries]
    came = [entry["proxy"] for entry in entries]
    tau = float(kendalltau(said, came).statistic)
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    ranked = "they are all alike" if np.isnan(tau) else f"Kendall's tau {tau:.2f}"
    drawn = Drawn(
        name="foreseen",
        heading="Foreseen and measured",
        words=f"{len(entries)} networks that were built after something was learnt; {ranked}. "
        "On the line both are equal",
        figure=figure,
    )
    low, high = min(*said, *came), max(*said, *came)
    axes.plot([low, high], [low, high], linewidth=0.7, color="black")
    for entry, x, y in zip(entries, said, came, strict=True):
        (point,) = axes.plot([x], [y], "o", color="tab:blue", alpha=0.7)
        drawn.hover(point, f"{entry['network']}: foreseen {x:.3f}, measured {y:.3f}")
    axes.set_xlabel("foreseen probe of the built network")
    axes.set_ylabel("measured")
    return drawn


def draw_costs(
    entries: Sequence[Mapping[str, Any]], comparison: Sequence[Mapping[str, Any]]
) -> Drawn | None:
    """Accuracy against each cost; None where nothing was measured."""
    entries = [entry for entry in entries if entry["proxy"] is not None]
    if not entries:
        return None
    figure = Figure(figsize=(WIDTH, 7))
    drawn = Drawn(
        name="costs",
        heading="Accuracy and cost",
        words=f"{len(entries)} built networks; the line joins those that no other beats in both. "
        "Accuracy is the cross-validated probe, which chose among them: a little optimistic",
        figure=figure,
    )
    for place, (axes, (key, label)) in enumerate(zip(figure.subplots(2), COSTS, strict=True)):
        for entry in entries:
            (point,) = axes.plot([entry[key]], [entry["proxy"]], "o", color="grey", alpha=0.55)
            drawn.hover(point, f"{entry['network']}: {_figures(entry)}")
        front = list(frontier((entry[key], entry["proxy"]) for entry in entries))
        axes.plot(*zip(*front, strict=True), linewidth=0.9, color="grey", drawstyle="steps-post")
        for number, row in enumerate(comparison):
            if row["proxy"] is None:
                continue
            (point,) = axes.plot(
                [row[key]],
                [row["proxy"]],
                MARKS.get(row["role"], "h"),
                color=f"C{number % 10}",
                markersize=13 if row["role"] == "picked" else 8,
                label=printable(row["role"]),
                zorder=4 if row["role"] == "picked" else 3,
            )
            drawn.hover(point, f"{row['role']}: {row['network']}, {_figures(row)}")
        axes.margins(0.06)
        count_ticks(axes.xaxis)
        axes.set_xlabel(label)
        axes.set_ylabel("probe")
        if place == 0:
            axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.01), ncols=3)
    figure.subplots_adjust(hspace=0.3)
    return drawn


def _figures(entry: Mapping[str, Any]) -> str:
    costs = f"{show_count(entry['params'])} params, {show_count(entry['flops'])} multiply-adds"
    return f"{costs}, probe {entry['proxy']:.3f}"


def frontier(points: Iterable[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """(cost, score) that no other beats in both, by rising cost."""
    best = -np.inf
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            best = score
            yield cost, score


def draw_training(metrics: Sequence[Mapping[str, Any]]) -> Drawn:
    """Loss, and accuracy on validation images where there are some."""
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots()
    steps = [line["step"] for line in metrics]
    drawn = Drawn(name="training", heading="Fine-tuning", words="", figure=figure)

    def curve(on: Any, key: str, style: str, colour: str, what: str) -> bool:
        values = [line.get(key) for line in metrics]
        if all(value is None for value in values):
            return False
        numbers = [np.nan if value is None else value for value in values]
        on.plot(steps, numbers, style, color=colour)
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                (dot,) = on.plot([step], [value], "o", color=colour, markersize=5)
                drawn.hover(dot, f"update {step}: {what} {value:.4f}")
        on.set_ylabel(what, color=colour)
        return True

    curve(axes, "train_loss", "-", "tab:blue", "training loss")
    drawn.words = f"{len(steps)} reports"
    if any(line.get("valid_top1") is not None for line in metrics):
        other = axes.twinx()
        curve(other, "valid_top1", "--", "tab:green", "validation top-1")
        drawn.words += "; the validation images chose the weights"
    else:
        drawn.words += "; there are no validation images"
    axes.set_xlabel("updates")
    return drawn


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Drawn:
    """Rows are true classes, columns answers."""
    count_KK = np.array(confusion, dtype=float)
    share_KK = count_KK / count_KK.sum(1, keepdims=True).clip(min=1)
    side = min(WIDTH - 1, 2.2 + 0.3 * len(classes))
    figure = Figure(figsize=(side + 1, side))
    axes = figure.subplots()
    image = axes.imshow(share_KK, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    top1 = float(np.trace(count_KK) / max(count_KK.sum(), 1))
    drawn = Drawn(
        name="confusion",
        heading="Confusion on the test images",
        words=f"{int(count_KK.sum()):,} images that nothing was chosen on; top-1 {top1:.4f}",
        figure=figure,
    )
    if len(classes) <= NAMED:
        names = [printable(name)[:20] for name in classes]
        upright = 90 if max(map(len, names)) > ROTATED else 0
        axes.set_xticks(range(len(names)), names, rotation=upright, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    for row, column in np.argwhere(count_KK > 0).tolist() if len(classes) <= COUNTED else ():
        number = axes.text(
            column,
            row,
            str(int(count_KK[row, column])),
            ha="center",
            va="center",
            color="white" if share_KK[row, column] > 0.5 else "#333333",
            fontsize=7,
        )
        drawn.hover(
            number,
            f"{classes[row]}, answered {classes[column]}: {int(count_KK[row, column])} "
            f"of {int(count_KK[row].sum())}",
        )
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    bar.outline.set_visible(False)
    return drawn
