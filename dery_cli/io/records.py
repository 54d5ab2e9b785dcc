"""A record: the JSON that says what an artifact is, what it came of, and what its files hold.

A record knows itself. ``sha256`` is its identity, which children name as their parent: it covers
parents, options, seed, data and the hashes of the files, but not the library versions. ``checksum``
covers all that the file holds, so that any edit is noticed. Its kind says what may stand in it,
which is checked on reading and on writing alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dery_cli.errors import DeryError, StaleError
from dery_cli.io import schema
from dery_cli.io.schema import Check, SchemaError

_LIBRARIES = ("dery-cli", "numpy", "safetensors", "timm", "torch", "torchvision")
_BASE = {
    "format": schema.any_text,
    "version": schema.integer(0, 1 << 31),
    "parents": schema.mapping(schema.sha256),
    "options": schema.plain_object,
    "seed": schema.optional(schema.integer()),
    "files": schema.mapping(schema.sha256, key=schema.file_name),
    "data": schema.plain_object,
    "libraries": schema.mapping(schema.any_text),
    "sha256": schema.sha256,
}
# records of before 0.3 have no checksum
_RECORD = schema.fields(_BASE, {"checksum": schema.sha256})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What the records of one kind of artifact look like; the stage that writes them defines it.

    Args:
        name: ``dery/<name>`` is the record's format.
        version: Of the format; a record of another one is refused.
        parents: Names that must be among the parents.
        options: What the options must be.
        data: What the data must be.
        once: Formats that earlier versions of dery gave such records.
    """

    name: str
    version: int
    parents: tuple[str, ...] = ()
    options: Check = schema.plain_object
    data: Check = schema.plain_object
    once: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        return f"dery/{self.name}"

    def check(self, record: Mapping[str, Any]) -> None:
        """Check the fields of a record of this kind.

        Raises:
            SchemaError: One is not what it must be.
        """
        parents = dict.fromkeys(self.parents, schema.sha256)
        schema.fields(
            {
                "parents": schema.fields(parents, more=schema.sha256),
                "options": self.options,
                "data": self.data,
            },
            more=_anything,
        )(record)


def _anything(value: Any) -> None:
    """No check: another one had it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """One stage's record.

    Args:
        kind: What it is a record of.
        parents: Hash of everything the stage read, by name.
        options: What the user could choose, resolved.
        seed: What its random choices were drawn from; None where nothing is drawn.
        data: The stage's answer.
        files: Hash of each file that belongs to the record, by name.
        libraries: Versions of what wrote it, which no hash covers; empty for those installed.
    """

    kind: Kind
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    libraries: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def _hashed(self) -> dict[str, Any]:
        return {
            "format": self.kind.format,
            "version": self.kind.version,
            "parents": dict(self.parents),
            "options": dict(self.options),
            "seed": self.seed,
            "files": dict(self.files),
            "data": dict(self.data),
        }

    @property
    def sha256(self) -> str:
        """Content hash: what children name as their parent."""
        return json_sha256(self._hashed())

    def same_inputs(self, other: Artifact) -> bool:
        """Whether ``other`` came of the same parents, options and seed."""
        return (
            self.kind.format == other.kind.format
            and dict(self.parents) == dict(other.parents)
            and canonical_json(dict(self.options)) == canonical_json(dict(other.options))
            and self.seed == other.seed
        )

    def to_bytes(self) -> bytes:
        """The record's file.

        Raises:
            SchemaError: The record is not what its kind asks for.
        """
        record = self._hashed()
        try:
            record["libraries"] = dict(self.libraries) or library_versions()
            record["sha256"] = self.sha256
            record["checksum"] = json_sha256(record)
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:  # no JSON, or NaN
            raise SchemaError(f"cannot be written: {error}") from error
        # a name that is no Unicode has half characters, which JSON writes as \udc80
        written = text.encode("utf-8", "backslashreplace")
        again = _loads(written)
        _RECORD(again)
        self.kind.check(again)
        if _identity(again) != again["sha256"]:
            raise SchemaError("has names that are no texts")
        return written


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_sha256(value: Any) -> str:
    """Hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries a result depends on."""
    import importlib.metadata

    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def parse_record(raw: bytes, kind: Kind, path: Path, hint: str) -> Artifact:
    """The artifact that a record's file holds.

    Args:
        raw: The file.
        kind: What it must be a record of.
        path: What to call it in a message.
        hint: The command that makes it anew.

    Raises:
        StaleError: It is in an older format.
        DeryError: It is damaged, was edited, is a record of something else, or a newer dery's.
    """
    anew = f"rerun: {hint}"
    try:
        record = _loads(raw)
    except SchemaError as error:
        raise DeryError(f"{path} is damaged: {error}", anew) from error
    found, version = record.get("format"), record.get("version")
    if not isinstance(found, str):
        raise DeryError(f"{path} is damaged: it is not a dery record", anew)
    if found in kind.once:
        raise StaleError(f"{path} is in the older format {found}", hint)
    if found != kind.format:
        raise DeryError(f"{path} holds {ascii(found)[:60]}, not '{kind.format}'", anew)
    try:
        _BASE["version"](version)
    except SchemaError as error:
        raise DeryError(f"{path} is damaged: {error.below('.version')}", anew) from error
    assert isinstance(version, int)
    if version > kind.version:
        raise DeryError(
            f"{path} was written by a newer dery (format {version}, this one reads {kind.version})",
            f"upgrade dery-cli, or make it anew: {hint}",
        )
    if version < kind.version:
        raise StaleError(f"{path} is in the older format {version}", hint)
    try:
        _RECORD(record)
        if (edited := _edited(record)) is not None:
            raise DeryError(f"{path} was altered: {edited}", anew)
        kind.check(record)
    except SchemaError as error:
        raise DeryError(f"{path} is damaged: {error}", anew) from error
    return Artifact(
        kind=kind,
        parents=record["parents"],
        options=record["options"],
        seed=record["seed"],
        data=record["data"],
        files=record["files"],
        libraries=record["libraries"],
    )


def files_of(raw: bytes) -> Mapping[str, str] | None:
    """The hashes of its files in a whole record of any kind; None where it is not whole."""
    try:
        record = _loads(raw)
        _RECORD(record)
    except SchemaError:
        return None
    return None if _edited(record) is not None else cast("Mapping[str, str]", record["files"])


def _edited(record: Mapping[str, Any]) -> str | None:
    """How a record's hashes differ from its content, in words; None where they do not."""
    sealed = {key: value for key, value in record.items() if key != "checksum"}
    for what, found, said in (
        ("sha256", _identity(record), record["sha256"]),
        ("checksum", json_sha256(sealed), record.get("checksum")),
    ):
        if said is not None and found != said:
            return f"its {what} is {found[:12]}, it says {said[:12]}"
    return None


def _identity(record: Mapping[str, Any]) -> str:
    covered = ("format", "version", "parents", "options", "seed", "files", "data")
    return json_sha256({key: record[key] for key in covered})


def _loads(raw: bytes) -> dict[str, Any]:
    """The object in a JSON file, all of it finite and not deeper than a record nests.

    Raises:
        SchemaError: There is none.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SchemaError(f"is no UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise SchemaError("is nested too deeply") from error
    except ValueError as error:  # of json, or a number of thousands of digits
        raise SchemaError(f"is no JSON, or cut short ({str(error)[:60]})") from error
    schema.plain_object(value)
    return cast("dict[str, Any]", value)
