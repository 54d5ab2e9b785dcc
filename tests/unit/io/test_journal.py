"""Writing: what a kill, an error or a full disk leaves, and what the next writer makes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from dery_cli.errors import DeryError
from dery_cli.io import journal
from dery_cli.io.journal import settle, tidy, transaction
from dery_cli.io.schema import fields, integer
from tests.unit.io.samples import TENSORS, opened, read, record, value_of, write
from tests.unit.training.standins import in_a_child

WHOLE = ["sample.json", "x.safetensors", "x.txt"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "sample.json", 1)
    return tmp_path / "sample.json"


class Killed(BaseException):
    """Stands for a kill: nothing runs after it."""


def kill_at(monkeypatch, place):
    """Stop the process before a rename, counted from 0; the list tells which there were."""
    real, done = os.replace, []

    def replace(source, target):
        if len(done) == place:
            raise Killed
        done.append(target)
        real(source, target)

    monkeypatch.setattr(journal.os, "replace", replace)
    monkeypatch.setattr(journal.Transaction, "abort", lambda self: None)
    return done


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "sample.json"
    written = write(path, 7)
    assert opened(path).record == written
    assert value_of(opened(path)) == 7
    assert names(path.parent) == WHOLE
    write(path, 8)
    assert value_of(opened(path)) == 8


@pytest.mark.parametrize("place", range(5))
def test_a_kill_before_any_rename_leaves_one_version_whole(path, monkeypatch, place):
    """Readers get it without touching anything; the next writer finishes it or sweeps it away."""
    with monkeypatch.context() as patch:
        done = kill_at(patch, place)
        with contextlib.suppress(Killed):
            write(path, 2)
    assert len(done) == min(place, 4)  # the record's commit, two files, the record
    left, expected = names(path.parent), 2 if place > 0 else 1
    assert value_of(opened(path)) == expected
    assert read(path).data == {"value": expected}
    assert names(path.parent) == left
    settle(path)
    tidy(path.parent)
    assert names(path.parent) == WHOLE
    assert value_of(opened(path)) == expected
    assert (path.parent / "x.txt").read_text() == str(expected)


@pytest.mark.parametrize("place", range(1, 4))
def test_an_interruption_after_the_commit_is_finished_not_undone(path, monkeypatch, place):
    """Half of the files have their names by then: to remove the others would leave a mixture."""
    real, done = os.replace, []

    def replace(source, target):
        done.append(target)
        if len(done) == place + 1:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write(path, 2)
    assert value_of(opened(path)) == 2
    assert names(path.parent) == WHOLE


def test_an_error_before_the_commit_leaves_the_old_artifact_and_no_litter(path):
    def fail():
        with transaction(path) as work:
            work.write_tensors(TENSORS, {"x": torch.zeros(3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert value_of(opened(path)) == 1
    assert names(path.parent) == WHOLE


def test_a_full_disk_is_said_in_one_line_whoever_wrote(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        with transaction(path) as work:
            work.path("x.txt").write_bytes(b"half")
            full()

    with pytest.raises(DeryError, match=r"could not write .*: the disk is full") as caught:
        fill()
    assert "what was there before is intact" in caught.value.hint
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DeryError, match=r"x\.safetensors.*: the disk is full") as caught:
            write(path, 2)
    assert "free some space" in caught.value.hint
    assert names(path.parent) == WHOLE
    assert value_of(opened(path)) == 1


def test_tensors_may_be_read_by_those_who_may_read_the_record(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "sample.json", 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_tensors_may_share_memory_and_lie_in_any_order(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    tensors = {"x": x, "again": x, "turned": x.T, "part": x[1], "number": torch.tensor(7)}
    with transaction(tmp_path / "sample.json") as work:
        work.write_tensors(TENSORS, tensors)
        work.commit(record(1))
    found = load_file(tmp_path / TENSORS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_json_beside_the_record_is_checked_too(path):
    def bad():
        with transaction(path) as work:
            work.write_json("x.json", {"a": -1}, fields({"a": integer(0)}))

    with pytest.raises(DeryError, match=r"x\.json is not written: a is -1"):
        bad()
    assert names(path.parent) == WHOLE


@pytest.mark.parametrize(
    "pending", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"files": 3}'], ids=range(5)
)
def test_a_pending_record_that_is_none_is_swept_away(path, pending):
    place = path.with_name("sample.json.pending")
    place.write_bytes(pending)
    assert value_of(opened(path)) == 1
    assert place.exists()
    write(path, 2)
    assert value_of(opened(path)) == 2
    assert names(path.parent) == WHOLE


def test_a_pending_record_without_its_files_does_not_count(path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(Killed):
            write(path, 2)
    (path.parent / "x.txt.pending").write_text("3")
    assert value_of(opened(path)) == 1
    tidy(path.parent)
    assert value_of(opened(path)) == 1
    assert names(path.parent) == WHOLE


def test_tidy_takes_what_is_dery_s_own_and_nothing_else(path):
    for litter in ("a.safetensors.pending", "b.part", ".tmpAbC123", "other.json.pending"):
        (path.parent / litter).write_text("half")
    kept = ["pending", "tmpAbC123", ".tmp", "notes.txt"]
    for name in kept:
        (path.parent / name).write_text("mine")
    (path.parent / "folder.pending").mkdir()
    tidy(path.parent)
    assert names(path.parent) == sorted([*WHOLE, *kept, "folder.pending"])


def test_a_killed_writer_never_leaves_a_mixture(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 0)

    def write_for_ever():
        value = 0
        while True:
            value += 1
            write(path, value, size=50_000)

    for trial in range(8):
        child = in_a_child(write_for_ever)
        time.sleep(0.05 + 0.031 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        value = value_of(opened(path))
        tidy(tmp_path)
        assert value_of(opened(path)) == value
        assert names(tmp_path) == WHOLE
