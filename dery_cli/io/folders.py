"""Folders for elsewhere: written beside their place under another name, then renamed as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dery_cli.errors import UsageError
from dery_cli.io.files import not_written, sync


def check_place(to: Path, *, force: bool, command: str, file: str, schema: str, hint: str) -> Path:
    """The folder that may be written.

    Args:
        to: As the user gave it.
        force: Replace what an earlier run of the command wrote.
        command: That writes it.
        file: JSON that lies in each such folder.
        schema: That its ``schema`` begins with.
        hint: How to give another folder.

    Raises:
        UsageError: There is something; with ``force``, something that the command did not write.
    """
    place = Path(os.path.abspath(to.expanduser()))
    if not os.path.lexists(place):
        return place
    if not force:
        raise UsageError(f"{to} is there already", f"{hint}, or replace it with --force")
    if not _is_of(place, file, schema):
        raise UsageError(f"{to} is no folder that {command} wrote, and is not replaced", hint)
    return place


def _is_of(place: Path, file: str, schema: str) -> bool:
    if place.is_symlink() or not place.is_dir():
        return False
    try:
        found = json.loads((place / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("schema")).startswith(schema)


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder that takes its place at the end of the block; any exception removes it.

    What lay there before stays until then.

    Raises:
        DeryError: The disk is full, or the folder cannot be written.
    """
    made: list[Path] = []
    work: Path | None = None
    try:
        made = _make_parents(place.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
        yield work
        for path in (*work.rglob("*"), work):
            path.chmod(0o644 if path.is_file() else 0o755)
            sync(path)
        _put(work, place)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise not_written(place, error) from error
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; the ones that were not there, from the top down."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _put(work: Path, place: Path) -> None:
    """Rename ``work`` to ``place``; an earlier folder goes only when it has taken its place."""
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    old = work.with_name(work.name + ".old")
    if place.exists():
        os.replace(place, old)
    try:
        os.replace(work, place)
    except OSError:
        if old.exists():
            os.replace(old, place)
        raise
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)
