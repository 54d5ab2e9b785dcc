"""The workspace's files through the real commands: the command that damage names repairs it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dery_cli
from tests.conftest import Outcome, run_dery
from tests.e2e.conftest import snapshot
from tests.unit.io.samples import edit

STAGES = {
    "zoo add": "zoo add demo/mobilenetv3 demo/resnext",
    "embed": "embed --data demo -n 24 --grid 2 --grid-samples 16",
    "sim": "sim",
    "partition": "partition -K 2 --eps 1 --restarts 5",
    "assemble": "assemble --max-params 700k --effort 1 --fit-samples 16 --target-samples 40",
    "finetune": "finetune --steps 4 --report-every 2 --batch-size 8 --valid-fraction 0.2",
}
RECORDS = {
    "zoo.json": "zoo add",
    "embeddings/demo__resnext.json": "embed",
    "similarity/cka.json": "sim",
    "partition.json": "partition",
    "scores.json": "assemble",
    "assemblies/default/assembly.json": "assemble",
    "runs/default/run.json": "finetune",
}
READERS = {
    "zoo.json": "zoo list",
    "embeddings/demo__resnext.json": "sim",
    "similarity/cka.json": "partition -K 2 --eps 1",
    "partition.json": "assemble --max-params 700k --name other",
    "assemblies/default/assembly.json": "eval assemblies/default",
    "runs/default/run.json": "eval",
}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "no UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b"dery", b"d\xffry", 1)),
    "version": lambda path: edit(path, lambda body: body.update(version=["1"]), seal=True),
    "edited": lambda path: edit(path, lambda body: body["options"].update(more=1)),
    "no data": lambda path: edit(path, lambda body: body.update(data={}), seal=True),
    "NaN": lambda path: edit(path, lambda body: body["data"].update(x=float("nan"))),
}


def run(root: Path, line: str) -> Outcome:
    return run_dery(*shlex.split(line), "--workspace", str(root), "--json", cwd=root.parent)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small workspace after all stages; read only."""
    root = tmp_path_factory.mktemp("small") / "ws"
    for line in STAGES.values():
        outcome = run(root, line)
        assert outcome.code == 0, outcome.stderr
    return root


@pytest.fixture
def root(small: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(small, tmp_path / "ws"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_with_the_command_that_makes_it_anew(root, damage):
    for name, line in READERS.items():
        path = root / name
        whole = path.read_bytes()
        DAMAGES[damage](path)
        outcome = run(root, line)
        assert outcome.code == 1, (name, outcome)
        assert "Traceback" not in outcome.stderr
        error = outcome.json["error"]
        assert path.name in error["message"], name
        assert f"dery {RECORDS[name]}" in error["hint"], name
        path.write_bytes(whole)


def test_the_commands_that_are_named_repair(root, small):
    """All records damaged, each in its own way, and one pending; the stages in order."""
    for name, damage in zip(RECORDS, DAMAGES.values(), strict=True):
        damage(root / name)
    (root / "partition.json.pending").write_bytes(b"[" * 100_000)
    (root / "similarity" / "cka.safetensors.pending").write_bytes(b"half")
    for line in STAGES.values():
        outcome = run(root, line)
        assert outcome.code == 0, outcome
    assert snapshot(root) == snapshot(small)


def test_a_workspace_of_records_without_checksums_is_up_to_date(root):
    """Those of dery 0.2 and before."""
    for path in [*root.glob("*.json"), *root.glob("*/*.json"), *root.glob("*/default/*.json")]:
        if "checksum" in (body := json.loads(path.read_text())):
            del body["checksum"]
            path.write_text(json.dumps(body))
    before = snapshot(root)
    for line in [*STAGES.values(), "eval", "zoo list"]:
        assert run(root, line).code == 0
    assert snapshot(root) == before


def test_a_workspace_that_cannot_be_written_with_a_pending_record_is_read(root, monkeypatch):
    """Killed between two renames; then mounted read only."""
    folder = root / "assemblies" / "default"
    value = run(root, "eval assemblies/default").json["result"]["top1"]
    for name in ("assembly.json", "model.safetensors"):
        (folder / name).rename(folder / f"{name}.pending")
    (folder / "model.safetensors").write_bytes(b"of the version before")
    before = snapshot(root)
    folder.chmod(0o555)
    try:
        assert run(root, "eval assemblies/default").json["result"]["top1"] == value
        dery_cli.load_assembly(folder)
    finally:
        folder.chmod(0o755)
    assert snapshot(root) == before
    assert run(root, STAGES["assemble"]).code == 0  # a writer settles it
    assert not list(folder.glob("*.pending"))
    assert run(root, "eval assemblies/default").json["result"]["top1"] == value


@pytest.mark.slow
def test_damaged_parts_of_an_unfinished_run_are_left_behind(root, small):
    """``run.json`` is gone, as after a kill: the same command goes on, or says it begins anew."""
    folder = root / "runs" / "default"
    for damage, told in (
        (lambda: (folder / "metrics.jsonl").open("ab").write(b"\xff\n"), "is damaged in line 3"),
        (lambda: flip(next(folder.glob("best-*/model.safetensors"))), "was altered or cut short"),
        (lambda: shutil.rmtree(next(folder.glob("best-*"))), "checkpoint.json is missing"),
    ):
        (folder / "run.json").unlink()
        damage()
        outcome = run(root, STAGES["finetune"])
        assert outcome.code == 0, outcome
        assert any(told in warning for warning in outcome.json["warnings"])
        assert snapshot(root) == snapshot(small)
        assert run(root, STAGES["finetune"] + " --resume").code == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_teacher_s_name_is_no_path(root):
    for name in ("runs/../default", "assemblies/../../ws/runs/default", "runs//etc"):
        outcome = run(root, f"finetune --steps 1 --name t --teacher {name} --distill-logits 0.5")
        assert outcome.code == 2
        assert "bad teacher name" in outcome.json["error"]["message"]
    assert not (root / "runs" / "t").exists()
