"""``dery report``: one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands._options import (
    DeviceOption,
    Result,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.stages.report.config import ReportConfig


@command
def report(
    terminal: Terminal,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="The assembly, and the run of that name.")
    ] = ReportConfig.name,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The page.")] = ReportConfig.to,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Write each figure there, as SVG and PNG."),
    ] = None,
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Run the network on the test images for the confusion matrix and examples.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that is there.")] = False,
    workspace: WorkspaceOption = None,
    device: DeviceOption = None,
) -> Result:
    """Write one HTML page with the zoo, its similarity, the pick and all built networks.

    It needs no network and opens from disk. For example: dery report --to page.html --figures fig
    """
    config = ReportConfig(
        to=to, figures=figures, name=name, images=images, force=force, device=device
    )
    space = open_workspace(workspace)
    from dery_cli.stages.report.run import report as write

    written = write(terminal, space, config)
    for words in written.missing:
        terminal.note(f"left out: {words}")
    terminal.say(
        f"{written.page}: {len(written.figures)} figures, {show_count(written.bytes)} bytes"
    )
    return {
        "page": str(written.page),
        "bytes": written.bytes,
        "figures": written.figures,
        "left_out": written.missing,
    }
