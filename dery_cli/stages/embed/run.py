"""The embed stage: the features of every donor at every node, on the calibration images."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dery_cli.data.sets import DataSet, open_checked
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import (
    Workspace,
    made_of_the_same,
    unchanged,
    write_log,
    write_record,
)
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact
from dery_cli.runtime.devices import AUTO, FP32
from dery_cli.runtime.launcher import alone_by_mistake, launched
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import FEW_SAMPLES, LARGE, MOST_SAMPLES, show_count
from dery_cli.stages.embed.config import EmbedConfig
from dery_cli.stages.embed.store import (
    Calibration,
    choose_calibration,
    embedding_artifact,
    finished,
    known_batch_size,
    left_out,
    why_left_out,
)
from dery_cli.types import Donor
from dery_cli.zoo.registry import Zoo, require_zoo

if TYPE_CHECKING:
    from dery_cli.runtime.processes import Processes
    from dery_cli.stages.embed.passes import Embedder

_LARGEST_DTYPE = EmbedConfig.DTYPES[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """What embedding a zoo came to, or would come to.

    Args:
        data: Spec of the images.
        samples: How many images.
        embedded: Donors whose embedding was missing or out of date.
        unchanged: Donors whose embedding was up to date.
        skipped: Donors that are left out, for NaN or infinite features.
        bytes: Written in all.
        bytes_per_donor: Of each donor that was embedded, or tried.
    """

    data: str
    samples: int
    embedded: list[str]
    unchanged: list[str]
    skipped: list[str]
    bytes: int
    bytes_per_donor: dict[str, int]

    @property
    def up_to_date(self) -> bool:
        """Whether there was nothing to do."""
        return not self.bytes_per_donor


def embed_zoo(terminal: Terminal, space: Workspace, config: EmbedConfig) -> Embedded:
    """Embed the donors whose embedding is missing or out of date.

    Under a launcher all processes call this; the main one decides, locks, writes and prints.

    Raises:
        Dismissed: In every process but the main one, when all is over.
        StaleError: The zoo is empty.
        DeryError: Images cannot be read, features are not finite, or memory or disk do not suffice.
    """
    if (warning := alone_by_mistake()) is not None:
        terminal.warn(warning)
    if not launched():
        return _embed_zoo(terminal, space, config, lambda: _processes(config))
    from dery_cli.stages.embed.passes import Embedder

    with _processes(config) as processes:
        if not processes.main:
            Embedder(space, config, processes).follow()
        return _embed_zoo(terminal, space, config, lambda: contextlib.nullcontext(processes))


_Opened = Callable[[], contextlib.AbstractContextManager["Processes"]]
"""Gives the processes, which are not needed (nor is torch) where all is up to date."""


def _processes(config: EmbedConfig) -> contextlib.AbstractContextManager[Processes]:
    from dery_cli.runtime.processes import open_processes

    return open_processes(config.device, config.threads, lambda _: None)


def _embed_zoo(
    terminal: Terminal, space: Workspace, config: EmbedConfig, opened: _Opened
) -> Embedded:
    # a wrong name answers before images are read
    donors = _chosen(require_zoo(space), config.donors)
    images = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    if config.samples is not None and len(images.train) < config.samples:
        count = len(images.train)
        terminal.warn(f"{config.data} has {count} training images, not {config.samples}")
    config, calibration = _with_samples(terminal, space, config, donors, images)
    if config.dry_run:
        return _plan(space, config, calibration).result()
    with space.lock(terminal.note):
        # another dery may have worked here until now
        plan = _plan(space, config, calibration)
        _embed(terminal, space, config, opened, images, plan)
    return plan.result()


def _with_samples(
    terminal: Terminal,
    space: Workspace,
    config: EmbedConfig,
    donors: dict[str, Donor],
    images: DataSet,
) -> tuple[EmbedConfig, Calibration]:
    """The options with a number of images, and these: as before, else what the device does soon."""

    def settled(samples: int) -> tuple[EmbedConfig, Calibration]:
        asked = dataclasses.replace(config, samples=samples)
        return asked, choose_calibration(asked, images)

    if config.samples is not None:
        return settled(config.samples)
    side = max(max(donor.input.image_size) for donor in donors.values())
    if side < LARGE or len(images.train) <= FEW_SAMPLES:
        return settled(MOST_SAMPLES)
    found = {samples: settled(samples) for samples in (MOST_SAMPLES, FEW_SAMPLES)}
    for asked, calibration in found.values():
        records = {n: embedding_artifact(d, asked, calibration) for n, d in donors.items()}
        if any(made_of_the_same(space.embedding(n), record) for n, record in records.items()):
            return asked, calibration
    from dery_cli.runtime.devices import pick_device

    if pick_device(config.device).type != "cpu":
        return found[MOST_SAMPLES]
    terminal.note(
        f"{FEW_SAMPLES} images, since a CPU takes long for {side} pixels; on a GPU "
        f"{MOST_SAMPLES} are taken: --samples rules"
    )
    return found[FEW_SAMPLES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be done.

    Args:
        donors: Those asked for.
        records: What each embedding's record will say.
        todo: Donors whose embedding is missing or out of date.
        sizes: Bytes of each that will be written.
        bad: Donors that are left out, and why; grows as more are found.
        calibration: The images.
    """

    donors: dict[str, Donor]
    records: dict[str, Artifact]
    todo: list[str]
    sizes: dict[str, int]
    bad: dict[str, DeryError]
    calibration: Calibration

    def result(self) -> Embedded:
        return Embedded(
            data=self.calibration.spec,
            samples=len(self.calibration.indices),
            embedded=[name for name in self.todo if name not in self.bad],
            unchanged=[n for n in self.records if n not in self.todo and n not in self.bad],
            skipped=list(self.bad),
            bytes=sum(self.sizes.values()),
            bytes_per_donor=self.sizes,
        )


