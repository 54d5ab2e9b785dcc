"""Checkpoints: a folder of safetensors and the record that holds their hashes; no pickle.

A checkpoint is ``<kind>-<step>``, for example ``last-000150``. It is written under a temporary
name, every file and the folder synced, ``checkpoint.json`` last, then renamed; older ones go only
after that. So whatever is called ``last-*`` is whole, at any moment, and the highest step counts.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dery_cli.errors import DeryError
from dery_cli.io.artifacts import open_artifact, read_record
from dery_cli.io.files import copy_mode, file_sha256, not_written, sync
from dery_cli.io.look import AbsentError, Opened
from dery_cli.io.records import Artifact, Kind
from dery_cli.io.row_stream import write_tensors
from dery_cli.io.schema import (
    Check,
    SchemaError,
    any_text,
    fields,
    file_name,
    integer,
    mapping,
    plain_object,
)

SIDECAR = "checkpoint.json"
BEGIN_ANEW = "fine-tune again without --resume"
GO_ON = "free some space and go on with --resume; the checkpoint before is as it was"
_SUFFIX = ".safetensors"

CHECKPOINT = Kind(
    name="checkpoint",
    version=3,
    data=fields(
        {
            "step": integer(0),
            "aliases": mapping(mapping(any_text), key=file_name),
            "state": plain_object,
        }
    ),
    once=("dery-checkpoint",),
)

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
    folder = checkpoint_folder(run_dir, kind, step)
    partial = run_dir / f".{folder.name}.{os.getpid()}.tmp"
    files: dict[str, str] = {}
    aliases: dict[str, dict[str, str]] = {}
    path = partial
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for stem, named in tensors.items():
            path = partial / f"{stem}{_SUFFIX}"
            kept, aliases[path.name] = _untied(named)
            write_tensors(path, kept, {"format": "pt"})
            files[path.name] = file_sha256(path)
        path = partial / SIDECAR
        data = {"step": step, "aliases": aliases, "state": state}
        path.write_bytes(Artifact(kind=CHECKPOINT, files=files, data=data).to_bytes())
        for name in files:
            copy_mode(path, partial / name)
        sync(path)
        sync(partial)
        partial.rename(folder)
        sync(run_dir)
    except (OSError, DeryError, SchemaError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.__cause__ if isinstance(error, DeryError) else error
        if isinstance(reason, OSError):
            raise not_written(folder / path.name, reason, hint=GO_ON) from error
        raise DeryError(f"could not write {folder / path.name}: {reason}", GO_ON) from error
    return folder


def checkpoint_folder(run_dir: Path, kind: str, step: int) -> Path:
    """Where the checkpoint of that kind and step lies."""
    return run_dir / f"{kind}-{step:06d}"


def find_checkpoint(run_dir: Path, kind: str) -> Path | None:
    """The newest checkpoint of that kind, or None."""
    return max(checkpoints(run_dir, kind), key=_step_of, default=None)


def checkpoints(run_dir: Path, kind: str) -> list[Path]:
    """All checkpoints of that kind, in no order."""
    if not run_dir.is_dir():
        return []
    return [p for p in run_dir.iterdir() if re.fullmatch(rf"{kind}-\d+", p.name)]


def load_checkpoint(
    folder: Path, *, only: str | None = None, state: Check = plain_object
) -> Checkpoint:
    """Read a checkpoint, checking every file against its recorded hash.

    Args:
        folder: Of the checkpoint.
        only: Stem of the one file to read; None reads all.
        state: What its state must be.

    Raises:
        StaleError: It is of an older version.
        DeryError: A file is missing, altered or cut short, or of a newer version.
    """
    files = None if only is None else (f"{only}{_SUFFIX}",)
    try:
        opened = open_artifact(
            folder / SIDECAR, CHECKPOINT, missing="", hint=BEGIN_ANEW, only=files
        )
    except AbsentError as error:
        raise _damaged(folder / SIDECAR, "is missing") from error
    step = opened.record.data["step"]
    if step != _step_of(folder):
        raise _damaged(folder, f"holds the state after {step} updates")
    try:
        state(opened.record.data["state"])
    except SchemaError as error:
        raise _damaged(folder / SIDECAR, f"is damaged: {error.below('.data.state')}") from error
    names = opened.record.files if files is None else files
    return Checkpoint(
        folder=folder,
        step=step,
        tensors={name.removesuffix(_SUFFIX): _tensors(opened, name) for name in names},
        state=opened.record.data["state"],
    )


def _tensors(opened: Opened, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one of its files, by all their names."""
    tensors = opened.tensors(name)
    for second, first in opened.record.data["aliases"].get(name, {}).items():
        if first not in tensors or second in tensors:
            raise _damaged(opened.path, f"is damaged: {second!a} cannot be {first!a}")
        tensors[second] = tensors[first]
    return tensors


def is_unfinished(run_dir: Path) -> bool:
    """Whether the run got past its first update, but not to its last; as far as can be told."""
    folder = find_checkpoint(run_dir, "last")
    if folder is None:
        return False
    try:
        record = read_record(folder / SIDECAR, CHECKPOINT, missing="", hint="")
    except DeryError:
        return True
    steps = record.data["state"].get("steps")
    return not isinstance(steps, int) or 0 < record.data["step"] < steps


def keep_only(run_dir: Path, **steps: int | Collection[int] | None) -> None:
    """Remove the checkpoints of each kind named but those of these steps, and what was cut off.

    ``keep_only(run_dir, last=150, best=120)``; None removes all of the kind.
    """
    for kind, step in steps.items():
        kept = () if step is None else (step,) if isinstance(step, int) else step
        for folder in checkpoints(run_dir, kind):
            if _step_of(folder) not in kept:
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


def _untied(named: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, and second names of those that appear twice."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in named.items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and where in seen:
            aliases[name] = seen[where]
            continue
        seen[where] = name
        kept[name] = tensor
    return kept, aliases


def _damaged(path: Path, what: str) -> DeryError:
    return DeryError(f"{path} {what}", f"rerun: {BEGIN_ANEW}")


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
