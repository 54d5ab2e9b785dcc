"""The one door for a workspace's files: atomic, hashed, locked artifacts.

An artifact is a JSON record, alone (``zoo.json``, ``partition.json``) or as sidecar of the files
it names (``embeddings/<donor>.json`` beside ``<donor>.safetensors``). ``io.records`` says what a
record is, ``io.journal`` how it is written, ``io.look`` how it is read without a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dery_cli.errors import DeryError, UsageError
from dery_cli.io import schema
from dery_cli.io.files import not_written
from dery_cli.io.journal import pending_path, settle, tidy, transaction
from dery_cli.io.look import Opened, looked_at
from dery_cli.io.records import Artifact, Kind
from dery_cli.types import WEIGHTS_FOLDER, is_file_name


def open_artifact(
    path: Path,
    kind: Kind,
    *,
    missing: str,
    hint: str,
    only: Collection[str] | None = None,
    late: bool = False,
) -> Opened:
    """Open an artifact: one version of it, its record checked and its files hashed.

    Args:
        path: Of its record.
        kind: What it must be.
        missing: Says that there is none.
        hint: The command that makes it anew.
        only: Files to open, where not all are needed.
        late: Open files of tensors when they are read, for who may need none of them: that takes
            torch. Who reads them holds the workspace's lock.

    Raises:
        StaleError: It is not there, or was written in an older format.
        DeryError: It, or one of its files, is damaged, or a newer dery wrote it.
    """
    return looked_at(lambda look: look.open(path, kind, missing, hint, only, late=late))


def read_record(path: Path, kind: Kind, *, missing: str, hint: str) -> Artifact:
    """Read and check an artifact's record alone; otherwise as ``open_artifact``."""
    return looked_at(lambda look: look.open(path, kind, missing, hint, ())).record


def is_there(path: Path) -> bool:
    """Whether there is a record, whole or not."""
    return pending_path(path).is_file() or path.is_file()


def made_of_the_same(path: Path, wanted: Artifact) -> Artifact | None:
    """The record at ``path`` if it came of ``wanted``'s parents, options and seed.

    Its files may be damaged; a record that cannot be read counts as none.
    """
    with contextlib.suppress(DeryError):
        found = read_record(path, wanted.kind, missing="", hint="")
        if found.same_inputs(wanted):
            return found
    return None


def open_unchanged(path: Path, wanted: Artifact, *, late: bool = False) -> Opened | None:
    """The artifact at ``path`` if it is whole and came of ``wanted``'s parents, options and seed.

    Whatever is wrong with it, it counts as none: who asks will write it anew. ``late`` is as in
    ``open_artifact``.
    """
    if made_of_the_same(path, wanted) is None:
        return None
    with contextlib.suppress(DeryError):
        opened = open_artifact(path, wanted.kind, missing="", hint="", late=late)
        if opened.record.same_inputs(wanted):
            return opened
    return None


def unchanged(path: Path, wanted: Artifact) -> Artifact | None:
    """The record of ``open_unchanged``; takes no torch."""
    opened = open_unchanged(path, wanted, late=True)
    return None if opened is None else opened.record


def write_record(path: Path, artifact: Artifact) -> Artifact:
    """Write an artifact that is its record alone."""
    with transaction(path) as work:
        return work.commit(artifact)


def write_log(path: Path, log: Mapping[str, Any]) -> None:
    """Write timings and the like, which no hash covers and nothing depends on.

    That a disk is full now does not undo what was made: nothing is said then.
    """
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def read_log(path: Path, check: schema.Check = schema.plain_object) -> dict[str, Any]:
    """What ``write_log`` wrote; empty where it is gone, damaged, or not what ``check`` asks for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema.plain_object(found)
        check(found)
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(found)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Paths of a workspace folder; all that take a name refuse one that leads elsewhere."""

    root: Path

    @property
    def zoo(self) -> Path:
        return self.root / "zoo.json"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    def embedding(self, donor: str) -> Path:
        return self.embeddings / f"{_plain(donor)}.json"

    def similarity(self, metric: str) -> Path:
        return self.root / "similarity" / f"{_plain(metric)}.json"

    @property
    def partition(self) -> Path:
        return self.root / "partition.json"

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"

    @property
    def latency(self) -> Path:
        return self.root / "latency.json"

    def target(self, name: str) -> Path:
        """Folder of what is kept of a target."""
        return self.root / "targets" / _plain(name)

    def builds(self, target: str) -> Path:
        """The folder of what built networks came to on a target."""
        return self.root / "builds" / _plain(target)

    def assembly(self, name: str) -> Path:
        return self.root / "assemblies" / _plain(name) / "assembly.json"

    def run(self, name: str) -> Path:
        return self.root / "runs" / _plain(name)

    @property
    def scratch(self) -> Path:
        """For files of a trial, which whoever holds the lock next removes."""
        return self.root / "builds" / ".trial.tmp"

    def remove(self, record_path: Path, names: Sequence[str]) -> None:
        """Delete a record first, then the files it named; the caller holds the lock."""
        for path in (record_path, *(record_path.parent / _plain(name) for name in names)):
            pending_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the workspace; ``waiting`` is told when another process has it.

        What a killed process left is finished or removed first. Runs have a lock of their own.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / ".lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.2)
            except Timeout:
                waiting(f"another dery works in {self.root}; waiting for it to finish")
                lock.acquire()
        except OSError as error:
            raise not_written(self.root, error) from error
        try:
            self._tidy()
            yield
        finally:
            lock.release()

    def _tidy(self) -> None:
        folders: tuple[Path, ...]
        folders = (self.embeddings, self.root / "similarity", self.root / WEIGHTS_FOLDER)
        try:
            for record in (self.zoo, self.partition, self.scores, self.latency):
                settle(record)
            for pattern in ("assemblies/*", "builds/*", "targets/*", "targets/*/donors"):
                folders += tuple(self.root.glob(pattern))
            for folder in folders:
                tidy(folder)
            shutil.rmtree(self.scratch, ignore_errors=True)
        except OSError as error:
            raise not_written(self.root, error) from error


def _plain(name: str) -> str:
    """A name that stays in its folder.

    Raises:
        UsageError: It does not.
    """
    if not is_file_name(name):
        raise UsageError(f"{name!a} is no plain name", "give a name, not a path")
    return name
