"""``dery embed``: features of every donor at every node, on the calibration images."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

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
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import (
    Artifact,
    Workspace,
    transaction,
    unchanged,
    write_log,
    write_record,
)
from dery_cli.runtime.launcher import alone_by_mistake
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.stages.embed.config import AUTO, EmbedConfig

if TYPE_CHECKING:
    from dery_cli.runtime.processes import Processes
    from dery_cli.stages.embed.run import Embedder
    from dery_cli.stages.embed.store import Calibration
    from dery_cli.types import Donor
    from dery_cli.zoo.registry import Zoo


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
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size", "-b", help="Images a batch, or auto: as many as the memory holds."
        ),
    ] = "64",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the stored features: fp16 or fp32.")
    ] = "fp16",
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
            help="CPU threads of each process; all cores by default, whatever a launcher sets.",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Run the calibration images through every donor and keep the features at its nodes.

    For each node: the mean over positions for all images (for similarity), and a small grid for the
    first --grid-samples (for stitches). A donor whose embedding is up to date is skipped.

    'accelerate launch -m dery_cli embed ...', or torchrun in its place, spreads the batches over
    processes and machines; with the same --threads the files are the same byte for byte.
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
        crop=crop,
        skip_bad=skip_bad,
        seed=seed,
        workers=workers,
    )
    from dery_cli.runtime.processes import open_processes
    from dery_cli.stages.embed.run import Embedder

    space = open_workspace(workspace)
    if (warning := alone_by_mistake()) is not None:
        terminal.warn(warning)
    with open_processes(device, threads) as processes:
        if not processes.main:  # it writes and prints nothing, its exit code says enough
            try:
                code = Embedder(space, config, processes).follow()
            except DeryError as error:
                code = error.exit_code
            raise typer.Exit(code)
        return _lead(terminal, space, config, processes, donor, dry_run=dry_run)


def _lead(
    terminal: Terminal,
    space: Workspace,
    config: EmbedConfig,
    processes: Processes,
    chosen: list[str] | None,
    *,
    dry_run: bool,
) -> Result:
    """The command, in the process that decides, locks, writes and prints."""
    from dery_cli.data.sets import open_checked
    from dery_cli.stages.embed.run import Embedder
    from dery_cli.stages.embed.store import choose_calibration
    from dery_cli.zoo.registry import require_zoo

    _choose(require_zoo(space), chosen)
    images = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    calibration = choose_calibration(config, images)
    count = len(calibration.indices)
    if count < config.samples and config.samples != EmbedConfig.samples:
        terminal.warn(f"{config.data} has {count} training images, not {config.samples}")
    if dry_run:
        plan = _plan(space, _choose(require_zoo(space), chosen), config, calibration)
        for name, size in plan.sizes.items():
            terminal.say(f"{name}: {show_count(size)} bytes")
        total = sum(plan.sizes.values())
        terminal.say(f"{show_count(total)} bytes in all, in {space.embeddings}")
        return plan.result()
    with space.lock(terminal.note):
        # another dery may have worked here until now
        plan = _plan(space, _choose(require_zoo(space), chosen), config, calibration)
        for name, error in plan.bad.items():
            if not config.skip_bad:
                raise DeryError(f"{name}: {error.message}", error.hint, details=error.details)
            terminal.warn(f"{name} is left out: {error.message}")
        if not plan.todo:
            terminal.say(f"all {len(plan.records)} embeddings are up to date")
            return plan.result()
        _check_disk(space, sum(plan.sizes.values()))
        embedder = Embedder(space, config, processes, images)
        for name in plan.todo:
            record = plan.records[name]
            try:
                _embed_one(terminal, space, plan.donors[name], config, record, embedder, processes)
            except DeryError as error:
                if not (config.skip_bad and error.details and "node" in error.details):
                    raise DeryError(
                        f"{name}: {error.message}", error.hint, details=error.details
                    ) from error
                _leave_out(space, name, record, error)
                terminal.warn(f"{name} is left out: {error.message}")
                plan.bad[name] = error
    result = plan.result()
    terminal.say(
        f"embedded {len(result['embedded'])} donors on {count} images of {config.data}; "
        f"{len(result['unchanged'])} were up to date"
    )
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be done.

    Args:
        donors: Those asked for.
        records: What each embedding's record will say.
        todo: Donors whose embedding is missing or out of date.
        sizes: Bytes of each that will be written.
        bad: Donors that are left out, and why.
        data: Spec of the images.
        count: How many images.
    """

    donors: dict[str, Donor]
    records: dict[str, Artifact]
    todo: list[str]
    sizes: dict[str, int]
    bad: dict[str, DeryError]
    data: str
    count: int

    def result(self) -> Result:
        return {
            "data": self.data,
            "samples": self.count,
            "embedded": [name for name in self.todo if name not in self.bad],
            "unchanged": [n for n in self.records if n not in self.todo and n not in self.bad],
            "skipped": list(self.bad),
            "bytes": sum(self.sizes.values()),
            "bytes_per_donor": self.sizes,
        }


