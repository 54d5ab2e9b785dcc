"""Checkpoints: whole or refused, whatever happens to the disk or the process."""

from __future__ import annotations

import json
import os
import resource
import signal
import time

import pytest
import torch

from dery_cli.errors import DeryError
from dery_cli.io.files import file_sha256
from dery_cli.io.schema import fields, number
from dery_cli.training import checkpoint as ckpt
from dery_cli.training.runlog import (
    append_metrics,
    read_metrics,
    rewind_metrics,
    run_lock,
    settle_run,
)
from tests.unit.io.samples import edit
from tests.unit.training.standins import in_a_child, same

M = "model.safetensors"


def tensors(value=1.0):
    return {"model": {"a": torch.full((3, 2), value), "n": torch.tensor(7)}}


def save(run_dir, kind="last", step=5, value=1.0, **state):
    return ckpt.save_checkpoint(run_dir, kind, step, tensors(value), state)


def test_all_its_files_may_be_read_by_the_same_people(tmp_path):
    before = os.umask(0o022)
    try:
        folder = save(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    weight = torch.randn(4, 3)
    named = {
        "weight": weight,
        "tied": weight,
        "transposed": weight.T,
        "row": weight[1],
        "bf16": torch.randn(3).bfloat16(),
        "empty": torch.empty(0),
        "count": torch.tensor(3),
    }
    state = {"lr": 0.1 + 0.2, "names": ["a"], "none": None}
    folder = ckpt.save_checkpoint(tmp_path, "last", 12, {"model": named, "optimizer": {}}, state)
    assert folder.name == "last-000012"
    loaded = ckpt.load_checkpoint(folder)
    assert (loaded.step, loaded.state) == (12, state)
    assert same(loaded.tensors["model"], named)
    assert loaded.tensors["optimizer"] == {}
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["files"]["model.safetensors"] == file_sha256(folder / "model.safetensors")
    assert record["data"]["aliases"]["model.safetensors"] == {"tied": "weight"}


def test_nothing_is_pickled(tmp_path):
    folder = save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]


