"""``dery predict``: what an assembly or a run says of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import (
    DeviceOption,
    Result,
    SkipBadOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals
from dery_cli.stages.evaluate.config import find_network
from dery_cli.stages.predict.config import PredictConfig


@command
def predict(
    terminal: Terminal,
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="runs/NAME, assemblies/NAME or a folder.",
            autocompletion=_completion.networks,
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="Image files, and folders of any depth."),
    ],
    top: Annotated[int, typer.Option("--top", help="Classes an image.")] = PredictConfig.top,
    table: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write file, rank, class and score there too."),
    ] = None,
    skip_bad: SkipBadOption = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images a batch.")
    ] = PredictConfig.batch_size,
    workspace: WorkspaceOption = None,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Print the likeliest classes of images, with their scores.

    For example: dery predict runs/default photos/ --top 1 --csv answers.csv
    """
    config = PredictConfig(
        top=top, skip_bad=skip_bad, batch_size=batch_size, device=device, workers=workers
    )
    folder = find_network(open_workspace(workspace), what)
    from dery_cli.stages.predict.run import predict as show
    from dery_cli.stages.predict.run import write_csv

    found = show(terminal, folder, images, config)
    terminal.table(
        None,
        ["image", "class", "score"],
        [
            [one.file if not rank else "", name, show_decimals(score)]
            for one in found.predictions
            for rank, (name, score) in enumerate(zip(one.classes, one.scores, strict=True))
        ],
    )
    if found.left_out:
        terminal.warn(
            f"{len(found.left_out)} images cannot be decoded and were left out, "
            f"{found.left_out[0]} first"
        )
    if table is not None:
        write_csv(table, found.predictions)
        terminal.say(f"written to {table}")
    return {
        "folder": str(folder),
        "predictions": [dataclasses.asdict(one) for one in found.predictions],
        "left_out": found.left_out,
    }
