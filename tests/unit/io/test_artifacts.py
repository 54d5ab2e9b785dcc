"""Atomic, hashed artifacts: what a kill, a full disk or a second process leave behind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dery_cli.errors import DeryError, StaleError
from dery_cli.io import artifacts
from dery_cli.io.artifacts import (
    Artifact,
    Workspace,
    check_files,
    read_record,
    transaction,
    unchanged,
    write_record,
)


def record(value: int, **changes) -> Artifact:
    return Artifact(kind="partition", parents={"a": "1"}, data={"value": value}, **changes)


def read(path: Path) -> Artifact:
    return read_record(path, "partition", missing="none there", hint="dery partition")


def write_with_file(path: Path, value: int, payload: bytes) -> Artifact:
    with transaction(path) as work:
        work.path("payload.bin").write_bytes(payload)
        return work.commit(record(value))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "partition.json"
    written = write_with_file(path, 7, b"payload")
    found = read(path)
    assert found == written
    assert found.data == {"value": 7}
    check_files(path, found, hint="")
    assert sorted(p.name for p in path.parent.iterdir()) == ["partition.json", "payload.bin"]


def test_the_hash_covers_everything_but_library_versions(tmp_path, monkeypatch):
    base = record(1)
    for other in (
        record(2),
        record(1, seed=3),
        record(1, options={"k": 4}),
        Artifact(kind="partition", parents={"a": "2"}, data={"value": 1}),
        Artifact(kind="similarity", parents={"a": "1"}, data={"value": 1}),
    ):
        assert other.sha256 != base.sha256
    before = base.sha256
    monkeypatch.setattr(artifacts, "library_versions", lambda: {"torch": "99"})
    written = write_record(tmp_path / "partition.json", base)
    assert written.sha256 == before
    assert read(tmp_path / "partition.json").sha256 == before


def test_unchanged_asks_for_parents_options_seed_and_whole_files(tmp_path):
    path = tmp_path / "partition.json"
    write_with_file(path, 1, b"payload")
    assert unchanged(path, record(99)) is not None  # the answer is not an input
    assert unchanged(path, record(1, seed=1)) is None
    assert unchanged(path, record(1, options={"k": 4})) is None
    (tmp_path / "payload.bin").write_bytes(b"paxload")
    assert unchanged(path, record(1)) is None


def test_an_error_leaves_the_old_artifact_and_no_litter(tmp_path):
    path = tmp_path / "partition.json"
    write_with_file(path, 1, b"old")

    def fail():
        with transaction(path) as work:
            work.path("payload.bin").write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read(path).data == {"value": 1}
    assert (tmp_path / "payload.bin").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["partition.json", "payload.bin"]


def test_tensors_may_be_read_by_those_who_may_read_the_record(tmp_path):
    before = os.umask(0o027)
    try:
        with transaction(tmp_path / "p.json") as work:
            save_file({"x": torch.zeros(1)}, work.path("x.safetensors"))
            work.commit(record(1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_full_disk_is_said_in_one_line(tmp_path):
    path = tmp_path / "partition.json"
    write_with_file(path, 1, b"old")

    def fill():
        with transaction(path) as work:
            work.path("payload.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DeryError, match="no space left on the disk while writing") as caught:
        fill()
    assert "what was there before is intact" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["partition.json", "payload.bin"]


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_two_renames_is_rolled_forward(tmp_path, monkeypatch, renames):
    """Stop the process after each rename: the old artifact or the new one, never a mixture."""
    path = tmp_path / "partition.json"
    write_with_file(path, 1, b"old")
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        real(source, target)

    monkeypatch.setattr(artifacts.os, "replace", replace)
    monkeypatch.setattr(artifacts.Transaction, "abort", lambda self: None)  # a kill runs nothing
    finished = False
    try:
        write_with_file(path, 2, b"new")
        finished = True
    except Killed:
        pass
    monkeypatch.undo()
    found = read(path)
    check_files(path, found, hint="")
    expected = 2 if renames > 0 or finished else 1
    assert found.data == {"value": expected}
    assert (tmp_path / "payload.bin").read_bytes() == (b"new" if expected == 2 else b"old")


WRITER = """
import sys, pathlib
from dery_cli.io.artifacts import Artifact, transaction
path = pathlib.Path(sys.argv[1])
value = 0
while True:
    value += 1
    with transaction(path) as work:
        work.path("payload.bin").write_bytes(bytes([value % 251]) * 200_000)
        work.commit(Artifact(kind="partition", data={"value": value % 251}))
    if value == 1:
        print("ready", flush=True)
"""


def test_a_killed_writer_never_leaves_a_mixture(tmp_path):
    path = tmp_path / "partition.json"
    for pause in (0.05, 0.11, 0.17):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        found = read(path)
        check_files(path, found, hint="")
        value = found.data["value"]
        assert (tmp_path / "payload.bin").read_bytes() == bytes([value]) * 200_000


def test_missing_damaged_altered_newer_older(tmp_path):
    path = tmp_path / "partition.json"
    with pytest.raises(StaleError, match="none there"):
        read(path)
    write_record(path, record(1))
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DeryError, match="is damaged"):
        read(path)
    path.write_text(text.replace('"value": 1', '"value": 2'))
    with pytest.raises(DeryError, match="was altered: its sha256 is"):
        read(path)
    path.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(DeryError, match="written by a newer dery"):
        read(path)
    path.write_text(text.replace('"version": 1', '"version": 0'))
    with pytest.raises(StaleError, match="older format 0"):
        read(path)
    path.write_text(text.replace("dery/partition", "dery/zoo"))
    with pytest.raises(DeryError, match="holds 'dery/zoo'"):
        read(path)
    path.write_text(json.dumps([1, 2]))
    with pytest.raises(DeryError, match="is damaged"):
        read(path)


def _hold(root: Path, held, release) -> None:
    with Workspace(root).lock(lambda _: None):
        held.set()
        release.wait(30)


def test_the_second_process_says_that_it_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(60)
    said = []

    def waiting(text):
        said.append(text)
        release.set()

    with Workspace(tmp_path).lock(waiting):
        pass
    process.join(30)
    assert len(said) == 1
    assert "another dery works in" in said[0]


@pytest.mark.parametrize("name", ["../victim.txt", "/victim.txt", "a/b", "..", ""])
def test_a_record_names_files_beside_it_and_nothing_else(tmp_path, name):
    """Anybody's record may lie there: neither it nor a pending one reaches out of its folder."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "partition.json"
    evil = Artifact(kind="partition", files={name: "0" * 64}).to_text()
    (tmp_path / "victim.txt.pending").write_text("evil")
    path.with_name(path.name + ".pending").write_text(evil)
    with pytest.raises(DeryError):
        read(path)
    path.with_name(path.name + ".pending").unlink()
    path.write_text(evil)
    with pytest.raises(DeryError):
        read(path)
    assert victim.read_text() == "mine"