def _chosen(zoo: Zoo, names: Sequence[str]) -> dict[str, Donor]:
    return {name: zoo[name] for name in names or zoo.names()}


def _plan(space: Workspace, config: EmbedConfig, calibration: Calibration) -> _Plan:
    donors = _chosen(require_zoo(space), config.donors)
    count = len(calibration.indices)
    records = {n: embedding_artifact(d, config, calibration) for n, d in donors.items()}
    found = {n: unchanged(space.embedding(n), record) for n, record in records.items()}
    todo = [name for name, record in found.items() if record is None]
    return _Plan(
        donors=donors,
        records=records,
        todo=todo,
        sizes={name: _nbytes(donors[name], config, count) for name in todo},
        bad={n: why for n, r in found.items() if r is not None and (why := why_left_out(r))},
        calibration=calibration,
    )


def _nbytes(donor: Donor, config: EmbedConfig, count: int) -> int:
    from dery_cli.io.row_stream import stream_nbytes
    from dery_cli.stages.embed.passes import embedding_specs

    return stream_nbytes(embedding_specs(donor.anatomy.nodes, config, count))


def _embed(
    terminal: Terminal,
    space: Workspace,
    config: EmbedConfig,
    opened: _Opened,
    images: DataSet,
    plan: _Plan,
) -> None:
    """Carry the plan out; with ``skip_bad``, donors without finite features are added to ``bad``.

    Raises:
        DeryError: A donor cannot be embedded; the message names it.
    """
    for name, error in plan.bad.items():
        if not config.skip_bad:
            raise _of_donor(name, error)
        terminal.warn(f"{name} is left out: {error.message}")
    if not plan.todo:
        terminal.say(f"all {len(plan.records)} embeddings are up to date")
        return
    _check_disk(space, sum(plan.sizes.values()))
    with opened() as processes:
        _embed_donors(terminal, space, config, processes, images, plan)


def _embed_donors(
    terminal: Terminal,
    space: Workspace,
    config: EmbedConfig,
    processes: Processes,
    images: DataSet,
    plan: _Plan,
) -> None:
    from dery_cli.stages.embed.passes import Embedder

    inputs = [plan.donors[name].input for name in plan.todo]
    embedder = Embedder(space, config, processes, images, inputs)
    for name in plan.todo:
        record = plan.records[name]
        try:
            _embed_one(terminal, space, config, processes, embedder, plan.donors[name], record)
        except DeryError as error:
            if not (config.skip_bad and error.details and "node" in error.details):
                raise _of_donor(name, error) from error
            _leave_out(space, name, record, error)
            terminal.warn(f"{name} is left out: {error.message}")
            plan.bad[name] = error


