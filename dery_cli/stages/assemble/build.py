"""Candidates as networks: scored, tried as they would be delivered, and finished for use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.proxies import ProxyInputs
from dery_cli.core.scoring import network_outputs, top1
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.sets import ImageDataset
from dery_cli.errors import DeryError
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import network_memory
from dery_cli.stages.assemble.target import Target
from dery_cli.stages.assemble.workshop import Delivered, Workshop
from dery_cli.training.evaluate import evaluate
from dery_cli.types import BlockRef
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.plugin import Proxy
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.transforms import EvalTransform

TRIAL_FOLDS = 3
"""A finalist is made so many times, each time without one part, which it is then asked about."""

MIN_TRIAL_IMAGES = 40
"""Parts of fewer target images would tell nothing."""


class NetworkMaker:
    """Builds candidates on the target's images: ``score`` all, ``try_out`` some, ``finish`` few.

    In that order: what a step kept in memory makes room for the next.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        target: Target images.
        config: Options.
    """

    def __init__(self, zoo: Zoo, donors: DonorPool, target: Target, config: AssembleConfig) -> None:
        self.zoo, self.donors, self.target, self.config = zoo, donors, target, config
        self._images = ImageStore(
            target.data.train,
            target.indices,
            crop=target.crop,
            batch_size=target.batch_size,
            device=target.device,
            workers=target.workers,
        )
        # labels would flatter what is scored on the images that it was fitted on
        self._scout: Workshop | None = self._workshop(target, with_labels=False)
        self._final: Workshop | None = None
        self._finished: dict[tuple[BlockRef, ...], Delivered] = {}

    def _workshop(self, target: Target, *, with_labels: bool) -> Workshop:
        return Workshop(
            self.zoo, self.donors, self._images, target, self.config, with_labels=with_labels
        )

    def view(self, donor: str) -> Iterable[Tensor]:
        """The target's images as a donor sees them."""
        return self._images.view(self.zoo[donor].input, self.target.indices)

    def score(self, candidate: Candidate, proxy: Proxy) -> Scored:
        """Build a candidate with closed-form stitches, fitted without labels, and ask the proxy."""
        assert self._scout is not None, "score everything before anything is tried or finished"
        built = self._scout.build(candidate.refs)
        batches = self.view(candidate.refs[0].donor)
        value = proxy(
            ProxyInputs(
                network=built.network,
                batches=lambda: iter(batches),
                labels=self.target.labels,
                num_classes=self.target.num_classes,
            )
        )
        score = float(value) if math.isfinite(value) else -math.inf
        return Scored(candidate=candidate, proxy=score, fits=built.fits)

    @property
    def can_try(self) -> bool:
        """Whether there are labels, and enough images to hold some of them out."""
        return self.target.labels is not None and len(self.target.indices) >= MIN_TRIAL_IMAGES

    def try_out(self, candidates: Sequence[Candidate], advance: Callable[[], None]) -> list[float]:
        """Cross-validated accuracy of each as it would be delivered, stitches and head.

        What labels add to a fit counts for what it is worth on images that the fit has not seen.

        Args:
            candidates: To try.
            advance: Called after each of the ``TRIAL_FOLDS`` networks of each candidate.
        """
        self._scout = None
        hits = [0.0] * len(candidates)
        for made_on, asked_about in self._trials():
            workshop = self._workshop(made_on, with_labels=True)
            labels = asked_about.labels
            assert labels is not None
            for number, candidate in enumerate(candidates):
                network = workshop.deliver(candidate.refs).network
                spec = self.zoo[candidate.refs[0].donor].input
                batches = self._images.view(spec, asked_about.indices)
                logits_NK = network_outputs(network, batches)
                hits[number] += float(top1(logits_NK, torch.tensor(labels))) * len(labels)
                advance()
        return [count / len(self.target.indices) for count in hits]

    def _trials(self) -> Iterator[tuple[Target, Target]]:
        """The target without one part, and that part; classes are spread evenly over the parts."""
        fit, labels = set(self.target.fit_indices), self.target.labels
        assert labels is not None
        # those of a class that stitches are fitted on are spread apart from the others
        kind_N = torch.tensor(
            [2 * k + (i in fit) for i, k in zip(self.target.indices, labels, strict=True)]
        )
        part_of = dict(
            zip(self.target.indices, stratified_folds(kind_N, TRIAL_FOLDS).tolist(), strict=True)
        )
        for part in range(TRIAL_FOLDS):
            yield (
                self.target.part([index for index, of in part_of.items() if of != part]),
                self.target.part([index for index, of in part_of.items() if of == part]),
            )

    def finish(self, candidate: Candidate) -> Delivered:
        """The candidate as a network of its own; with labels in its stitches, and with a head.

        Without labels it has no head, and plain stitches.
        """
        if candidate.refs not in self._finished:
            if self._final is None and self.target.labels is None:
                self._final = self._scout
            elif self._final is None:
                self._scout, self._final = None, self._workshop(self.target, with_labels=True)
            assert self._final is not None
            self._finished[candidate.refs] = self._final.deliver(candidate.refs)
        return self._finished[candidate.refs]

    def test_top1(self, candidate: Candidate) -> float | None:
        """Of the finished network on the test images, which nothing was chosen on."""
        test, classes = self.target.data.test, self.target.data.classes
        if test is None or classes is None:
            return None
        transform = EvalTransform(self.zoo[candidate.refs[0].donor].input, self.target.crop)
        return evaluate(
            self.finish(candidate).network,
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
