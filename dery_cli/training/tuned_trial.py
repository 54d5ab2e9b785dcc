"""Networks tried as they will be used: fitted without some images, fine-tuned, asked about these.

What is best untrained is often not what trains best (``tests/bench/bench_tuned.py``).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from dery_cli.core.scoring import network_outputs, top1
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import Judgement
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.sets import ImageDataset
from dery_cli.data.target import Target
from dery_cli.training.augment import train_transform
from dery_cli.training.closed_form import FittedBuilder, Recipe, divisions
from dery_cli.training.rate_finder import FEWEST_UPDATES, at_rate, short_run
from dery_cli.training.recipe import FinetuneConfig, make_config
from dery_cli.types import InputSpec
from dery_cli.zoo.registry import Zoo

SLOWER = 1 / 3
"""Of the recipe's rate: over few updates it ruins fewer starts and foresees as much or more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedTrial:
    """What images say of a network that was fine-tuned for a few updates without them.

    Args:
        accuracy: Top-1; 0 where the loss rose.
        cross_entropy: In nats; None where the loss rose.
    """

    accuracy: float
    cross_entropy: float | None


def trial_config(seed: int, workers: int = 0) -> FinetuneConfig:
    """How networks are fine-tuned in a trial: the default recipe, cut short."""
    config = make_config("default", steps=FEWEST_UPDATES, effort=0.0, seed=seed, workers=workers)
    return at_rate(config, SLOWER * config.lr, config.block_lr_scale)


def images_seen(config: FinetuneConfig) -> int:
    """Images that a trial pays for, forward passes of one: an update takes three of each."""
    assert config.steps is not None
    return 3 * config.steps * config.batch_size


class TunedTrials:
    """Fine-tunes networks without a part of the target's images and asks about these.

    The part is that to choose on; where there is none, the first fold.

    Args:
        target: With labels.
        images: Has the target's images.
        zoo: The donors.
        fitted_on: A builder with labels for a part of the target.
        config: How to fine-tune.
        folder: For the files of one after the other; it is removed.
    """

    def __init__(
        self,
        target: Target,
        images: ImageStore,
        zoo: Zoo,
        fitted_on: Callable[[Target], FittedBuilder],
        config: FinetuneConfig,
        folder: Path,
    ) -> None:
        kept, asked_N = next(divisions(target))
        labels = target.data.train.labels
        assert labels is not None
        self._target, self._kept, self._zoo, self._config = target, kept, zoo, config
        self._images, self._builder, self._folder = images, fitted_on(kept), folder
        self._asked = [i for i, of in zip(target.all_indices, asked_N.tolist(), strict=True) if of]
        self._label_N = torch.tensor([int(labels[index]) for index in self._asked])

    def ask(self, recipe: Recipe, head: Judgement) -> TunedTrial:
        """Fine-tune one network.

        Args:
            recipe: Which.
            head: How its head is fitted.

        Raises:
            DeryError: A checkpoint cannot be written.
        """
        network = self._builder.complete(recipe, head).network
        spec = self._zoo[recipe.refs[0].donor].input
        if not self._trained(network, spec):
            return TunedTrial(accuracy=0.0, cross_entropy=None)
        network.to(self._target.device).eval()
        view = self._images.view(spec, self._asked)
        logits_NC = network_outputs(network, view).double().cpu()
        loss = torch.nn.functional.cross_entropy(logits_NC, self._label_N)
        return TunedTrial(accuracy=float(top1(logits_NC, self._label_N)), cross_entropy=float(loss))

    def _trained(self, network: AssembledNetwork, spec: InputSpec) -> bool:
        data, target, config = self._target.data, self._target, self._config
        augmented = train_transform(spec, config, target.crop)
        fit = as_dataset(ImageDataset(data.train, augmented, self._kept.indices))
        assert data.classes is not None
        try:
            return short_run(
                network, fit, config, self._folder, classes=data.classes, device=target.device
            )
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
