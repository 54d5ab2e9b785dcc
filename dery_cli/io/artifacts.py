"""The one door for a workspace's files: atomic, hashed, locked artifacts.

An artifact is a JSON record, alone (``zoo.json``, ``partition.json``) or as sidecar of the files
it names (``embeddings/<donor>.json`` beside ``<donor>.safetensors``). The record carries a format
version, its parents' hashes, the options and the seed; its own ``sha256`` covers all of these and
the hashes of its files, but not the library versions, which it also names.

Replacing several files at once is made atomic by a journal: everything is first written and synced
as ``NAME.pending``, the record last; then all are renamed. Whoever finds a complete
``record.pending`` finishes the renames, so a killed process leaves the old artifact or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dery_cli.errors import DeryError, StaleError
from dery_cli.types import is_file_name

PENDING = ".pending"
FORMAT_VERSIONS = {
    "zoo": 1,
    "embedding": 1,
    "similarity": 1,
    "partition": 1,
    "scores": 1,
    "latency": 1,
    "assembly": 2,
    "candidates": 1,
    "run": 2,
}
_LIBRARIES = ("dery-cli", "numpy", "safetensors", "timm", "torch", "torchvision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """One stage's record.

    Args:
        kind: Key of ``FORMAT_VERSIONS``.
        parents: Hash of everything the stage read, by name.
        options: What the user could choose, resolved.
        seed: What its random choices were drawn from; None where nothing is drawn.
        data: The stage's answer.
        files: Hash of each file that belongs to the record, by name.
    """

    kind: str
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def version(self) -> int:
        return FORMAT_VERSIONS[self.kind]

    def _hashed(self) -> dict[str, Any]:
        return {
            "format": f"dery/{self.kind}",
            "version": self.version,
            "parents": dict(self.parents),
            "options": dict(self.options),
            "seed": self.seed,
            "files": dict(self.files),
            "data": dict(self.data),
        }

    @property
    def sha256(self) -> str:
        """Content hash: what children name as their parent."""
        return hashlib.sha256(canonical_json(self._hashed()).encode()).hexdigest()

    def same_inputs(self, other: Artifact) -> bool:
        """Whether ``other`` came of the same parents, options and seed."""
        return (
            self.kind == other.kind
            and dict(self.parents) == dict(other.parents)
            and canonical_json(dict(self.options)) == canonical_json(dict(other.options))
            and self.seed == other.seed
        )

    def to_text(self) -> str:
        record = self._hashed()
        record["libraries"] = library_versions()
        record["sha256"] = self.sha256
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def library_versions() -> dict[str, str]:
    """Versions of the libraries a result depends on."""
    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    flags = os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0)
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain_os_error(error: OSError, path: Path) -> DeryError:
    if error.errno == errno.ENOSPC:
        return DeryError(
            f"no space left on the disk while writing {path}",
            "free some space and rerun; what was there before is intact",
        )
    return DeryError(f"cannot write {path}: {error.strerror or error}")


class Transaction:
    """Files being written beside their final names; ``commit`` makes them the artifact."""

    def __init__(self, record_path: Path) -> None:
        self.record_path = record_path
        self.folder = record_path.parent
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write the file that will be called ``name``."""
        self._names.append(name)
        return self.folder / (name + PENDING)

    def write_text(self, name: str, text: str) -> None:
        self.path(name).write_text(text, encoding="utf-8")

    def commit(self, artifact: Artifact) -> Artifact:
        """Hash the written files into ``artifact``, write the record, rename everything."""
        files = {name: file_sha256(self.folder / (name + PENDING)) for name in self._names}
        artifact = dataclasses.replace(artifact, files=files)
        for name in self._names:
            _sync(self.folder / (name + PENDING))
        pending = self.record_path.with_name(self.record_path.name + PENDING)
        half = self.record_path.with_name(self.record_path.name + ".part")
        half.write_text(artifact.to_text(), encoding="utf-8")
        for name in self._names:
            copy_mode(half, self.folder / (name + PENDING))
        _sync(half)
        os.replace(half, pending)
        _sync(self.folder)
        _roll_forward(self.record_path)
        return artifact

    def abort(self) -> None:
        for name in [*self._names, self.record_path.name]:
            (self.folder / (name + PENDING)).unlink(missing_ok=True)
        (self.folder / (self.record_path.name + ".part")).unlink(missing_ok=True)


def copy_mode(like: Path, path: Path) -> None:
    """Let those read ``path`` who may read ``like``: safetensors writes for the owner alone."""
    os.chmod(path, like.stat().st_mode & 0o777)


@contextlib.contextmanager
def transaction(record_path: Path) -> Iterator[Transaction]:
    """A block in which an artifact's files are written; any exception removes them again.

    Raises:
        DeryError: The disk is full or the folder cannot be written.
    """
    try:
        record_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain_os_error(error, record_path.parent) from error
    _roll_forward(record_path)
    work = Transaction(record_path)
    try:
        yield work
    except OSError as error:
        work.abort()
        raise _explain_os_error(error, record_path) from error
    except BaseException:
        work.abort()
        raise


