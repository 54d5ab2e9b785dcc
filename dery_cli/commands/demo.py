"""``dery demo``: the whole path on the zoo that comes with dery, each command line shown."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dery_cli.commands._options import (
    DeviceOption,
    Result,
    SeedOption,
    WorkspaceOption,
    command,
)
from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals
from dery_cli.stages.demo.config import DemoConfig
from dery_cli.stages.demo.run import Demo, run_demo


@command
def demo(
    terminal: Terminal,
    context: typer.Context,
    max_params: Annotated[
        str, typer.Option("--max-params", metavar="SIZE", help="Budget of the assembly.")
    ] = DemoConfig.max_params,
    steps: Annotated[
        int, typer.Option("--steps", help="Updates of each fine-tuning.")
    ] = DemoConfig.steps,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> Result:
    """Take ten small pretrained networks apart and build a new one under a budget.

    The donors learnt pictures of clothes; the target is 300 labelled handwritten digits, with 1,497
    held out. Runs the six commands in one process, in a new temporary folder unless --workspace
    names one, and compares the assembly, under the same budget and with the same labels and
    updates, with the best whole donor (plain, and cut and stitched to itself), with the best slice
    of one donor, and with its own architecture from scratch.

    For example: dery demo --max-params 300k
    """
    config = DemoConfig(max_params=max_params, steps=steps, seed=seed, device=device)
    folder = workspace or Path(tempfile.mkdtemp(prefix="dery-demo-"))
    dery = context.find_root().command

    def run_line(words: Sequence[str]) -> Any:
        return dery.main(args=list(words), prog_name="dery", standalone_mode=False)

    found = run_demo(terminal, folder, config, run_line)
    _show(terminal, found, config)
    terminal.say(f"everything is in {folder}; the assembly loads with")
    terminal.say(f'  dery_cli.load_assembly("{folder / "runs" / "assembly"}")')
    return {"workspace": str(folder), **dataclasses.asdict(found)}


def _show(terminal: Terminal, found: Demo, config: DemoConfig) -> None:
    terminal.say()
    terminal.table(
        f"1,497 held-out digits, at most {config.max_params} params, {config.steps} updates on 300 "
        "labelled digits",
        ["", "network", *COST_COLUMNS, "top-1 untrained", "fine-tuned", "seconds"],
        [
            [
                row.role,
                row.network,
                *cost_cells(row.params, row.flops),
                show_decimals(row.top1_untrained),
                show_decimals(row.top1_finetuned),
                show_decimals(row.seconds, 1),
            ]
            for row in found.rows
        ],
        highlight=0,
    )
    terminal.say(f"{found.seconds:.0f} s in all")
