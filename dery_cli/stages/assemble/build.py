"""Candidates as networks: scored by a proxy, tried, built with all that is asked for.

A candidate is built in two steps. Its stitches are fitted in closed form, joint by joint; this is
what a proxy sees. The complete network has weights of its own, stitches fitted with the labels and
trained further where the options say so, and a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import Judgement
from dery_cli.core.training_free.inputs import ProxyInputs
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import ImageDataset
from dery_cli.data.target import Target
from dery_cli.errors import DeryError
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import network_memory
from dery_cli.stages.assemble.features_store import PseudoClasses
from dery_cli.training.closed_form import (
    CompleteNetwork,
    FitOptions,
    FittedBuilder,
    Recipe,
    can_be_tried,
    num_trial_builds,
    try_out,
)
from dery_cli.training.evaluate import evaluate
from dery_cli.training.tuned_trial import TunedTrial, TunedTrials, trial_config
from dery_cli.types import StemKind, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.plugin import Proxy
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.transforms import EvalTransform


class Builder:
    """Builds candidates on the target's images: ``score`` all, ``try_out`` some, ``build``.

    In that order: what a step kept in memory makes room for the next.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        images: Has the target's images.
        target: Which they are.
        config: Options.
        scratch: A folder for files of trials, which is removed after each.
    """

    def __init__(
        self,
        zoo: Zoo,
        donors: DonorPool,
        images: ImageStore,
        target: Target,
        config: AssembleConfig,
        scratch: Path,
    ) -> None:
        self.zoo, self.donors, self.target, self.config = zoo, donors, target, config
        self._images, self._scratch = images, scratch
        self._options = FitOptions(
            stitch=StitchKind(config.stitch),
            stem=StemKind(config.stem),
            match=config.match,
            seed=config.seed,
        )
        # labels would flatter what is scored on the images that it was fitted on
        self._unlabelled: FittedBuilder | None = self._fitted_on(target, with_labels=False)
        self._final: FittedBuilder | None = None
        self._built: dict[tuple[object, ...], CompleteNetwork] = {}
        self.stand_in: PseudoClasses | None = None

    def _fitted_on(self, target: Target, *, with_labels: bool) -> FittedBuilder:
        return FittedBuilder(
            self.zoo, self.donors, self._images, target, self._options, with_labels=with_labels
        )

    def view(self, donor: str) -> Iterable[Tensor]:
        """The target's images to fit on, as a donor sees them."""
        return self._images.view(self.zoo[donor].input, self.target.indices)

    def score(self, candidate: Candidate, proxy: Proxy) -> Scored:
        """Build a candidate with closed-form stitches, fitted without labels, and ask the proxy."""
        if self._unlabelled is None:
            self._unlabelled = self._fitted_on(self.target, with_labels=False)
        built = self._unlabelled.stitched(candidate.refs)
        network = built.network
        if candidate.reestimated:
            network = self._unlabelled.reestimated(network, candidate.refs)
        value = proxy(self.proxy_inputs(network, candidate.refs[0].donor))
        score = float(value) if math.isfinite(value) else -math.inf
        return Scored(candidate=candidate, proxy=score, fits=built.fits)

    def proxy_inputs(self, network: AssembledNetwork, donor: str) -> ProxyInputs:
        """All the target's images, and a few: as many of each class, in an order of the seed."""
        target, config, stand_in = self.target, self.config, self.stand_in
        labels: Any = target.data.train.labels
        if stand_in is not None:
            labels = dict(zip(target.indices, stand_in.labels, strict=True))
        count = config.proxy_batches * config.proxy_batch_size
        few = choose_samples(target.indices, labels, count, config.seed)
        batches, some = self.view(donor), self._images.view(self.zoo[donor].input, few)
        return ProxyInputs(
            network=network,
            batches=lambda: iter(batches),
            labels=target.labels if stand_in is None else stand_in.labels,
            num_classes=target.num_classes if stand_in is None else stand_in.count,
            few=lambda: iter(some),
            few_labels=None if labels is None else [int(labels[index]) for index in few],
            num_batches=config.proxy_batches,
            batch_size=config.proxy_batch_size,
        )

    @property
    def can_try(self) -> bool:
        """Whether there are labels, and enough images to keep some of them from a network."""
        return can_be_tried(self.target)

    @property
    def trial_builds(self) -> int:
        """Networks that are built to try one candidate."""
        return num_trial_builds(self.target)

    def try_out(
        self, candidates: Sequence[Candidate], advance: Callable[[], None]
    ) -> list[Judgement]:
        """What images that a candidate was not fitted on say of it, complete with its stitches.

        What labels add to a fit counts for what it is worth on images that the fit has not seen.

        Args:
            candidates: To build.
            advance: Called after each of the ``trial_builds`` networks of each candidate.
        """
        self._unlabelled = None
        recipes = [_recipe(candidate) for candidate in candidates]
        return try_out(recipes, self.target, self._images, self.zoo, self._fitted_on_part, advance)

    def tune_out(self, entries: Sequence[Scored]) -> Iterator[TunedTrial]:
        """What images say of candidates that were fine-tuned for a few updates without them.

        Args:
            entries: Candidates that were tried; one after the other.
        """
        self._unlabelled = None
        config = trial_config(self.config.seed, self.config.workers)
        trials = TunedTrials(
            self.target, self._images, self.zoo, self._fitted_on_part, config, self._scratch
        )
        for entry in entries:
            assert entry.trial is not None
            yield trials.ask(_recipe(entry.candidate), entry.trial)

    def _fitted_on_part(self, part: Target) -> FittedBuilder:
        """With labels; what is delivered without the part to choose on is tried as it is."""
        if part == self.delivered_on:
            return self._final_builder()
        return self._fitted_on(part, with_labels=True)

    @property
    def delivered_on(self) -> Target:
        """The images that what is delivered is fitted on."""
        if self.config.purpose == "untrained":
            return self.target.altogether(self.config.fit_samples, self.config.seed)
        return self.target.part(self.target.indices)

    def _final_builder(self) -> FittedBuilder:
        if self._final is None and self.target.labels is None:
            self._final = self._unlabelled
        if self._final is None:
            self._unlabelled = None
            labelled = self.target.labels is not None
            self._final = self._fitted_on(self.delivered_on, with_labels=labelled)
        return self._final

    def build(self, candidate: Candidate, chosen: Judgement | None) -> CompleteNetwork:
        """The candidate as a network of its own; with labels in its stitches, and with a head.

        Without labels it has no head, and plain stitches.

        Args:
            candidate: To build.
            chosen: What trying it came to; None tries it now, where that can be done.
        """
        if candidate.key not in self._built:
            if chosen is None and self.can_try:
                (chosen,) = self.try_out([candidate], lambda: None)
            self._built[candidate.key] = self._final_builder().complete(_recipe(candidate), chosen)
        return self._built[candidate.key]

    def test_top1(self, candidate: Candidate, chosen: Judgement | None) -> float | None:
        """Of the complete network on the test images, which nothing was chosen on."""
        test, classes = self.target.data.test, self.target.data.classes
        if test is None or classes is None:
            return None
        transform = EvalTransform(self.zoo[candidate.refs[0].donor].input, self.target.crop)
        return evaluate(
            self.build(candidate, chosen).network,
            as_dataset(ImageDataset(test, transform)),
            classes=classes,
            batch_size=self.target.batch_size,
            device=self.target.device,
            workers=self.target.workers,
        ).top1


def _recipe(candidate: Candidate) -> Recipe:
    return Recipe(refs=candidate.refs, reestimated=candidate.reestimated)


def check_size(
    network: AssembledNetwork,
    candidate: Candidate,
    input_size: Sequence[int],
    memory_batch: int,
) -> None:
    """Count the built network again; its memory only where there is a budget for it.

    Raises:
        DeryError: It is not the size that the program promised.
    """
    params = count_params(network)
    flops = count_flops(network, torch.zeros(1, *input_size))
    if (params, flops) != (candidate.params, candidate.flops):
        raise DeryError(
            f"the built network has {params:,} params and {flops:,} multiply-adds, the program "
            f"counted {candidate.params:,} and {candidate.flops:,}",
            "please report this as a bug",
        )
    if candidate.memory is not None:
        memory = network_memory(network, tuple(input_size), memory_batch)
        if memory != candidate.memory:
            raise DeryError(
                f"the built network takes {memory:,} bytes, the program counted "
                f"{candidate.memory:,}",
                "please report this as a bug",
            )