def _roll_forward(record_path: Path) -> None:
    pending = record_path.with_name(record_path.name + PENDING)
    if not pending.exists():
        return
    files = _own_files(json.loads(pending.read_text(encoding="utf-8"))["files"])
    for name in files:
        part = record_path.parent / (name + PENDING)
        if part.exists():
            os.replace(part, record_path.parent / name)
    os.replace(pending, record_path)
    _sync(record_path.parent)


def _own_files(files: Mapping[str, str]) -> Mapping[str, str]:
    """The files a record names, if all lie beside it.

    Raises:
        ValueError: One leads elsewhere.
    """
    for name in files:
        if not is_file_name(name):
            raise ValueError(f"{name!r} is no file beside its record")
    return files


def write_record(path: Path, artifact: Artifact) -> Artifact:
    """Write an artifact that is its record alone."""
    with transaction(path) as work:
        return work.commit(artifact)


def read_record(path: Path, kind: str, *, missing: str, hint: str) -> Artifact:
    """Read and check an artifact's record, and the hashes of its files.

    Raises:
        StaleError: It is not there (``missing`` says so, ``hint`` is the command that makes it) or
            was written in an older format.
        DeryError: It, or one of its files, is damaged, or a newer dery wrote it.
    """
    try:
        _roll_forward(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeryError(f"{path}{PENDING} is damaged: {error}", f"rerun: {hint}") from error
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StaleError(missing, hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeryError(f"cannot read {path}: {error}") from error
    try:
        record = json.loads(text)
        name, version = record["format"], record["version"]
        found = str(record["sha256"])
        if name == f"dery/{kind}" and version == FORMAT_VERSIONS[kind]:
            artifact = Artifact(
                kind=kind,
                parents=record["parents"],
                options=record["options"],
                seed=record["seed"],
                data=record["data"],
                files=_own_files(record["files"]),
            )
    except (ValueError, KeyError, TypeError) as error:
        raise DeryError(f"{path} is damaged: not a dery record", f"rerun: {hint}") from error
    if name != f"dery/{kind}":
        raise DeryError(f"{path} holds '{name}', not 'dery/{kind}'", f"rerun: {hint}")
    if version > FORMAT_VERSIONS[kind]:
        raise DeryError(
            f"{path} was written by a newer dery (format {version}, this one reads "
            f"{FORMAT_VERSIONS[kind]})",
            "upgrade dery-cli",
        )
    if version < FORMAT_VERSIONS[kind]:
        raise StaleError(f"{path} is in the older format {version}", hint)
    if artifact.sha256 != found:
        raise DeryError(
            f"{path} was altered: its sha256 is {artifact.sha256[:12]}, it says {found[:12]}",
            f"rerun: {hint}",
        )
    return artifact


def check_files(path: Path, artifact: Artifact, *, hint: str) -> None:
    """Compare the files beside a record with the hashes it names.

    Raises:
        DeryError: One is missing, truncated or altered.
    """
    for name, expected in artifact.files.items():
        file = path.parent / name
        if not file.is_file():
            raise DeryError(f"{file} is missing", f"rerun: {hint}")
        actual = file_sha256(file)
        if actual != expected:
            raise DeryError(
                f"{file} is damaged: its sha256 is {actual[:12]}, recorded was {expected[:12]}",
                f"rerun: {hint}",
            )


def existing_record(path: Path, kind: str) -> Artifact | None:
    """The record at ``path``, or None where there is none that can be read."""
    try:
        artifact = read_record(path, kind, missing="", hint="")
    except DeryError:
        return None
    return artifact


def unchanged(path: Path, wanted: Artifact) -> Artifact | None:
    """The record at ``path`` if it is whole and came of ``wanted``'s parents, options and seed."""
    found = existing_record(path, wanted.kind)
    if found is None or not found.same_inputs(wanted):
        return None
    try:
        check_files(path, found, hint="")
    except DeryError:
        return None
    return found


def write_log(path: Path, log: Mapping[str, Any]) -> None:
    """Write timings and the like, which no hash covers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def read_log(path: Path) -> dict[str, Any]:
    """What ``write_log`` wrote; empty where it is gone or damaged, since nothing depends on it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Paths of a workspace folder."""

    root: Path

    @property
    def zoo(self) -> Path:
        return self.root / "zoo.json"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    def embedding(self, donor: str) -> Path:
        return self.embeddings / f"{donor}.json"

    def similarity(self, metric: str) -> Path:
        return self.root / "similarity" / f"{metric}.json"

    @property
    def partition(self) -> Path:
        return self.root / "partition.json"

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"

    @property
    def latency(self) -> Path:
        return self.root / "latency.json"

    def assembly(self, name: str) -> Path:
        return self.root / "assemblies" / name / "assembly.json"

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def remove(self, record_path: Path, names: Sequence[str]) -> None:
        """Delete a record first, then the files it named."""
        for path in (record_path, *(record_path.parent / name for name in names)):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the workspace; ``waiting`` is told when another process has it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explain_os_error(error, self.root) from error
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            waiting(f"another dery works in {self.root}; waiting for it to finish")
            lock.acquire()
        except OSError as error:
            raise _explain_os_error(error, self.root) from error
        try:
            yield
        finally:
            lock.release()
