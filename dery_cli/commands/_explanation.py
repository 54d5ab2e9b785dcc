"""Tables of ``dery assemble --explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals

if TYPE_CHECKING:
    from dery_cli.stages.assemble.why import Explanation, Foreseen


def show_explanation(terminal: Terminal, why: Explanation) -> None:
    """Why a network was picked: its parts, other budgets, and the donors that it needs."""
    terminal.say()
    terminal.table(
        f"why {why.network}: what is foreseen of it, in points of accuracy",
        ["part", "points"],
        [
            *([share.part, _points(share.value)] for share in why.shares),
            ["what every network has", _points(why.offset)],
            ["foreseen", _points(why.predicted)],
            ["measured by its proxy", None if why.measured is None else _points(why.measured)],
        ],
    )
    if not why.learnt:
        terminal.say("the weights are those of the formula: this proxy is nothing to learn from")
    terminal.table(
        "the best foreseen within other budgets; trials, not this, decide between built networks",
        ["", "network", *COST_COLUMNS, "foreseen"],
        [_row(one, f"{one.what}: {one.budget}") for one in (why.now, *why.budgets)],
    )
    terminal.table(
        "the best foreseen without a donor",
        ["without", "network", *COST_COLUMNS, "foreseen", "points lost"],
        [
            [*_row(one.best, one.donor), None if one.lost is None else f"{100 * one.lost:.1f}"]
            for one in why.missed
        ],
    )
    terminal.say(_most_missed(why))


def _row(one: Foreseen, what: str) -> list[object]:
    costs: list[object] = [None, None]
    if one.params is not None and one.flops is not None:
        costs = [*cost_cells(one.params, one.flops)]
    return [what, one.network or "none", *costs, show_decimals(one.predicted)]


def _most_missed(why: Explanation) -> str:
    first = next(iter(why.missed), None)
    if first is None or first.lost == 0:
        return "no donor would be missed: without any of them as much is foreseen"
    if first.lost is None:
        return f"{first.donor} would be missed most: without it nothing is left within the budget"
    return (
        f"{first.donor} would be missed most: without it {100 * first.lost:.1f} points less are "
        "foreseen"
    )


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0
