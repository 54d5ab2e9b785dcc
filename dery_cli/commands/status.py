"""``dery status``: what is done, what is stale, and what comes next."""

from __future__ import annotations

import dataclasses

from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.runtime.terminal import Terminal


@command
def status(terminal: Terminal, workspace: WorkspaceOption = None) -> Result:
    """Show what the workspace has, what of it is out of date, and the command to run next.

    Nothing is computed, changed or fetched. For example: dery status --json
    """
    space = open_workspace(workspace)
    from dery_cli.stages.status.run import status as look

    found = look(space)
    terminal.table(
        str(space.root),
        ["stage", "", "state", ""],
        [[row.stage, row.name, row.state, row.words] for row in found.rows],
    )
    terminal.say("all is up to date" if found.next is None else f"next: {found.next}")
    return {
        "workspace": str(space.root),
        "stages": [dataclasses.asdict(row) for row in found.rows],
        "next": found.next,
    }
