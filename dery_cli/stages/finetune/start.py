"""What fine-tuning starts from: the network, and the target's images in three parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dery_cli.core.stitching.head import NotFiniteError
from dery_cli.data.batches import ImageBatches, as_dataset
from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.data.splits import stratified_holdout
from dery_cli.errors import UsageError
from dery_cli.io.artifacts import Artifact, Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.training.augment import train_transform
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import Donor
from dery_cli.zoo.networks import (
    LoadedAssembly,
    build_network,
    describe_network,
    load_assembly,
    loaded,
)
from dery_cli.zoo.registry import require_zoo
from dery_cli.zoo.whole import WholeDonor, fit_whole_donor, whole_block, whole_cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from.

    Args:
        assembly: Network, preprocessing and description.
        parent: Hash of what it came from.
        name: In words.
    """

    assembly: LoadedAssembly
    parent: str
    name: str


def start_from_assembly(workspace: Workspace, name: str, *, scratch: bool, seed: int) -> Start:
    """An assembly of the workspace, or its architecture with fresh weights.

    Raises:
        StaleError: There is none of that name.
        UsageError: It has no head.
    """
    path = workspace.assembly(name).parent
    assembly = load_assembly(path)
    if assembly.classes is None:
        raise UsageError(
            f"the assembly '{name}' has no head: it was made without labels",
            "dery assemble --data with class folders",
        )
    if scratch:
        network = build_network(assembly.record.data["network"], seed=seed)
        assembly = loaded(network, assembly.record)
    label = str(assembly.record.data["name"]) + (", from scratch" if scratch else "")
    return Start(assembly=assembly, parent=assembly.record.sha256, name=label)


def fit_donor(
    workspace: Workspace,
    donor: Donor,
    data: DataSet,
    indices: Sequence[int],
    *,
    crop: float,
    device: torch.device,
    workers: int = 0,
    advance: Callable[[int], None],
) -> WholeDonor:
    """A whole donor with a head fitted to some of the target's training images.

    Args:
        workspace: Of the zoo.
        donor: From the zoo.
        data: The target, with labels.
        indices: Training images to fit to.
        crop: Field of view.
        device: Where to compute.
        workers: Processes that decode images.
        advance: Told the images of each batch that is done.

    Raises:
        NotFiniteError: Its features are not finite.
        DeryError: Its weights changed.
    """
    batches = ImageBatches(
        data.train, indices, donor.input, crop=crop, batch_size=64, device=device, workers=workers
    )
    assert batches.labels is not None
    assert data.classes is not None

    def told() -> Iterator[torch.Tensor]:
        for x_NCHW in batches:
            yield x_NCHW
            advance(len(x_NCHW))

    try:
        return fit_whole_donor(
            donor, workspace, told(), batches.labels, len(data.classes), device=device
        )
    except NotFiniteError as error:
        raise NotFiniteError(
            f"{donor.name} has NaN or infinite features on {data.spec}",
            f"dery zoo remove {donor.name}",
        ) from error


def start_from_donor(workspace: Workspace, name: str, data: DataSet, crop: float) -> Start:
    """A whole donor with a head for the target: the control an assembly has to beat.

    Its weights are random until ``load_donor_weights``: a run that is there does not need them.

    Raises:
        UsageError: No such donor, or data without labels.
    """
    zoo = require_zoo(workspace)
    donor = zoo[name]
    check_labelled(data)
    assert data.classes is not None
    cost = whole_cost(zoo, name, len(data.classes))
    record = Artifact(
        kind="assembly",
        parents={"weights": donor.weights_sha256},
        data={
            "network": describe_network(
                zoo,
                [whole_block(zoo, name)],
                [None],
                classes=data.classes,
                crop=crop,
                sets=None,
            ),
            "name": f"whole {name}",
            "params": cost.params,
            "flops": cost.flops,
            "target": data.spec,
        },
    )
    assembly = loaded(build_network(record.data["network"]), record)
    return Start(assembly=assembly, parent=record.sha256, name=f"whole {name}")


def load_donor_weights(
    terminal: Terminal,
    workspace: Workspace,
    name: str,
    data: DataSet,
    start: Start,
    *,
    device: torch.device,
    workers: int,
) -> None:
    """Give the network of ``start_from_donor`` the donor's weights, and a closed-form head.

    Raises:
        DeryError: The weights changed, or the features are not finite.
    """
    with terminal.progress(f"fitting {name}", len(data.train)) as bar:
        whole = fit_donor(
            workspace,
            require_zoo(workspace)[name],
            data,
            range(len(data.train)),
            crop=start.assembly.transform.crop,
            device=device,
            workers=workers,
            advance=bar.advance,
        )
    start.assembly.network.load_state_dict(whole.network.state_dict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The target's images as the training loop takes them.

    Args:
        train: Augmented.
        valid: Chosen on; None where nothing is held out.
        test: Reported on; None where there are none.
        digest: Hash of the training images and the split.
        valid_fraction: Share held out to choose on.
        kept: Which of the target's training images are trained on.
        target: Data spec.
        target_skip_bad: Whether broken images are left out of these data.
    """

    train: Dataset[Any]
    valid: Dataset[Any] | None
    test: Dataset[Any] | None
    digest: str
    valid_fraction: float
    kept: tuple[int, ...]
    target: str
    target_skip_bad: bool


def make_splits(
    data: DataSet, start: Start, config: FinetuneConfig, valid_fraction: float
) -> Splits:
    """Split the target by seed and attach the preprocessing.

    Raises:
        UsageError: The data have no labels, or other classes than the network's head.
    """
    labels = check_labelled(data)
    check_classes(data, start.assembly.classes)
    kept = list(range(len(data.train)))
    held_out: list[int] = []
    if valid_fraction > 0:
        kept, held_out = stratified_holdout(labels, fraction=valid_fraction, seed=config.seed)
    transform = start.assembly.transform
    augmented = train_transform(transform.input, config, transform.crop)
    return Splits(
        train=as_dataset(ImageDataset(data.train, augmented, kept)),
        valid=as_dataset(ImageDataset(data.train, transform, held_out)) if held_out else None,
        test=None if data.test is None else as_dataset(ImageDataset(data.test, transform)),
        digest=fingerprint(data.train, [*kept, *held_out]),
        valid_fraction=valid_fraction,
        kept=tuple(kept),
        target=data.spec,
        target_skip_bad=data.skip_bad,
    )


def check_labelled(data: DataSet) -> Sequence[int]:
    """The labels of the training images.

    Raises:
        UsageError: There are none.
    """
    if data.classes is None or data.train.labels is None:
        raise UsageError(f"{data.spec} has no labels to fine-tune on", "give class folders")
    return data.train.labels


def check_classes(data: DataSet, classes: Sequence[str] | None) -> None:
    """Refuse data whose classes are not those of the network's head.

    Raises:
        UsageError: They differ; the message names some.
    """
    if classes is None or data.classes is None or tuple(data.classes) == tuple(classes):
        return
    raise UsageError(
        f"{data.spec} has other classes than the network: {difference(data.classes, classes)}",
        "assemble for these data: dery assemble --data SPEC",
    )


def difference(classes: Sequence[str], others: Sequence[str]) -> str:
    """What tells the first class names from the second, in words."""
    new = [name for name in classes if name not in others]
    missing = [name for name in others if name not in classes]
    return (_some("new", new) + _some("missing", missing)).strip() or "the same in another order"


def _some(what: str, names: Sequence[str]) -> str:
    return f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} " if names else ""
