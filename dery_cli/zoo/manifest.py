"""Zoo manifests: lists of donors as TOML data.

::

    [zoo]
    title = "My donors"

    [[model]]
    spec = "timm/resnet18.a1_in1k"     # plugin/name[.tag]
    name = "resnet18"                  # optional; name in the zoo
    weights = "weights/resnet18.safetensors"  # optional; inside the manifest's folder
    weights_key = "model_ema"          # optional; which of the state dicts in that file
    allow_partial = true               # optional; load of these weights what fits
    sha256 = "..."                     # optional; of that file, or else of the plugin's own file
    image_size = 224                   # optional
    license = "apache-2.0"             # optional; overrides what the plugin says
    task = "ImageNet-1k classification"
    source = "https://..."
    note = "fetch it from ..."         # optional; shown where the weights are not there

The weights of a manifest that ships with dery are looked for below the current folder.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dery_cli.errors import UsageError

_TYPES: dict[str, type] = {
    "spec": str,
    "name": str,
    "weights": str,
    "weights_key": str,
    "allow_partial": bool,
    "sha256": str,
    "image_size": int,
    "license": str,
    "task": str,
    "source": str,
    "params": int,
    "top1": float,
    "note": str,
}
LARGEST_SIDE = 4096
"""Pixels; beyond it a single feature has gigabytes."""
_ZOO_KEYS = {"name", "title", "description"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One ``[[model]]`` of a manifest."""

    spec: str
    name: str | None = None
    weights: Path | None = None
    weights_key: str | None = None
    allow_partial: bool = False
    sha256: str | None = None
    image_size: int | None = None
    license: str | None = None
    task: str | None = None
    source: str | None = None
    note: str | None = None


def shipped_manifests() -> dict[str, Path]:
    """The manifests that come with dery, by bare name."""
    package = Path(str(resources.files("dery_cli")))
    packaged = package / "_manifests"
    folder = packaged if packaged.is_dir() else package.parent / "zoo_manifests"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_manifest(text: str) -> list[ManifestEntry]:
    """Read a manifest by file or, for those that ship with dery, by bare name.

    Raises:
        UsageError: There is none, or something is wrong in it.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return read_manifest(path)
    shipped = shipped_manifests()
    if text in shipped:
        return read_manifest(shipped[text], folder=Path())
    raise UsageError(f"no such manifest: {text}", f"give a TOML file, or {', '.join(shipped)}")


def read_manifest(path: Path, *, folder: Path | None = None) -> list[ManifestEntry]:
    """Read and check a manifest.

    Args:
        path: TOML file.
        folder: Where its relative weight paths begin, and which they may not leave; the
            manifest's own folder where None.

    Raises:
        UsageError: Not TOML, an unknown key, a wrong type, a path that leaves the folder, a name
            that is taken twice; the message names key path and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
        document = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path.name} is not TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path.name} is no manifest: it is nested too deeply") from error
    reader = _Reader(path, text, path.parent if folder is None else folder)
    return reader.entries(document)


class _Reader:
    """Checks one document and says where in the text something is wrong."""

    def __init__(self, path: Path, text: str, folder: Path) -> None:
        self._path, self._folder = path, folder.resolve()
        self._lines = text.splitlines()
        self._starts = [
            number
            for number, line in enumerate(self._lines, start=1)
            if re.match(r"\s*\[\[\s*model\s*\]\]", line)
        ]

    def entries(self, document: Mapping[str, Any]) -> list[ManifestEntry]:
        for key in document:
            if key not in ("zoo", "model"):
                raise self._fault(key, "unknown table; there are [zoo] and [[model]]")
        zoo = document.get("zoo", {})
        if not isinstance(zoo, dict):
            raise self._fault("zoo", f"expected a table, got {zoo!r}")
        for key in zoo:
            if key not in _ZOO_KEYS:
                known = ", ".join(sorted(_ZOO_KEYS))
                raise self._fault("zoo", f"unknown key; there are {known}", key=key)
        models = document.get("model", [])
        tables = isinstance(models, list) and all(isinstance(m, dict) for m in models)
        if not tables or not models:
            raise self._fault("model", "at least one [[model]] is needed")
        entries: list[ManifestEntry] = []
        for index, table in enumerate(models):
            entry = self._entry(table, index)
            for other, before in enumerate(entries):
                if (before.name or before.spec) == (entry.name or entry.spec):
                    raise self._fault(
                        f"model[{index}]",
                        f"model[{other}] is '{before.name or before.spec}' already; give it a name",
                        index=index,
                        key="name" if entry.name else "spec",
                    )
            entries.append(entry)
        return entries

    def _entry(self, table: Mapping[str, Any], index: int) -> ManifestEntry:
        where = f"model[{index}]"
        for key, value in table.items():
            if key not in _TYPES:
                known = ", ".join(_TYPES)
                raise self._fault(where, f"unknown key; there are {known}", index=index, key=key)
            wanted = _TYPES[key]
            accepted = (int, float) if wanted is float else (wanted,)
            if type(value) not in accepted:
                text = f"expected {wanted.__name__}, got {value!r}"
                raise self._fault(where, text, index=index, key=key)
        if "spec" not in table:
            raise self._fault(where, "'spec' is missing", index=index)
        if not 1 <= table.get("image_size", 1) <= LARGEST_SIDE:
            text = f"expected a side of 1 to {LARGEST_SIDE} pixels, got {table['image_size']}"
            raise self._fault(where, text, index=index, key="image_size")
        if "sha256" in table and not re.fullmatch(r"[0-9a-f]{64}", table["sha256"]):
            text = "expected 64 hexadecimal digits"
            raise self._fault(where, text, index=index, key="sha256")
        weights = None
        if "weights" in table:
            weights = (self._folder / table["weights"]).resolve()
            if not weights.is_relative_to(self._folder):
                text = f"'{table['weights']}' leaves the manifest's folder"
                raise self._fault(where, text, index=index, key="weights")
        names = {field.name for field in dataclasses.fields(ManifestEntry)} - {"weights"}
        return ManifestEntry(weights=weights, **{k: v for k, v in table.items() if k in names})

    def _fault(
        self, where: str, what: str, *, index: int | None = None, key: str | None = None
    ) -> UsageError:
        line = self._line(index, key if index is not None or key else where)
        path = where if key is None else f"{where}.{key}"
        return UsageError(f"{self._path.name}, line {line}, {path}: {what}")

    def _line(self, index: int | None, key: str | None) -> int:
        """Line of a key, or of the table's head; the first where neither is to be found."""
        start, stop = 1, len(self._lines)
        if index is not None and index < len(self._starts):
            start = self._starts[index]
            stop = next((s - 1 for s in self._starts if s > start), stop)
        if key is not None:
            wanted = rf'\s*(\[+\s*)?["\']?{re.escape(key)}["\']?\s*(=|\])'
            for number in range(start, stop + 1):
                if re.match(wanted, self._lines[number - 1]):
                    return number
        return start