def _of_donor(name: str, error: DeryError) -> DeryError:
    """The error that names the donor too."""
    return DeryError(f"{name}: {error.message}", error.hint, details=error.details)


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
    config: EmbedConfig,
    processes: Processes,
    embedder: Embedder,
    donor: Donor,
    record: Artifact,
) -> None:
    """Write one donor's embedding; on ``auto``, with half the batch size as long as memory lacks.

    Raises:
        DeryError: Out of memory or disk, an image that cannot be read, features not finite.
    """
    from dery_cli.runtime.processes import NoMemoryError

    started = time.monotonic()
    indices = record.data["indices"]
    auto = config.batch_size == AUTO
    wanted = known_batch_size(space.embedding(donor.name), record) if auto else config.batch_size
    size = None if wanted is None else int(wanted)
    size = embedder.load(donor, indices, size, config.precision)
    dtype = config.dtype
    loaded = time.monotonic()
    with transaction(space.embedding(donor.name)) as work:
        path = work.path(f"{donor.name}.safetensors")
        while True:
            try:
                made = dataclasses.replace(config, dtype=dtype)
                _write_features(terminal, embedder, donor, made, len(indices), size, path)
                break
            except DeryError as error:
                details = error.details or {}
                if dtype != _LARGEST_DTYPE and details.get("too_large"):
                    dtype, told = _LARGEST_DTYPE, f"are kept in {_LARGEST_DTYPE}"
                elif "node" in details and embedder.arithmetic.precision != FP32:
                    told = f"are computed in {FP32}"
                    size = embedder.load(donor, indices, size, FP32)
                else:
                    raise
                terminal.warn(f"{donor.name}: {error.message}; its features {told}")
                continue
            except NoMemoryError:
                if size == 1 or not auto:
                    raise DeryError(
                        f"out of memory on {processes.device} with batches of {size}",
                        f"--batch-size {AUTO}, or a number below {size}" if size > 1 else None,
                    ) from None
            size //= 2
            terminal.note(f"{donor.name}: out of memory, again with batches of {size}")
        work.commit(finished(record, size, dtype, embedder.arithmetic))
    now = time.monotonic()
    _write_log(space, processes, embedder, record, (now - started, now - loaded))


def _write_features(
    terminal: Terminal,
    embedder: Embedder,
    donor: Donor,
    config: EmbedConfig,
    count: int,
    batch_size: int,
    path: Path,
) -> None:
    """One pass of the donor, written as it comes."""
    from dery_cli.io.row_stream import SafetensorsStream
    from dery_cli.stages.embed.passes import embedding_specs

    specs = embedding_specs(donor.anatomy.nodes, config, count)
    with (
        SafetensorsStream(path, specs) as stream,
        terminal.progress(donor.name, count) as progress,
    ):
        for rows in embedder.rows(batch_size, config.dtype):
            for name, tensor in rows.items():
                stream.write(name, tensor)
            progress.advance(len(rows["0.feat_NC"]))


def _write_log(
    space: Workspace,
    processes: Processes,
    embedder: Embedder,
    record: Artifact,
    seconds: tuple[float, float],
) -> None:
    """What no hash covers; ``seconds`` are those of all and of the passes."""
    write_log(
        space.embeddings / f"{record.data['donor']}.log.json",
        {
            "seconds": seconds[0],
            "images_per_second": len(record.data["indices"]) / seconds[1],
            "device": str(processes.device),
            "precision": embedder.arithmetic.precision,
            "layout": embedder.arithmetic.layout,
            "tf32": False,
            "processes": processes.count,
            "threads": processes.threads,
        },
    )


def _leave_out(space: Workspace, name: str, record: Artifact, error: DeryError) -> None:
    """Replace the donor's embedding, if it has one, by the record of why it is left out."""
    path = space.embedding(name)
    write_record(path, left_out(record, error))
    path.with_suffix(".safetensors").unlink(missing_ok=True)
