"""Candidates as networks: scored by a proxy, cross-validated, built with all that is asked for.

A candidate is built in two steps. Its stitches are fitted in closed form, joint by joint; this is
what a proxy sees. The complete network has weights of its own, stitches fitted with the labels and
trained further where the options say so, and a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.proxies import ProxyInputs
from dery_cli.core.scoring import network_outputs, top1
from dery_cli.core.stitching.fit import StitchFit, reestimate_batch_norm
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.match import Match, match_features
from dery_cli.core.stitching.network import AssembledNetwork, BuiltNetwork, NetworkBuilder
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.sets import ImageDataset
from dery_cli.errors import DeryError
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import network_memory
from dery_cli.stages.assemble.target import Target
from dery_cli.training.evaluate import evaluate
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.plugin import Proxy
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.transforms import EvalTransform

FOLDS = 3
"""A finalist is built so many times, each time without one part, which it is then asked about."""

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


class _FittedBuilder:
    """Builds networks that are fitted on the images of a target, or of a part of it.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        images: Has the target's images.
        target: Which of them to use.
        config: Options.
        with_labels: Whether stitches are fitted with the labels.
    """

    def __init__(
        self,
        zoo: Zoo,
        donors: DonorPool,
        images: ImageStore,
        target: Target,
        config: AssembleConfig,
        *,
        with_labels: bool,
    ) -> None:
        self._zoo, self._donors, self._images = zoo, donors, images
        self._target, self._config = target, config
        self._stitched = NetworkBuilder(
            donors,
            lambda name: self._view(name, fit=True),
            labels=target.fit_labels if with_labels else None,
            kind=StitchKind(config.stitch),
            seed=config.seed,
        )

    def _view(self, donor: str, *, fit: bool = False) -> Iterable[Tensor]:
        """The target's images as a donor sees them, all or those of fits."""
        indices = self._target.fit_indices if fit else self._target.indices
        return self._images.view(self._zoo[donor].input, indices)

    def stitched(self, refs: Sequence[BlockRef]) -> BuiltNetwork:
        """Blocks and fitted stitches; they may be shared with other networks of this builder."""
        return self._stitched.build(refs)

    def complete(self, candidate: Candidate) -> CompleteNetwork:
        """A network of its own, with all that the options ask for."""
        refs = candidate.refs
        built = self.stitched(refs)
        network = built.network.copy()
        if candidate.reestimated:
            network = self.reestimated(network, candidate)
        match = self._match(network, refs)
        labels, num_classes = self._target.labels, self._target.num_classes
        if labels is not None and num_classes is not None:
            fit_head(network, self._view(refs[0].donor), labels, num_classes)
        return CompleteNetwork(network.eval(), built.fits, match)

    def reestimated(self, network: AssembledNetwork, candidate: Candidate) -> AssembledNetwork:
        """A whole donor with batch-norm statistics of the target's images."""
        network = network.copy()
        donor = candidate.refs[0].donor
        reestimate_batch_norm(network.blocks[0], lambda: self._view(donor, fit=True))
        return network

    def _match(self, network: AssembledNetwork, refs: Sequence[BlockRef]) -> Match | None:
        """Train the stitches to give the last donor's pre-logits, where that is asked for."""
        if not self._config.match or not network.stitches:
            return None
        last = refs[-1]
        whole = self._donors[last.donor].block(0, last.stop).eval()
        wanted_NC = network_outputs(whole, self._view(last.donor, fit=True))
        x_NCHW = torch.cat(list(self._view(refs[0].donor, fit=True)))
        return match_features(
            network, x_NCHW, wanted_NC.to(self._target.device), seed=self._config.seed
        )


