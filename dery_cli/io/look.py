"""Reading an artifact while others may write it: no lock is taken and nothing is written.

A reader gets one version whole: each file is opened once, hashed through that handle, and read from
the bytes that were hashed. Where something is replaced meanwhile, it begins again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dery_cli.errors import DeryError, StaleError
from dery_cli.io.journal import pending_path
from dery_cli.io.records import Artifact, Kind, parse_record

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dery_cli.io.row_stream import LazyRows, TensorFile

Shapes = Mapping[str, Sequence[int]]
"""The full shape of each tensor, by name."""
PATIENCE = 10.0
"""Seconds after which a reader gives up on an artifact that is replaced again and again."""
_PAUSE = 0.003
_Stamp = tuple[int, ...]
_Made = TypeVar("_Made")


class AbsentError(StaleError):
    """There is no such record."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """An artifact whose files were found whole and are held open.

    Args:
        record: Its record.
        path: Of the record.
        hint: The command that makes it anew.
        tensor_files: Those of its files that hold tensors, by name. A late one is read by its name
            when it is first asked for, if it is still the file that was hashed.
    """

    record: Artifact
    path: Path
    hint: str
    tensor_files: Mapping[str, TensorFile | LateFile]

    def tensors(self, name: str, shapes: Shapes | None = None) -> dict[str, Tensor]:
        """All tensors of a file.

        Args:
            name: Of the file.
            shapes: Of the floats it must hold, by name; None leaves that open.

        Raises:
            DeryError: The record names no such file, or it holds something else.
        """
        return self._file(name, shapes).tensors()

    def rows(self, name: str, shapes: Shapes) -> dict[str, LazyRows]:
        """All tensors of a file, read only where they are sliced; else as ``tensors``."""
        file = self._file(name, shapes)
        return {tensor: file.rows(tensor) for tensor in shapes}

    def arrays(self, name: str, shapes: Shapes) -> dict[str, np.ndarray[Any, Any]]:
        """As ``tensors``, as arrays and without torch; for types that numpy knows."""
        file = self.tensor_files.get(name)
        if not isinstance(file, LateFile):
            return {key: tensor.numpy() for key, tensor in self.tensors(name, shapes).items()}
        found = file.arrays()
        self._check_shapes(file.path, {key: value.shape for key, value in found.items()}, shapes)
        return found

    def shape(self, name: str, tensor: str) -> tuple[int, ...] | None:
        """The shape of one tensor of a file; None where it holds no such tensor."""
        found = self._file(name, None).specs().get(tensor)
        return None if found is None else found[1]

    def _file(self, name: str, shapes: Shapes | None) -> TensorFile:
        file = self.tensor_files.get(name)
        if file is None:
            raise DeryError(f"{self.path} names no file {name}", f"rerun: {self.hint}")
        if isinstance(file, LateFile):
            file = file.tensor_file()
        if shapes is not None:
            found = {
                key: shape if dtype.is_floating_point else None
                for key, (dtype, shape) in file.specs().items()
            }
            self._check_shapes(file.path, found, shapes)
        return file

    def _check_shapes(
        self, path: Path, found: Mapping[str, Sequence[int] | None], shapes: Shapes
    ) -> None:
        for key in sorted(found.keys() | shapes.keys()):
            if key not in shapes or found.get(key) != tuple(shapes[key]):
                raise DeryError(
                    f"{path} does not fit its record: '{key}' is not what it should be",
                    f"rerun: {self.hint}",
                )


@dataclasses.dataclass(frozen=True)
class LateFile:
    """A file of tensors that was hashed, and is opened when it is read: that takes torch or numpy.

    Args:
        place: Where it lies.
        path: What it is called in messages.
        stamp: What tells it from one that replaces it.
    """

    place: Path
    path: Path
    stamp: _Stamp

    def tensor_file(self) -> TensorFile:
        """The file, open.

        Raises:
            DeryError: It is damaged, or not the same any more.
        """
        from dery_cli.io.row_stream import TensorFile

        return self._opened(lambda place: TensorFile(place, shown=self.path))

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it; else as ``tensor_file``."""
        from safetensors import safe_open

        try:
            opened = self._opened(lambda place: safe_open(str(place), framework="numpy"))
            with opened as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except DeryError:
            raise
        except Exception as error:  # a damaged header makes the library raise what it will
            raise self._damaged(error) from error

    def _opened(self, open_it: Callable[[Path], _Made]) -> _Made:
        """What ``open_it`` makes of it: what was pending may have got its name, now or before.

        Another file may lie under the name that is opened a moment after it was looked at, even
        while this one lies under the other; so the very place is looked at again.
        """
        for place in (self.place, self.path):
            if _state(place) == self.stamp:
                opened = open_it(place)
                if _state(place) == self.stamp:
                    return opened
        raise self._damaged("it was replaced meanwhile")

    def _damaged(self, reason: object) -> DeryError:
        return DeryError(
            f"{self.path} cannot be read: {reason}",
            "the file is damaged; run the stage that wrote it again",
        )


