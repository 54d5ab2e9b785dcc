"""Safetensors files written row by row and read row range by row range.

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

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# safetensors lays tensors out by falling alignment, then by name; this is its order of dtypes.
_LAYOUT_RANK = {
    name: rank
    for rank, name in enumerate(
        ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
    )
}


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
        specs: Mapping[str, tuple[torch.dtype, Sequence[int]]],
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
        try:
            self._put(_little_endian(rows.to(dtype)), offset)
        except BaseException:
            self.abort()
            raise
        self._rows[name] = done + rows.shape[0]

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
            raise self._told(error) from error

    def _told(self, error: OSError) -> Exception:
        """``error`` as what the user can act on; other operating system errors stay as they are."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        return DeryError(
            f"the disk is full: {self.path} needs {self.nbytes:,} bytes",
            "free some space, or choose another --workspace",
            details={"bytes_needed": self.nbytes},
        )


def stream_nbytes(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Size in bytes of the file that ``SafetensorsStream`` would write."""
    return _layout({name: (d, tuple(s)) for name, (d, s) in specs.items()}, metadata)[2]


class LazyRows:
    """Tensor ``name`` of a safetensors file, read only where it is sliced.

    ``rows[start:stop]`` gives those rows; ``rows.shape`` costs no read. ``core.similarity`` takes
    these in place of tensors.

    Raises:
        DeryError: The file is damaged or has no such tensor.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path = Path(path)
        self.name = name
        try:
            file: Any = safe_open(str(self.path), framework="pt")
            self._slice = file.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are read in steps of one, not {step}")
        tensor: Tensor = self._slice[start:stop]
        return tensor


def read_rows(path: str | Path, name: str, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of tensor ``name``, and nothing else of the file.

    Raises:
        DeryError: The file is damaged or has no such tensor.
    """
    return LazyRows(path, name)[start:stop]


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


def _damaged(path: Path, error: Exception) -> DeryError:
    return DeryError(
        f"{path} cannot be read: {error}", "the file is damaged; run the stage that wrote it again"
    )
