"""A run's folder besides its checkpoints: the lock and ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dery_cli.errors import DeryError
from dery_cli.io.files import PENDING, not_written, replace_text
from dery_cli.io.journal import tidy
from dery_cli.io.schema import fields, integer, plain
from dery_cli.training.checkpoint import GO_ON, keep_only

LOCK = ".lock"
METRICS = "metrics.jsonl"
_LINE = fields({"step": integer(0)}, more=plain)


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; what a killed one left of an artifact is settled.

    Raises:
        DeryError: Another process holds it, or it cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise DeryError(
            f"another process is fine-tuning in {run_dir}",
            "wait for it to end, or give another --name",
        ) from error
    except OSError as error:
        raise not_written(run_dir, error, hint=GO_ON) from error
    try:
        try:
            tidy(run_dir)
        except OSError as error:
            raise not_written(run_dir, error, hint=GO_ON) from error
        yield
    finally:
        lock.release()


def clear_run(run_dir: Path) -> None:
    """Remove the checkpoints and metrics of an earlier run.

    Raises:
        DeryError: Another process is at work in the folder, or it cannot be written to.
    """
    with run_lock(run_dir):
        keep_only(run_dir, last=None, best=None)
        rewind_metrics(run_dir, -1)


def settle_run(run_dir: Path) -> None:
    """Finish what a killed process left of a run's artifact, unless one is at work there."""
    if any(run_dir.glob(f"*{PENDING}")):
        with contextlib.suppress(DeryError), run_lock(run_dir):
            pass


def append_metrics(run_dir: Path, line: Mapping[str, Any]) -> None:
    """Add one line to ``metrics.jsonl`` and sync it; NaN and infinity become null.

    Raises:
        DeryError: It could not be written.
    """
    path = run_dir / METRICS
    try:
        with path.open("a") as file:
            file.write(json.dumps(finite_or_none(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error, hint=GO_ON) from error


def rewind_metrics(
    run_dir: Path, step: int, warn: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Drop the lines after ``step`` and those that are damaged; returns those kept.

    Args:
        run_dir: The run's folder.
        step: The last that is kept.
        warn: Told which lines were damaged; one that was cut off at the end goes without a word.
    """
    path = run_dir / METRICS
    lines, damaged = _read(path)
    kept = [line for line in lines if line["step"] <= step]
    if damaged and warn is not None:
        numbers = ", ".join(str(number) for number in damaged[:5])
        more = " ..." if len(damaged) > 5 else ""
        warn(f"{path} is damaged in line {numbers}{more}: left out")
    if path.exists():
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept), hint=GO_ON)
    return kept


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are whole."""
    return _read(run_dir / METRICS)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole lines, and the numbers of those that are damaged."""
    try:
        raw = path.read_bytes()
    except OSError:
        return [], []
    whole, damaged = [], []
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        try:
            found = json.loads(line)
            _LINE(found)
            whole.append(found)
        except (ValueError, RecursionError):
            if line.endswith(b"\n"):
                damaged.append(number)
    return whole, damaged


def finite_or_none(line: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinity, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
