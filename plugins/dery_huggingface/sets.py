"""Hugging Face data sets as ``hf:OWNER/NAME[?OPTIONS]`` or ``hf:FOLDER[?OPTIONS]``.

A folder holds parquet files, images, or what ``save_to_disk`` wrote. Options: ``config``; ``train``
and ``test``, names of splits; ``image`` and ``label``, names of columns (an empty ``label`` reads
the images unlabelled); ``root``, the cache of ``datasets``; ``download=1``, without which nothing
is fetched. No code of a data set is run and nothing is unpickled. Images stay encoded until they
are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from dery_cli.errors import DeryError, UsageError

if TYPE_CHECKING:
    from PIL import Image

OPTIONS = ("config", "download", "image", "label", "root", "test", "train")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LABEL_COLUMNS = ("label", "labels")
"""Columns that are labels though they are no ``ClassLabel``."""
_DISCRETE = ("string", "large_string", "int", "uint", "bool")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_TRUE = {"1", "ON", "YES", "TRUE"}


class HuggingFaceData:
    """The data sets of the Hugging Face hub, and folders of the same formats."""

    def resolve(self, argument: str) -> str:
        """``argument`` with its folders as absolute paths."""
        spec = _parse(argument)
        options = dict(spec.options)
        if "root" in options:
            options["root"] = str(Path(os.path.expanduser(options["root"])).resolve())
        place = spec.place if spec.folder is None else str(spec.folder)
        return f"{place}?{urlencode(options, safe='/')}" if options else place

    def classes(self, argument: str) -> Sequence[str] | None:
        return _Tables(_parse(argument)).classes

    def split(self, argument: str, name: str) -> HuggingFaceSplit | None:
        if name not in ("train", "test"):
            return None
        return _Tables(_parse(argument)).split(name)


class HuggingFaceSplit:
    """An ``ImageSplit``: one column of a table.

    Args:
        table: A ``datasets.Dataset`` whose images are not decoded.
        column: Where its images are.
        labels: One class index a row, or None.
        where: What the split is called in messages.
    """

    def __init__(self, table: Any, column: str, labels: Sequence[int] | None, where: str) -> None:
        self._table, self._column, self._where = table, column, where
        self.labels: Sequence[int] | None = labels

    def __len__(self) -> int:
        return len(self._table)

    def image(self, index: int) -> Image.Image:
        from PIL import Image

        with Image.open(io.BytesIO(self._bytes(index))) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
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
        return Path(path).read_bytes()  # a URL is no file here: nothing is fetched


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """A parsed argument.

    Args:
        place: What stands before the options.
        folder: It, if it is a folder; None for a name on the hub.
        options: By name.
    """

    place: str
    folder: Path | None
    options: Mapping[str, str]

    def __str__(self) -> str:
        return f"hf:{self.place}"

    def with_option(self, option: str) -> str:
        """The whole spec with one more option, to be typed."""
        options = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"--data '{self}?{options}{'&' if options else ''}{option}'"


def _parse(argument: str) -> _Spec:
    place, _, query = argument.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UsageError(
            f"hf:{argument}: unknown option '{unknown[0]}'", f"there are {', '.join(OPTIONS)}"
        )
    path = Path(os.path.expanduser(place))
    folder = path.resolve() if place and path.is_dir() else None
    if folder is None and not _HUB_NAME.fullmatch(place):
        raise UsageError(f"no such folder: '{place}'", "hf:OWNER/NAME, or hf:FOLDER")
    return _Spec(place=place, folder=folder, options=options)


def _library() -> ModuleType:
    try:
        import datasets
        from datasets import load_dataset, load_from_disk  # noqa: F401 - not of another 'datasets'
    except ImportError as error:
        raise DeryError(
            f"hf: needs the package 'datasets', which cannot be imported: {error}",
            "pip install 'dery-cli[huggingface]'",
        ) from error
    return datasets


@contextlib.contextmanager
def _explained(spec: _Spec) -> Iterator[None]:
    try:
        yield
    except DeryError:
        raise
    except Exception as error:  # whatever the library, its readers or the network raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise DeryError(
            f"cannot open {spec}: {reason or type(error).__name__}",
            "files of images or parquet, or a folder written by save_to_disk, are read",
        ) from error


def _load(spec: _Spec) -> dict[str, Any]:
    """The splits of a spec by name.

    Raises:
        DeryError: They are not there, cannot be read, or would have to be fetched.
    """
    datasets = _library()
    with _explained(spec):
        folder = spec.folder
        if folder is None:
            found = _from_hub(datasets, spec)
        elif any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            found = _load_dataset(datasets, str(folder), spec)
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    return {str(name): table.with_format(None) for name, table in found.items()}


def _load_dataset(datasets: ModuleType, path: str, spec: _Spec) -> Any:
    return datasets.load_dataset(
        path,
        spec.options.get("config"),
        cache_dir=_root(spec),
        trust_remote_code=False,  # version 3 would ask; later ones run no code at all
    )


def _root(spec: _Spec) -> str | None:
    root = spec.options.get("root")
    return None if root is None else os.path.expanduser(root)


def _from_hub(datasets: ModuleType, spec: _Spec) -> Any:
    """What an earlier call prepared, without asking the hub; else it is fetched, if that is asked.

    Raises:
        DeryError: It is not there and may not be fetched, or several configurations are there.
    """
    from datasets.packaged_modules.cache.cache import Cache

    cache = Path(_root(spec) or datasets.config.HF_DATASETS_CACHE).expanduser()
    name = spec.place.rpartition("/")[2]
    asked = spec.options.get("config")
    prepared = _prepared(cache, spec.place)
    if asked is None and len(prepared) > 1:
        raise UsageError(
            f"{spec} has several configurations: {', '.join(prepared)}",
            spec.with_option(f"config={next(iter(prepared))}"),
        )
    config = next(iter(prepared), None) if asked is None else asked
    if config in prepared:
        version, digest = prepared[config].parts[-2:]
        return Cache(
            cache_dir=str(cache),
            dataset_name=name,
            repo_id=spec.place,
            config_name=config,
            version=version,
            hash=digest,
        ).as_dataset()
    what = str(spec) if asked is None else f"{spec} with config={asked}"
    if spec.options.get("download", "0").upper() not in _TRUE:
        raise DeryError(
            f"{what} is no folder, and not in {cache}",
            f"{spec.with_option('download=1')} fetches it",
        )
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in _TRUE:
            raise DeryError(
                f"{what} is not in {cache}, and {variable} forbids fetching it", f"unset {variable}"
            )
    return _load_dataset(datasets, spec.place, spec)


def _prepared(cache: Path, name: str) -> dict[str, Path]:
    """The newest prepared copy of each configuration of a data set in the cache of ``datasets``."""
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = name.partition("/")
    folder = cache / f"{owner}___{camelcase_to_snakecase(short)}"
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*/*/dataset_info.json"), key=lambda p: p.stat().st_mtime):
        config, _, digest = path.parts[-4:-1]
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["config_name"] == config and not digest.endswith(".incomplete"):
            found[config] = path.parent
    return dict(sorted(found.items()))


class _Tables:
    """An opened data set: which splits and columns are used, and what its classes are."""

    def __init__(self, spec: _Spec) -> None:
        self._spec = spec
        self._splits = _load(spec)
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
        datasets = _library()
        if isinstance(table.features[self._image], datasets.Image):
            table = table.cast_column(self._image, datasets.Image(decode=False))
        return HuggingFaceSplit(table, self._image, labels, f"the split '{name}' of {self._spec}")

    def _choose_train(self) -> str:
        asked = self._asked_split("train")
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
        asked = self._asked_split("test")
        if asked is not None:
            return asked
        for name in _TEST_SPLITS:
            if name not in self._splits or name == self._train:
                continue
            if self._label is None or None not in self._values(name):
                return name
        return None

    def _asked_split(self, role: str) -> str | None:
        name = self._spec.options.get(role)
        if name is not None and name not in self._splits:
            raise UsageError(
                f"{self._spec} has no split '{name}'", f"there are {', '.join(self._splits)}"
            )
        return name

    def _image_column(self, features: Mapping[str, Any]) -> str:
        asked = self._asked_column("image", features)
        if asked is not None:
            return asked
        image = _library().Image
        found = [name for name, feature in features.items() if isinstance(feature, image)]
        if len(found) == 1:
            return found[0]
        columns = found or list(features)
        what = f"several image columns: {', '.join(found)}" if found else "no image column"
        raise UsageError(
            f"{self._spec} has {what}",
            f"{self._spec.with_option(f'image={columns[0]}')}; its columns are "
            f"{', '.join(features)}",
        )

    def _label_column(self, features: Mapping[str, Any]) -> str | None:
        if self._spec.options.get("label") == "":
            return None
        asked = self._asked_column("label", features)
        if asked is not None:
            return asked
        datasets = _library()
        found = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(found) > 1:
            raise UsageError(
                f"{self._spec} has several columns of classes: {', '.join(found)}",
                self._spec.with_option(f"label={found[0]}"),
            )
        plain = [n for n in _LABEL_COLUMNS if isinstance(features.get(n), datasets.Value)]
        discrete = [n for n in plain if features[n].dtype.startswith(_DISCRETE)]
        return next(iter([*found, *discrete]), None)

    def _asked_column(self, role: str, features: Mapping[str, Any]) -> str | None:
        name = self._spec.options.get(role)
        if name is not None and name not in features:
            raise UsageError(
                f"{self._spec} has no column '{name}'", f"there are {', '.join(features)}"
            )
        return name

    def _values(self, split: str) -> list[Any]:
        """A split's labels, a class's name where it has one; None where there is no label."""
        if split not in self._known:
            assert self._label is not None
            table = self._splits[split].select_columns([self._label])
            values = table[:][self._label]
            if any(isinstance(value, list | dict) for value in values):
                raise UsageError(
                    f"{self._spec}: the column '{self._label}' holds more than one class a row"
                )
            names = getattr(table.features[self._label], "names", None)
            if names is not None:  # -1 is what ClassLabel stores for none
                values = [None if value in (None, -1) else names[value] for value in values]
            self._known[split] = values
        return self._known[split]

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
