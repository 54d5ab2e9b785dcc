"""The zoo's donors in the order of what they know of a target, before anything is assembled."""

from __future__ import annotations

import dataclasses

from dery_cli.data.batches import ImageStore
from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import open_checked
from dery_cli.data.target import Target
from dery_cli.errors import UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.features import probe_donors
from dery_cli.stages.assemble.inputs import choose_images
from dery_cli.stages.assemble.prepare import target_of
from dery_cli.stages.assemble.rank_config import RankConfig
from dery_cli.types import StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo, require_zoo
from dery_cli.zoo.whole import network_cost, whole_block

FEWEST = 8
"""Images, below which folds say nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedDonor:
    """A donor and what it knows of a target.

    Args:
        donor: Name.
        accuracy: Cross-validated top-1 of the linear probe on its pre-logits.
        cross_entropy: Cross-validated, in nats.
        params: Of the whole donor, with a head for the target.
        flops: Multiply-adds of one image, likewise.
        best_node: The node whose probe is the most accurate; the last one where others equal it.
        best_accuracy: Of that probe.
        nodes: How many units the donor has, which is its last node.
    """

    donor: str
    accuracy: float
    cross_entropy: float
    params: int
    flops: int
    best_node: int
    best_accuracy: float
    nodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The donors of a zoo by what they know of a target.

    Args:
        donors: The most accurate first; ties go to the lower cross-entropy, the fewer parameters.
        data: The target's spec.
        images: That the probes were cross-validated on.
        classes: How many there are.
    """

    donors: list[RankedDonor]
    data: str
    images: int
    classes: int


def rank_zoo(terminal: Terminal, space: Workspace, config: RankConfig) -> Ranking:
    """Ask every donor of the zoo what it knows of a target; answers are kept, and found again.

    ``dery assemble`` on the same images finds what was computed here in single precision.

    Raises:
        StaleError: The zoo is empty.
        UsageError: The images have no labels, or are fewer than ``FEWEST``.
        DeryError: A donor gives NaN or infinite features.
    """
    zoo = require_zoo(space)
    data = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    if data.train.labels is None or data.classes is None:
        raise UsageError(
            f"the images of {data.spec} have no labels, which a probe needs",
            "--data with class folders",
        )
    if len(data.train) < FEWEST:
        raise UsageError(
            f"the data '{config.data}' have {len(data.train)} training images",
            f"at least {FEWEST} are needed to cross-validate a probe",
        )
    chosen = choose_images(
        terminal, data, samples=config.samples, fit=config.samples, seed=config.seed
    )
    target = target_of(
        data,
        chosen,
        crop=config.crop,
        batch_size=config.batch_size,
        device=config.device,
        workers=config.workers,
    )
    with space.lock(terminal.note):
        probes = probe_donors(
            terminal,
            space,
            zoo,
            DonorPool(zoo, space, target.device, keep=False),
            target,
            _images(target, zoo),
            digest=fingerprint(data.train, target.all_indices),
            seed=config.seed,
            precision=config.computed_in,
        )
    classes = len(data.classes)
    found = [_ranked(zoo, name, probes[name], classes) for name in zoo.names()]
    found.sort(key=lambda one: (-one.accuracy, one.cross_entropy, one.params, one.donor))
    return Ranking(donors=found, data=data.spec, images=len(target.indices), classes=classes)


def _images(target: Target, zoo: Zoo) -> ImageStore:
    return ImageStore(
        target.data.train,
        target.indices,
        crop=target.crop,
        batch_size=target.batch_size,
        device=target.device,
        workers=target.workers,
        inputs=[donor.input for donor in zoo.donors.values()],
    )


def _ranked(
    zoo: Zoo, name: str, probes: list[tuple[float, float]], num_classes: int
) -> RankedDonor:
    cost = network_cost(zoo, (whole_block(zoo, name),), num_classes, StitchKind.LINEAR)
    accuracy, cross_entropy = probes[-1]
    best = max(range(len(probes)), key=lambda place: (probes[place][0], place))
    return RankedDonor(
        donor=name,
        accuracy=accuracy,
        cross_entropy=cross_entropy,
        params=cost.params,
        flops=cost.flops,
        best_node=best + 1,
        best_accuracy=probes[best][0],
        nodes=len(probes),
    )
