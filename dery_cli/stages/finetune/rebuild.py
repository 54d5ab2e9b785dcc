"""An assembly fitted anew on some of the target's images, of the same donors.

What an assembly delivers was fitted on all training images where there were too few to hold some
out. Whoever then holds some out, to choose on or to try rates on, needs a network that does not
know them: the same blocks, with stitches and head fitted again by the assembly's own options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import Judgement
from dery_cli.data.batches import ImageStore
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import DataSet
from dery_cli.data.target import Target
from dery_cli.errors import StaleError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.finetune.start import Start
from dery_cli.training.closed_form import FitOptions, FittedBuilder, Recipe
from dery_cli.types import BlockRef, StemKind, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo, require_zoo

BATCH_SIZE = 64


class Rebuilder:
    """Makes the network of a start again, without some of the images.

    Args:
        space: Of the zoo.
        start: An assembly.
        data: The target.
        indices: Training images that any of the networks may be fitted on.
        device: Where to compute.
        workers: Processes that decode images.

    Raises:
        StaleError: The zoo does not have the assembly's donors as they were.
    """

    def __init__(
        self,
        space: Workspace,
        start: Start,
        data: DataSet,
        indices: Sequence[int],
        *,
        device: torch.device,
        workers: int,
    ) -> None:
        record = start.assembly.record
        self._options, self._seed = record.options, record.seed or 0
        self._zoo = require_zoo(space)
        self._recipe = _recipe(start, self._zoo)
        self._donors = DonorPool(self._zoo, space, device)
        self._target = Target(
            data=data,
            indices=tuple(indices),
            fit_indices=(),
            crop=start.assembly.transform.crop,
            batch_size=BATCH_SIZE,
            device=device,
            workers=workers,
        )
        self._images = ImageStore(
            data.train,
            indices,
            crop=self._target.crop,
            batch_size=BATCH_SIZE,
            device=device,
            workers=workers,
        )
        head = record.data["head"]
        self._chosen = None if head is None else Judgement(accuracy=0.0, cross_entropy=0.0, **head)

    def fitted_on(self, indices: Sequence[int]) -> AssembledNetwork:
        """The network as these images alone would have made it, in eval mode.

        Raises:
            DeryError: A donor's weights changed.
        """
        labels, options = self._target.data.train.labels, self._options
        chosen = choose_samples(indices, labels, options["target_samples"], self._seed)
        target = dataclasses.replace(
            self._target,
            indices=chosen,
            fit_indices=choose_samples(chosen, labels, options["fit_samples"], self._seed),
        )
        fit = FitOptions(
            stitch=StitchKind(options["stitch"]),
            match=options["match"],
            seed=self._seed,
            stem=StemKind(options.get("stem", StemKind.DONOR)),
        )
        builder = FittedBuilder(
            self._zoo, self._donors, self._images, target, fit, with_labels=True
        )
        return builder.complete(self._recipe, self._chosen).network


def refit_start(
    terminal: Terminal,
    space: Workspace,
    start: Start,
    data: DataSet,
    kept: Sequence[int],
    *,
    device: torch.device,
    workers: int,
) -> None:
    """Give the network of a start the weights that some of the images alone would have made.

    Args:
        terminal: Shows progress.
        space: Of the zoo.
        start: An assembly.
        data: The target.
        kept: Training images to fit on.
        device: Where to compute.
        workers: Processes that decode images.

    Raises:
        StaleError: The zoo does not have the assembly's donors as they were.
        DeryError: A donor's weights changed.
    """
    with terminal.progress("fitting without the images to choose on", 1) as bar:
        builder = Rebuilder(space, start, data, kept, device=device, workers=workers)
        start.assembly.network.load_state_dict(builder.fitted_on(kept).state_dict())
        bar.advance()


def _recipe(start: Start, zoo: Zoo) -> Recipe:
    """The network that a record describes, of donors that are what they were."""
    data = start.assembly.record.data
    refs: list[BlockRef] = []
    network = data["network"]
    for block, joint in zip(network["blocks"], network["joints"], strict=True):
        name = block["donor"]
        donor = zoo.donors.get(name)
        if (
            donor is None
            or donor.weights_sha256 != block["weights_sha256"]
            or list(donor.input.image_size) != list(block["image_size"])
        ):
            raise StaleError(
                f"{name} is not in the zoo as it was, so the assembly cannot be fitted without the "
                "images to choose on",
                "--valid-fraction 0, or dery assemble anew",
            )
        follows = bool(refs) and (refs[-1].donor, refs[-1].stop) == (name, block["start"])
        adapter = follows and joint is not None
        refs.append(BlockRef(name, block["start"], block["stop"], adapter=adapter))
    return Recipe(refs=tuple(refs), reestimated=data["batch_norm"])