def _choose(zoo: Zoo, names: Sequence[str] | None) -> dict[str, Donor]:
    return {name: zoo[name] for name in names or zoo.names()}


def _plan(
    space: Workspace, donors: dict[str, Donor], config: EmbedConfig, calibration: Calibration
) -> _Plan:
    from dery_cli.io.row_stream import stream_nbytes
    from dery_cli.stages.embed.run import embedding_specs
    from dery_cli.stages.embed.store import embedding_artifact, why_left_out

    count = len(calibration.indices)
    records = {n: embedding_artifact(d, config, calibration) for n, d in donors.items()}
    found = {n: unchanged(space.embedding(n), record) for n, record in records.items()}
    todo = [name for name, record in found.items() if record is None]
    return _Plan(
        donors=donors,
        records=records,
        todo=todo,
        sizes={
            name: stream_nbytes(embedding_specs(donors[name].anatomy.nodes, config, count))
            for name in todo
        },
        bad={n: why for n, r in found.items() if r is not None and (why := why_left_out(r))},
        data=calibration.spec,
        count=count,
    )


def _check_disk(space: Workspace, needed: int) -> None:
    free = shutil.disk_usage(space.root).free
    if needed > free:
        raise DeryError(
            f"the embeddings need {show_count(needed)} bytes, the disk has {show_count(free)}",
            "fewer --samples, a smaller --grid, or another --workspace",
            details={"bytes_needed": needed, "bytes_free": free},
        )


def _embed_one(
    terminal: Terminal,
    space: Workspace,
    donor: Donor,
    config: EmbedConfig,
    record: Artifact,
    embedder: Embedder,
    processes: Processes,
) -> None:
    from dery_cli.io.row_stream import SafetensorsStream
    from dery_cli.runtime.processes import NoMemoryError
    from dery_cli.stages.embed.run import embedding_specs
    from dery_cli.stages.embed.store import finished, known_batch_size

    started = time.monotonic()
    indices = record.data["indices"]
    auto = config.batch_size == AUTO
    size = known_batch_size(space.embedding(donor.name), record) if auto else config.batch_size
    size = embedder.load(donor, indices, None if size is None else int(size))
    specs = embedding_specs(donor.anatomy.nodes, config, len(indices))
    loaded = time.monotonic()
    with transaction(space.embedding(donor.name)) as work:
        path = work.path(f"{donor.name}.safetensors")
        while True:
            try:
                with (
                    SafetensorsStream(path, specs) as stream,
                    terminal.progress(donor.name, len(indices)) as progress,
                ):
                    for rows in embedder.rows(size):
                        for name, tensor in rows.items():
                            stream.write(name, tensor)
                        progress.advance(len(rows["0.feat_NC"]))
                break
            except NoMemoryError:
                if size == 1 or not auto:
                    raise DeryError(
                        f"out of memory on {processes.device} with batches of {size}",
                        f"--batch-size {AUTO}, or a number below {size}" if size > 1 else None,
                    ) from None
            size //= 2
            terminal.note(f"{donor.name}: out of memory, again with batches of {size}")
        work.commit(finished(record, size))
    seconds = time.monotonic() - loaded
    write_log(
        space.embeddings / f"{donor.name}.log.json",
        {
            "seconds": time.monotonic() - started,
            "images_per_second": len(indices) / seconds,
            "device": str(processes.device),
            "processes": processes.count,
            "threads": processes.threads,
        },
    )


def _leave_out(space: Workspace, name: str, record: Artifact, error: DeryError) -> None:
    """Replace the donor's embedding, if it has one, by the record of why it is left out."""
    from dery_cli.stages.embed.store import left_out

    path = space.embedding(name)
    space.remove(path, [f"{name}.safetensors"])
    write_record(path, left_out(record, error))
