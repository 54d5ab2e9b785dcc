"""A small real zoo, taken through all stages once a run, on a few of the demo's digits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dery_cli.data.sets import open_data
from tests.conftest import Outcome, run_dery

DONORS = ("mobilenetv3", "resnext", "vit_cls", "swin")
TRAIN, TEST = 10, 6
"""Images of a class."""
STAGES = {
    "embed": "embed --data DATA --batch-size 100",
    "sim": "sim",
    "partition": "partition -K 3 --eps 0.5 --restarts 20",
    "assemble": "assemble --max-params 700k --effort 1",
    "finetune": "finetune --steps 8 --effort 0 --batch-size 32",
    "eval": "eval",
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A workspace after all stages, and what each said."""

    root: Path
    data: Path
    results: dict[str, dict[str, Any]]


def stage_lines(data: Path) -> dict[str, list[str]]:
    """Every stage's words."""
    lines = {"zoo add": ["zoo", "add", *(f"demo/{name}" for name in DONORS)]}
    words = {name: line.split() for name, line in STAGES.items()}
    return lines | {n: [str(data) if w == "DATA" else w for w in ws] for n, ws in words.items()}


def run_stages(root: Path, data: Path) -> Pipeline:
    results = {}
    for name, words in stage_lines(data).items():
        outcome = run_dery(*words, "--workspace", str(root), "--json")
        assert outcome.code == 0, f"{name}: {outcome.stderr}"
        results[name] = outcome.json["result"]
    return Pipeline(root, data, results)


def write_images(folder: Path, spec: str = "demo") -> Path:
    """The first of the demo's images of every class, as class folders."""
    data = open_data(spec)
    assert data.classes is not None
    assert data.test is not None
    for name, split, each in (("train", data.train, TRAIN), ("test", data.test, TEST)):
        left = dict.fromkeys(range(len(data.classes)), each)
        assert split.labels is not None
        for index, label in enumerate(split.labels):
            if not left[int(label)]:
                continue
            left[int(label)] -= 1
            place = folder / name / data.classes[int(label)]
            place.mkdir(parents=True, exist_ok=True)
            split.image(index).save(place / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """All stages on four donors, made once for all processes of a run; read only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root, data, said = base / "ws", base / "digits", base / "said.json"
    with FileLock(base / "pipeline.lock"):
        if not said.exists():
            made = run_stages(root, write_images(data))
            said.write_text(json.dumps(made.results))
    return Pipeline(root, data, json.loads(said.read_text()))


@pytest.fixture
def copied(pipeline: Pipeline, tmp_path: Path) -> Callable[..., Outcome]:
    """``dery`` on a copy of the pipeline's workspace, which may be changed; DATA is its images."""
    root = tmp_path / "ws"
    shutil.copytree(pipeline.root, root)

    def call(*args: str) -> Outcome:
        words = [str(pipeline.data) if word == "DATA" else word for word in args]
        return run_dery(*words, "--workspace", str(root), cwd=tmp_path)

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
