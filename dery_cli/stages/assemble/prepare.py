"""What has to be there before anything is searched: stages, target, measured costs, the record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.data.samples import TargetSamples
from dery_cli.data.sets import DataSet
from dery_cli.data.target import Target
from dery_cli.io.artifacts import Workspace, unchanged, write_record
from dery_cli.io.records import Artifact
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_time
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import (
    REPEATS,
    WARMUP,
    LatencyTable,
    latency_elsewhere,
    latency_options,
    stitches_to_time,
)
from dery_cli.stages.assemble.inputs import Inputs, read_inputs
from dery_cli.stages.assemble.setting import Setting
from dery_cli.stages.assemble.store import LATENCY
from dery_cli.stages.latency.store import read_times
from dery_cli.stages.partition.store import StoredPartition


@dataclasses.dataclass(frozen=True)
class Job:
    """One ``dery assemble`` from the moment that its inputs are known.

    Args:
        terminal: Shows progress.
        space: The workspace, whose lock is held.
        setting: Donors, target, options.
        partition: Of the donors; None in the free space where there is none that is current.
        record: What the artifact will be recorded as.
        proxy: Name of what ranks built networks.
    """

    terminal: Terminal
    space: Workspace
    setting: Setting
    partition: StoredPartition | None
    record: Artifact
    proxy: str


def prepare(
    terminal: Terminal, space: Workspace, config: AssembleConfig, inputs: Inputs | None = None
) -> Job:
    """What is searched and built with, and what will be recorded; latencies are measured here.

    Args:
        terminal: Shows progress.
        space: The workspace.
        config: Options.
        inputs: Where they are read already.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        UsageError: The options do not suit the target or the device.
    """
    inputs = inputs or read_inputs(terminal, space, config)
    calibration = inputs.embeddings.calibration
    target = target_of(
        inputs.data,
        inputs.chosen,
        crop=calibration.crop,
        batch_size=calibration.batch_size,
        device=config.device,
        workers=config.workers,
    )
    setting = Setting(space, inputs.embeddings, target, inputs.chosen.split, inputs.config)
    job = Job(terminal, space, setting, inputs.partition, inputs.record, inputs.proxy)
    if config.budget.max_latency is not None:
        job = dataclasses.replace(job, record=_with_latency(job))
    if config.budget.max_memory is not None:
        setting.use_memory()
    return job


def target_of(
    data: DataSet,
    chosen: TargetSamples,
    *,
    crop: float,
    batch_size: int,
    device: str | None,
    workers: int,
) -> Target:
    """Images of a data set as the target of an assembly.

    Args:
        data: The data set.
        chosen: Which of its images are used for what.
        crop: Field of view.
        batch_size: Images a batch.
        device: As the option names it.
        workers: Processes that decode.

    Raises:
        UsageError: No such device.
    """
    return Target(
        data=data,
        indices=chosen.indices,
        fit_indices=chosen.fit_indices,
        valid_indices=chosen.valid_indices,
        crop=crop,
        batch_size=batch_size,
        device=pick_device(device),
        workers=workers,
    )


def _with_latency(job: Job) -> Artifact:
    """The record with measured latencies among its parents; they are measured or those kept."""
    setting, target = job.setting, job.setting.target
    if setting.config.latency_from is not None:
        return _with_latency_elsewhere(job, setting.config.latency_from)
    wanted = Artifact(
        kind=LATENCY,
        parents={f"weights/{n}": d.weights_sha256 for n, d in setting.zoo.donors.items()},
        options=latency_options(
            target.device, setting.stitch, setting.config.latency_batch, target.num_classes
        ),
    )
    kept = unchanged(job.space.latency, wanted)
    if kept is None or not LatencyTable.fits(kept.data, setting.zoo, target.num_classes):
        with job.terminal.progress("timing units and stitches", WARMUP + REPEATS) as bar:
            table = setting.measured_latency(bar.advance)
        kept = write_record(job.space.latency, dataclasses.replace(wanted, data=table.to_json()))
    else:
        job.terminal.detail("latencies are those of an earlier run")
    setting.latency = LatencyTable.from_json(kept.data, setting.zoo, target.num_classes)
    return dataclasses.replace(job.record, parents={**job.record.parents, "latency": kept.sha256})


def _with_latency_elsewhere(job: Job, path: Path) -> Artifact:
    """The record with another machine's latencies among its parents."""
    setting, target = job.setting, job.setting.target
    times = read_times(
        path,
        setting.zoo,
        kind=setting.stitch,
        batch_size=setting.config.latency_batch,
        classes=target.num_classes,
    )
    times.require(stitches_to_time(setting.zoo, setting.stitch))
    setting.latency = latency_elsewhere(
        setting.zoo, times, kind=setting.stitch, num_classes=target.num_classes
    )
    for one in times.wholes():
        job.terminal.say(
            f"{one.network}, measured there: {show_time(one.whole)} whole, its parts sum to "
            f"{show_time(one.parts)} ({one.error:+.1%})"
        )
    return dataclasses.replace(job.record, parents={**job.record.parents, "latency": times.sha256})
