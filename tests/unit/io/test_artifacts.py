"""Whether an artifact is up to date, the workspace's lock and paths, and logs."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from dery_cli.errors import DeryError, UsageError
from dery_cli.io import journal
from dery_cli.io.artifacts import (
    Workspace,
    is_there,
    made_of_the_same,
    open_unchanged,
    read_log,
    unchanged,
    write_log,
)
from dery_cli.io.schema import fields, number
from tests.unit.io.samples import TENSORS, opened, record, value_of, write


def test_unchanged_asks_for_parents_options_seed_and_whole_files(tmp_path):
    path = tmp_path / "sample.json"
    assert unchanged(path, record(1)) is None
    written = write(path, 1)
    assert unchanged(path, record(99)) == written  # the answer is not an input
    assert value_of(open_unchanged(path, record(99))) == 1
    assert unchanged(path, record(1, seed=1)) is None
    assert unchanged(path, record(1, options={"k": 4})) is None
    (tmp_path / TENSORS).write_bytes(b"other")
    assert unchanged(path, record(1)) is None
    assert made_of_the_same(path, record(1)) == written


@pytest.mark.parametrize("damage", [b"", b"[" * 100_000, b"\xff", b"{}"], ids=range(4))
def test_what_cannot_be_read_counts_as_none(tmp_path, damage):
    path = tmp_path / "sample.json"
    write(path, 1)
    path.write_bytes(damage)
    assert is_there(path)
    assert unchanged(path, record(1)) is None
    assert made_of_the_same(path, record(1)) is None
    write(path, 2)
    assert value_of(opened(path)) == 2


def _hold(root, held, release) -> None:
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


def test_who_takes_the_lock_finishes_or_removes_what_a_killed_process_left(tmp_path, monkeypatch):
    space = Workspace(tmp_path)
    target = space.target("t")
    places = [space.zoo, space.embedding("a"), space.similarity("cka"), space.assembly("b")]
    places += [target / "joints.json", target / "donors" / "a.json"]
    real = os.replace
    for path in places:
        write(path, 1)
        with monkeypatch.context() as patch:
            patch.setattr(journal, "finish", lambda *_: (_ for _ in ()).throw(SystemError))
            patch.setattr(journal.Transaction, "abort", lambda self: None)
            with pytest.raises(SystemError):
                write(path, 2)
        assert path.with_name(path.name + ".pending").exists()
    assert os.replace is real
    (tmp_path / "embeddings" / "c.safetensors.pending").write_text("half")
    (tmp_path / "mine.part").write_text("not dery's")
    with space.lock(lambda _: None):
        left = {p.name for p in tmp_path.rglob("*") if p.name.endswith((".pending", ".part"))}
        # of a record in the workspace's own folder only the record's files are known
        assert left == {"mine.part"}
        assert [value_of(opened(path)) for path in places] == [2] * 6


def test_names_that_lead_elsewhere_make_no_path(tmp_path):
    space = Workspace(tmp_path)
    for make in (space.embedding, space.similarity, space.target, space.assembly, space.run):
        assert tmp_path in make("a.b-c").parents
        for name in ("../x", "/x", "..", "", "a/b", ".x", "a\nb"):
            with pytest.raises(UsageError, match="is no plain name"):
                make(name)
    with pytest.raises(UsageError):
        space.remove(space.zoo, ["../x"])


def test_a_removed_artifact_does_not_come_back(tmp_path):
    space = Workspace(tmp_path)
    path = space.embedding("a")
    write(path, 1)
    path.with_name("a.json.pending").write_bytes(path.read_bytes())
    space.remove(path, [TENSORS, "x.txt"])
    assert not is_there(path)
    assert list(space.embeddings.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DeryError, match=r"could not write .*file"),
        Workspace(tmp_path / "file").lock(lambda _: None),
    ):
        pass


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"seconds": "x"}', None])
def test_a_damaged_log_is_no_log(tmp_path, damage):
    path, check = tmp_path / "x.log.json", fields({"seconds": number()})
    write_log(path, {"seconds": 1.5})
    assert read_log(path, check) == {"seconds": 1.5}
    path.unlink() if damage is None else path.write_bytes(damage)
    assert read_log(path, check) == {}
    write_log(tmp_path / "nowhere" / "x.log.json", {"seconds": 1.5})  # and that is no failure
