"""``dery compare``: assemblies and runs side by side."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count, show_decimals, show_time
from dery_cli.stages.evaluate.config import find_network


@command
def compare(
    terminal: Terminal,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Names, runs/NAME, assemblies/NAME or folders.",
            autocompletion=_completion.networks,
        ),
    ],
    workspace: WorkspaceOption = None,
) -> Result:
    """Show networks side by side: parts, costs, accuracy, licences, data.

    All figures are those of the records. For example: dery compare assemblies/default runs/default
    """
    space = open_workspace(workspace)
    from dery_cli.stages.compare.run import HELD_OUT, TEST
    from dery_cli.stages.compare.run import compare as read

    found = read(space, [find_network(space, name) for name in names])
    timed = any(one.latency_ns is not None for one in found)
    counted = any(one.memory_bytes is not None for one in found)
    terminal.table(
        None,
        [
            "",
            "network",
            *COST_COLUMNS,
            *(["latency"] if timed else []),
            *(["memory"] if counted else []),
            "donors",
            "stitches",
            "held out",
            "test top-1",
            "licences",
            "data",
        ],
        [
            [
                one.name,
                one.network,
                *cost_cells(one.params, one.flops),
                *([None if one.latency_ns is None else show_time(one.latency_ns)] if timed else []),
                *(
                    [None if one.memory_bytes is None else show_count(one.memory_bytes)]
                    if counted
                    else []
                ),
                len(one.donors),
                one.stitches,
                show_decimals(one.held_out),
                show_decimals(one.test_top1),
                ", ".join(one.licenses),
                one.data,
            ]
            for one in found
        ],
    )
    terminal.say(f"held out: {HELD_OUT}")
    terminal.say(f"test: {TEST}")
    if len({one.data for one in found}) > 1:
        terminal.warn("these were made for different data: their accuracies do not compare")
    return {
        "networks": [dataclasses.asdict(one) for one in found],
        "figures": {"held_out": HELD_OUT, "test_top1": TEST},
    }
