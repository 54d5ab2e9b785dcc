"""Networks that are fitted in closed form on a target's images: stitches, batch norm, head.

Labels enter the stitches, so the images whose labels did are no judges of a network. ``Trials``
builds it without some of the images, asks about these, and so tells its accuracy and how its head
is to be fitted: on the target's part to choose on where there is one, else on folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.fit import StitchFit, reestimate_batch_norm
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.match import Match, match_features
from dery_cli.core.stitching.network import AssembledNetwork, BuiltNetwork, NetworkBuilder
from dery_cli.core.stitching.probe import HeldOut, Judgement, judge, stratified_folds
from dery_cli.data.batches import ImageStore
from dery_cli.data.target import Target
from dery_cli.types import BlockRef, StemKind, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo

FOLDS = 3
"""Without a part to choose on a network is built so many times, each time without one fold."""

MIN_IMAGES = 40
"""Parts of fewer target images would tell nothing."""


@dataclasses.dataclass(frozen=True)
class CompleteNetwork:
    """A network as it would be written.

    Args:
        network: With a head where the target has labels, in eval mode; it shares nothing.
        fits: For each block, how well the stitch in front of it was fitted, or None.
        match: What training the stitches came to, where that was asked for.
    """

    network: AssembledNetwork
    fits: tuple[StitchFit | None, ...]
    match: Match | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How networks are fitted.

    Args:
        stitch: What stitches are made of.
        stem: What networks begin with.
        match: Whether stitches are trained to give the last donor's pre-logits.
        seed: Of whatever is drawn.
    """

    stitch: StitchKind
    match: bool
    seed: int
    stem: StemKind = StemKind.DONOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which network: its blocks, and whether a whole donor gets the target's batch norm."""

    refs: tuple[BlockRef, ...]
    reestimated: bool = False


class FittedBuilder:
    """Builds networks that are fitted on the images of a target, or of a part of it.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        images: Has the target's images.
        target: Which of them to use.
        options: How to fit.
        with_labels: Whether stitches are fitted with the labels.
    """

    def __init__(
        self,
        zoo: Zoo,
        donors: DonorPool,
        images: ImageStore,
        target: Target,
        options: FitOptions,
        *,
        with_labels: bool,
    ) -> None:
        self._zoo, self._donors, self._images = zoo, donors, images
        self._target, self._options = target, options
        self._stitched = NetworkBuilder(
            donors,
            lambda name: self._view(name, fit=True),
            labels=target.fit_labels if with_labels else None,
            kind=options.stitch,
            stem=options.stem,
            seed=options.seed,
        )

    def _view(self, donor: str, *, fit: bool = False) -> Iterable[Tensor]:
        """The target's images as a donor sees them, all or those of fits."""
        indices = self._target.fit_indices if fit else self._target.indices
        return self._images.view(self._zoo[donor].input, indices)

    def stitched(self, refs: Sequence[BlockRef]) -> BuiltNetwork:
        """Blocks and fitted stitches; they may be shared with other networks of this builder."""
        return self._stitched.build(refs)

    def headless(self, recipe: Recipe) -> CompleteNetwork:
        """A network of its own with all that the options ask for, but for a head."""
        built = self.stitched(recipe.refs)
        network = built.network.copy()
        if recipe.reestimated:
            self._reestimate(network, recipe.refs)
        match = self._match(network, recipe.refs)
        return CompleteNetwork(network.eval(), built.fits, match)

    def for_trial(self, recipe: Recipe) -> AssembledNetwork:
        """The same to be asked only: what nothing changes is shared with other networks."""
        if recipe.reestimated or self._options.match:
            return self.headless(recipe).network
        return self.stitched(recipe.refs).network

    def complete(self, recipe: Recipe, chosen: Judgement | None) -> CompleteNetwork:
        """A network of its own, with a head where the target has labels.

        Args:
            recipe: Which.
            chosen: How the head is fitted; None cross-validates on the images it is fitted on.
        """
        built = self.headless(recipe)
        labels, num_classes = self._target.labels, self._target.num_classes
        if labels is not None and num_classes is not None:
            fit_head(built.network, self._view(recipe.refs[0].donor), labels, num_classes, chosen)
        return built

    def reestimated(self, network: AssembledNetwork, refs: Sequence[BlockRef]) -> AssembledNetwork:
        """A whole donor, of its own, with batch-norm statistics of the target's images."""
        network = network.copy()
        self._reestimate(network, refs)
        return network

    def _reestimate(self, network: AssembledNetwork, refs: Sequence[BlockRef]) -> None:
        donor = refs[0].donor
        reestimate_batch_norm(network.blocks[0], lambda: self._view(donor, fit=True))

    def _match(self, network: AssembledNetwork, refs: Sequence[BlockRef]) -> Match | None:
        """Train the stitches to give the last donor's pre-logits, where that is asked for."""
        if not self._options.match or not network.stitches:
            return None
        last = refs[-1]
        whole = self._donors[last.donor].block(0, last.stop).eval()
        wanted_NC = network_outputs(whole, self._view(last.donor, fit=True))
        x_NCHW = torch.cat(list(self._view(refs[0].donor, fit=True)))
        return match_features(
            network, x_NCHW, wanted_NC.to(self._target.device), seed=self._options.seed
        )


def can_be_tried(target: Target) -> bool:
    """Whether there are labels, and images enough to keep some of them from a network."""
    return target.labels is not None and len(target.all_indices) >= MIN_IMAGES


def num_trial_builds(target: Target) -> int:
    """Networks that are built to try one."""
    return 1 if target.valid_indices else FOLDS


def try_out(
    recipes: Sequence[Recipe],
    target: Target,
    images: ImageStore,
    zoo: Zoo,
    fitted_on: Callable[[Target], FittedBuilder],
    advance: Callable[[], None],
) -> list[Judgement]:
    """Ask networks about target images that they were not fitted on.

    Args:
        recipes: To build, complete with stitches.
        target: Its part to choose on is asked about; without one, each fold in turn.
        images: Has the images of both parts.
        zoo: The donors.
        fitted_on: A builder with labels for a part of the target.
        advance: Called after each of the ``num_trial_builds`` networks of each recipe.
    """
    parts: list[list[HeldOut]] = [[] for _ in recipes]
    for kept, asked_N in divisions(target):
        builder = fitted_on(kept)
        for place, recipe in enumerate(recipes):
            network = builder.for_trial(recipe)
            view = images.view(zoo[recipe.refs[0].donor].input, target.all_indices)
            parts[place].append(HeldOut(network_outputs(network, view), asked_N))
            advance()
    labels, num_classes = target.all_labels, target.num_classes
    assert labels is not None
    assert num_classes is not None
    label_N = torch.tensor(labels)
    return [judge(some, label_N, num_classes) for some in parts]


def divisions(target: Target) -> Iterator[tuple[Target, Tensor]]:
    """What a network is fitted on, and which of ``all_indices`` it is then asked about."""
    count, asked = len(target.all_indices), len(target.valid_indices)
    if asked:
        yield target.part(target.indices), torch.arange(count) >= count - asked
        return
    fit, labels = set(target.fit_indices), target.labels
    assert labels is not None
    # those of a class that stitches are fitted on are spread apart from the others
    kind_N = torch.tensor([2 * k + (i in fit) for i, k in zip(target.indices, labels, strict=True)])
    fold_N = stratified_folds(kind_N, FOLDS)
    for fold in range(FOLDS):
        kept = [
            index for index, of in zip(target.indices, fold_N.tolist(), strict=True) if of != fold
        ]
        yield target.part(kept), fold_N == fold