def looked_at(open_it: Callable[[Look], Opened]) -> Opened:
    """What ``open_it`` gives, asked again as long as something moved under it.

    Raises:
        DeryError: Of the last look.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.ExitStack() as held:
            look = Look(held)
            try:
                return open_it(look)
            except DeryError:
                if not look.moved() or time.monotonic() > deadline:
                    raise
        time.sleep(_PAUSE)


class Look:
    """One look at the files of an artifact; tells afterwards whether one was replaced meanwhile.

    Where none was, all were at one moment as they were seen: what is damaged then is damaged.

    Args:
        held: Keeps every file open until the look is over: as long, no other file can be mistaken
            for it.
    """

    def __init__(self, held: contextlib.ExitStack) -> None:
        self._held = held
        self._seen: dict[Path, _Stamp | None] = {}
        self._seen_moving = False
        self._hashes: dict[_Stamp, str] = {}

    def moved(self) -> bool:
        return self._seen_moving or any(_state(path) != was for path, was in self._seen.items())

    def open(
        self,
        path: Path,
        kind: Kind,
        missing: str,
        hint: str,
        only: Collection[str] | None,
        *,
        late: bool = False,
    ) -> Opened:
        """The newest version that is whole: what is pending counts before what it will replace."""
        pending, present = self._read(pending_path(path)), self._read(path)
        if pending is not None:
            with contextlib.suppress(DeryError):
                return self._opened(pending, path, kind, hint, only, late)
        if present is None:
            raise AbsentError(missing, hint)
        return self._opened(present, path, kind, hint, only, late)

    def _opened(
        self,
        raw: bytes,
        path: Path,
        kind: Kind,
        hint: str,
        only: Collection[str] | None,
        late: bool,
    ) -> Opened:
        record = parse_record(raw, kind, path, hint)
        files = {
            name: self._whole(path.parent / name, digest, hint, late)
            for name, digest in record.files.items()
            if only is None or name in only
        }
        tensor_files = {name: file for name, file in files.items() if file is not None}
        return Opened(record=record, path=path, hint=hint, tensor_files=tensor_files)

    def _whole(
        self, path: Path, digest: str, hint: str, late: bool
    ) -> TensorFile | LateFile | None:
        """The file with that hash, under its own name or its pending one; opened if of tensors.

        Raises:
            DeryError: There is none.
        """
        found = None
        for place in (path, pending_path(path)):
            file = self._open(place)
            if file is None:
                continue
            actual = self._sha256(place, file)
            if actual == digest:
                return _tensor_file(place, path, file, late)
            found = found or actual
        if found is None:
            raise DeryError(f"{path} is missing (recorded sha256 {digest})", f"rerun: {hint}")
        raise DeryError(
            f"{path} was altered or cut short: sha256 {found}, recorded {digest}", f"rerun: {hint}"
        )

    def _sha256(self, path: Path, file: BufferedReader) -> str:
        """Its hash, computed once for the two records that may name it."""
        stamp = _stamp(os.fstat(file.fileno()))
        if stamp not in self._hashes:
            try:
                self._hashes[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(path, error) from error
        return self._hashes[stamp]

    def _read(self, path: Path) -> bytes | None:
        file = self._open(path)
        try:
            return None if file is None else file.read()
        except OSError as error:
            raise _unreadable(path, error) from error

    def _open(self, path: Path) -> BufferedReader | None:
        """The open file, or None where there is none.

        Raises:
            DeryError: It cannot be read.
        """
        try:
            # not to wait for ever where somebody put a pipe
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            self._note(path, None)
            return None
        except OSError as error:
            self._note(path, _state(path))
            raise _unreadable(path, error) from error
        found = os.fstat(handle)
        self._note(path, _stamp(found))
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            raise DeryError(f"cannot read {path}: it is no file")
        return self._held.enter_context(os.fdopen(handle, "rb"))

    def _note(self, path: Path, stamp: _Stamp | None) -> None:
        """Remember what a path was when it was looked at; the second time it may be another."""
        self._seen_moving |= self._seen.setdefault(path, stamp) != stamp


def _unreadable(path: Path, error: OSError) -> DeryError:
    return DeryError(f"cannot read {path}: {error.strerror or error}")


def _tensor_file(
    place: Path, path: Path, file: BufferedReader, late: bool
) -> TensorFile | LateFile | None:
    """The very file that is held open, as the library opens it by its name.

    Raises:
        DeryError: It is not a file of tensors, or not the same any more.
    """
    if path.suffix != ".safetensors":
        return None
    found = LateFile(place, path, _stamp(os.fstat(file.fileno())))
    return found if late else found.tensor_file()


def _state(path: Path) -> _Stamp | None:
    """What tells a file from one that replaces it; None where there is none."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def _stamp(found: os.stat_result) -> _Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
