"""Checkpoints: a folder of safetensors and one JSON that holds their hashes; no pickle.

A checkpoint is ``<kind>-<step>``, for example ``last-000150``. It is written under a temporary
name, every file and the folder synced, ``checkpoint.json`` last, then renamed; older ones go only
after that. So whatever is called ``last-*`` is whole, at any moment, and the highest step counts.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import copy_mode

FORMAT = "dery-checkpoint"
VERSION = 1
SIDECAR = "checkpoint.json"

Tensors = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Args:
        folder: Where it lies.
        step: Updates done.
        tensors: By file stem (``model``, ``ema``, ``optimizer``), then by name.
        state: Everything that is not a tensor.
    """

    folder: Path
    step: int
    tensors: Mapping[str, dict[str, torch.Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(
    run_dir: Path, kind: str, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint under a name that is not taken yet.

    Tensors that are one and the same (tied weights) are stored once.

    Args:
        run_dir: The run's folder.
        kind: ``last`` or ``best``.
        step: Updates done.
        tensors: File stem to named tensors.
        state: Plain data, for JSON.

    Returns:
        The checkpoint's folder.

    Raises:
        DeryError: It could not be written (a full disk, a name that is taken); the checkpoints
            there are as they were.
    """
    folder = run_dir / f"{kind}-{step:06d}"
    partial = run_dir / f".{folder.name}.{os.getpid()}.tmp"
    files: dict[str, Any] = {}
    path = partial
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for stem, named in tensors.items():
            path = partial / f"{stem}.safetensors"
            kept, aliases = _untied(named)
            save_file(kept, path, metadata={"format": "pt"})
            _sync(path)
            files[path.name] = {
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
                "aliases": aliases,
            }
        path = partial / SIDECAR
        body = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "state": state}
        path.write_text(json.dumps({**body, "sha256": _json_sha256(body)}, indent=1) + "\n")
        for name in files:
            copy_mode(path, partial / name)
        _sync(path)
        _sync(partial)
        partial.rename(folder)
        _sync(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _not_written(folder / path.name, error) from error
    return folder


def find_checkpoint(run_dir: Path, kind: str) -> Path | None:
    """The newest checkpoint of that kind, or None."""
    return max(checkpoints(run_dir, kind), key=_step_of, default=None)


def checkpoints(run_dir: Path, kind: str) -> list[Path]:
    """All checkpoints of that kind, in no order."""
    if not run_dir.is_dir():
        return []
    return [p for p in run_dir.iterdir() if re.fullmatch(rf"{kind}-\d+", p.name)]


def load_checkpoint(folder: Path, *, only: str | None = None) -> Checkpoint:
    """Read a checkpoint, checking every file against its recorded hash.

    Args:
        folder: Of the checkpoint.
        only: Stem of the one file to read; None reads all.

    Raises:
        DeryError: A file is missing, altered or cut short, or of a newer version.
    """
    body = _read_sidecar(folder / SIDECAR)
    tensors = {}
    for name, recorded in body["files"].items():
        stem = name.removesuffix(".safetensors")
        if only in (None, stem):
            tensors[stem] = _read_tensors(folder / name, recorded)
    return Checkpoint(folder=folder, step=body["step"], tensors=tensors, state=body["state"])


def is_unfinished(run_dir: Path) -> bool:
    """Whether the run got past its first update, but not to its last; as far as can be told."""
    folder = find_checkpoint(run_dir, "last")
    if folder is None:
        return False
    try:
        body = _read_sidecar(folder / SIDECAR)
    except DeryError:
        return True
    step, steps = int(body["step"]), int(body["state"].get("steps", 0))
    return 0 < step < steps


def load_weights(run_dir: Path, kind: str = "best") -> dict[str, torch.Tensor]:
    """Weights of a run's ``best`` or ``last`` checkpoint, averaged where the run averaged them.

    Raises:
        UsageError: The run has none yet.
        DeryError: It is damaged.
    """
    folder = find_checkpoint(run_dir, kind)
    if folder is None:
        raise UsageError(
            f"{run_dir} holds no {kind} checkpoint", "fine-tune first: dery finetune ..."
        )
    files = _read_sidecar(folder / SIDECAR)["files"]
    stem = "ema" if "ema.safetensors" in files else "model"
    return load_checkpoint(folder, only=stem).tensors[stem]


def keep_only(run_dir: Path, **steps: int | None) -> None:
    """Remove the checkpoints of each kind named but the one of that step, and what was cut off.

    ``keep_only(run_dir, last=150, best=120)``; None removes all of the kind.
    """
    for kind, step in steps.items():
        for folder in checkpoints(run_dir, kind):
            if _step_of(folder) != step:
                discard(folder)
    for partial in run_dir.glob(".*.tmp"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen half removed."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.{os.getpid()}.gone.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step.

    Raises:
        DeryError: It could not be written; the old file is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> DeryError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else str(error)
    return DeryError(
        f"could not write {path}: {reason}",
        "free some space and go on with --resume; the checkpoint before is as it was",
    )


def _untied(named: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors ready for safetensors, and second names of those that appear twice."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in named.items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and where in seen:
            aliases[name] = seen[where]
            continue
        seen[where] = name
        copy = tensor.detach().cpu().contiguous()
        partial = copy.untyped_storage().nbytes() != copy.numel() * copy.element_size()
        kept[name] = copy.clone() if partial else copy
    return kept, aliases


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
        recorded = data.pop("sha256")
        version, kind = data["version"], data["format"]
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, "is not a checkpoint's record") from error
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if kind != FORMAT:
        raise _damaged(path, f"is of format {kind!r}, not {FORMAT!r}")
    if version > VERSION:
        raise DeryError(
            f"{path} was written by a newer dery: checkpoint version {version}, "
            f"this one reads {VERSION}",
            "update dery: pip install -U dery-cli",
        )
    if (actual := _json_sha256(data)) != recorded:
        raise _damaged(path, f"was altered: sha256 {actual}, recorded {recorded}")
    return data  # type: ignore[no-any-return]


def _read_tensors(path: Path, recorded: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise _damaged(path, f"is missing (recorded sha256 {recorded['sha256']})")
    if (actual := file_sha256(path)) != recorded["sha256"]:
        raise _damaged(
            path,
            f"was altered or cut short: sha256 {actual}, recorded {recorded['sha256']} "
            f"({path.stat().st_size} bytes of {recorded['bytes']})",
        )
    tensors = load_file(path)
    for name, first in recorded["aliases"].items():
        tensors[name] = tensors[first]
    return tensors


def _damaged(path: Path, what: str) -> DeryError:
    return DeryError(
        f"{path} {what}", "the checkpoint cannot be used: fine-tune again without --resume"
    )


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _json_sha256(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    """Make sure a file or folder is on the disk before anything points at it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
