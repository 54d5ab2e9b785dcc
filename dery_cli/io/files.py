"""Single files: hashed, synced, replaced in one step, and what to say when that fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from dery_cli.errors import DeryError

PENDING = ".pending"
"""Ends the name of a file until its artifact is whole."""
PART = ".part"
"""Ends the name of a file that is being written alone."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTACT = "free some space and rerun; what was there before is intact"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk before anything points at it."""
    handle = os.open(path, os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_mode(like: Path, path: Path) -> None:
    """Let those read ``path`` who may read ``like``: some libraries write for the owner alone."""
    os.chmod(path, like.stat().st_mode & 0o777)


def replace_text(path: Path, text: str, *, hint: str = INTACT) -> None:
    """Replace a small file in one step, its folder made if need be.

    Raises:
        DeryError: It could not be written; the old file is as it was. ``hint`` is for a full disk.
    """
    partial = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise not_written(path, error, hint=hint) from error


def not_written(
    path: Path, error: OSError, *, hint: str = INTACT, bytes_needed: int | None = None
) -> DeryError:
    """The one way to say that a file could not be written.

    Args:
        path: The file, or the folder it should lie in.
        error: What the operating system said.
        hint: For a full disk.
        bytes_needed: Size of the file, where it is known.
    """
    if error.errno not in DISK_FULL:
        return DeryError(f"could not write {path}: {error.strerror or error}")
    needs = "" if bytes_needed is None else f"; the file has {bytes_needed:,} bytes"
    details: dict[str, object] | None = None
    if bytes_needed is not None:
        details = {"bytes_needed": bytes_needed}
    return DeryError(f"could not write {path}: the disk is full{needs}", hint, details=details)
