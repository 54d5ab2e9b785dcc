"""Data specs, splits and what a donor sees of an image.

A data spec is a folder, or ``NAME`` / ``NAME:ARGUMENT`` of a plugin in the entry-point group
``dery.data``. Every donor sees the same field of view: a centred square of ``crop`` times the short
side, resized to the donor's own input size and normalised its way. torch is imported where tensors
are made, so that a wrong spec answers at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image

from dery_cli.errors import DeryError, UsageError
from dery_cli.folders import read_folder
from dery_cli.plugin import (
    DATA_GROUP,
    DataPlugin,
    ImageSplit,
    find_plugin,
    guarded,
    plugin_names,
)
from dery_cli.splits import (
    UNREADABLE,
    Screen,
    Sieve,
    Subset,
    image_digest,
    image_name,
    read_image,
    unreadable,
)
from dery_cli.types import InputSpec

if TYPE_CHECKING:
    import torch

    from dery_cli.terminal import Terminal

DEFAULT_CROP = 0.95
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """An opened data spec.

    Args:
        spec: As it is recorded: folders as resolved paths, plugins as ``NAME:ARGUMENT``.
        classes: Class names in label order; None where the images have no labels.
        train: The images things are fitted and chosen on.
        test: Held-out images that are only reported on, or None where there are none.
        left_out: What a screen left out of each split it was given, in the order of the calls.
    """

    spec: str
    classes: tuple[str, ...] | None
    train: ImageSplit
    test: ImageSplit | None
    left_out: tuple[tuple[int, ...], ...] = ()

    @property
    def skip_bad(self) -> bool:
        """Whether these are the images only if broken ones are left out again."""
        return any(self.left_out)

    @property
    def held_out(self) -> bool:
        """Whether the test images were held out of those that are there to train on."""
        train, test = self.train, self.test
        return isinstance(train, Subset) and isinstance(test, Subset) and train.split is test.split


def open_data(spec: str, screen: Screen | None = None) -> DataSet:
    """Open a data spec.

    Args:
        spec: A folder, or ``NAME`` or ``NAME:ARGUMENT`` of a plugin.
        screen: Called once with each split that is read, before anything is derived from it; the
            images it gives are as if they were not there.

    Raises:
        UsageError: No such folder or plugin, no images, or a single class.
        DeryError: The data are there but damaged, or the screen leaves a class without images.
    """
    sieve = Sieve(spec, screen)
    name, colon, argument = spec.partition(":")
    known = name in plugin_names(DATA_GROUP)
    named = bool(colon) and known
    folder = None if named else _as_folder(spec)
    if known and folder is not None:
        raise UsageError(
            f"'{spec}' is a data set by that name and a folder here",
            f"--data {spec}: for the data set, --data ./{spec} for the folder",
        )
    if folder is not None:
        return _data_set(str(folder), *read_folder(folder), sieve)
    if not named and ("/" in spec.partition("?")[0] or spec.startswith((".", "~"))):
        raise UsageError(f"no such data folder: {spec}", "give a folder of class folders")
    plugin = find_plugin(DATA_GROUP, name, DataPlugin, what="data set or folder")
    resolve = getattr(plugin, "resolve", None)
    try:
        with guarded(name, f"opening '{argument}'", let=(KeyError, OSError)):
            if resolve is not None:
                argument = resolve(argument)
            spec = f"{name}:{argument}"  # with the colon it is never taken for a folder
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
    if classes is not None and len(classes) < 2:
        raise UsageError(f"the data '{spec}' have only one class: {', '.join(classes)}")
    _check_labels(f"training images of '{spec}'", train, classes)
    if test is not None:
        _check_labels(f"test images of '{spec}'", test, classes)
    return _data_set(spec, classes, train, test, sieve)


def _as_folder(spec: str) -> Path | None:
    """The folder that a spec names, or None.

    Raises:
        UsageError: It is empty, names a file, or cannot be looked up.
    """
    if not spec:
        raise UsageError("the data spec is empty", "give a folder of class folders, or demo")
    path = Path(os.path.expanduser(spec))  # unlike Path's, it leaves a user it does not know
    try:
        if path.is_dir():
            return path.resolve()
        is_file = path.is_file()
    except OSError as error:
        raise UsageError(
            f"cannot open the data folder {spec}: {error.strerror}",
            "give a folder of class folders",
        ) from error
    if is_file:
        raise UsageError(f"{spec} is a file", "give a folder of class folders")
    return None


def _check_labels(what: str, split: ImageSplit, classes: Sequence[str] | None) -> None:
    """Refuse labels of a plugin that do not belong to its classes or images."""
    labels = split.labels
    if labels is None or classes is None:
        if labels is not None or classes is not None:
            has, lacks = ("classes", "labels") if labels is None else ("labels", "classes")
            raise DeryError(f"the {what} have {has} but no {lacks}")
        return
    if len(labels) != len(split):
        raise DeryError(f"the {what} are {len(split)}, their labels {len(labels)}")
    wrong = [label for label in labels if not 0 <= label < len(classes)]
    if wrong:
        raise DeryError(f"the {what} have a label {wrong[0]}; there are {len(classes)} classes")


def _data_set(
    spec: str,
    classes: Sequence[str] | None,
    train: ImageSplit,
    test: ImageSplit | None,
    sieve: Sieve,
) -> DataSet:
    """Take out broken images; then, where there is no test split, hold out a fifth to test on."""
    train = sieve(train, classes)
    if test is not None:
        test = sieve(test)
    elif train.labels is not None:
        kept, out = stratified_holdout(train.labels, fraction=0.2, seed=0)
        if out:
            train, test = Subset(train, kept), Subset(train, out)
    return DataSet(
        spec=spec,
        classes=None if classes is None else tuple(classes),
        train=train,
        test=test,
        left_out=tuple(sieve.left_out),
    )


def open_checked(terminal: Terminal, spec: str, *, skip_bad: bool) -> DataSet:
    """Open a data spec for a command: with ``skip_bad``, broken images are left out with a warning.

    Raises:
        UsageError: As ``open_data``.
        DeryError: As ``open_data``.
    """
    if not skip_bad:
        return open_data(spec)
    names: list[str] = []

    def screen(split: ImageSplit) -> list[int]:
        broken = []
        with terminal.progress("checking images", len(split)) as bar:
            for index, bad in enumerate(unreadable(split)):
                if bad:
                    broken.append(index)
                bar.advance()
        names.extend(image_name(split, index) for index in broken)
        return broken

    data = open_data(spec, screen)
    if names:
        some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        terminal.warn(f"left out {len(names)} broken image{'s' * (len(names) > 1)}: {some}")
    return data


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
    """Upright as EXIF says; grayscale for one channel, else RGB; transparency is laid on white."""
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    elif image.mode == "LAB":
        image = image.convert("RGB")
    wanted = "L" if in_chans == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:  # the EXIF data are damaged, the pixels are not
        return image
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    kept = {"transparency"} & set(image.info)
    turned.info = {key: image.info[key] for key in kept}  # or it would be turned again
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits of gray as eight; the one value that may be transparent as white."""
    gray = image.convert("I").point(lambda value: value / 257).convert("L")
    if "transparency" in image.info:
        import numpy as np

        clear = np.asarray(image) == image.info["transparency"]
        gray.paste(255, mask=Image.fromarray(clear.astype(np.uint8) * 255))
    return gray


