"""Image folders: which files are images, what their classes are, and which part is for what.

A class is a folder with images in it or below it. Hidden files and folders do not count, since
macOS and notebooks keep stubs and copies in them; links to folders are followed, to each real
folder once a class, and to another class's never. What is read is listed once, in the order of the
names; what is passed over is counted, and told.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dery_cli.data.splits import FolderSplit
from dery_cli.errors import DeryError, UsageError
from dery_cli.sizes import some_of

IMAGE_SUFFIXES = frozenset(
    {
        ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
        ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
_DEEPEST = 64
"""Levels of folders below a class."""
_TEST_FOLDERS = ("test", "val", "valid", "validation")
"""What is tested on: the first of these that has class folders with images."""
_SPLIT_FOLDERS = {*_TEST_FOLDERS, "testing", "train", "training"}


class PassedOver:
    """What was met in folders and is not read."""

    def __init__(self) -> None:
        self._others: collections.Counter[str] = collections.Counter()
        self._empty: list[str] = []
        self._special: list[str] = []
        self._again: list[str] = []

    def file(self, path: str) -> None:
        """One that is not called like an image."""
        self._others[os.path.splitext(path)[1].lower() or "no suffix"] += 1

    def special(self, path: str) -> None:
        """A pipe, a device or a socket that is called like an image."""
        self._special.append(_text(path))

    def empty(self, folder: str) -> None:
        """A folder among those of classes that has no images."""
        self._empty.append(_text(folder))

    def again(self, link: str) -> None:
        """A second class folder that is a link to the first."""
        self._again.append(_text(link))

    def notes(self) -> list[str]:
        """All of it in words, a line each."""
        lines = []
        if self._special:
            lines.append(f"passed over, for they are no files: {some_of(self._special)}")
        if self._again:
            lines.append(f"passed over, for they link to another class: {some_of(self._again)}")
        if self._empty:
            lines.append(f"no classes, for they have no images: {some_of(self._empty)}")
        if self._others:
            count = sum(self._others.values())
            kinds = [f"{number} {suffix}" for suffix, number in sorted(self._others.items())]
            what = "a file that is no image" if count == 1 else f"{count} files that are no images"
            lines.append(f"passed over {what}: {some_of(kinds)}")
        return lines


def _text(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def read_folder(
    root: Path, passed: PassedOver | None = None
) -> tuple[tuple[str, ...] | None, FolderSplit, FolderSplit | None]:
    """A folder of class folders, or one with ``train`` and ``val``.

    Args:
        root: The folder.
        passed: Told what is passed over.

    Returns:
        Class names, or None where there are no class folders; training images; test images.

    Raises:
        UsageError: There are no images, a single class, or it is not clear what the classes are.
        DeryError: A folder cannot be listed.
    """
    folders = {path.name.lower(): path for path in _folders(root)}
    base = folders.get("train", root)
    passed = PassedOver() if passed is None else passed
    found = _list(base, passed)
    if not found.loose and not found.classes:
        raise UsageError(
            f"no images in {base}",
            f"looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and below it",
        )
    if base == root:
        _refuse_splits(root, found.classes)
    elif not found.classes:
        _refuse_class(base, [path for name, path in folders.items() if name not in _SPLIT_FOLDERS])
    if not found.classes:
        return None, FolderSplit(found.loose, None), None
    classes = tuple(found.classes)
    _check_count(base, classes)
    test = None
    if base != root:
        candidates = [folders[name] for name in _TEST_FOLDERS if name in folders]
        test = _held_out(base, classes, candidates, passed)
    return classes, _labelled(found.classes, classes), test


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and the images of the folders that are, at any depth and by name.

    Raises:
        UsageError: A path is not there, or there is no image.
        DeryError: A folder cannot be listed.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += _images(str(path), (os.path.realpath(path),), PassedOver(), set())
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"there is no image or folder {path}", "give files or folders")
    if not found:
        raise UsageError(
            f"there is no image in {', '.join(map(str, paths))}",
            f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The images directly in a folder, and those in and below each folder in it that has any."""

    loose: list[Path]
    classes: dict[str, list[Path]]


