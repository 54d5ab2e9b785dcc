"""``dery init``: a recipe from the folder and the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands._options import Result, command
from dery_cli.runtime.terminal import Terminal


@command
def init(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe to write.")] = Path(
        "recipe.toml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> Result:
    """Write a commented recipe from the image folders, checkpoints and machine that are found.

    Looks below the current folder and fetches nothing. For example: dery init photos.toml
    """
    from dery_cli.stages.recipe.draft import draft, look_around, write_draft

    found = look_around(Path.cwd())
    write_draft(file, draft(found), force=force)
    for folder, classes in found.images.items():
        terminal.say(f"images: {folder}, {classes} classes")
    for path, architecture in found.checkpoints.items():
        terminal.say(f"checkpoint: {path}, {architecture or 'of an unknown architecture'}")
    terminal.say(f"wrote {file}; next: dery run {file} --dry-run")
    return {"recipe": str(file), **dataclasses.asdict(found)}
