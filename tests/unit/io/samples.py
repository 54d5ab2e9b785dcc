"""A kind of record for tests, and how a record is edited by somebody who knows the hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from dery_cli.io.artifacts import Opened, open_artifact, read_record
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact, Kind, json_sha256
from dery_cli.io.schema import fields, integer

KIND = Kind(
    name="sample",
    version=3,
    parents=("of",),
    data=fields({"value": integer(0)}),
    once=("dery-sample",),
)
PARENT = hashlib.sha256(b"parent").hexdigest()
TENSORS = "x.safetensors"
HINT = "dery sample"


def record(value: int, **changes: Any) -> Artifact:
    return Artifact(kind=KIND, parents={"of": PARENT}, data={"value": value}, **changes)


def write(path: Path, value: int, *, size: int = 10) -> Artifact:
    """An artifact whose tensor and text say the same value as its record."""
    with transaction(path) as work:
        work.write_tensors(TENSORS, {"x": torch.full((size,), float(value))})
        work.write_text("x.txt", str(value))
        return work.commit(record(value))


def read(path: Path) -> Artifact:
    return read_record(path, KIND, missing="none there", hint=HINT)


def opened(path: Path) -> Opened:
    return open_artifact(path, KIND, missing="none there", hint=HINT)


def value_of(found: Opened) -> int:
    """The one value that record and tensor say; fails on a mixture."""
    value = found.record.data["value"]
    assert found.tensors(TENSORS)["x"].unique().tolist() == [value]
    return value


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    """The record with the hashes that dery would give it."""
    covered = ("format", "version", "parents", "options", "seed", "files", "data")
    body = {key: value for key, value in body.items() if key != "checksum"}
    body["sha256"] = json_sha256({key: body[key] for key in covered if key in body})
    return {**body, "checksum": json_sha256(body)}


def edit(path: Path, change: Any, *, seal: bool = False) -> None:
    """Change a record's file by hand."""
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(sealed(body) if seal else body))
