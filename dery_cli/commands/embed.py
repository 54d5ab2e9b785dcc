"""``dery embed``: features of every donor at every node, on the calibration images."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SeedOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.errors import UsageError
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import FEW_SAMPLES, LARGE, MOST_SAMPLES, show_count
from dery_cli.stages.embed.config import EmbedConfig


@command
def embed(
    terminal: Terminal,
    data: DataOption = None,
    donor: Annotated[
        list[str] | None,
        typer.Option(
            "--donor",
            help="Embed this donor only; may be given several times.",
            autocompletion=_completion.donors,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            "-n",
            help="Calibration images, chosen by --seed.",
            show_default=f"{MOST_SAMPLES}; on a CPU {FEW_SAMPLES}, where a donor takes {LARGE} "
            "pixels or more",
        ),
    ] = None,
    grid: Annotated[
        int, typer.Option("--grid", help="Side of the pooled grid kept for stitches.")
    ] = 4,
    grid_samples: Annotated[
        int, typer.Option("--grid-samples", help="Images whose grid features are kept.")
    ] = 256,
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size", "-b", help="Images a batch, or auto: as many as the memory holds."
        ),
    ] = "64",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the stored features: fp16 or fp32.")
    ] = "fp16",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Of the forward passes: fp32, bf16, fp16, or auto: fp32 in the memory layout that "
            "is faster on the device. Half precision changes the features by about 1 %.",
        ),
    ] = "auto",
    crop: Annotated[
        float, typer.Option("--crop", help="Side of the square crop, as a share of the short side.")
    ] = 0.95,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave out images that cannot be decoded, and donors with NaN or infinite "
            "features, here and in all later stages.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            envvar="DERY_THREADS",
            min=1,
            help="CPU threads of each process; by default its share of the machine's cores, "
            "whatever a launcher sets.",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            help="Threads of each process that decode images, once for all donors; 0: none beside "
            "the main one. By default its share of the machine's cores.",
        ),
    ] = None,
) -> Result:
    """Run the calibration images through every donor and keep the features at its nodes.

    For each node: the mean over positions for all images (for similarity), and a small grid for the
    first --grid-samples (for stitches). A donor whose embedding is up to date is skipped.

    'accelerate launch -m dery_cli embed ...', or torchrun in its place, spreads the batches over
    processes and machines; with the same --threads the files are the same byte for byte.

    For example: dery embed --data photos --samples 1024
    """
    if data is None:
        raise UsageError(
            "--data is missing: which images should the donors be compared on?",
            "dery embed --data FOLDER, or dery embed --data demo",
        )
    config = EmbedConfig(
        data=data,
        samples=samples,
        grid=grid,
        grid_samples=grid_samples,
        batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
        dtype=dtype,
        precision=precision,
        crop=crop,
        skip_bad=skip_bad,
        seed=seed,
        donors=tuple(donor or ()),
        dry_run=dry_run,
        device=device,
        threads=threads,
        workers=workers,
    )
    space = open_workspace(workspace)
    from dery_cli.stages.embed.run import embed_zoo

    found = embed_zoo(terminal, space, config)
    if dry_run:
        for name, size in found.bytes_per_donor.items():
            terminal.say(f"{name}: {show_count(size)} bytes")
        terminal.say(f"{show_count(found.bytes)} bytes in all, in {space.embeddings}")
    elif not found.up_to_date:
        terminal.say(
            f"embedded {len(found.embedded)} donors on {found.samples} images of {data}; "
            f"{len(found.unchanged)} were up to date"
        )
    return dataclasses.asdict(found)
