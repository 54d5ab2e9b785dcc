"""Candidates as networks: built for scoring, finished for use, and tried on test images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dery_cli.candidates import Candidate, Scored
from dery_cli.config import AssembleConfig
from dery_cli.core.cost import count_flops, count_params
from dery_cli.core.match import Match, match_features
from dery_cli.core.network import AssembledNetwork, NetworkBuilder, linear_head
from dery_cli.core.probe import fit_classifier
from dery_cli.core.proxies import ProxyInputs, pre_logits
from dery_cli.core.stitch_fit import StitchFit
from dery_cli.errors import DeryError
from dery_cli.inference import network_memory
from dery_cli.loading import ImageBatches
from dery_cli.plugin import Proxy
from dery_cli.target import DonorPool, Target
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class Finished:
    """A network of its own, ready to be written.

    Args:
        network: With a head where the target has labels, in eval mode.
        fits: For each block, how well the stitch in front of it was fitted, or None.
        match: What training the stitches came to, where that was asked for.
        test_top1: On the test images, which nothing was chosen on; None where there are none.
    """

    network: AssembledNetwork
    fits: tuple[StitchFit | None, ...]
    match: Match | None
    test_top1: float | None


class NetworkMaker:
    """Builds candidates on the target's images.

    Args:
        zoo: The donors.
        donors: The same, dissected.
        target: Target images.
        config: Options.
    """

    def __init__(self, zoo: Zoo, donors: DonorPool, target: Target, config: AssembleConfig) -> None:
        self.zoo, self.donors, self.target, self.config = zoo, donors, target, config
        self._views: dict[tuple[str, bool], ImageBatches] = {}
        # labels would flatter what is scored on the images that it was fitted on
        self._scout: NetworkBuilder | None = self._builder(labels=None)
        self._final: NetworkBuilder | None = None
        self._finished: dict[tuple[BlockRef, ...], Finished] = {}

    def _builder(self, labels: Sequence[int] | None) -> NetworkBuilder:
        return NetworkBuilder(
            self.donors,
            lambda name: self.view(name, fit=True),
            labels=labels,
            kind=StitchKind(self.config.stitch),
            seed=self.config.seed,
        )

    def view(self, donor: str, *, fit: bool = False) -> ImageBatches:
        """The target's images as a donor sees them, all or those of fits, decoded once."""
        fit = fit and self.target.fit_indices != self.target.indices
        key = (donor, fit)
        if key not in self._views:
            self._views[key] = ImageBatches(
                self.target.data.train,
                self.target.fit_indices if fit else self.target.indices,
                self.zoo[donor].input,
                crop=self.target.crop,
                batch_size=self.target.batch_size,
                device=self.target.device,
                workers=self.target.workers,
                keep=True,
            )
        return self._views[key]

    def score(self, candidate: Candidate, proxy: Proxy) -> Scored:
        """Build a candidate with closed-form stitches, fitted without labels, and ask the proxy."""
        assert self._scout is not None, "score everything before anything is finished"
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
        return Scored(candidate=candidate, proxy=float(value), fits=built.fits)

    def finish(self, candidate: Candidate) -> Finished:
        """The candidate as a network of its own; with labels in its stitches, and with a head.

        Without labels it has no head, and plain stitches.
        """
        if candidate.refs in self._finished:
            return self._finished[candidate.refs]
        if self._final is None:
            again = self.target.fit_labels is not None
            self._final = self._builder(self.target.fit_labels) if again else self._scout
            self._scout = None  # what it keeps in memory makes room
            assert self._final is not None
        built = self._final.build(candidate.refs)
        network = copy.deepcopy(built.network)
        matched = self._match(network, candidate)
        labels, num_classes = self.target.labels, self.target.num_classes
        if labels is not None and num_classes is not None:
            batches = self.view(candidate.refs[0].donor)
            x_NC = pre_logits(network, batches)
            classifier = fit_classifier(x_NC, torch.tensor(labels), num_classes)
            network.head = linear_head(classifier).to(self.target.device)
        network.eval()
        top1 = self._test_accuracy(network, candidate.refs[0].donor)
        finished = Finished(network, built.fits, matched, top1)
        self._finished[candidate.refs] = finished
        return finished

    def _match(self, network: AssembledNetwork, candidate: Candidate) -> Match | None:
        """Train the stitches to give the last donor's pre-logits, where that is asked for."""
        if not self.config.match or not network.stitches:
            return None
        last = candidate.refs[-1]
        whole = self.donors[last.donor].block(0, last.stop).eval()
        wanted_NC = pre_logits(whole, self.view(last.donor, fit=True)).to(self.target.device)
        x_NCHW = torch.cat(list(self.view(candidate.refs[0].donor, fit=True)))
        return match_features(network, x_NCHW, wanted_NC, seed=self.config.seed)

    def _test_accuracy(self, network: AssembledNetwork, donor: str) -> float | None:
        test = self.target.data.test
        if test is None or test.labels is None or network.head is None:
            return None
        batches = ImageBatches(
            test,
            range(len(test)),
            self.zoo[donor].input,
            crop=self.target.crop,
            batch_size=self.target.batch_size,
            device=self.target.device,
            workers=self.target.workers,
        )
        return accuracy(network, batches, test.labels)


def accuracy(network: AssembledNetwork, batches: Iterable[Tensor], labels: Sequence[int]) -> float:
    """Top-1 accuracy of a network's logits."""
    with torch.inference_mode():
        guess = torch.cat([network(x).argmax(1).cpu() for x in batches])
    return float((guess == torch.tensor(list(labels))).double().mean())


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
