"""Hugging Face data sets as ``hf:OWNER/NAME[?OPTIONS]`` or ``hf:FOLDER[?OPTIONS]``.

A folder holds parquet files, images, or what ``save_to_disk`` wrote. Options: ``config``; ``train``
and ``test``, names of splits; ``image`` and ``label``, names of columns (an empty ``label`` reads
the images unlabelled); ``root``, the cache of ``datasets``; ``download=1``, without which nothing
is fetched. No code of a data set is run and nothing is unpickled. Images stay encoded until they
are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from dery_cli.errors import UsageError
from dery_huggingface.sources import Spec, library, load, parse, places

if TYPE_CHECKING:
    from PIL import Image

_LABEL_COLUMNS = ("label", "labels")
"""Columns that are labels though they are no ``ClassLabel``."""
_TEST_SPLITS = ("test", "validation", "valid", "val")


class HuggingFaceData:
    """The data sets of the Hugging Face hub, and folders of the same formats.

    ``classes`` opens a data set; ``split`` takes its parts from what was opened last.
    """

    def __init__(self) -> None:
        self._opened: tuple[str, _Tables] | None = None

    def resolve(self, argument: str) -> str:
        """``argument`` with its folders as absolute paths."""
        spec = parse(argument)
        options = dict(spec.options)
        if "root" in options:
            options["root"] = str(Path(os.path.expanduser(options["root"])).resolve())
        place = spec.place if spec.folder is None else str(spec.folder)
        return f"{place}?{urlencode(options, safe='/')}" if options else place

    def classes(self, argument: str) -> Sequence[str] | None:
        return self._open(argument).classes

    def split(self, argument: str, name: str) -> HuggingFaceSplit | None:
        if name not in ("train", "test"):
            return None
        if self._opened is not None and self._opened[0] == argument:
            return self._opened[1].split(name)
        return self._open(argument).split(name)

    def _open(self, argument: str) -> _Tables:
        tables = _Tables(parse(argument))
        self._opened = (argument, tables)
        return tables


def _may_hold_images(feature: Any) -> bool:
    """Whether a column may hold images: as such, encoded, as paths, or as bytes and path."""
    if isinstance(feature, Mapping):
        return "bytes" in feature
    kind, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    return kind == "Image" or (kind == "Value" and dtype.startswith(("string", "binary", "large")))


def _may_hold_labels(feature: Any) -> bool:
    """Whether a column that is called so may hold classes: values, or lists of one value."""
    if isinstance(feature, list):
        return True
    kind, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    return kind in ("List", "LargeList", "Sequence") or (kind == "Value" and dtype != "null")


class HuggingFaceSplit:
    """An ``ImageSplit``: one column of a table.

    Args:
        table: A ``datasets.Dataset`` whose images are not decoded.
        column: Where its images are.
        labels: One class index a row, or None.
        where: What the split is called in messages.
        places: Folders in which files lie that rows name by path; relative ones in the first.
    """

    def __init__(
        self,
        table: Any,
        column: str,
        labels: Sequence[int] | None,
        where: str,
        places: Sequence[Path] = (),
    ) -> None:
        self._table, self._column, self._where = table, column, where
        self._places = places
        self.labels: Sequence[int] | None = labels

    def __len__(self) -> int:
        return len(self._table)

    def image(self, index: int) -> Image.Image:
        from PIL import Image

        with Image.open(io.BytesIO(self._bytes(index))) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        path = None
        with contextlib.suppress(OSError):
            path = self._stored(index)[1]
        return f"{index} of {self._where}" + (f" ({path})" if path else "")

    def digest(self, index: int) -> bytes:
        """Hash of the encoded image; spares decoding."""
        return hashlib.sha256(self._bytes(index)).digest()

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        """The encoded image, and its path, of which one may be missing."""
        value = self._table[index][self._column]
        if isinstance(value, Mapping):
            return value.get("bytes"), value.get("path")
        if isinstance(value, str):
            return None, value
        if value is None or isinstance(value, bytes):
            return value, None
        raise OSError(f"the column '{self._column}' holds {type(value).__name__}, not image files")

    def _bytes(self, index: int) -> bytes:
        data, path = self._stored(index)
        if data is not None:
            return data
        if path is None:
            raise OSError("there is none in this row")
        return self._inside(path).read_bytes()  # a URL is no file here: nothing is fetched

    def _inside(self, path: str) -> Path:
        """The file that a row names, which lies in the data set and is a file."""
        for place in self._places:
            found = Path(os.path.normpath(place / path))
            if found.is_relative_to(place):
                if found.exists() and not found.is_file():
                    raise OSError(f"{path} is no file")
                return found
        raise OSError(f"{path} is not in the data set")


class _Tables:
    """An opened data set: which splits and columns are used, and what its classes are."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._splits = load(spec)
        self._train = self._choose_train()
        features = self._splits[self._train].features
        self._image = self._image_column(features)
        self._label = self._label_column(features)
        self._known: dict[str, list[Any]] = {}
        self._order: list[Any] = []
        if self._label is not None:
            names = getattr(features[self._label], "names", None)
            self._order = sorted(set(self._labelled(self._train))) if names is None else names

    @property
    def classes(self) -> list[str] | None:
        return None if self._label is None else [str(value) for value in self._order]

    def split(self, role: str) -> HuggingFaceSplit | None:
        """The split that is used as ``train`` or ``test``."""
        name = self._train if role == "train" else self._choose_test()
        if name is None:
            return None
        labels = None
        if self._label is not None:
            values = self._labelled(name)
            index = {value: label for label, value in enumerate(self._order)}
            new = sorted({str(value) for value in values if value not in index})
            if new:
                raise UsageError(
                    f"{self._spec}: the split '{name}' has classes that '{self._train}' lacks: "
                    f"{', '.join(new[:5])}",
                    "both need the same classes",
                )
            labels = [index[value] for value in values]
        table = self._splits[name].select_columns([self._image])
        datasets = library()
        if isinstance(table.features[self._image], datasets.Image):
            table = table.cast_column(self._image, datasets.Image(decode=False))
        where = f"the split '{name}' of {self._spec}"
        return HuggingFaceSplit(table, self._image, labels, where, places(self._spec))

    def _choose_train(self) -> str:
        asked = self._asked("train", "split", self._splits)
        if asked is not None:
            return asked
        if "train" in self._splits:
            return "train"
        others = [name for name in self._splits if name != self._spec.options.get("test")]
        if len(others) == 1:
            return others[0]
        raise UsageError(
            f"{self._spec} has no split 'train'; there are {', '.join(self._splits)}",
            self._spec.with_option(f"train={next(iter(self._splits))}"),
        )

    def _choose_test(self) -> str | None:
        """The split asked for, else the first of the usual ones whose rows all have labels."""
        asked = self._asked("test", "split", self._splits)
        if asked is not None:
            if asked == self._train:
                raise UsageError(
                    f"{self._spec}: the split '{asked}' cannot be trained and tested on",
                    "without test= a fifth of each class is held out",
                )
            for column in self._lacking(asked):
                raise UsageError(
                    f"{self._spec}: the split '{asked}' has no column '{column}'",
                    f"there are {', '.join(self._splits[asked].column_names)}",
                )
            return asked
        for name in _TEST_SPLITS:
            if name not in self._splits or name == self._train or self._lacking(name):
                continue
            if self._label is None or None not in self._values(name):
                return name
        return None

    def _lacking(self, split: str) -> list[str]:
        """Which of the columns that are used a split lacks."""
        used = [column for column in (self._image, self._label) if column is not None]
        return [column for column in used if column not in self._splits[split].column_names]

    def _image_column(self, features: Mapping[str, Any]) -> str:
        usable = [name for name, feature in features.items() if _may_hold_images(feature)]
        asked = self._asked("image", "column", features)
        if asked is not None and asked not in usable:
            raise UsageError(
                f"{self._spec}: the column '{asked}' holds no images but {features[asked]}",
                "a column of images, of encoded images as bytes, or of paths is needed",
            )
        if asked is not None:
            return asked
        image = library().Image
        found = [name for name, feature in features.items() if isinstance(feature, image)]
        if len(found) == 1:
            return found[0]
        columns = found or usable
        what = f"several image columns: {', '.join(found)}" if found else "no image column"
        listed = f"its columns are {', '.join(features)}"
        if columns:
            listed = f"{self._spec.with_option(f'image={columns[0]}')}; {listed}"
        raise UsageError(f"{self._spec} has {what}", listed)

    def _label_column(self, features: Mapping[str, Any]) -> str | None:
        if self._spec.options.get("label") == "":
            return None
        asked = self._asked("label", "column", features)
        if asked is not None:
            return asked
        datasets = library()
        found = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(found) > 1:
            raise UsageError(
                f"{self._spec} has several columns of classes: {', '.join(found)}",
                self._spec.with_option(f"label={found[0]}"),
            )
        plain = [n for n in _LABEL_COLUMNS if n in features and _may_hold_labels(features[n])]
        return next(iter([*found, *plain]), None)

    def _asked(self, option: str, kind: str, known: Iterable[str]) -> str | None:
        """What an option names, which has to be there."""
        name = self._spec.options.get(option)
        if name is not None and name not in known:
            raise UsageError(
                f"{self._spec} has no {kind} '{name}'", f"there are {', '.join(known)}"
            )
        return name

    def _values(self, split: str) -> list[Any]:
        """A split's labels, a class's name where it has one; None where there is no label."""
        if split not in self._known:
            assert self._label is not None
            table = self._splits[split].select_columns([self._label])
            values = table[:][self._label]
            if all(isinstance(value, list) and len(value) == 1 for value in values):
                values = [value[0] for value in values]
            if any(isinstance(value, list | dict) for value in values):
                raise UsageError(
                    f"{self._spec}: the column '{self._label}' holds more than one class a row",
                    f"use no labels: {self._spec.with_option('label=')}",
                )
            if any(isinstance(value, float) for value in values):
                values = self._whole(values)
            names = getattr(table.features[self._label], "names", None)
            if names is not None:  # -1 is what ClassLabel stores for none
                values = [None if value in (None, -1) else names[value] for value in values]
            self._known[split] = values
        return self._known[split]

    def _whole(self, values: list[Any]) -> list[Any]:
        """Labels that are stored as numbers with decimals, and have none.

        Raises:
            UsageError: One has.
        """
        for value in values:
            if value is not None and not float(value).is_integer():
                raise UsageError(
                    f"{self._spec}: the column '{self._label}' holds {value}, which is no class",
                    f"name another, or use no labels: {self._spec.with_option('label=')}",
                )
        return [None if value is None else int(value) for value in values]

    def _labelled(self, split: str) -> list[Any]:
        """The same.

        Raises:
            UsageError: A label is missing.
        """
        values = self._values(split)
        missing = values.count(None)
        if missing:
            raise UsageError(
                f"{self._spec}: {missing} of {len(values)} rows of the split '{split}' have no "
                "label",
                f"name another split, or use no labels: {self._spec.with_option('label=')}",
            )
        return values
