"""``dery export``: a network for other runtimes, with all that is needed to run it there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import (
    DataOption,
    Result,
    SkipBadOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.stages.evaluate.config import find_network
from dery_cli.stages.export.config import ExportConfig


@command
def export(
    terminal: Terminal,
    *,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A run's or assembly's name or folder; the run 'default', else the assembly.",
            autocompletion=_completion.networks,
        ),
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")],
    format: Annotated[  # noqa: A002 - the option's name
        str, typer.Option("--format", help=f"{', '.join(ExportConfig.FORMATS)}.")
    ],
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms into the convolutions before them.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantise an ONNX file, calibrated on training images."),
    ] = False,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", help="Points of top-1 on test images that --int8 may cost."),
    ] = ExportConfig.max_drop,
    data: DataOption = None,
    skip_bad: SkipBadOption = False,
    images: Annotated[
        int, typer.Option("--images", help="Images to compare on, and to calibrate --int8 on.")
    ] = ExportConfig.images,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Largest relative difference from the original."),
    ] = ExportConfig.tolerance,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    workspace: WorkspaceOption = None,
) -> Result:
    """Write a network for another runtime, and compare what is loaded back there on real images.

    For example: dery export --to out --format onnx
    """
    config = ExportConfig(
        to=to,
        format=format,
        fuse=fuse,
        int8=int8,
        max_drop=max_drop,
        data=data,
        skip_bad=skip_bad,
        images=images,
        tolerance=tolerance,
        force=force,
    )
    folder = find_network(open_workspace(workspace), what)
    from dery_cli.stages.export.run import export_network

    found = export_network(terminal, folder, config)
    alike, quantised = found.agreement, found.int8
    same = "" if alike.top1 is None else f"top-1 agreement {alike.top1:.4f}, "
    terminal.say(f"wrote {found.folder}: {found.model}, {show_count(found.size)} bytes in all")
    terminal.say(
        f"loaded back and compared on {alike.images} images ({found.data}): {same}"
        f"largest relative difference {alike.difference:.1e}"
    )
    if found.folded is not None:
        terminal.say(f"batch norms folded: {found.folded}")
    if quantised is not None:
        terminal.say(
            f"int8: top-1 on {quantised.images} test images {quantised.before:.4f} before, "
            f"{quantised.after:.4f} after"
        )
    terminal.say(f"try it: python {found.folder / 'run.py'} IMAGE")
    return {**dataclasses.asdict(found), "folder": str(found.folder), "format": format}
