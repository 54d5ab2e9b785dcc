"""Data specs, splits and what a donor sees of an image.

A data spec is a folder, or ``NAME`` / ``NAME:ARGUMENT`` of a plugin in the entry-point group
``dery.data``. Every donor sees the same field of view: a centred square of ``crop`` times the short
side, resized to the donor's own input size and normalised its way. torch is imported where tensors
are made, so that a wrong spec answers at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from dery_cli.errors import DeryError, UsageError
from dery_cli.plugin import DATA_GROUP, DataPlugin, ImageSplit, find_plugin
from dery_cli.types import InputSpec

if TYPE_CHECKING:
    import torch

DEFAULT_CROP = 0.95
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """An opened data spec.

    Args:
        spec: What the user typed; a folder is kept as its resolved path.
        classes: Class names in label order; None where the images have no labels.
        train: The images things are fitted and chosen on.
        test: Held-out images that are only reported on, or None where there are none.
    """

    spec: str
    classes: tuple[str, ...] | None
    train: ImageSplit
    test: ImageSplit | None


class FolderSplit:
    """Image files with their labels."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None) -> None:
        self.files = list(files)
        self.labels: Sequence[int] | None = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            reason = str(error).replace(str(path), path.name)
            raise DeryError(
                f"cannot read the image {path}: {reason}", "replace or remove that file"
            ) from error

    def digest(self, index: int) -> bytes:
        """Hash of the file's bytes; spares decoding."""
        return hashlib.sha256(self.files[index].read_bytes()).digest()


class Subset:
    """Some images of another split, in the order of ``indices``."""

    def __init__(self, split: ImageSplit, indices: Sequence[int]) -> None:
        self.split = split
        self.indices = [int(i) for i in indices]
        labels = split.labels
        self.labels: Sequence[int] | None = (
            None if labels is None else [labels[i] for i in self.indices]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.split.image(self.indices[index])

    def digest(self, index: int) -> bytes:
        return image_digest(self.split, self.indices[index])


def open_data(spec: str) -> DataSet:
    """Open a data spec.

    Raises:
        UsageError: No such folder or plugin, no images, or a single class.
        DeryError: The data are there but damaged.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path.resolve())
    if "/" in spec.partition("?")[0] or spec.startswith((".", "~")):
        raise UsageError(f"no such data folder: {spec}", "give a folder of class folders")
    name, _, argument = spec.partition(":")
    plugin = find_plugin(DATA_GROUP, name, DataPlugin, what="data set or folder")
    try:
        classes = plugin.classes(argument)
        train = plugin.split(argument, "train")
        test = plugin.split(argument, "test")
    except KeyError as error:
        reason = error.args[0] if error.args else argument
        raise UsageError(f"data plugin '{name}' does not know '{argument}': {reason}") from error
    except OSError as error:
        raise DeryError(f"cannot open the data '{spec}': {error}") from error
    if train is None:
        raise UsageError(f"the data '{spec}' have no training split")
    return DataSet(
        spec=spec, classes=None if classes is None else tuple(classes), train=train, test=test
    )


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def _class_folders(folder: Path) -> list[Path]:
    return sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _labelled(folder: Path, classes: Sequence[str]) -> FolderSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_below(folder / name)
        files += found
        labels += [label] * len(found)
    return FolderSplit(files, labels)


def _open_folder(root: Path) -> DataSet:
    spec = str(root)
    train_root = root / "train"
    held_out = next((root / n for n in ("test", "val", "validation") if (root / n).is_dir()), None)
    split = train_root.is_dir()
    base = train_root if split else root
    if not _images_below(base):
        raise UsageError(
            f"no images in {base}",
            f"looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and below it",
        )
    folders = [child for child in _class_folders(base) if _images_below(child)]
    if not folders:
        unlabelled = FolderSplit(_images_below(base), None)
        return DataSet(spec=spec, classes=None, train=unlabelled, test=None)
    if len(folders) == 1:
        raise UsageError(
            f"only one class folder with images in {base}: {folders[0].name}",
            "give two or more class folders, or images without class folders for unlabelled use",
        )
    classes = tuple(child.name for child in folders)
    train = _labelled(base, classes)
    if split and held_out is not None:
        unknown = sorted({c.name for c in _class_folders(held_out)} - set(classes))
        if unknown:
            raise UsageError(
                f"{held_out} has classes that {base} lacks: {', '.join(unknown[:5])}",
                "both need the same class folders",
            )
        return DataSet(spec=spec, classes=classes, train=train, test=_labelled(held_out, classes))
    assert train.labels is not None
    kept, out = stratified_holdout(train.labels, fraction=0.2, seed=0)
    test = Subset(train, out) if out else None
    return DataSet(spec=spec, classes=classes, train=Subset(train, kept), test=test)


def stratified_holdout(
    labels: Sequence[int], *, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split indices into kept and held out, the same share of every class.

    A class of one image stays in the kept part whole.
    """
    generator = random.Random(seed)  # noqa: S311 - a reproducible split, not a secret
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(int(label), []).append(index)
    held_out: list[int] = []
    for label in sorted(by_class):
        members = by_class[label]
        generator.shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out += members[:count]
    out = set(held_out)
    return [i for i in range(len(labels)) if i not in out], sorted(held_out)


def image_digest(split: ImageSplit, index: int) -> bytes:
    """Hash of one image's content: its file's bytes where it has a file, else its pixels."""
    digest = getattr(split, "digest", None)
    if digest is not None:
        return bytes(digest(index))
    image = split.image(index)
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).digest()


