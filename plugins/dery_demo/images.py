"""The demo images: handwritten digits (``demo``) and a sample of Fashion-MNIST (``demo:fashion``).

A set is one grey PNG, its images side by side, and a JSON file with its labels; ``make_data``
writes both. Where the images are from and under which licences: ``data/NOTICE.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_demo.donors import IMAGE_SIZE

if TYPE_CHECKING:
    from PIL import Image

DATA_DIR = Path(__file__).parent / "data"
FILES = {"": "digits", "fashion": "fashion"}
"""File stem by a spec's argument."""


@dataclasses.dataclass(frozen=True)
class MosaicSplit:
    """An ``ImageSplit``: a run of tiles of one picture.

    Args:
        mosaic: Grey picture, tiles in rows from the top left.
        tile: Height and width of one image in it.
        first: Tile at which the split begins.
        labels: One class index an image.
    """

    mosaic: Image.Image
    tile: int
    first: int
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, grey (mode ``L``), 32 x 32."""
        from PIL import Image

        if not 0 <= index < len(self.labels):
            raise IndexError(f"image {index} of a split of {len(self.labels)}")
        row, column = divmod(self.first + index, self.mosaic.width // self.tile)
        left, top = column * self.tile, row * self.tile
        cropped = self.mosaic.crop((left, top, left + self.tile, top + self.tile))
        return cropped.resize((IMAGE_SIZE[1], IMAGE_SIZE[0]), Image.Resampling.BILINEAR)


class DemoData:
    """A ``DataPlugin`` whose images lie beside it.

    Args:
        data_dir: Folder of the pictures and their labels.
    """

    def __init__(self, data_dir: Path = DATA_DIR) -> None:
        self.data_dir = data_dir

    def classes(self, argument: str) -> Sequence[str]:
        """Class names in label order."""
        return tuple(_read_labels(self.data_dir / f"{_stem(argument)}.json")["classes"])

    def split(self, argument: str, name: str) -> MosaicSplit | None:
        """The split ``train`` or ``test``; None for any other name.

        Raises:
            KeyError: ``argument`` is unknown.
            OSError: A file is missing or damaged.
        """
        stem = _stem(argument)
        info = _read_labels(self.data_dir / f"{stem}.json")
        if name not in info["labels"]:
            return None
        mosaic = _read_mosaic(self.data_dir / f"{stem}.png")
        first = 0 if name == "train" else len(info["labels"]["train"])
        labels = tuple(int(label) for label in info["labels"][name])
        return MosaicSplit(mosaic, info["tile"], first, labels)


def _stem(argument: str) -> str:
    if argument not in FILES:
        raise KeyError("there are demo and demo:fashion")
    return FILES[argument]


@functools.cache
def _read_labels(path: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(
            f"{path.name} of the demo data is damaged: {error}; reinstall dery-cli"
        ) from error
    return info


@functools.cache
def _read_mosaic(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except OSError as error:
        raise OSError(
            f"{path.name} of the demo data is damaged: {error}; reinstall dery-cli"
        ) from error
