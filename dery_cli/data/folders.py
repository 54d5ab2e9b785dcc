"""Image folders: which files are images, what their classes are, and which part is for what.

A class is a folder with images in it or below it. Hidden files and folders do not count, since
macOS and notebooks keep stubs and copies in them; links to folders are followed. What is read is
listed once, in the order of the names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dery_cli.data.splits import FolderSplit
from dery_cli.errors import DeryError, UsageError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_TEST_FOLDERS = ("test", "val", "valid", "validation")
"""What is tested on: the first of these that has class folders with images."""
_SPLIT_FOLDERS = {*_TEST_FOLDERS, "testing", "train", "training"}


def read_folder(root: Path) -> tuple[tuple[str, ...] | None, FolderSplit, FolderSplit | None]:
    """A folder of class folders, or one with ``train`` and ``val``.

    Returns:
        Class names, or None where there are no class folders; training images; test images.

    Raises:
        UsageError: There are no images, a single class, or it is not clear what the classes are.
        DeryError: A folder cannot be listed.
    """
    folders = {path.name.lower(): path for path in _folders(root)}
    base = folders.get("train", root)
    found = _list(base)
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
    _check_names(base, classes)
    test = None
    if base != root:
        candidates = [folders[name] for name in _TEST_FOLDERS if name in folders]
        test = _held_out(base, classes, candidates)
    return classes, _labelled(found.classes, classes), test


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The images directly in a folder, and those in and below each folder in it that has any."""

    loose: list[Path]
    classes: dict[str, list[Path]]


def _list(folder: Path) -> _Listing:
    found = _Listing([], {})
    for entry, place in _entries(folder, (os.path.realpath(folder),)):
        if place is None:
            found.loose.append(Path(entry))
        elif images := list(_images(entry, place)):
            found.classes[os.path.basename(entry)] = images
    return found


def _folders(folder: Path) -> list[Path]:
    inside = (os.path.realpath(folder),)
    return [Path(entry) for entry, place in _entries(folder, inside) if place is not None]


def _images(folder: str, inside: tuple[str, ...]) -> Iterator[Path]:
    """The images in a folder and below it."""
    for entry, place in _entries(folder, inside):
        if place is None:
            yield Path(entry)
        else:
            yield from _images(entry, place)


def _entries(
    folder: str | Path, inside: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """The folders and images in a folder, by name.

    A link to nowhere is taken for an image if it is called like one, so that it is missed.

    Args:
        folder: To be listed.
        inside: Where it really is, and the folders on the way to it; a link to any of these, or
            to a folder above, is passed over.

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
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and _is_file(entry):
            yield entry.path, None


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
    others = [path.name for path in beside if any(_images(str(path), (os.path.realpath(path),)))]
    if others:
        raise UsageError(
            f"is {train} a class? It has images but no class folders, and beside it there are "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}",
            f"if it is, move all classes into a folder called train; if not, give {train}",
        )


def _check_names(base: Path, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise UsageError(
            f"only one class folder with images in {base}: {classes[0]}",
            "give two or more class folders, or images without class folders for unlabelled use",
        )
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"a class folder in {base} has a name that is not UTF-8: {os.fsencode(name)!r}",
                "rename it",
            ) from error


def _held_out(base: Path, classes: Sequence[str], candidates: Sequence[Path]) -> FolderSplit | None:
    """The images to test on; None where no candidate has labelled ones.

    Raises:
        UsageError: They have classes that ``base`` lacks.
    """
    for folder in candidates:
        found = _list(folder).classes
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
