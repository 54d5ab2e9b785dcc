"""The finetune stage: which network starts, on which images, and what is kept of the run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from dery_cli.artifacts import Artifact, Workspace
from dery_cli.assembly_store import (
    LoadedAssembly,
    build_network,
    describe_network,
    load_assembly,
    loaded,
)
from dery_cli.core.network import AssembledNetwork, linear_head
from dery_cli.core.proxies import pre_logits
from dery_cli.core.ridge import fit_classifier
from dery_cli.data import DataSet, ImageDataset, fingerprint, stratified_holdout
from dery_cli.errors import UsageError
from dery_cli.loading import ImageBatches, as_dataset
from dery_cli.reassembly import network_cost, whole_model
from dery_cli.training.augment import train_transform
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.zoo import load_donor, require_zoo


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


def start_from_donor(
    workspace: Workspace, name: str, data: DataSet, crop: float, device: torch.device
) -> Start:
    """A whole donor with a closed-form head for the target: the control an assembly has to beat.

    Raises:
        UsageError: No such donor, or data without labels.
    """
    zoo = require_zoo(workspace)
    donor = zoo[name]
    if data.classes is None or data.train.labels is None:
        raise UsageError(f"{data.spec} has no labels to fine-tune on", "give class folders")
    ref = whole_model(zoo, name)
    dissection = load_donor(donor, workspace, device=device)
    block = copy.deepcopy(dissection.block(ref.start, ref.stop))
    network = AssembledNetwork([block], [None]).eval()
    batches = ImageBatches(
        data.train,
        range(len(data.train)),
        donor.input,
        crop=crop,
        batch_size=64,
        device=device,
    )
    x_NC = pre_logits(network, batches)
    classifier = fit_classifier(
        x_NC, torch.tensor([int(label) for label in data.train.labels]), len(data.classes)
    )
    network.head = linear_head(classifier)
    cost = network_cost(zoo, [ref], len(data.classes))
    record = Artifact(
        kind="assembly",
        parents={"weights": donor.weights_sha256},
        data={
            "network": describe_network(
                zoo, [ref], [None], classes=data.classes, crop=crop, sets=None
            ),
            "name": f"whole {name}",
            "params": cost.params,
            "flops": cost.flops,
            "target": data.spec,
        },
    )
    return Start(assembly=loaded(network.cpu(), record), parent=record.sha256, name=f"whole {name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The target's images as the training loop takes them.

    Args:
        train: Augmented.
        valid: Chosen on; None where nothing is held out.
        test: Reported on; None where there are none.
        digest: Hash of the training images and the split.
        valid_fraction: Share held out to choose on.
    """

    train: Dataset[Any]
    valid: Dataset[Any] | None
    test: Dataset[Any] | None
    digest: str
    valid_fraction: float


def make_splits(
    data: DataSet, start: Start, config: FinetuneConfig, valid_fraction: float
) -> Splits:
    """Split the target by seed and attach the preprocessing.

    Raises:
        UsageError: The data have no labels, or other classes than the network's head.
    """
    classes = start.assembly.classes
    if data.classes is None or data.train.labels is None:
        raise UsageError(f"{data.spec} has no labels to fine-tune on", "give class folders")
    check_classes(data, classes)
    kept = list(range(len(data.train)))
    held_out: list[int] = []
    if valid_fraction > 0:
        kept, held_out = stratified_holdout(
            data.train.labels, fraction=valid_fraction, seed=config.seed
        )
    transform = start.assembly.transform
    augmented = train_transform(transform.input, config, transform.crop)
    return Splits(
        train=as_dataset(ImageDataset(data.train, augmented, kept)),
        valid=as_dataset(ImageDataset(data.train, transform, held_out)) if held_out else None,
        test=None if data.test is None else as_dataset(ImageDataset(data.test, transform)),
        digest=fingerprint(data.train, [*kept, *held_out]),
        valid_fraction=valid_fraction,
    )


def check_classes(data: DataSet, classes: Sequence[str] | None) -> None:
    """Refuse data whose classes are not those of the network's head.

    Raises:
        UsageError: They differ; the message names some.
    """
    if classes is None or data.classes is None or tuple(data.classes) == tuple(classes):
        return
    other = [name for name in data.classes if name not in classes]
    missing = [name for name in classes if name not in data.classes]
    difference = _some("new", other) + _some("missing", missing) or "the same in another order"
    raise UsageError(
        f"{data.spec} has other classes than the network: {difference.strip()}",
        "assemble for these data: dery assemble --data SPEC",
    )


def _some(what: str, names: Sequence[str]) -> str:
    return f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} " if names else ""


def run_artifact(
    start: Start, splits: Splits, config: FinetuneConfig, data: Mapping[str, Any]
) -> Artifact:
    """The record of a run; ``workers`` changes no number and is left out."""
    options = {key: value for key, value in config.to_json().items() if key != "workers"}
    return Artifact(
        kind="run",
        parents={"network": start.parent, "data": splits.digest},
        options={**options, **data},
        seed=config.seed,
    )
