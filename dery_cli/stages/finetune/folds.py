"""What rates are tried on: the validation part, or folds with starts that have not seen them.

A network that was fitted on an image is no judge of it: it tells nearly all of them right. So for
each fold the assembly is made once more without it, of the same donors; where that cannot be done,
its head at least is fitted anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import AssembledNetwork, NetworkBuilder
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.sets import DataSet, ImageDataset
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace
from dery_cli.stages.finetune.splits import Splits
from dery_cli.stages.finetune.start import Start
from dery_cli.training.augment import train_transform
from dery_cli.training.rate_finder import FOLDS, Part
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import BlockRef, InputSpec, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo, read_zoo

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
        self._images = ImageStore(
            data.train,
            indices,
            crop=start.assembly.transform.crop,
            batch_size=64,
            device=device,
            workers=config.workers,
        )
        self._device = device
        self._zoo = _with_the_same_donors(space, start)
        self._donors = None if self._zoo is None else DonorPool(self._zoo, space, device)

    def without_rest(self, fit: Sequence[int]) -> AssembledNetwork:
        """The network as these images alone would have made it."""
        assembly = self._start.assembly
        fit = fit[:: -(-len(fit) // MOST_SAMPLES)]
        labels = [int(self._data.train.labels[index]) for index in fit]  # type: ignore[index]
        if self._zoo is None or self._donors is None:
            network = copy.deepcopy(assembly.network).to(self._device)
            network.head = None
        else:
            zoo = self._zoo

            def view(donor: str) -> Iterable[Tensor]:
                return self._images.view(zoo[donor].input, fit)

            stitches = NetworkBuilder(self._donors, view, labels=labels, seed=self._seed)
            network = stitches.build(_refs(self._start)).network.copy()
        spec: InputSpec = assembly.transform.input
        assert assembly.classes is not None
        fit_head(network.eval(), self._images.view(spec, fit), labels, len(assembly.classes))
        return network


def _refs(start: Start) -> list[BlockRef]:
    """The blocks of the network, as a builder takes them."""
    network = start.assembly.record.data["network"]
    refs: list[BlockRef] = []
    for block, joint in zip(network["blocks"], network["joints"], strict=True):
        follows = bool(refs) and (refs[-1].donor, refs[-1].stop) == (block["donor"], block["start"])
        adapter = follows and joint is not None
        refs.append(BlockRef(block["donor"], block["start"], block["stop"], adapter=adapter))
    return refs


def _with_the_same_donors(space: Workspace, start: Start) -> Zoo | None:
    """The zoo, where it can make the network's stitches again; None where it cannot."""
    data = start.assembly.record.data
    network = data["network"]
    joints = [joint for joint in network["joints"] if joint is not None]
    plain = all(joint["stitch"] == StitchKind.LINEAR for joint in joints)
    if not joints or not plain or data.get("match") is not None:
        return None
    try:
        zoo = read_zoo(space)
    except DeryError:
        return None
    for block in network["blocks"]:
        donor = zoo.donors.get(block["donor"])
        if donor is None or donor.weights_sha256 != block["weights_sha256"]:
            return None
        if list(donor.input.image_size) != list(block["image_size"]):
            return None
    return zoo
