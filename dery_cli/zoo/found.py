"""The record of a network on disk: where it is, and the command that makes it anew.

torch is not imported here: a command that only looks needs none of it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from dery_cli.errors import StaleError
from dery_cli.io.artifacts import is_there, read_record
from dery_cli.io.records import Kind
from dery_cli.zoo.schemas import ASSEMBLY, RUN

ASSEMBLE_HINT = "dery assemble --max-params SIZE --max-flops SIZE"


def find_record(path: Path) -> tuple[Path, Kind]:
    """The record below a folder of an assembly or a run, and its kind.

    Raises:
        StaleError: There is none.
    """
    for name, kind in (("run.json", RUN), ("assembly.json", ASSEMBLY)):
        if is_there(path / name):
            return path / name, kind
        if path.name == name and is_there(path):
            return path, kind
    begun = any(path.glob("last-*"))  # a run's checkpoints
    hint = f"dery finetune --name {path.name} --resume" if begun else ASSEMBLE_HINT
    raise StaleError(f"no assembly or finished run in {path}", hint)


def made_by(record_path: Path, kind: Kind) -> str:
    """The command that makes the network of a record anew, as far as it can be told."""
    name = shlex.quote(record_path.parent.name)
    if kind.name == RUN.name:
        return f"dery finetune --name {name}"
    return ASSEMBLE_HINT if name == "default" else f"{ASSEMBLE_HINT} --name {name}"


def target_of(folder: Path) -> str:
    """The data that a network was made for.

    Raises:
        StaleError: There is no network.
        DeryError: Its record is damaged.
    """
    path, kind = find_record(folder)
    record = read_record(path, kind, missing=f"{folder} is unfinished", hint=made_by(path, kind))
    return str(record.data["target"])
