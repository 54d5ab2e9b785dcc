"""Data specs, splits and what a donor sees of an image.

A data spec is a folder, or ``NAME`` / ``NAME:ARGUMENT`` of a plugin in the entry-point group
``dery.data``. Every donor sees the same field of view: a centred square of ``crop`` times the short
side, resized to the donor's own input size and normalised its way. torch is imported where tensors
are made, so that a wrong spec answers at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dery_cli.data.folders import PassedOver, read_folder
from dery_cli.data.splits import (
    Screen,
    Sieve,
    Subset,
    image_name,
    read_image,
    stratified_holdout,
    unreadable,
)
from dery_cli.errors import DeryError, UsageError
from dery_cli.zoo.plugin import (
    DATA_GROUP,
    DataPlugin,
    ImageSplit,
    find_plugin,
    guarded,
    plugin_names,
)
from dery_cli.zoo.transforms import NoBrightnessError, to_bytes

if TYPE_CHECKING:
    from dery_cli.runtime.terminal import Terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """An opened data spec.

    Args:
        spec: As it is recorded: folders as resolved paths, plugins as ``NAME:ARGUMENT``.
        classes: Class names in label order; None where the images have no labels.
        train: The images things are fitted and chosen on.
        test: Held-out images that are only reported on, or None where there are none.
        left_out: What a screen left out of each split it was given, in the order of the calls.
        notes: What in a folder was passed over, in words.
    """

    spec: str
    classes: tuple[str, ...] | None
    train: ImageSplit
    test: ImageSplit | None
    left_out: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

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
        passed = PassedOver()
        found = _data_set(str(folder), *read_folder(folder, passed), sieve)
        return dataclasses.replace(found, notes=tuple(passed.notes()))
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
        data = open_data(spec)
        _tell(terminal, data)
        return data
    names: list[str] = []

    def screen(split: ImageSplit) -> list[int]:
        broken = []
        with terminal.progress("checking images", len(split)) as bar:
            for index, bad in enumerate(unreadable(_Usable(split))):
                if bad:
                    broken.append(index)
                bar.advance()
        names.extend(image_name(split, index) for index in broken)
        return broken

    data = open_data(spec, screen)
    _tell(terminal, data)
    if names:
        some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        terminal.warn(f"left out {len(names)} broken image{'s' * (len(names) > 1)}: {some}")
    return data


def _tell(terminal: Terminal, data: DataSet) -> None:
    for note in data.notes:
        terminal.warn(f"{data.spec}: {note}")


@dataclasses.dataclass(frozen=True)
class _Usable:
    """A split, whose images fail also where their values have no brightness."""

    split: ImageSplit

    @property
    def labels(self) -> Sequence[int] | None:
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def image(self, index: int) -> Image.Image:
        image = self.split.image(index)
        image.load()
        to_bytes(image)
        return image

    def name(self, index: int) -> str:
        return image_name(self.split, index)


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
        image = read_image(self.split, index)
        try:
            return self.transform(image), label
        except NoBrightnessError as error:
            raise DeryError(
                f"cannot use the image {image_name(self.split, index)}: {error}",
                "save it with 8 or 16 bits, or leave out all that cannot be used: --skip-bad",
            ) from error

    @property
    def labels(self) -> list[int] | None:
        """Labels in the data set's own order, without decoding an image."""
        if self.split.labels is None:
            return None
        return [int(self.split.labels[i]) for i in self.indices]
