"""The evaluate stage: a network of the workspace, or of any folder, scored on images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.data.batches import as_dataset
from dery_cli.data.classes import check_classes
from dery_cli.data.samples import SEEN, held_out_anew
from dery_cli.data.sets import DataSet, ImageDataset, open_checked
from dery_cli.errors import UsageError
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.evaluate.config import EvaluateConfig
from dery_cli.training.evaluate import EvalResult, evaluate
from dery_cli.zoo.networks import LoadedAssembly, load_assembly
from dery_cli.zoo.plugin import ImageSplit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How well a network does.

    Args:
        data: Spec of the images.
        result: The scores.
    """

    data: str
    result: EvalResult


def evaluate_network(terminal: Terminal, folder: Path, config: EvaluateConfig) -> Evaluated:
    """Load the network of a folder and score it.

    Raises:
        UsageError: The data do not suit it.
        DeryError: The network or an image is damaged.
    """
    assembly = load_assembly(folder)
    data = _open(terminal, assembly, folder, config)
    images = _images(data, config.split)
    if config.split == "test" and held_out_anew(assembly.record, data):
        terminal.warn(f"the images of {data.spec} changed since the network was trained: {SEEN}")
    assert assembly.classes is not None
    with terminal.progress("evaluating", len(images)) as bar:
        result = evaluate(
            assembly.network,
            as_dataset(ImageDataset(images, assembly.transform)),
            classes=assembly.classes,
            batch_size=config.batch_size,
            device=pick_device(config.device),
            workers=config.workers,
            progress=lambda done, _total: bar.update(done),
        )
    return Evaluated(data=data.spec, result=result)


def _open(
    terminal: Terminal, assembly: LoadedAssembly, folder: Path, config: EvaluateConfig
) -> DataSet:
    """The data asked for, or those the network was made for."""
    if assembly.classes is None:
        raise UsageError(
            f"{folder} has no head: it was made without labels", "dery assemble --data SPEC"
        )
    target = assembly.record.data
    skip_bad = config.skip_bad or (config.data is None and target.get("target_skip_bad", False))
    data = open_checked(terminal, config.data or target["target"], skip_bad=skip_bad)
    check_classes(data, assembly.classes)
    return data


def _images(data: DataSet, split: str) -> ImageSplit:
    images = data.test if split == "test" else data.train
    if data.classes is None:
        raise UsageError(f"{data.spec} has no labels", "give class folders")
    if images is None:
        raise UsageError(f"{data.spec} has no test images", "--split train")
    return images
