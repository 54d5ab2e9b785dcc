"""``dery latency``: have the parts of networks measured on another machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands._options import Result, WorkspaceOption, command, open_workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.stages.latency.config import PackConfig

latency_app = typer.Typer(help="Have the parts of networks measured on another machine.")


@latency_app.callback()
def _group() -> None:
    pass


@latency_app.command("pack")
@command
def pack(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    network: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            metavar="NAME",
            help="Pack this assembly whole too, to compare with the sum of its parts; may be "
            "repeated.",
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            "--classes", help="Classes of heads.", show_default="those of the embedded data"
        ),
    ] = None,
    stitch: Annotated[
        str, typer.Option("--stitch", help="What stitches are made of: linear, mlp or paper.")
    ] = PackConfig.stitch,
    latency_batch: Annotated[
        int, typer.Option("--latency-batch", help="Images a batch.")
    ] = PackConfig.batch_size,
    force: Annotated[bool, typer.Option("--force", help="Replace a pack that is there.")] = False,
    workspace: WorkspaceOption = None,
) -> Result:
    """Write units, heads and stitches as ONNX files, with a script that measures them anywhere.

    Copy the folder to a phone, a Jetson or a server, run measure.py there (it needs onnxruntime and
    numpy alone), and bring back the latency.json that it writes: dery assemble --latency-from FILE.

    For example: dery latency pack parts --network default
    """
    config = PackConfig(
        to=folder,
        networks=tuple(network or ()),
        classes=classes,
        stitch=stitch,
        batch_size=latency_batch,
        force=force,
    )
    from dery_cli.stages.latency.run import pack_parts

    found = pack_parts(terminal, open_workspace(workspace), config)
    kept = "" if found.stitches >= found.all_stitches else f" of {found.all_stitches:,}"
    terminal.say(
        f"{found.units:,} units, {found.heads:,} heads, {found.stitches:,}{kept} stitches and "
        f"{len(found.networks)} whole networks are in {found.folder}, "
        f"{show_count(found.bytes)} bytes"
    )
    terminal.say("on the other machine: pip install onnxruntime; python measure.py")
    terminal.say("then here: dery assemble --latency-from latency.json --max-latency 8ms")
    return {**dataclasses.asdict(found), "folder": str(found.folder)}
