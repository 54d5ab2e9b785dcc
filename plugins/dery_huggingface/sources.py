"""What an ``hf:`` spec says, and the splits it names: of a folder, of the cache, or of the hub.

No code of a data set is run, nothing is unpickled, and nothing is fetched unless the spec says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from dery_cli.errors import DeryError, UsageError

OPTIONS = ("config", "download", "image", "label", "root", "test", "train")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
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


def parse(argument: str) -> Spec:
    """Place and options of an argument.

    Raises:
        UsageError: An option is unknown, or the place is neither a folder nor a name on the hub.
    """
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
    return Spec(place=place, folder=folder, options=options)


def library() -> ModuleType:
    """The package ``datasets``.

    Raises:
        DeryError: It cannot be imported.
    """
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
def _explained(spec: Spec) -> Iterator[None]:
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


def load(spec: Spec) -> dict[str, Any]:
    """The splits of a spec by name.

    Raises:
        DeryError: They are not there, cannot be read, or would have to be fetched.
    """
    datasets = library()
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


def _load_dataset(datasets: ModuleType, path: str, spec: Spec) -> Any:
    return datasets.load_dataset(
        path,
        spec.options.get("config"),
        cache_dir=_root(spec),
        trust_remote_code=False,  # version 3 would ask; later ones run no code at all
    )


def places(spec: Spec) -> list[Path]:
    """Where the files lie that a data set's rows may name: its folder, and the caches."""
    datasets = library()
    from huggingface_hub import constants

    caches = (_root(spec), datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    found = [Path(cache).expanduser().absolute() for cache in caches if cache is not None]
    return found if spec.folder is None else [spec.folder, *found]


def _root(spec: Spec) -> str | None:
    root = spec.options.get("root")
    return None if root is None else os.path.expanduser(root)


def _from_hub(datasets: ModuleType, spec: Spec) -> Any:
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
