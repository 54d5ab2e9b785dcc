"""``dery push``: a network to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.push.config import PushConfig, find_pushed


@command
def push(
    terminal: Terminal,
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The run of this name, else the assembly; or their folder.",
            autocompletion=_completion.networks,
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/REPO", help="The model on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, where it is new.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Push to this branch, not to main."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the model card; send nothing.")
    ] = False,
    workspace: WorkspaceOption = None,
) -> Result:
    """Send a network to the Hugging Face hub, for timm and for dery_cli.load_assembly.

    For example: dery push default me/my-network --dry-run
    """
    config = PushConfig(
        repo=repo, private=True if private else None, revision=revision, dry_run=dry_run
    )
    source = find_pushed(open_workspace(workspace), what)
    from dery_cli.stages.push.run import push as run_push

    pushed = run_push(terminal, source, config)
    terminal.table(
        None,
        ["file", "bytes", "sha256"],
        [[n, f"{size:,}", sha[:12]] for n, size, sha in pushed.files],
    )
    if pushed.url is None:
        for line in pushed.card.splitlines():
            terminal.say(line)
        terminal.say(f"nothing was sent to {repo}")
    else:
        at = repo if revision is None else f"{repo}@{revision}"
        terminal.say(f'sent to {pushed.url}; load it by dery_cli.load_assembly("hf:{at}")')
    return {
        "folder": str(source),
        "repo": repo,
        "revision": revision,
        "url": pushed.url,
        "files": [{"name": n, "bytes": size, "sha256": sha} for n, size, sha in pushed.files],
        "license_conflicts": pushed.conflicts,
    }
