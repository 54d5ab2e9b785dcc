"""Zoo manifests: lists of donors as TOML data.

::

    [zoo]
    title = "My donors"

    [[model]]
    spec = "timm/resnet18.a1_in1k"     # plugin/name[.tag]
    name = "resnet18"                  # optional; name in the zoo
    weights = "weights/resnet18.safetensors"  # optional; inside the manifest's folder
    sha256 = "..."                     # optional; of that file
    image_size = 224                   # optional
    license = "apache-2.0"             # optional; overrides what the plugin says
    task = "ImageNet-1k classification"
    source = "https://..."
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from dery_cli.errors import UsageError

_TYPES: dict[str, type] = {
    "spec": str,
    "name": str,
    "weights": str,
    "sha256": str,
    "image_size": int,
    "license": str,
    "task": str,
    "source": str,
    "params": int,
    "top1": float,
    "note": str,
}
_ZOO_KEYS = {"name", "title", "description"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One ``[[model]]`` of a manifest."""

    spec: str
    name: str | None = None
    weights: Path | None = None
    sha256: str | None = None
    image_size: int | None = None
    license: str | None = None
    task: str | None = None
    source: str | None = None
    note: str | None = None


def shipped_manifests() -> dict[str, Path]:
    """The manifests that come with dery, by bare name."""
    packaged = Path(str(resources.files("dery_cli"))) / "_manifests"
    checkout = Path(str(resources.files("dery_cli"))).parent / "zoo_manifests"
    folder = packaged if packaged.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_manifest(text: str) -> Path:
    """A manifest by file or, for those that ship with dery, by bare name.

    Raises:
        UsageError: There is none.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    shipped = shipped_manifests()
    if text in shipped:
        return shipped[text]
    raise UsageError(f"no such manifest: {text}", f"give a TOML file, or {', '.join(shipped)}")


def read_manifest(path: Path) -> list[ManifestEntry]:
    """Read and check a manifest.

    Raises:
        UsageError: Not TOML, an unknown key, a wrong type, a path that leaves the folder; the
            message names key path and line.
    """
    text = path.read_text(encoding="utf-8")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path.name} is not TOML: {error}") from error
    lines = _model_lines(text)

    def fail(where: str, line: int, what: str) -> UsageError:
        return UsageError(f"{path.name}, line {line}, {where}: {what}")

    for key in document:
        if key not in ("zoo", "model"):
            raise fail(key, 1, "unknown table; there are [zoo] and [[model]]")
    for key in document.get("zoo", {}):
        if key not in _ZOO_KEYS:
            raise fail(f"zoo.{key}", 1, f"unknown key; there are {', '.join(sorted(_ZOO_KEYS))}")
    models = document.get("model", [])
    if not isinstance(models, list) or not models:
        raise fail("model", 1, "at least one [[model]] is needed")
    entries = []
    for index, table in enumerate(models):
        start = lines[index] if index < len(lines) else 1
        entries.append(_entry(path, table, index, text, start, fail))
    return entries


def _entry(
    path: Path, table: dict[str, Any], index: int, text: str, start: int, fail: Any
) -> ManifestEntry:
    def line(key: str) -> int:
        return _key_line(text, key, start)

    for key, value in table.items():
        where = f"model[{index}].{key}"
        if key not in _TYPES:
            raise fail(where, line(key), f"unknown key; there are {', '.join(_TYPES)}")
        wanted = _TYPES[key]
        if not isinstance(value, wanted) and not (wanted is float and isinstance(value, int)):
            raise fail(where, line(key), f"expected {wanted.__name__}, got {value!r}")
    if "spec" not in table:
        raise fail(f"model[{index}]", start, "'spec' is missing")
    weights = None
    if "weights" in table:
        folder = path.parent.resolve()
        weights = (folder / table["weights"]).resolve()
        if not weights.is_relative_to(folder):
            raise fail(
                f"model[{index}].weights",
                line("weights"),
                f"'{table['weights']}' leaves the manifest's folder",
            )
    if "sha256" in table and not re.fullmatch(r"[0-9a-f]{64}", table["sha256"]):
        raise fail(f"model[{index}].sha256", line("sha256"), "expected 64 hexadecimal digits")
    known = {key: table.get(key) for key in ("name", "sha256", "image_size", "license", "task")}
    return ManifestEntry(
        spec=table["spec"],
        weights=weights,
        source=table.get("source"),
        note=table.get("note"),
        **known,
    )


def _model_lines(text: str) -> list[int]:
    return [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip().startswith("[[model]]")
    ]


def _key_line(text: str, key: str, start: int) -> int:
    for number, line in enumerate(text.splitlines(), start=1):
        if number > start and re.match(rf'\s*"?{re.escape(key)}"?\s*=', line):
            return number
    return start
