"""What a workspace's recipes came to: a log that saves time; no stage depends on it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dery_cli.io import schema
from dery_cli.io.artifacts import Workspace, read_log, write_log
from dery_cli.io.files import file_sha256
from dery_cli.stages.recipe.steps import Step

FILE = "recipe.log.json"
_PASSING = (".log.json", ".lock", ".part", ".pending", "metrics.jsonl")
"""Endings of files that may change where nothing is done."""
_LOG = schema.mapping(
    schema.fields(
        {
            "words": schema.plain_object,
            "records": schema.mapping(schema.any_text, key=schema.any_text),
            "result": schema.plain_object,
        }
    ),
    key=schema.any_text,
)


@dataclasses.dataclass(frozen=True)
class Memo:
    """The steps that were run to their end in a workspace, by what they make."""

    space: Workspace
    steps: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, space: Workspace) -> Memo:
        return cls(space, read_log(space.root / FILE, _LOG))

    def knows(self, step: Step) -> bool:
        """Whether a recipe made this before, however."""
        return step.key in self.steps

    def unchanged(self, step: Step, seen: Mapping[str, str]) -> dict[str, Any] | None:
        """The result of the same line on the same records and images; None where it has to be run.

        Args:
            step: The step.
            seen: Hashes of what it reads outside the workspace.
        """
        found = self.steps.get(step.key)
        if found is None or found["words"] != {"line": list(step.words)}:
            return None
        if found["records"] != {**records(self.space, step), **seen}:
            return None
        there = all(path.exists() for path in step.outputs)
        return dict(found["result"]) if there else None

    def keep(self, step: Step, seen: Mapping[str, str], result: Mapping[str, Any]) -> None:
        """Remember what a step came to."""
        self.steps[step.key] = {
            "words": {"line": list(step.words)},
            "records": {**records(self.space, step), **seen},
            "result": dict(result),
        }
        write_log(self.space.root / FILE, self.steps)


def records(space: Workspace, step: Step) -> dict[str, str]:
    """Hashes of the records that a step reads and makes."""
    return {
        path.relative_to(space.root).as_posix(): file_sha256(path)
        for pattern in step.records
        for path in sorted(space.root.glob(pattern))
        if path.is_file() and not path.name.endswith(_PASSING)
    }


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of a workspace that a stage may write; equal where none was written."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if not name.endswith(_PASSING):
                path = os.path.join(folder, name)
                seen = os.stat(path)
                found[path] = (seen.st_mtime_ns, seen.st_ino, seen.st_size)
    return found
