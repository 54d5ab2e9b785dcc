"""What fine-tuning starts from: the network, and the target's images in three parts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.network import AssembledNetwork, linear_head
from dery_cli.core.stitching.probe import fit_classifier
from dery_cli.data.batches import ImageBatches, as_dataset
from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.data.splits import stratified_holdout
from dery_cli.errors import DeryError, UsageError
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
from dery_cli.zoo.registry import load_donor, require_zoo
from dery_cli.zoo.whole import whole_cost, whole_model


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


class NotFiniteError(DeryError):
    """A donor's features on the target's images are NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeDonor:
    """A whole donor with a closed-form head for the target.

    Args:
        donor: From the zoo.
        network: On the device it was fitted on, in eval mode.
        accuracy: Cross-validated, of the head on the images it was fitted on.
    """

    donor: Donor
    network: AssembledNetwork
    accuracy: float


def whole_donor(
    workspace: Workspace,
    donor: Donor,
    data: DataSet,
    indices: Sequence[int],
    *,
    crop: float,
    device: torch.device,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> WholeDonor:
    """Fit a head for the target to a donor's last features, in one pass over some images.

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
    assert data.classes is not None
    dissection = load_donor(donor, workspace, device=device)
    block = copy.deepcopy(dissection.block(0, dissection.anatomy.num_units))
    network = AssembledNetwork([block], [None]).eval()
    batches = ImageBatches(
        data.train, indices, donor.input, crop=crop, batch_size=64, device=device, workers=workers
    )

    def told() -> Iterator[torch.Tensor]:
        for x_NCHW in batches:
            yield x_NCHW
            if advance is not None:
                advance(len(x_NCHW))

    x_NC = network_outputs(network, told())
    if not torch.isfinite(x_NC).all():
        raise NotFiniteError(
            f"{donor.name} has NaN or infinite features on {data.spec}",
            f"dery zoo remove {donor.name}",
        )
    labels = batches.labels
    assert labels is not None
    classifier = fit_classifier(x_NC, torch.tensor(labels), len(data.classes))
    network.head = linear_head(classifier).to(device)
    return WholeDonor(donor=donor, network=network, accuracy=classifier.accuracy)


def start_from_donor(workspace: Workspace, name: str, data: DataSet, crop: float) -> Start:
    """A whole donor with a head for the target: the control an assembly has to beat.

    Its weights are random until ``load_whole_donor``, which is not needed for a run that is there.

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
                [whole_model(zoo, name)],
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


def load_whole_donor(
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
        whole = whole_donor(
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
