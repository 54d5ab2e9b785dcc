"""Where candidates become networks: blocks, fitted stitches, and a head on the last block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.fit import StitchFit
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.match import Match, match_features
from dery_cli.core.stitching.network import (
    AssembledNetwork,
    BuiltNetwork,
    NetworkBuilder,
)
from dery_cli.data.batches import ImageStore
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.target import Target
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo


@dataclasses.dataclass(frozen=True)
class Delivered:
    """A network as it would be written.

    Args:
        network: With a head where the target has labels, in eval mode; it shares nothing.
        fits: For each block, how well the stitch in front of it was fitted, or None.
        match: What training the stitches came to, where that was asked for.
    """

    network: AssembledNetwork
    fits: tuple[StitchFit | None, ...]
    match: Match | None


class Workshop:
    """Builds networks on the images of a target, or of a part of it.

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
        self.target, self._config = target, config
        self._builder = NetworkBuilder(
            donors,
            lambda name: self.view(name, fit=True),
            labels=target.fit_labels if with_labels else None,
            kind=StitchKind(config.stitch),
            seed=config.seed,
        )

    def view(self, donor: str, *, fit: bool = False) -> Iterable[Tensor]:
        """The target's images as a donor sees them, all or those of fits."""
        indices = self.target.fit_indices if fit else self.target.indices
        return self._images.view(self._zoo[donor].input, indices)

    def build(self, refs: Sequence[BlockRef]) -> BuiltNetwork:
        """Blocks and fitted stitches; they may be shared with other networks of this workshop."""
        return self._builder.build(refs)

    def deliver(self, refs: Sequence[BlockRef]) -> Delivered:
        """A network of its own, with all that the options ask for."""
        built = self.build(refs)
        network = built.network.copy()
        match = self._match(network, refs)
        labels, num_classes = self.target.labels, self.target.num_classes
        if labels is not None and num_classes is not None:
            fit_head(network, self.view(refs[0].donor), labels, num_classes)
        return Delivered(network.eval(), built.fits, match)

    def _match(self, network: AssembledNetwork, refs: Sequence[BlockRef]) -> Match | None:
        """Train the stitches to give the last donor's pre-logits, where that is asked for."""
        if not self._config.match or not network.stitches:
            return None
        last = refs[-1]
        whole = self._donors[last.donor].block(0, last.stop).eval()
        wanted_NC = network_outputs(whole, self.view(last.donor, fit=True)).to(self.target.device)
        x_NCHW = torch.cat(list(self.view(refs[0].donor, fit=True)))
        return match_features(network, x_NCHW, wanted_NC, seed=self._config.seed)
