"""An assembly fitted anew, without the images that a run holds out to choose on.

What an assembly delivers was fitted on all training images where there were too few to hold some
out. A run that holds some out all the same would choose on images that its start knows; so stitches
and head are fitted again first, by the assembly's own options, on the others alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from dery_cli.data.batches import ImageStore
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import DataSet
from dery_cli.data.target import Target
from dery_cli.errors import StaleError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.records import Artifact
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.finetune.start import Start
from dery_cli.training.closed_form import (
    FitOptions,
    FittedBuilder,
    Recipe,
    can_be_tried,
    num_trial_builds,
    try_out,
)
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo, require_zoo

BATCH_SIZE = 64


def refit_start(
    terminal: Terminal,
    workspace: Workspace,
    start: Start,
    data: DataSet,
    kept: Sequence[int],
    *,
    device: torch.device,
    workers: int,
) -> None:
    """Fit the stitches and the head of an assembly on some of the target's training images.

    Args:
        terminal: Shows progress.
        workspace: Of the zoo.
        start: Its network gets the new weights.
        data: The target.
        kept: Training images to fit on.
        device: Where to compute.
        workers: Processes that decode images.

    Raises:
        StaleError: The zoo does not have the assembly's donors as they were.
        DeryError: A donor's weights changed.
    """
    record = start.assembly.record
    zoo = require_zoo(workspace)
    recipe = _recipe(record, zoo)
    seed, options = record.seed or 0, record.options
    labels = data.train.labels
    indices = choose_samples(kept, labels, options["target_samples"], seed)
    target = Target(
        data=data,
        indices=indices,
        fit_indices=choose_samples(indices, labels, options["fit_samples"], seed),
        crop=start.assembly.transform.crop,
        batch_size=BATCH_SIZE,
        device=device,
        workers=workers,
    )
    donors = DonorPool(zoo, workspace, device)
    images = ImageStore(
        data.train,
        indices,
        crop=target.crop,
        batch_size=BATCH_SIZE,
        device=device,
        workers=workers,
    )
    fit = FitOptions(stitch=StitchKind(options["stitch"]), match=options["match"], seed=seed)

    def fitted_on(part: Target) -> FittedBuilder:
        return FittedBuilder(zoo, donors, images, part, fit, with_labels=True)

    tries = num_trial_builds(target) if can_be_tried(target) else 0
    with terminal.progress("fitting without the images to choose on", tries + 1) as bar:
        chosen = None
        if tries:
            (chosen,) = try_out([recipe], target, images, zoo, fitted_on, bar.advance)
        network = fitted_on(target).complete(recipe, chosen).network
        bar.advance()
    start.assembly.network.load_state_dict(network.state_dict())


def _recipe(record: Artifact, zoo: Zoo) -> Recipe:
    """The network that a record describes, of donors that are what they were."""
    description = record.data["network"]
    refs: list[BlockRef] = []
    for block, joint in zip(description["blocks"], description["joints"], strict=True):
        name = block["donor"]
        donor = zoo.donors.get(name)
        if (
            donor is None
            or donor.weights_sha256 != block["weights_sha256"]
            or list(donor.input.image_size) != block["image_size"]
        ):
            raise StaleError(
                f"{name} is not in the zoo as it was, so the assembly cannot be fitted without the "
                "images to choose on",
                "--valid-fraction 0, or dery assemble anew",
            )
        ref = BlockRef(name, block["start"], block["stop"])
        follows = bool(refs) and (refs[-1].donor, refs[-1].stop) == (name, ref.start)
        refs.append(dataclasses.replace(ref, adapter=follows and joint is not None))
    return Recipe(refs=tuple(refs), reestimated=record.data["batch_norm"])
