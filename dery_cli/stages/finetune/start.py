"""What fine-tuning starts from: an assembly, its bare architecture, or a whole donor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from dery_cli.core.assembly.notation import format_network
from dery_cli.core.stitching.head import NotFiniteError
from dery_cli.data.batches import ImageBatches
from dery_cli.data.classes import training_labels
from dery_cli.data.sets import DataSet
from dery_cli.errors import UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.records import Artifact
from dery_cli.runtime.terminal import Terminal
from dery_cli.types import Donor, StitchKind
from dery_cli.zoo.networks import (
    LoadedAssembly,
    build_network,
    describe_network,
    loaded,
    read_network,
)
from dery_cli.zoo.registry import require_zoo
from dery_cli.zoo.schemas import ASSEMBLY
from dery_cli.zoo.whole import WholeDonor, fit_whole_donor, network_cost, whole_block


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
    assembly = read_network(workspace.assembly(name), ASSEMBLY)
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
    training_labels(data)
    assert data.classes is not None
    refs = [whole_block(zoo, name)]
    cost = network_cost(zoo, refs, len(data.classes), StitchKind.LINEAR)
    words = format_network(refs)
    record = Artifact(
        kind=ASSEMBLY,
        parents={"weights": donor.weights_sha256},
        data={
            "network": describe_network(
                zoo,
                refs,
                [None],
                classes=data.classes,
                crop=crop,
                sets=None,
            ),
            "name": words,
            "params": cost.params,
            "flops": cost.flops,
            "target": data.spec,
        },
    )
    assembly = loaded(build_network(record.data["network"]), record)
    return Start(assembly=assembly, parent=record.sha256, name=words)


def load_donor_weights(
    terminal: Terminal,
    workspace: Workspace,
    name: str,
    data: DataSet,
    start: Start,
    kept: Sequence[int],
    *,
    device: torch.device,
    workers: int,
) -> None:
    """Give the network of ``start_from_donor`` the donor's weights, and a closed-form head.

    The head is fitted on the training images ``kept``, and not on those to choose on.

    Raises:
        DeryError: The weights changed, or the features are not finite.
    """
    with terminal.progress(f"fitting {name}", len(kept)) as bar:
        whole = fit_donor(
            workspace,
            require_zoo(workspace)[name],
            data,
            kept,
            crop=start.assembly.transform.crop,
            device=device,
            workers=workers,
            advance=bar.advance,
        )
    start.assembly.network.load_state_dict(whole.network.state_dict())
