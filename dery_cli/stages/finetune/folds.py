"""What rates are tried on: the validation part, or folds with starts that have not seen them.

A network that was fitted on an image is no judge of it: it tells nearly all of them right. So for
each fold the assembly is made once more without it, of the same donors; where that cannot be done,
its head at least is fitted anew.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from functools import partial

import torch

from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace
from dery_cli.stages.finetune.rebuild import BATCH_SIZE, Rebuilder
from dery_cli.stages.finetune.splits import Splits
from dery_cli.stages.finetune.start import Start
from dery_cli.training.augment import train_transform
from dery_cli.training.rate_finder import FOLDS, Part
from dery_cli.training.recipe import FinetuneConfig

MIN_IMAGES = 40
"""Folds of fewer images would tell nothing."""

MOST_SAMPLES = 2048
"""Images that a start is fitted on; few more would not make it better."""


def make_parts(
    space: Workspace,
    start: Start,
    data: DataSet,
    splits: Splits,
    config: FinetuneConfig,
    device: torch.device,
    *,
    scratch: bool,
) -> list[Part]:
    """What the trials of a run start from and are asked about; nothing where images are too few.

    Args:
        space: Of the donors.
        start: Of the run, its weights loaded.
        data: The target.
        splits: Of its training images.
        config: Of the run.
        device: Where to compute.
        scratch: Whether the start has random weights, and so has seen nothing.
    """
    network = start.assembly.network
    if splits.valid is not None:
        return [Part(start=lambda: network, fit=splits.train, held_out=splits.valid)]
    labels = data.train.labels
    assert labels is not None
    label_N = torch.tensor([int(labels[index]) for index in splits.kept])
    if len(label_N) < MIN_IMAGES or min(torch.bincount(label_N).tolist()) < 2:
        return []
    fold_N = stratified_folds(label_N, FOLDS).tolist()
    transform = start.assembly.transform
    augmented = train_transform(transform.input, config, transform.crop)
    builder = None if scratch else _Rebuild(space, start, data, splits.kept, config, device)
    parts = []
    for fold in range(FOLDS):
        fit = [index for index, of in zip(splits.kept, fold_N, strict=True) if of != fold]
        out = [index for index, of in zip(splits.kept, fold_N, strict=True) if of == fold]
        parts.append(
            Part(
                start=(lambda: network) if builder is None else partial(builder.without_rest, fit),
                fit=as_dataset(ImageDataset(data.train, augmented, fit)),
                held_out=as_dataset(ImageDataset(data.train, transform, out)),
            )
        )
    return parts


class _Rebuild:
    """The run's start, fitted on some of the images alone."""

    def __init__(
        self,
        space: Workspace,
        start: Start,
        data: DataSet,
        indices: Sequence[int],
        config: FinetuneConfig,
        device: torch.device,
    ) -> None:
        self._start, self._data, self._seed = start, data, config.seed
        self._device = device
        self._images = ImageStore(
            data.train,
            indices,
            crop=start.assembly.transform.crop,
            batch_size=BATCH_SIZE,
            device=device,
            workers=config.workers,
        )
        self._rebuilder: Rebuilder | None = None
        data_of = start.assembly.record.data
        if "split" in data_of and any(data_of["network"]["joints"]):
            with contextlib.suppress(DeryError):
                self._rebuilder = Rebuilder(
                    space, start, data, indices, device=device, workers=config.workers
                )

    def without_rest(self, fit: Sequence[int]) -> AssembledNetwork:
        """The network as these images alone would have made it."""
        if self._rebuilder is not None:
            return self._rebuilder.fitted_on(fit)
        assembly = self._start.assembly
        labels_N = self._data.train.labels
        chosen = choose_samples(fit, labels_N, MOST_SAMPLES, self._seed)
        labels = [int(labels_N[index]) for index in chosen]  # type: ignore[index]
        network = copy.deepcopy(assembly.network).to(self._device)
        network.head = None
        assert assembly.classes is not None
        view = self._images.view(assembly.transform.input, chosen)
        fit_head(network.eval(), view, labels, len(assembly.classes))
        return network
