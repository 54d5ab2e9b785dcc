"""``dery embed``: features of every donor at every node, on the calibration images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dery_cli.artifacts import Artifact, Workspace, transaction, unchanged, write_log
from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SeedOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.config import EmbedConfig, show_count
from dery_cli.data import DataSet, open_data
from dery_cli.errors import DeryError, UsageError
from dery_cli.terminal import Terminal
from dery_cli.types import Donor, Node

if TYPE_CHECKING:
    import torch


@command
def embed(
    terminal: Terminal,
    data: DataOption = None,
    donor: Annotated[
        list[str] | None,
        typer.Option("--donor", help="Embed this donor only; may be given several times."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="Calibration images, chosen by --seed.")
    ] = 2048,
    grid: Annotated[
        int, typer.Option("--grid", help="Side of the pooled grid kept for stitches.")
    ] = 4,
    grid_samples: Annotated[
        int, typer.Option("--grid-samples", help="Images whose grid features are kept.")
    ] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a batch.")] = 64,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the stored features: fp16 or fp32.")
    ] = "fp16",
    crop: Annotated[
        float, typer.Option("--crop", help="Side of the square crop, as a share of the short side.")
    ] = 0.95,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out donors with NaN or infinite features.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Run the calibration images through every donor and keep the features at its nodes.

    For each node: the mean over positions for all images (for similarity), and a small grid for the
    first --grid-samples (for stitches). A donor whose embedding is up to date is skipped.
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
        batch_size=batch_size,
        dtype=dtype,
        crop=crop,
        seed=seed,
        workers=workers,
    )
    from dery_cli.embeddings import choose_calibration, embedding_artifact
    from dery_cli.zoo import require_zoo

    space = open_workspace(workspace)
    zoo = require_zoo(space)
    names = donor or zoo.names()
    wanted = {name: zoo[name] for name in names}
    images = open_data(data)
    calibration = choose_calibration(config, images)
    if len(calibration.indices) < samples and samples != EmbedConfig.samples:
        terminal.warn(f"{data} has {len(calibration.indices)} training images, not {samples}")
    records = {n: embedding_artifact(d, config, calibration) for n, d in wanted.items()}
    todo = [n for n in names if unchanged(space.embedding(n), records[n]) is None]
    count = len(calibration.indices)
    sizes = {n: _stored_bytes(wanted[n].anatomy.nodes, config, count) for n in todo}
    result: Result = {
        "data": calibration.spec,
        "samples": count,
        "embedded": todo,
        "unchanged": [n for n in names if n not in todo],
        "bytes": sum(sizes.values()),
    }
    if dry_run:
        for name in todo:
            terminal.say(f"{name}: {show_count(sizes[name])} bytes")
        terminal.say(f"{show_count(result['bytes'])} bytes in all, in {space.embeddings}")
        return result
    if not todo:
        terminal.say(f"all {len(names)} embeddings are up to date")
        return result
    free = shutil.disk_usage(space.root).free
    if result["bytes"] > free:
        raise DeryError(
            f"the embeddings need {show_count(result['bytes'])} bytes, the disk has "
            f"{show_count(free)}",
            "fewer --samples, a smaller --grid, or another --workspace",
        )
    skipped = []
    with space.lock(terminal.note):
        for name in todo:
            try:
                _embed_one(terminal, space, wanted[name], config, records[name], images, device)
            except DeryError as error:
                if not (skip_bad and error.details and "node" in error.details):
                    raise DeryError(
                        f"{name}: {error.message}", error.hint, details=error.details
                    ) from error
                terminal.warn(f"{name} is left out: {error.message}")
                skipped.append(name)
    result["skipped"] = skipped
    terminal.say(
        f"embedded {len(todo) - len(skipped)} donors on {count} images of {data}; "
        f"{len(result['unchanged'])} were up to date"
    )
    return result


def _stored_bytes(nodes: Sequence[Node], config: EmbedConfig, count: int) -> int:
    from dery_cli.core.features import feature_specs
    from dery_cli.stream import stream_nbytes

    return stream_nbytes(
        feature_specs(
            nodes,
            count,
            grid=config.grid,
            grid_samples=config.grid_samples,
            dtype=_torch_dtype(config.dtype),
        )
    )


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}[name]


def _embed_one(
    terminal: Terminal,
    space: Workspace,
    donor: Donor,
    config: EmbedConfig,
    record: Artifact,
    images: DataSet,
    device_name: str | None,
) -> None:
    from dery_cli.core.features import embed_batches, feature_specs
    from dery_cli.loading import ImageBatches, pick_device
    from dery_cli.stream import SafetensorsStream
    from dery_cli.zoo import load_donor

    started = time.monotonic()
    name = donor.name
    device = pick_device(device_name)
    dissection = load_donor(donor, space, device=device)
    indices = record.data["indices"]
    dtype = _torch_dtype(config.dtype)
    batches = ImageBatches(
        images.train,
        indices,
        donor.input,
        crop=config.crop,
        batch_size=config.batch_size,
        device=device,
        workers=config.workers,
    )
    specs = feature_specs(
        donor.anatomy.nodes,
        len(indices),
        grid=config.grid,
        grid_samples=config.grid_samples,
        dtype=dtype,
    )
    with transaction(space.embedding(name)) as work:
        path = work.path(f"{name}.safetensors")
        with (
            SafetensorsStream(path, specs) as stream,
            terminal.progress(name, len(indices)) as progress,
        ):
            for batch in embed_batches(
                dissection,
                batches,
                grid=config.grid,
                grid_samples=config.grid_samples,
                dtype=dtype,
            ):
                for index, pooled in enumerate(batch.nodes):
                    stream.write(f"{index}.feat_NC", pooled.feat_NC)
                    stream.write(f"{index}.feat_NGC", pooled.feat_NGC)
                    if f"{index}.prefix_NTC" in specs:
                        stream.write(f"{index}.prefix_NTC", pooled.prefix_NTC)
                progress.advance(len(batch.nodes[0].feat_NC))
        work.commit(record)
    seconds = time.monotonic() - started
    write_log(
        space.embeddings / f"{name}.log.json",
        {"seconds": seconds, "device": str(device), "images_per_second": len(indices) / seconds},
    )
