"""``dery run``: the whole chain from one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dery_cli.commands._lines import Lines
from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.stages.recipe.config import SECTIONS, load_recipe, with_general
from dery_cli.stages.recipe.steps import check_steps, steps_of

if TYPE_CHECKING:
    from dery_cli.stages.recipe.run import Done


@command
def run(
    terminal: Terminal,
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A TOML file, or one that ships: demo, timm-small, paper."
        ),
    ],
    data: DataOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would run, what is up to date, and what it takes; only that.",
        ),
    ] = False,
    workspace: WorkspaceOption = None,
    device: DeviceOption = None,
) -> Result:
    """Run the stages of a recipe in order; what is up to date is skipped.

    The tables of a recipe are called like the commands and hold their options. All of them are
    checked before the first stage begins. A stage that fails ends the run with its own exit code;
    the same line goes on from there. For example: dery run timm-small --data photos --dry-run
    """
    found = with_general(load_recipe(recipe), data=data, device=device)
    lines = Lines(context)
    steps = steps_of(found, {name: lines.options(name) for name in SECTIONS.values()})
    check_steps(found, steps, lines.check)
    named = found.general.get("workspace")
    space = open_workspace(workspace or (None if named is None else Path(named)))
    from dery_cli.stages.recipe.run import RecipeRun, free_bytes

    runner = RecipeRun(terminal, space, found, lines.run)
    done = runner.dry_run(steps) if dry_run else runner.run(steps)
    terminal.say()
    _show(terminal, done, dry_run=dry_run)
    free = free_bytes(space.root)
    if dry_run:
        terminal.say(f"{show_count(free)} bytes of disk are free at {space.root}")
    return {
        "recipe": found.file,
        "workspace": str(space.root),
        "dry_run": dry_run,
        "bytes_free": free,
        "steps": [dataclasses.asdict(one) for one in done],
    }


def _show(terminal: Terminal, done: Sequence[Done], *, dry_run: bool) -> None:
    for one in done:
        took = one.words if dry_run else f"{one.seconds:.1f} s"
        terminal.say(f"{one.state:10}  {one.makes}{': ' if took else ''}{took}".rstrip())
