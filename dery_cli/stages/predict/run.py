"""What a network says of images: what ``dery predict`` runs once its options are right."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import torch

from dery_cli.data.batches import ImageBatches
from dery_cli.data.folders import image_files
from dery_cli.data.splits import FolderSplit, unreadable
from dery_cli.errors import UsageError
from dery_cli.io.files import replace_text
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.predict.config import PredictConfig
from dery_cli.zoo.networks import load_assembly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network says of one image.

    Args:
        file: The image.
        classes: The likeliest, best first.
        scores: Their softmax probabilities.
    """

    file: str
    classes: tuple[str, ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a network says of all images.

    Args:
        predictions: One an image, in the order of the files.
        left_out: Files that cannot be decoded, where these are left out.
    """

    predictions: list[Prediction]
    left_out: list[str]


def predict(
    terminal: Terminal, folder: Path, images: Sequence[Path], config: PredictConfig
) -> Predicted:
    """Load the network of a folder and show it images.

    Args:
        terminal: Shows progress.
        folder: Of an assembly or a run.
        images: Files, and folders whose images count at any depth.
        config: Options.

    Raises:
        UsageError: There is no image, or the network has no head.
        DeryError: The network is damaged, or an image cannot be decoded and may not be left out.
    """
    assembly = load_assembly(folder)
    if assembly.classes is None:
        raise UsageError(
            f"{folder} has no head: it was made without labels", "dery assemble --data SPEC"
        )
    files = image_files(images)
    left_out: list[str] = []
    split = FolderSplit(files, None)
    if config.skip_bad:
        bad = list(unreadable(split))
        left_out = [split.name(place) for place, is_bad in enumerate(bad) if is_bad]
        files = [file for file, is_bad in zip(files, bad, strict=True) if not is_bad]
        split = FolderSplit(files, None)
    device = pick_device(config.device)
    batches = ImageBatches(
        split,
        range(len(files)),
        assembly.transform.input,
        crop=assembly.transform.crop,
        batch_size=config.batch_size,
        device=device,
        workers=config.workers,
    )
    network = assembly.network.to(device)
    top = min(config.top, len(assembly.classes))
    found: list[Prediction] = []
    with terminal.progress("predicting", len(files)) as bar, torch.inference_mode():
        for x_NCHW in batches:
            best = network(x_NCHW).double().softmax(1).topk(top)
            for scores, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append(
                    Prediction(
                        file=split.name(len(found)),
                        classes=tuple(assembly.classes[place] for place in places),
                        scores=tuple(scores),
                    )
                )
            bar.advance(len(x_NCHW))
    return Predicted(predictions=found, left_out=left_out)


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """A line for each image and class: file, rank, class, score.

    Raises:
        DeryError: It cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["file", "rank", "class", "score"])
    for one in predictions:
        pairs = zip(one.classes, one.scores, strict=True)
        for rank, (name, score) in enumerate(pairs, 1):
            writer.writerow([one.file, rank, name, score])
    replace_text(path, table.getvalue())
