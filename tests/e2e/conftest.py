"""A small real zoo, taken through all stages once a session."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome, run_dery

DONORS = ("mobilenetv3", "resnext", "vit_cls", "convnext", "swin")
STAGES = {
    "embed": "embed --data demo",
    "sim": "sim",
    "partition": "partition -K 3 --eps 0.5",
    "assemble": "assemble --max-params 700k --effort 6",
    "finetune": "finetune --steps 8 --valid-fraction 0.2",
    "eval": "eval",
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A workspace after all stages, and what each said."""

    root: Path
    results: dict[str, dict[str, Any]]


def stage_lines() -> dict[str, list[str]]:
    """Every stage's words."""
    lines = {"zoo add": ["zoo", "add", *(f"demo/{name}" for name in DONORS)]}
    return lines | {name: line.split() for name, line in STAGES.items()}


def run_stages(root: Path) -> Pipeline:
    results = {}
    for name, words in stage_lines().items():
        outcome = run_dery(*words, "--workspace", str(root), "--json")
        assert outcome.code == 0, f"{name}: {outcome.stderr}"
        results[name] = outcome.json["result"]
    return Pipeline(root, results)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """All stages on five donors; read only."""
    return run_stages(tmp_path_factory.mktemp("pipeline") / "ws")


@pytest.fixture
def copied(pipeline: Pipeline, tmp_path: Path) -> Callable[..., Outcome]:
    """``dery`` on a copy of the pipeline's workspace, which may be changed."""
    root = tmp_path / "ws"
    shutil.copytree(pipeline.root, root)

    def call(*args: str) -> Outcome:
        return run_dery(*args, "--workspace", str(root), cwd=tmp_path)

    return call


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` that a hash covers."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith((".log.json", ".lock", "metrics.jsonl"))
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