def _list(folder: Path, passed: PassedOver) -> _Listing:
    found = _Listing([], {})
    entries = list(_entries(folder, (os.path.realpath(folder),), passed))
    taken: set[str] = set()
    classes = []
    for entry, place in entries:
        if place is None:
            found.loose.append(Path(entry))
        elif place[-1] in taken:
            passed.again(entry)
        else:
            taken.add(place[-1])
            classes.append((entry, place))
    for entry, place in classes:
        if images := list(_images(entry, place, passed, set(taken))):
            found.classes[_class_name(folder, os.path.basename(entry))] = images
        else:
            passed.empty(entry)
    return found


def _folders(folder: Path) -> list[Path]:
    inside = (os.path.realpath(folder),)
    found = _entries(folder, inside, PassedOver())
    return [Path(entry) for entry, place in found if place is not None]


def _images(
    folder: str, inside: tuple[str, ...], passed: PassedOver, taken: set[str]
) -> Iterator[Path]:
    """The images in a folder and below it; folders in ``taken``, which grows, are passed over."""
    if len(inside) > _DEEPEST:
        raise UsageError(
            f"folders nest more than {_DEEPEST} deep in {_text(inside[0])}",
            "give a folder of class folders",
        )
    for entry, place in _entries(folder, inside, passed):
        if place is None:
            yield Path(entry)
        elif place[-1] not in taken:
            taken.add(place[-1])
            yield from _images(entry, place, passed, taken)


def _entries(
    folder: str | Path, inside: tuple[str, ...], passed: PassedOver
) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """The folders and images in a folder, by name.

    A link to nowhere is taken for an image if it is called like one, so that it is missed.

    Args:
        folder: To be listed.
        inside: Where it really is, and the folders on the way to it; a link to any of these, or
            to a folder above, is passed over.
        passed: Told of files that are no images.

    Returns:
        Path; of a folder also what is ``inside`` for it.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DeryError(f"cannot list the folder {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            real = os.path.join(inside[-1], entry.name)
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if any(
                    os.path.join(place, "").startswith(os.path.join(real, "")) for place in inside
                ):
                    continue
            yield entry.path, (*inside, real)
        elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
            passed.file(entry.path)
        elif _is_file(entry):
            yield entry.path, None
        else:
            passed.special(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _refuse_splits(root: Path, classes: Mapping[str, object]) -> None:
    if classes and all(name.lower() in _SPLIT_FOLDERS for name in classes):
        raise UsageError(
            f"the folders in {root} are called like parts, not like classes: {', '.join(classes)}",
            "call them train and val (or test), or give one of them",
        )


def _refuse_class(train: Path, beside: Sequence[Path]) -> None:
    """Of class folders, one of which is called ``train``, that one alone would be read."""
    others = [
        path.name
        for path in beside
        if any(_images(str(path), (os.path.realpath(path),), PassedOver(), set()))
    ]
    if others:
        raise UsageError(
            f"is {train} a class? It has images but no class folders, and beside it there are "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}",
            f"if it is, move all classes into a folder called train; if not, give {train}",
        )


def _check_count(base: Path, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise UsageError(
            f"only one class folder with images in {base}: {classes[0]}",
            "give two or more class folders, or images without class folders for unlabelled use",
        )


def _class_name(base: Path, folder: str) -> str:
    """A class's name: its folder's, which is UTF-8 whatever the locale says of file names.

    Raises:
        UsageError: It is not.
    """
    try:
        return os.fsencode(folder).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"a class folder in {base} has a name that is not UTF-8: {os.fsencode(folder)!r}",
            "rename it",
        ) from error


def _held_out(
    base: Path, classes: Sequence[str], candidates: Sequence[Path], passed: PassedOver
) -> FolderSplit | None:
    """The images to test on; None where no candidate has labelled ones.

    Raises:
        UsageError: They have classes that ``base`` lacks.
    """
    for folder in candidates:
        found = _list(folder, passed).classes
        if not found:
            continue
        unknown = [name for name in found if name not in classes]
        if unknown:
            raise UsageError(
                f"{folder} has classes that {base} lacks: {', '.join(unknown[:5])}",
                "both need the same class folders",
            )
        return _labelled(found, classes)
    return None


def _labelled(images: Mapping[str, Sequence[Path]], classes: Sequence[str]) -> FolderSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = images.get(name, ())
        files += found
        labels += [label] * len(found)
    return FolderSplit(files, labels)
