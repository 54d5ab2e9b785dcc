"""Safetensors files written row by row or whole, and read whole or row range by row range.

A stage that embeds N images knows every tensor's shape before the first image, but has the rows
only batch by batch. ``SafetensorsStream`` lays the file out first and fills it as rows come, so
that memory does not grow with N. Given the same tensors the file is the one that
``safetensors.torch.save_file`` writes, byte for byte.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dery_cli.errors import DeryError
from dery_cli.io.files import DISK_FULL, not_written

# in the order in which safetensors lays tensors out, then by name
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LAYOUT_RANK = {name: rank for rank, name in enumerate(_DTYPES)}

Specs = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Name of each tensor to its type and full shape."""


class SafetensorsStream:
    """A safetensors file whose tensors are filled by rows, in any interleaving.

    Rows of one tensor come in order. Leaving the ``with`` block normally checks that every row is
    there and syncs the file; leaving it by an exception removes the file.

    Args:
        path: File to write; an existing one is replaced.
        specs: Name of each tensor to its dtype and full shape.
        metadata: Text entries for the header.

    Raises:
        DeryError: The disk cannot hold the file.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Specs,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._specs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in specs.items()}
        header, self._begin, self.nbytes = _layout(self._specs, metadata)
        self._rows = dict.fromkeys(self._specs, 0)
        self._fd: int | None = os.open(
            self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666
        )
        try:
            self._reserve()
            self._put(header, 0)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, rows: Tensor) -> None:
        """Append ``rows`` [n, ...] to tensor ``name``; they are cast to its dtype.

        Raises:
            ValueError: The rows do not fit the tensor's shape, or there are too many of them.
            DeryError: The disk is full.
        """
        dtype, shape = self._specs[name]
        done = self._rows[name]
        if tuple(rows.shape[1:]) != shape[1:] or done + rows.shape[0] > shape[0]:
            raise ValueError(
                f"rows {tuple(rows.shape)} after row {done} do not fit {name} of shape {shape}"
            )
        offset = self._begin[name] + done * math.prod(shape[1:]) * dtype.itemsize
        self._put(_little_endian(rows.to(dtype)), offset)
        self._rows[name] = done + rows.shape[0]

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """Write all of a tensor, which may also be a single number without a shape.

        Raises:
            DeryError: The disk is full.
        """
        _, shape = self._specs[name]
        assert tuple(tensor.shape) == shape
        self._put(_little_endian(tensor), self._begin[name])
        self._rows[name] = shape[0] if shape else 1

    def close(self) -> None:
        """Check that the file is complete, sync it and close it.

        Raises:
            ValueError: Rows are missing; the file is removed.
        """
        if self._fd is None:
            return
        missing = [
            f"{name} ({self._rows[name]} of {shape[0]})"
            for name, (_, shape) in self._specs.items()
            if shape and self._rows[name] < shape[0] and math.prod(shape) > 0
        ]
        if missing:
            self.abort()
            raise ValueError(f"rows are missing: {', '.join(missing)}")
        try:
            os.fsync(self._fd)
        except OSError as error:
            self.abort()
            raise self._told(error) from error
        os.close(self._fd)
        self._fd = None

    def abort(self) -> None:
        """Close and remove the unfinished file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self.path.unlink(missing_ok=True)

    def _reserve(self) -> None:
        """Claim the file's whole size now, so that a full disk shows at the start."""
        assert self._fd is not None
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self.nbytes)
            else:
                os.ftruncate(self._fd, self.nbytes)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                os.ftruncate(self._fd, self.nbytes)
            else:
                raise self._told(error) from error

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        view = memoryview(data)
        try:
            os.lseek(self._fd, offset, os.SEEK_SET)
            while len(view):
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self.abort()
            raise self._told(error) from error
        except BaseException:
            self.abort()
            raise

    def _told(self, error: OSError) -> Exception:
        """``error`` as what the user can act on; other operating system errors stay as they are."""
        if error.errno not in DISK_FULL:
            return error
        hint = "free some space, or choose another --workspace"
        return not_written(self.path, error, hint=hint, bytes_needed=self.nbytes)


def stream_nbytes(specs: Specs, metadata: Mapping[str, str] | None = None) -> int:
    """Size in bytes of the file that ``SafetensorsStream`` would write."""
    return _layout({name: (d, tuple(s)) for name, (d, s) in specs.items()}, metadata)[2]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one go: the bytes of ``safetensors.torch.save_file``.

    Nothing but ``path`` is written to, one tensor is copied at a time where it has to be, and
    tensors may share memory.

    Raises:
        DeryError: The disk is full; the file is removed.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsStream(path, specs, metadata) as stream:
        for name, tensor in tensors.items():
            stream.write_whole(name, tensor)


class TensorFile:
    """An open safetensors file: it goes on giving the same bytes when its name gets another file.

    Args:
        path: To open.
        shown: What to call it in messages; ``path`` if left out.

    Raises:
        DeryError: The file is damaged.
    """

    def __init__(self, path: str | Path, shown: Path | None = None) -> None:
        self.path = Path(path) if shown is None else shown
        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except Exception as error:  # a damaged header makes the library raise what it will
            raise self.damaged(error) from error

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor.

        Raises:
            DeryError: One is of a type that dery does not write.
        """
        found = {}
        for name in self._names():
            part = self._file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise self.damaged(f"'{name}' is of type {part.get_dtype()}")
            found[name] = (_DTYPES[part.get_dtype()], tuple(part.get_shape()))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of it.

        Raises:
            DeryError: The file is damaged.
        """
        try:
            return {name: self._file.get_tensor(name) for name in self._names()}
        except Exception as error:  # as above
            raise self.damaged(error) from error

    def rows(self, name: str) -> LazyRows:
        """One tensor, read only where it is sliced.

        Raises:
            DeryError: There is no such tensor.
        """
        try:
            return LazyRows(self._file.get_slice(name))
        except SafetensorError as error:
            raise self.damaged(error) from error

    def _names(self) -> list[str]:
        return list(self._file.keys())

    def damaged(self, reason: object) -> DeryError:
        """The error for a file that is not what it should be."""
        return DeryError(
            f"{self.path} cannot be read: {reason}",
            "the file is damaged; run the stage that wrote it again",
        )


class LazyRows:
    """A tensor of a safetensors file: ``rows[start:stop]`` reads those rows, ``rows.shape`` none.

    ``core.similarity`` takes these in place of tensors; ``TensorFile.rows`` makes them.
    """

    def __init__(self, part: Any) -> None:
        self._part = part
        self.shape: tuple[int, ...] = tuple(part.get_shape())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are read in steps of one, not {step}")
        tensor: Tensor = self._part[start:stop]
        return tensor


def _layout(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The header's bytes, each tensor's offset in the file, and the file's size."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin, offset = {}, 0
    order = sorted(specs, key=lambda name: (_LAYOUT_RANK[_DTYPE_NAMES[specs[name][0]]], name))
    for name in order:
        dtype, shape = specs[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        begin[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: start + value for name, value in begin.items()},
        start + offset,
    )


def _little_endian(rows: Tensor) -> memoryview:
    array = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        array = array.reshape(-1, rows.dtype.itemsize)[:, ::-1].copy().reshape(-1)
    return memoryview(array.data)
