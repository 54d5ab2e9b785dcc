"""A run's folder besides its checkpoints: the lock and ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dery_cli.errors import DeryError
from dery_cli.training.checkpoint import write_text

LOCK = ".lock"
METRICS = "metrics.jsonl"


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process.

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
        raise DeryError(f"cannot write to {run_dir}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def append_metrics(run_dir: Path, line: Mapping[str, Any]) -> None:
    """Add one line to ``metrics.jsonl`` and sync it; NaN and infinity become null.

    Raises:
        DeryError: It could not be written.
    """
    clean = {k: None if _is_not_finite(v) else v for k, v in line.items()}
    path = run_dir / METRICS
    try:
        with path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DeryError(f"could not write {path}: {error}", "free some space, --resume") from error


def rewind_metrics(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after ``step`` and a line that was cut off; returns those kept."""
    path = run_dir / METRICS
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are whole."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
