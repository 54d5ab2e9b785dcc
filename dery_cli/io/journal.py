"""Writing an artifact so that at any moment there is the old one or the new one, whole.

All files are first written and synced as ``NAME.pending``, the record last, as ``RECORD.part`` that
becomes ``RECORD.pending``: from here on the new artifact counts. Then all are renamed. A reader
takes a whole ``RECORD.pending`` before ``RECORD``, and finds each file by its hash under either
name; the next one who writes finishes the renames, or removes what was never finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_cli.errors import DeryError
from dery_cli.io.files import PART, PENDING, copy_mode, file_sha256, not_written, sync
from dery_cli.io.records import Artifact, files_of
from dery_cli.io.schema import Check, SchemaError
from dery_cli.types import is_file_name

if TYPE_CHECKING:
    from torch import Tensor

_OF_A_LIBRARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""What safetensors leaves where it is killed; dery used to write through it."""


def pending_path(path: Path) -> Path:
    """What a file is called until its artifact is whole."""
    return path.with_name(path.name + PENDING)


class Transaction:
    """Files being written beside their final names; ``commit`` makes them the artifact."""

    def __init__(self, record_path: Path) -> None:
        self.record_path = record_path
        self.folder = record_path.parent
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write the file that will be called ``name``."""
        assert is_file_name(name)
        self._names.append(name)
        return pending_path(self.folder / name)

    def write_text(self, name: str, text: str) -> None:
        self.path(name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_json(self, name: str, value: Mapping[str, Any], check: Check) -> None:
        """Write plain data that ``check`` lets pass.

        Raises:
            DeryError: It does not.
        """
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        try:
            check(json.loads(text))
        except SchemaError as error:
            raise _not_valid(self.folder / name, error) from error
        self.write_text(name, text)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file; tensors may lie anywhere and share memory."""
        from dery_cli.io.row_stream import write_tensors

        write_tensors(self.path(name), tensors)

    def commit(self, artifact: Artifact) -> Artifact:
        """Hash the written files into ``artifact``, write the record, rename everything.

        Raises:
            DeryError: The record is not what its kind asks for; nothing is changed then.
        """
        written = {name: pending_path(self.folder / name) for name in self._names}
        files = {name: file_sha256(path) for name, path in written.items()}
        artifact = dataclasses.replace(artifact, files=files)
        half = self.record_path.with_name(self.record_path.name + PART)
        try:
            half.write_bytes(artifact.to_bytes())
        except SchemaError as error:
            raise _not_valid(self.record_path, error) from error
        for path in written.values():
            copy_mode(half, path)
            sync(path)
        sync(half)
        os.replace(half, pending_path(self.record_path))
        sync(self.folder)
        finish(self.record_path, written)
        return artifact

    def abort(self) -> None:
        """Remove what was written; what counts already is finished instead."""
        if pending_path(self.record_path).exists():
            with contextlib.suppress(OSError):
                settle(self.record_path)
            return
        for name in self._names:
            pending_path(self.folder / name).unlink(missing_ok=True)
        self.record_path.with_name(self.record_path.name + PART).unlink(missing_ok=True)


@contextlib.contextmanager
def transaction(record_path: Path) -> Iterator[Transaction]:
    """A block in which an artifact's files are written; any exception removes them again.

    The caller holds the lock of the workspace or the run.

    Raises:
        DeryError: The disk is full, the folder cannot be written, or the record is not valid.
    """
    try:
        record_path.parent.mkdir(parents=True, exist_ok=True)
        settle(record_path)
    except OSError as error:
        raise not_written(record_path.parent, error) from error
    work = Transaction(record_path)
    try:
        yield work
    except OSError as error:
        work.abort()
        raise not_written(record_path, error) from error
    except BaseException:
        work.abort()
        raise


def settle(record_path: Path) -> None:
    """Finish what an earlier writer of this record committed; drop what can never be finished."""
    pending = pending_path(record_path)
    if not pending.exists():
        return
    files = files_of(pending.read_bytes())
    waiting = None if files is None else _waiting(record_path.parent, files)
    if waiting is None:
        pending.unlink()
    else:
        finish(record_path, waiting)


def _waiting(folder: Path, files: Mapping[str, str]) -> list[str] | None:
    """Those files of a record that still have their pending names; None where one is not whole."""
    waiting = []
    for name, digest in files.items():
        if _has(pending_path(folder / name), digest):
            waiting.append(name)
        elif not _has(folder / name, digest):
            return None
    return waiting


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def tidy(folder: Path) -> None:
    """Settle all records of a folder that is dery's own, and remove what was cut off.

    The caller holds the lock, so nobody is writing here.
    """
    for pending in sorted(folder.glob(f"*.json{PENDING}")):
        if files_of(pending.read_bytes()) is not None:  # else it may be a file of another record
            settle(pending.with_name(pending.name.removesuffix(PENDING)))
    for path in folder.glob("*"):
        cut_off = path.name.endswith((PENDING, PART)) or _OF_A_LIBRARY.fullmatch(path.name)
        if cut_off and path.is_file():
            path.unlink(missing_ok=True)


def finish(record_path: Path, waiting: Iterable[str]) -> None:
    """Give the files of a committed artifact their names, the record last."""
    for name in waiting:
        os.replace(pending_path(record_path.parent / name), record_path.parent / name)
    os.replace(pending_path(record_path), record_path)
    sync(record_path.parent)


def _not_valid(path: Path, error: SchemaError) -> DeryError:
    return DeryError(f"{path} is not written: {error}", "what was there before is intact")