class Builder:
    """Builds candidates on the target's images: ``score`` all, ``cross_validate`` some, ``build``.

    In that order: what a step kept in memory makes room for the next.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        images: Has the target's images.
        target: Which they are.
        config: Options.
    """

    def __init__(
        self,
        zoo: Zoo,
        donors: DonorPool,
        images: ImageStore,
        target: Target,
        config: AssembleConfig,
    ) -> None:
        self.zoo, self.donors, self.target, self.config = zoo, donors, target, config
        self._images = images
        # labels would flatter what is scored on the images that it was fitted on
        self._unlabelled: _FittedBuilder | None = self._fitted_on(target, with_labels=False)
        self._final: _FittedBuilder | None = None
        self._built: dict[tuple[object, ...], CompleteNetwork] = {}

    def _fitted_on(self, target: Target, *, with_labels: bool) -> _FittedBuilder:
        return _FittedBuilder(
            self.zoo, self.donors, self._images, target, self.config, with_labels=with_labels
        )

    def view(self, donor: str) -> Iterable[Tensor]:
        """The target's images as a donor sees them."""
        return self._images.view(self.zoo[donor].input, self.target.indices)

    def score(self, candidate: Candidate, proxy: Proxy) -> Scored:
        """Build a candidate with closed-form stitches, fitted without labels, and ask the proxy."""
        if self._unlabelled is None:
            self._unlabelled = self._fitted_on(self.target, with_labels=False)
        built = self._unlabelled.stitched(candidate.refs)
        network = built.network
        if candidate.reestimated:
            network = self._unlabelled.reestimated(network, candidate)
        batches = self.view(candidate.refs[0].donor)
        value = proxy(
            ProxyInputs(
                network=network,
                batches=lambda: iter(batches),
                labels=self.target.labels,
                num_classes=self.target.num_classes,
            )
        )
        score = float(value) if math.isfinite(value) else -math.inf
        return Scored(candidate=candidate, proxy=score, fits=built.fits)

    @property
    def can_cross_validate(self) -> bool:
        """Whether there are labels, and enough images to hold some of them out."""
        return self.target.labels is not None and len(self.target.indices) >= MIN_IMAGES

    def cross_validate(
        self, candidates: Sequence[Candidate], advance: Callable[[], None]
    ) -> list[float]:
        """Accuracy of each on the target's images, all of them held out of a build in turn.

        What labels add to a fit counts for what it is worth on images that the fit has not seen.

        Args:
            candidates: To build, complete with stitches and head.
            advance: Called after each of the ``FOLDS`` networks of each candidate.
        """
        self._unlabelled = None
        hits = [0.0] * len(candidates)
        for fitted_on, held_out in self._folds():
            builder = self._fitted_on(fitted_on, with_labels=True)
            label_N = torch.tensor(held_out.labels)
            for number, candidate in enumerate(candidates):
                network = builder.complete(candidate).network
                spec = self.zoo[candidate.refs[0].donor].input
                logits_NK = network_outputs(network, self._images.view(spec, held_out.indices))
                hits[number] += float(top1(logits_NK, label_N)) * len(label_N)
                advance()
        return [count / len(self.target.indices) for count in hits]

    def _folds(self) -> Iterator[tuple[Target, Target]]:
        """The target without one part, and that part; classes are spread evenly over the parts."""
        fit, labels = set(self.target.fit_indices), self.target.labels
        assert labels is not None
        # those of a class that stitches are fitted on are spread apart from the others
        kind_N = torch.tensor(
            [2 * k + (i in fit) for i, k in zip(self.target.indices, labels, strict=True)]
        )
        part_of = dict(
            zip(self.target.indices, stratified_folds(kind_N, FOLDS).tolist(), strict=True)
        )
        for part in range(FOLDS):
            yield (
                self.target.part([index for index, of in part_of.items() if of != part]),
                self.target.part([index for index, of in part_of.items() if of == part]),
            )

    def build(self, candidate: Candidate) -> CompleteNetwork:
        """The candidate as a network of its own; with labels in its stitches, and with a head.

        Without labels it has no head, and plain stitches.
        """
        if candidate.key not in self._built:
            if self._final is None and self.target.labels is None:
                self._final = self._unlabelled
            elif self._final is None:
                self._unlabelled, self._final = None, self._fitted_on(self.target, with_labels=True)
            assert self._final is not None
            self._built[candidate.key] = self._final.complete(candidate)
        return self._built[candidate.key]

    def test_top1(self, candidate: Candidate) -> float | None:
        """Of the complete network on the test images, which nothing was chosen on."""
        test, classes = self.target.data.test, self.target.data.classes
        if test is None or classes is None:
            return None
        transform = EvalTransform(self.zoo[candidate.refs[0].donor].input, self.target.crop)
        return evaluate(
            self.build(candidate).network,
            as_dataset(ImageDataset(test, transform)),
            classes=classes,
            batch_size=self.target.batch_size,
            device=self.target.device,
            workers=self.target.workers,
        ).top1


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
