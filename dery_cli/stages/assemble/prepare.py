"""What has to be there before anything is searched: stages, target, measured costs, the record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.core.training_free.inputs import about
from dery_cli.data.samples import Split, TargetSamples, choose_target, fingerprint
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.data.target import Target
from dery_cli.errors import StaleError, UsageError
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
from dery_cli.stages.assemble.setting import Setting
from dery_cli.stages.assemble.store import ASSEMBLY, LATENCY
from dery_cli.stages.embed.store import Embeddings, embed_command, read_embeddings
from dery_cli.stages.latency.store import read_times
from dery_cli.stages.partition.store import StoredPartition, require_partition
from dery_cli.zoo.plugin import find_proxy
from dery_cli.zoo.registry import require_zoo


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


def prepare(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Job:
    """Check the stages before, open the target, and say what the record and the proxy will be."""
    zoo = require_zoo(space)
    embeddings = read_embeddings(space, zoo)
    for warning in embeddings.warnings:
        terminal.warn(warning)
    partition = _partition(terminal, space, embeddings, config)
    target, split = _target(terminal, embeddings, config)
    proxy = config.proxy or ("naswot" if target.labels is None else "probe")
    if target.labels is None and reads_labels(proxy):
        raise UsageError(
            f"--proxy {proxy} needs labels, which {target.data.spec} has not",
            "--data with class folders, or --proxy naswot",
        )
    parents = {
        "target": fingerprint(target.data.train, target.all_indices),
        **{f"embedding/{donor}": sha for donor, sha in embeddings.hashes.items()},
    }
    if partition is not None:
        parents["partition"] = partition.record.sha256
    record = Artifact(
        kind=ASSEMBLY,
        parents=parents,
        options={
            **config.options(),
            "data": target.data.spec,
            "skip_bad": target.data.skip_bad,
            "proxy": proxy,
        },
        seed=config.seed,
    )
    setting = Setting(space, embeddings, target, split, config)
    job = Job(terminal, space, setting, partition, record, proxy)
    if config.budget.max_latency is not None:
        job = dataclasses.replace(job, record=_with_latency(job))
    if config.budget.max_memory is not None:
        setting.use_memory()
    return job


def reads_labels(proxy: str) -> bool:
    """Whether a proxy says that it needs labels; one of another package need not say."""
    stated = about(find_proxy(proxy))
    return stated is not None and stated.reads_labels


def _partition(
    terminal: Terminal, space: Workspace, embeddings: Embeddings, config: AssembleConfig
) -> StoredPartition | None:
    """The partition, which the paper's space needs, and the free space takes a control from."""
    if config.space == "paper":
        return require_partition(space, embeddings)
    if config.blocks is not None:
        return None
    try:
        return require_partition(space, embeddings)
    except StaleError as error:
        terminal.note(f"{error.message}: the best of the paper's space is left out")
        return None


def _target(
    terminal: Terminal, embeddings: Embeddings, config: AssembleConfig
) -> tuple[Target, Split]:
    """The target's images, and the split that they keep to."""
    if config.data is None:
        data = _calibration(terminal, embeddings, config.skip_bad)
    else:
        data = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    return open_target(
        terminal,
        data,
        samples=config.target_samples,
        fit=config.fit_samples,
        crop=embeddings.calibration.crop,
        batch_size=embeddings.calibration.batch_size,
        device=config.device,
        workers=config.workers,
        seed=config.seed,
    )


def open_target(
    terminal: Terminal,
    data: DataSet,
    *,
    samples: int,
    fit: int,
    crop: float,
    batch_size: int,
    device: str | None,
    workers: int,
    seed: int,
) -> tuple[Target, Split]:
    """A data set as the target of an assembly, and the split that it keeps to.

    Args:
        terminal: Gets a warning where classes have no image among those that are fitted on.
        data: The data set.
        samples: Images that probes and the head are fitted on, at most.
        fit: Of them, those that stitches are fitted on, at most.
        crop: Field of view.
        batch_size: Images a batch.
        device: As the option names it.
        workers: Processes that decode.
        seed: Of the split and the choice.

    Raises:
        UsageError: No such device.
    """
    split = Split.of(data.train, seed)
    chosen = choose_target(data.train, split, samples=samples, fit=fit)
    _warn_of_missing_classes(terminal, data, chosen)
    target = Target(
        data=data,
        indices=chosen.indices,
        fit_indices=chosen.fit_indices,
        valid_indices=chosen.valid_indices,
        crop=crop,
        batch_size=batch_size,
        device=pick_device(device),
        workers=workers,
    )
    return target, split


def _warn_of_missing_classes(terminal: Terminal, data: DataSet, chosen: TargetSamples) -> None:
    """Say which classes the head cannot know: no image of theirs is among those it is fitted on."""
    labels, classes = data.train.labels, data.classes
    if labels is None or classes is None:
        return
    found = {int(labels[index]) for index in chosen.indices}
    missing = [name for label, name in enumerate(classes) if label not in found]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        terminal.warn(
            f"{len(missing)} of {len(classes)} classes have no image to fit on ({some}), so the "
            "network will not know them: raise --target-samples, or add images"
        )


def _calibration(terminal: Terminal, embeddings: Embeddings, skip_bad: bool) -> DataSet:
    """The data that were embedded, which must be what they were."""
    used = embeddings.calibration
    data = open_checked(terminal, used.spec, skip_bad=skip_bad or used.skip_bad)
    if fingerprint(data.train, used.indices) != used.digest:
        raise StaleError(
            f"the images of {used.spec} changed since dery embed",
            embed_command(dict(embeddings.options), embeddings.seed),
        )
    return data


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