def pixels(image: Image.Image) -> torch.Tensor:
    """PIL image to bytes (C, H, W), uint8."""
    import numpy as np
    import torch

    values = np.array(image, dtype=np.uint8)
    if values.ndim == 2:
        values = values[:, :, None]
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalise(pixels_CHW: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """Bytes (..., C, H, W) to floats, scaled to [0, 1], then normalised."""
    import torch

    device = pixels_CHW.device
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=device).view(-1, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float32, device=device).view(-1, 1, 1)
    return (pixels_CHW.float() / 255.0 - mean) / std


def normalised(image: Image.Image, spec: InputSpec) -> torch.Tensor:
    """PIL image to a float tensor (C, H, W), scaled to [0, 1], then normalised."""
    return normalise(pixels(image), spec)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Square crop, resize, normalise: what a donor sees at embedding and evaluation."""

    input: InputSpec
    crop: float = DEFAULT_CROP

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalise(self.pixels(image), self.input)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """The same before it is normalised: bytes (C, H, W)."""
        image = to_mode(image, self.input.in_chans)
        height, width = self.input.image_size
        resized = image.resize(
            (width, height),
            _RESAMPLING[self.input.interpolation],
            box=field_of_view(image.size, self.crop),
        )
        return pixels(resized)


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
        return self.transform(read_image(self.split, index)), label

    @property
    def labels(self) -> list[int] | None:
        """Labels in the data set's own order, without decoding an image."""
        if self.split.labels is None:
            return None
        return [int(self.split.labels[i]) for i in self.indices]
