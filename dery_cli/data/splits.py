"""Splits of image files and parts of splits; reading their images, and leaving broken ones out.

Images are left out before anything is derived from a split, so labels, choices and hashes are those
of the same data without the broken files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dery_cli.errors import DeryError
from dery_cli.zoo.plugin import ImageSplit
from dery_cli.zoo.transforms import UNREADABLE

Screen = Callable[[ImageSplit], Sequence[int]]
"""Which images of a split are to be left out, by index."""

_CHUNK = 512
"""Images handed to the decoding threads at once: what is left to wait for on Ctrl-C."""


class FolderSplit:
    """Image files with their labels."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None) -> None:
        self.files = list(files)
        self.labels: Sequence[int] | None = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        return os.fsencode(self.files[index]).decode(errors="backslashreplace")

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

    def name(self, index: int) -> str:
        return image_name(self.split, self.indices[index])

    def digest(self, index: int) -> bytes:
        return image_digest(self.split, self.indices[index])


def image_name(split: ImageSplit, index: int) -> str:
    """What an image is called in messages: its file where the split tells it, else its number."""
    name = getattr(split, "name", None)
    return f"number {index}" if name is None else str(name(index))


def image_digest(split: ImageSplit, index: int) -> bytes:
    """Hash of one image's content: its file's bytes where it has a file, else its pixels.

    Raises:
        DeryError: It cannot be read.
    """
    digest = getattr(split, "digest", None)
    if digest is not None:
        with _named(split, index):
            return bytes(digest(index))
    image = read_image(split, index)
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).digest()


def read_image(split: ImageSplit, index: int) -> Image.Image:
    """Decode an image.

    Raises:
        DeryError: It cannot be decoded; the message names it.
    """
    with _named(split, index):
        image = split.image(index)
        image.load()
        return image


@contextlib.contextmanager
def _named(split: ImageSplit, index: int) -> Iterator[None]:
    """Turn what reading an image fails with into an error that names the image."""
    try:
        yield
    except UNREADABLE as error:
        name = image_name(split, index)
        reason = str(error).replace(name, Path(name).name)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no image format that Pillow knows"
        raise DeryError(
            f"cannot read the image {name}: {reason}",
            "replace or remove it, or leave out all that cannot be read: --skip-bad",
        ) from error


def unreadable(split: ImageSplit) -> Iterator[bool]:
    """Whether each image cannot be decoded, in order; each is decoded once, by threads."""

    def fails(index: int) -> bool:
        try:
            read_image(split, index)
        except DeryError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(split), _CHUNK):
            yield from pool.map(fails, range(start, min(start + _CHUNK, len(split))))


class Sieve:
    """Takes out of splits what a screen gives, and remembers it.

    Args:
        spec: What the data are called in messages.
        screen: None lets everything through.
    """

    def __init__(self, spec: str, screen: Screen | None) -> None:
        self._spec, self._screen = spec, screen
        self.left_out: list[tuple[int, ...]] = []

    def __call__(self, split: ImageSplit, classes: Sequence[str] | None = None) -> ImageSplit:
        """What is left of ``split``; of each of ``classes`` that it has, at least one image.

        Raises:
            DeryError: Nothing is left, or no image of a class.
        """
        if self._screen is None:
            return split
        out = tuple(self._screen(split))
        self.left_out.append(out)
        if not out:
            return split
        rest = Subset(split, sorted(set(range(len(split))) - set(out)))
        if not len(rest):
            raise DeryError(
                f"none of the {len(out)} images of {self._spec} can be read",
                f"the first is {image_name(split, 0)}",
            )
        lost = set(split.labels or ()) - set(rest.labels or ())
        for label, name in enumerate(classes or ()):
            if label in lost:
                raise DeryError(
                    f"no image of the class '{name}' of {self._spec} can be read",
                    "replace its images, or remove the class",
                )
        return rest


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
