"""Whether this machine and a workspace are well: libraries, solver, plugins, files, disk."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import PART, PENDING, file_sha256
from dery_cli.io.records import files_of, library_versions
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count
from dery_cli.zoo.plugin import describe_plugins

LOW_DISK = 1 << 30
"""Bytes free below which work is likely to stop half-way."""

OF_A_LIBRARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""What safetensors leaves where it is killed."""

REINSTALL = "pip install --upgrade dery-cli"
FINE, WRONG, NOTE = "fine", "wrong", "note"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: In a word or two.
        state: ``fine``, ``wrong``, or ``note`` for what only has to be known.
        words: What was found.
        command: That mends it, as far as one does.
    """

    what: str
    state: str
    words: str
    command: str | None = None


def examine(terminal: Terminal, space: Workspace, *, fix: bool) -> list[Finding]:
    """Look at everything; ``fix`` finishes or removes first what killed commands left.

    Raises:
        DeryError: The workspace cannot be written, with ``fix``.
    """
    found: list[Finding] = []
    if fix and space.root.is_dir():
        before = list(_leftovers(space.root))
        with space.lock(terminal.note):
            pass  # taking it finishes what was committed, and removes what never was
        for path in _leftovers(space.root):
            path.unlink(missing_ok=True)
        words = f"{len(before)} half-written files were finished or removed"
        found.append(Finding(what="repair", state=NOTE, words=words))
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("versions", _versions),
        ("device", _device),
        ("solver", _solver),
    )
    for what, check in checks:
        found.append(_checked(what, check))
    found += _plugins()
    found.append(_disk(space.root))
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    words = (
        "HF_HUB_OFFLINE is set: nothing is fetched" if offline else "what is asked for is fetched"
    )
    found.append(Finding(what="network", state=NOTE, words=words))
    found += _files(terminal, space)
    return found


def _checked(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, state=FINE, words=check())
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(what=what, state=WRONG, words=words, command=REINSTALL)


def _versions() -> str:
    versions = {"dery": importlib.metadata.version("dery-cli"), "python": platform.python_version()}
    versions |= library_versions()
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _device() -> str:
    from dery_cli.runtime.devices import pick_device

    return f"{pick_device(None)}, {os.cpu_count()} CPUs"


def _solver() -> str:
    """A tiny program with a known answer."""
    mip = importlib.import_module("mip")
    model = mip.Model(sense=mip.MAXIMIZE, solver_name=mip.CBC)
    model.verbose = 0
    x = [model.add_var(var_type=mip.BINARY) for _ in range(3)]
    model.objective = mip.xsum(value * one for value, one in zip((5, 4, 3), x, strict=True))
    model += mip.xsum(cost * one for cost, one in zip((4, 3, 2), x, strict=True)) <= 5
    if model.optimize() != mip.OptimizationStatus.OPTIMAL or round(model.objective_value) != 7:
        raise DeryError("CBC does not solve a program of three variables")
    return f"python-mip {importlib.metadata.version('mip')} solves with CBC"


def _plugins() -> Iterator[Finding]:
    for plugin in describe_plugins():
        name = f"{plugin.group} {plugin.name}"
        if plugin.error is None:
            yield Finding(what=name, state=FINE, words=f"{plugin.distribution} {plugin.version}")
        else:
            yield Finding(
                what=name,
                state=WRONG,
                words=plugin.error,
                command=f"pip install --upgrade {plugin.distribution}",
            )


def _disk(root: Path) -> Finding:
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    words = f"{show_count(free)} bytes free at {place}"
    return Finding(what="disk", state=FINE if free >= LOW_DISK else WRONG, words=words)


def _leftovers(root: Path) -> Iterator[Path]:
    """Half-written files below a workspace."""
    for path in sorted(root.rglob("*")):
        half = path.name.endswith((PENDING, PART)) or OF_A_LIBRARY.fullmatch(path.name)
        if half and path.is_file() and not path.is_symlink():
            yield path


def _files(terminal: Terminal, space: Workspace) -> Iterator[Finding]:
    """Every record, the files that it names by their hashes, and files that no record names."""
    if not space.root.is_dir():
        yield Finding(what="workspace", state=NOTE, words=f"there is none at {space.root}")
        return
    for path in _leftovers(space.root):
        yield Finding(
            what="half-written", state=WRONG, words=str(path), command="dery doctor --fix"
        )
    records = [path for path in sorted(space.root.rglob("*.json")) if _is_record(path, space.root)]
    named: set[Path] = set()
    whole = 0
    with terminal.progress("hashing files", len(records)) as bar:
        for record in records:
            bar.advance()
            files = _named_files(record)
            if files is None:
                yield Finding(what="damaged", state=WRONG, words=f"{record} is no whole record")
                continue
            whole += 1
            for name, digest in files.items():
                path = record.parent / name
                named.add(path)
                wrong = _why_wrong(path, digest)
                if wrong is not None:
                    whole -= 1
                    yield Finding(what="damaged", state=WRONG, words=f"{path} {wrong}")
                    break
    for path in sorted(space.root.rglob("*.safetensors")):
        checkpoints = path.parent.parent.parent.name == "runs"
        if path not in named and not checkpoints and path.parent.name != "weights":
            yield Finding(
                what="orphan", state=NOTE, words=f"no record names {path}; it may be deleted"
            )
    words = f"{whole} artifacts of {space.root} are whole"
    yield Finding(what="workspace", state=FINE, words=words)


def _is_record(path: Path, root: Path) -> bool:
    """Whether a JSON file of a workspace is a record; checkpoints and logs know themselves."""
    parts = path.relative_to(root).parts
    checkpoint = parts[0] == "runs" and len(parts) > 3
    return not (checkpoint or path.name == "candidates.json" or path.name.endswith(".log.json"))


def _named_files(record: Path) -> dict[str, str] | None:
    """Name and hash of a record's files; None where the file is no record."""
    try:
        found = files_of(record.read_bytes())
    except OSError:
        return None
    return None if found is None else dict(found)


def _why_wrong(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    return None if file_sha256(path) == digest else "was altered or cut short"
