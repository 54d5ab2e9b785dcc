"""``dery zoo rank``: which donors know most of a target."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SeedOption,
    SkipBadOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.commands._tables import COST_COLUMNS, cost_cells
from dery_cli.errors import UsageError
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals
from dery_cli.stages.assemble.rank_config import RankConfig


@command
def rank(
    terminal: Terminal,
    data: DataOption = None,
    samples: Annotated[
        int, typer.Option("--target-samples", help="Target images for the probes, at most.")
    ] = RankConfig.samples,
    crop: Annotated[
        float, typer.Option("--crop", help="Side of the square crop, as a share of the short side.")
    ] = RankConfig.crop,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images a batch.")
    ] = RankConfig.batch_size,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", help="Of the forward passes: fp32, bf16, fp16, or auto, which is fp32."
        ),
    ] = RankConfig.precision,
    skip_bad: SkipBadOption = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Order the donors by how well a linear probe on each tells the target's classes.

    Nothing else is needed: neither embed nor sim. Accuracy and cross-entropy are cross-validated
    on the target's training images; params and multiply-adds are the whole donor's, with a head
    for the target. What is computed is kept, and assemble finds it there.

    For example: dery zoo rank --data photos
    """
    if data is None:
        raise UsageError(
            "--data is missing: on which images should the donors be ranked?",
            "dery zoo rank --data FOLDER, or dery zoo rank --data demo",
        )
    config = RankConfig(
        data=data,
        samples=samples,
        crop=crop,
        batch_size=batch_size,
        precision=precision,
        skip_bad=skip_bad,
        seed=seed,
        device=device,
        workers=workers,
    )
    space = open_workspace(workspace)
    from dery_cli.stages.assemble.rank import rank_zoo

    found = rank_zoo(terminal, space, config)
    terminal.table(
        f"{found.images} images, {found.classes} classes of {found.data}",
        ["donor", "probe top-1", "cross-entropy", *COST_COLUMNS, "best node"],
        [
            [
                one.donor,
                show_decimals(one.accuracy),
                show_decimals(one.cross_entropy),
                *cost_cells(one.params, one.flops),
                f"{one.best_node} of {one.nodes}: {show_decimals(one.best_accuracy)}",
            ]
            for one in found.donors
        ],
    )
    return dataclasses.asdict(found)
