"""``dery doctor``: whether this machine and the workspace are well."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.errors import DeryError
from dery_cli.runtime.terminal import Terminal


@command
def doctor(
    terminal: Terminal,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Finish or remove what killed commands left half-written."),
    ] = False,
    workspace: WorkspaceOption = None,
) -> Result:
    """Check libraries, devices, solver, plugins, disk, and the hash of every file of the workspace.

    Exits with 1 where something is wrong. For example: dery doctor --json
    """
    space = open_workspace(workspace)
    from dery_cli.stages.doctor.run import WRONG, examine

    found = examine(terminal, space, fix=fix)
    terminal.table(
        None,
        ["", "state", ""],
        [[one.what, one.state, one.words] for one in found],
    )
    wrong = [one for one in found if one.state == WRONG]
    if wrong:
        first = wrong[0]
        raise DeryError(
            f"{len(wrong)} of {len(found)} checks failed: {first.what}: {first.words}",
            first.command or "rerun the stage that wrote it; dery status names the command",
            details={"findings": [dataclasses.asdict(one) for one in found]},
        )
    terminal.say("all is well")
    return {"findings": [dataclasses.asdict(one) for one in found]}