def test_the_highest_step_counts_and_the_others_are_removed(tmp_path):
    for step in (9, 1000000, 100):
        save(tmp_path, step=step)
    save(tmp_path, "best", step=9)
    (tmp_path / ".last-000200.77.tmp").mkdir()
    assert ckpt.find_checkpoint(tmp_path, "last").name == "last-1000000"
    ckpt.keep_only(tmp_path, last=1000000, best=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-000009", "last-1000000"]
    assert ckpt.find_checkpoint(tmp_path / "nothing", "last") is None


def test_a_name_that_is_taken_is_refused_and_left_alone(tmp_path):
    folder = save(tmp_path, value=1.0)
    with pytest.raises(DeryError, match="could not write"):
        save(tmp_path, value=2.0)
    assert ckpt.load_checkpoint(folder).tensors["model"]["a"][0, 0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last-000005"]


def test_a_missing_file_is_named_with_its_hash(tmp_path):
    folder = save(tmp_path)
    digest = file_sha256(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DeryError) as error:
        ckpt.load_checkpoint(folder)
    assert error.value.message == (
        f"{folder}/model.safetensors is missing (recorded sha256 {digest})"
    )
    (folder / "checkpoint.json").unlink()
    with pytest.raises(DeryError, match=r"checkpoint\.json is missing"):
        ckpt.load_checkpoint(folder)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_an_altered_file_is_named_with_both_hashes(tmp_path, damage):
    folder = save(tmp_path)
    path = folder / "model.safetensors"
    before, data = file_sha256(path), bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    with pytest.raises(DeryError) as error:
        ckpt.load_checkpoint(folder)
    assert f"{path} was altered or cut short" in error.value.message
    assert before in error.value.message
    assert file_sha256(path) in error.value.message


@pytest.mark.parametrize(
    ("change", "seal", "text"),
    [
        (lambda b: b["data"].update(step=6), False, "was altered: its sha256 is"),
        (lambda b: b.update(version=4), False, "was written by a newer dery (format 4"),
        (lambda b: b.update(format="dery-checkpoint"), False, "is in the older format"),
        (lambda b: b.update(format="other"), False, "holds 'other'"),
        (lambda b: b.pop("sha256"), False, "is damaged: it has no field 'sha256'"),
        (lambda b: b["data"].update(step="x"), True, "is damaged: data.step is 'x'"),
        (lambda b: b["data"].update(step=6), True, "holds the state after 6 updates"),
        (lambda b: b["data"].update(state=[]), True, "is damaged: data.state is a list"),
        (
            lambda b: b["data"].update(aliases={"../x": {}}),
            True,
            "is damaged: data.aliases['../x']",
        ),
        (lambda b: b["data"]["aliases"].update({M: {"b": "c"}}), True, "'b' cannot be 'c'"),
        (lambda b: b["data"]["aliases"].update({M: {"a": "n"}}), True, "'a' cannot be 'n'"),
        (lambda b: b["files"].update({"../x": "0" * 64}), True, "is damaged: files['../x']"),
        (lambda b: b["files"].clear(), True, "names no file model.safetensors"),
    ],
)
def test_an_altered_or_hostile_record_is_refused(tmp_path, change, seal, text):
    path = save(tmp_path) / "checkpoint.json"
    edit(path, change, seal=seal)
    with pytest.raises(DeryError) as error:
        ckpt.load_checkpoint(path.parent, only="model")
    assert text in error.value.message
    assert "fine-tune again without --resume" in error.value.hint
    path.write_text("{")
    with pytest.raises(DeryError, match="is damaged: it is no JSON, or cut short"):
        ckpt.load_checkpoint(path.parent)


def test_what_its_state_must_be_is_asked(tmp_path):
    folder = save(tmp_path, lr=-1)
    assert ckpt.load_checkpoint(folder).state == {"lr": -1}
    with pytest.raises(DeryError, match=r"is damaged: data\.state\.lr is -1"):
        ckpt.load_checkpoint(folder, state=fields({"lr": number(0)}))


def test_a_file_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path):
    def write_too_much():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            ckpt.save_checkpoint(run_dir, "last", 2, {"model": {"a": torch.ones(100_000)}}, {})
        except DeryError as error:
            (tmp_path / "error").write_text(f"{error.message}\n{error.hint}")

    run_dir = tmp_path / "run"
    save(run_dir, step=1)
    os.waitpid(in_a_child(write_too_much), 0)
    message, hint = (tmp_path / "error").read_text().splitlines()
    assert message.startswith(f"could not write {run_dir}/last-000002/model.safetensors")
    assert "go on with --resume" in hint
    assert [p.name for p in run_dir.iterdir()] == ["last-000001"]
    assert ckpt.load_checkpoint(run_dir / "last-000001").step == 1


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "sync", fail)
    with pytest.raises(DeryError, match="the disk is full"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_never_leaves_an_unreadable_checkpoint(tmp_path):
    def save_for_ever():
        last = ckpt.find_checkpoint(tmp_path, "last")
        step = int(last.name[5:])
        ckpt.keep_only(tmp_path, last=step, best=step)
        while True:
            step += 1
            many = {"model": {"a": torch.full((100_000,), float(step))}}
            ckpt.save_checkpoint(tmp_path, "best", step, many, {"step": step})
            ckpt.save_checkpoint(tmp_path, "last", step, many, {"step": step})
            ckpt.keep_only(tmp_path, last=step, best=step)

    for kind in ("best", "last"):
        ckpt.save_checkpoint(tmp_path, kind, 0, {"model": {"a": torch.zeros(1)}}, {"step": 0})
    for trial in range(12):
        child = in_a_child(save_for_ever)
        time.sleep(0.1 + 0.037 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for kind in ("last", "best"):
            assert ckpt.find_checkpoint(tmp_path, kind) is not None
            for folder in ckpt.checkpoints(tmp_path, kind):
                loaded = ckpt.load_checkpoint(folder)
                assert loaded.state["step"] == loaded.step
                assert (loaded.tensors["model"]["a"] == loaded.step).all()
    assert ckpt.find_checkpoint(tmp_path, "last").name > "last-000003"


def test_two_runs_on_one_folder_are_refused_at_once(tmp_path):
    with run_lock(tmp_path / "run"):
        with pytest.raises(DeryError) as error, run_lock(tmp_path / "run"):
            pass
        assert error.value.message == f"another process is fine-tuning in {tmp_path / 'run'}"
    with run_lock(tmp_path / "run"):
        pass


def test_metrics_lines_are_dropped_after_the_step_resumed_from(tmp_path):
    for step in (10, 20, 30):
        append_metrics(tmp_path, {"step": step, "loss": float("nan") if step == 20 else 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert rewind_metrics(tmp_path, 20) == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": None}]
    append_metrics(tmp_path, {"step": 30, "loss": 0.4})
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"[1]\n", b'{"lo": 1}\n', b"[" * 100_000 + b"\n", b"\n"]
)
def test_a_damaged_line_is_named_and_left_behind(tmp_path, line):
    append_metrics(tmp_path, {"step": 10})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line)
    append_metrics(tmp_path, {"step": 20})
    assert read_metrics(tmp_path) == [{"step": 10}, {"step": 20}]
    told = []
    assert rewind_metrics(tmp_path, 20, told.append) == [{"step": 10}, {"step": 20}]
    assert told == [f"{tmp_path / 'metrics.jsonl'} is damaged in line 2: left out"]
    assert rewind_metrics(tmp_path, 20, told.append) == [{"step": 10}, {"step": 20}]
    assert len(told) == 1


def test_who_takes_a_run_s_lock_settles_what_a_killed_process_left(tmp_path):
    (tmp_path / "model.safetensors.pending").write_text("half")
    settle_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
    (tmp_path / "model.safetensors.pending").write_text("half")
    with run_lock(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
        (tmp_path / "model.safetensors.pending").write_text("being written")
        settle_run(tmp_path)  # somebody is at work: it is his
        assert (tmp_path / "model.safetensors.pending").exists()