def fingerprint(split: ImageSplit, indices: Sequence[int] | None = None) -> str:
    """Hash of the chosen images' content, order and labels."""
    chosen = range(len(split)) if indices is None else indices
    sha = hashlib.sha256()
    for index in chosen:
        sha.update(image_digest(split, index))
        sha.update(str(None if split.labels is None else int(split.labels[index])).encode())
    return sha.hexdigest()


def choose_samples(count: int, samples: int, seed: int) -> list[int]:
    """``samples`` of ``count`` indices in random order, the same for the same seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible choice, not a secret
    return order[:samples]


def field_of_view(size: tuple[int, int], crop: float) -> tuple[float, float, float, float]:
    """The centred square of ``crop`` times the short side, as a PIL box, for a (width, height)."""
    width, height = size
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Grayscale for one channel, else RGB; transparency is laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    elif image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda v: v / 257).convert("L")
    wanted = "L" if in_chans == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def normalised(image: Image.Image, spec: InputSpec) -> torch.Tensor:
    """PIL image to a float tensor (C, H, W), scaled to [0, 1], then normalised."""
    import numpy as np
    import torch

    pixels = np.asarray(image, dtype=np.float32) / 255.0
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    x_CHW = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    mean = torch.tensor(spec.mean, dtype=torch.float32).view(-1, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float32).view(-1, 1, 1)
    return (x_CHW - mean) / std


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Square crop, resize, normalise: what a donor sees at embedding and evaluation."""

    input: InputSpec
    crop: float = DEFAULT_CROP

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = to_mode(image, self.input.in_chans)
        height, width = self.input.image_size
        resized = image.resize(
            (width, height),
            _RESAMPLING[self.input.interpolation],
            box=field_of_view(image.size, self.crop),
        )
        return normalised(resized, self.input)


class ImageDataset:  # torch's Dataset by protocol: torch is not imported here
    """A map-style torch data set of (image tensor, label); label -1 where there is none."""

    def __init__(
        self,
        split: ImageSplit,
        transform: Callable[[Image.Image], Any],
        indices: Sequence[int] | None = None,
    ) -> None:
        self.split = split
        self.transform = transform
        self.indices = list(range(len(split))) if indices is None else [int(i) for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        index = self.indices[position]
        label = -1 if self.split.labels is None else int(self.split.labels[index])
        return self.transform(self.split.image(index)), label

    @property
    def labels(self) -> list[int] | None:
        """Labels in the data set's own order, without decoding an image."""
        if self.split.labels is None:
            return None
        return [int(self.split.labels[i]) for i in self.indices]
