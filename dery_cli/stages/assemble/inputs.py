"""What an ``assemble`` is made of, read without torch: one that is up to date needs no more."""

from __future__ import annotations

import dataclasses

from dery_cli.data.samples import Split, TargetSamples, choose_target, fingerprint
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.errors import StaleError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.records import Artifact
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import FEW_SAMPLES, MOST_SAMPLES
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.store import ASSEMBLY
from dery_cli.stages.embed.store import Embeddings, embed_command, read_embeddings
from dery_cli.stages.partition.store import StoredPartition, require_partition
from dery_cli.zoo.registry import require_zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The stages before, the target's images, and what will be recorded.

    Args:
        config: The options, with a number of target images.
        embeddings: Of the zoo.
        partition: Of the donors; None in the free space where there is none that is current.
        data: The target.
        chosen: Which of its training images are used for what.
        record: What the artifact will be recorded as; measured latencies come to its parents.
        proxy: Name of what ranks built networks.
    """

    config: AssembleConfig
    embeddings: Embeddings
    partition: StoredPartition | None
    data: DataSet
    chosen: TargetSamples
    record: Artifact
    proxy: str


def read_inputs(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Inputs:
    """Check the stages before, open the target, and say what the record and the proxy will be.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        UsageError: The data cannot be opened, or the proxy needs labels that they have not.
    """
    embeddings = read_embeddings(space, require_zoo(space))
    for warning in embeddings.warnings:
        terminal.warn(warning)
    partition = _partition(terminal, space, embeddings, config)
    if config.data is None:
        data = _calibration(terminal, embeddings, config.skip_bad)
    else:
        data = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    samples = config.target_samples
    if samples is None:
        samples = min(max(embeddings.options["samples"], FEW_SAMPLES), MOST_SAMPLES)
        config = dataclasses.replace(config, target_samples=samples)
    chosen = choose_images(
        terminal,
        data,
        samples=samples,
        fit=config.fit_samples,
        seed=config.seed,
    )
    labelled = data.train.labels is not None
    # in the free space clusters of what a donor makes of the images stand for labels
    can_probe = labelled or (config.space == "free" and config.blocks is None)
    proxy = config.proxy or ("probe" if can_probe else "naswot")
    if config.proxy is not None and not can_probe and reads_labels(proxy):
        raise UsageError(
            f"--proxy {proxy} needs labels, which {data.spec} has not",
            "--data with class folders, or --proxy naswot",
        )
    parents = {
        "target": fingerprint(data.train, (*chosen.indices, *chosen.valid_indices)),
        **{f"embedding/{donor}": sha for donor, sha in embeddings.hashes.items()},
    }
    if partition is not None:
        parents["partition"] = partition.record.sha256
    record = Artifact(
        kind=ASSEMBLY,
        parents=parents,
        options={
            **config.options(),
            "data": data.spec,
            "skip_bad": data.skip_bad,
            "proxy": proxy,
        },
        seed=config.seed,
    )
    return Inputs(
        config=config,
        embeddings=embeddings,
        partition=partition,
        data=data,
        chosen=chosen,
        record=record,
        proxy=proxy,
    )


def choose_images(
    terminal: Terminal, data: DataSet, *, samples: int, fit: int, seed: int
) -> TargetSamples:
    """Which of a target's training images are used for what.

    Args:
        terminal: Gets a warning where classes have no image among those that are fitted on.
        data: The data set.
        samples: Images that probes and the head are fitted on, at most.
        fit: Of them, those that stitches are fitted on, at most.
        seed: Of the split and the choice.
    """
    chosen = choose_target(data.train, Split.of(data.train, seed), samples=samples, fit=fit)
    _warn_of_missing_classes(terminal, data, chosen)
    return chosen


def reads_labels(proxy: str) -> bool:
    """Whether a proxy says that it needs labels; one of another package need not say."""
    from dery_cli.core.training_free.inputs import about
    from dery_cli.zoo.plugin import find_proxy

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
