"""Reading beside writers: one version whole, nothing written, no writer disturbed."""

from __future__ import annotations

import multiprocessing
import os
import re
import time

import pytest
import torch

from dery_cli.errors import DeryError, StaleError
from dery_cli.io import journal, look, row_stream
from dery_cli.io.artifacts import open_artifact
from dery_cli.io.journal import transaction
from dery_cli.io.row_stream import TensorFile
from tests.unit.io.samples import HINT, KIND, TENSORS, opened, read, record, value_of, write

FORK = multiprocessing.get_context("fork")


def read_until(path, done, results):
    """Read as often as can be until ``done``; tells how many reads, and what went wrong."""
    reads, wrong = 0, []
    while not done.is_set():
        try:
            value_of(opened(path))
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}"[:200])
        reads += 1
    results.put((reads, wrong))


def beside_readers(path, writes, readers=2):
    """Write ``writes`` times while others read; the number of reads, and what went wrong."""
    write(path, 0)
    done, results = FORK.Event(), FORK.Queue()
    processes = [
        FORK.Process(target=read_until, args=(path, done, results)) for _ in range(readers)
    ]
    for process in processes:
        process.start()
    try:
        for value in range(1, writes + 1):
            write(path, value)
    finally:
        done.set()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
    assert value_of(opened(path)) == writes
    return sum(reads for reads, _ in found), [text for _, wrong in found for text in wrong]


def test_readers_beside_a_writer(tmp_path, monkeypatch):
    """A few hundred writes, thousands of reads: none fails, none sees a mixture."""
    monkeypatch.setattr(journal, "sync", lambda path: None)  # more writes in the time
    reads, wrong = beside_readers(tmp_path / "sample.json", 300)
    assert wrong == []
    assert reads > 300
    assert len(list(tmp_path.iterdir())) == 3


def test_readers_in_the_window_between_two_renames(tmp_path, monkeypatch):
    """With the window held open, most reads fall into it."""
    real = os.replace

    def slowly(source, target):
        real(source, target)
        time.sleep(0.01)

    monkeypatch.setattr(journal.os, "replace", slowly)
    reads, wrong = beside_readers(tmp_path / "sample.json", 15, readers=1)
    assert wrong == []
    assert reads > 15


def test_a_read_is_of_the_bytes_that_were_hashed(tmp_path, monkeypatch):
    """The file is replaced between the hash and the library's own opening of it."""
    path = tmp_path / "sample.json"
    write(path, 1)
    real, times = look._tensor_file, []

    def late(place, name, file, *rest):
        times.extend([place] if place.name == TENSORS else [])
        if len(times) == 1 and place.name == TENSORS:
            write(path, 2)
        return real(place, name, file, *rest)

    monkeypatch.setattr(look, "_tensor_file", late)
    assert value_of(opened(path)) == 2
    assert len(times) == 2


def opened_late(path):
    return open_artifact(path, KIND, missing="", hint=HINT, late=True)


def test_a_late_file_is_read_when_it_is_asked_for(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 1)
    found = opened_late(path)
    assert value_of(found) == 1
    arrays = found.arrays(TENSORS, {"x": (10,)})
    assert arrays["x"].tolist() == [1.0] * 10
    assert opened(path).arrays(TENSORS, {"x": (10,)})["x"].tolist() == [1.0] * 10
    for give in (found.arrays, found.tensors):
        with pytest.raises(DeryError, match="'x' is not what it should be"):
            give(TENSORS, {"x": (9,)})


@pytest.mark.parametrize("give", ["arrays", "tensors"])
def test_a_late_file_that_was_replaced_is_not_taken_for_what_was_hashed(tmp_path, give):
    path = tmp_path / "sample.json"
    write(path, 1)
    found = opened_late(path)
    write(path, 2)
    with pytest.raises(DeryError, match=f"{TENSORS} cannot be read: it was replaced meanwhile"):
        getattr(found, give)(TENSORS, {"x": (10,)})


def test_a_late_file_that_was_pending_may_get_its_name(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 1)
    final = tmp_path / TENSORS
    pending = journal.pending_path(final)
    os.rename(final, pending)
    found = opened_late(path)
    os.rename(pending, final)
    assert value_of(found) == 1


def test_a_damaged_late_file_is_one_line(tmp_path):
    path = tmp_path / "sample.json"
    with transaction(path) as work:
        work.write_text(TENSORS, "no tensors at all")
        work.commit(record(1))
    for give in ("arrays", "tensors"):
        with pytest.raises(DeryError, match=f"{TENSORS} cannot be read: "):
            getattr(opened_late(path), give)(TENSORS, {"x": (10,)})


def test_what_is_open_stays_as_it_was(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 1)
    found = opened(path)
    rows = found.rows(TENSORS, {"x": (10,)})["x"]
    write(path, 2)
    assert value_of(found) == 1
    assert rows[2:4].tolist() == [1.0, 1.0]
    assert value_of(opened(path)) == 2


def test_a_folder_that_cannot_be_written_with_a_pending_record_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sample.json"
    write(path, 1)
    with monkeypatch.context() as patch:
        real = os.replace

        def killed(source, target):
            if str(source).endswith("x.txt.pending"):
                raise SystemError
            real(source, target)

        patch.setattr(journal.os, "replace", killed)
        patch.setattr(journal.Transaction, "abort", lambda self: None)
        with pytest.raises(SystemError):
            write(path, 2)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    tmp_path.chmod(0o555)
    try:
        for name in ("replace", "rename", "unlink", "mkdir"):  # root may write anywhere
            monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("a reader wrote"))
        assert value_of(opened(path)) == 2
        assert read(path).data == {"value": 2}
    finally:
        monkeypatch.undo()
        tmp_path.chmod(0o755)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_damage_is_said_at_once(tmp_path):
    """Where nothing moves nobody waits for it."""
    path = tmp_path / "sample.json"
    write(path, 1)
    before = time.monotonic()
    tensors = tmp_path / TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(DeryError) as caught:
        opened(path)
    pattern = rf"{re.escape(str(tensors))} was altered or cut short: sha256 \w+, recorded \w+"
    assert re.fullmatch(pattern, caught.value.message)
    assert caught.value.hint == f"rerun: {HINT}"
    tensors.unlink()
    with pytest.raises(DeryError, match=r"x\.safetensors is missing \(recorded sha256 \w+\)"):
        opened(path)
    tensors.mkdir()
    with pytest.raises(DeryError, match=r"cannot read .*x\.safetensors: it is no file"):
        opened(path)
    tensors.rmdir()
    os.mkfifo(tensors)  # nobody writes to it: to open it would take for ever
    with pytest.raises(DeryError, match=r"cannot read .*x\.safetensors: it is no file"):
        opened(path)
    path.unlink()
    with pytest.raises(StaleError, match="none there"):
        opened(path)
    assert time.monotonic() - before < look.PATIENCE / 2


def test_only_what_is_asked_for_is_opened(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 1)
    (tmp_path / "x.txt").write_text("edited")
    found = open_artifact(path, KIND, missing="", hint=HINT, only=(TENSORS,))
    assert value_of(found) == 1
    with pytest.raises(DeryError, match="names no file y"):
        found.tensors("y")


def test_a_file_that_does_not_fit_its_record(tmp_path):
    path = tmp_path / "sample.json"
    write(path, 1)
    found = opened(path)
    assert found.shape(TENSORS, "x") == (10,)
    assert found.shape(TENSORS, "y") is None
    assert found.tensors(TENSORS, {"x": [10]})["x"].shape == (10,)
    for shapes in ({"x": (9,)}, {"x": (10,), "y": (1,)}, {}):
        with pytest.raises(DeryError, match=r"x\.safetensors does not fit its record: '[xy]'"):
            found.rows(TENSORS, shapes)
    with transaction(path) as work:
        work.write_tensors(TENSORS, {"x": torch.arange(10)})
        work.commit(record(1))
    with pytest.raises(DeryError, match="does not fit its record"):
        opened(path).tensors(TENSORS, {"x": (10,)})


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 8, b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"{" * 100],
    ids=range(5),
)
def test_a_hashed_file_that_is_no_safetensors(tmp_path, data):
    path = tmp_path / "sample.json"
    with transaction(path) as work:
        work.path(TENSORS).write_bytes(data)
        work.commit(record(1))
    with pytest.raises(DeryError, match=r"x\.safetensors cannot be read"):
        opened(path)


def test_a_pending_file_whose_name_another_takes_before_it_is_opened(tmp_path, monkeypatch):
    """The next version lies under the name, and the one that was hashed where it belongs."""
    path, place = tmp_path / "sample.json", tmp_path / TENSORS
    write(path, 1)
    write(tmp_path / "next" / "sample.json", 2)
    for one in (path, place):
        os.replace(one, journal.pending_path(one))
    moves = [
        (journal.pending_path(place), place),
        (tmp_path / "next" / TENSORS, journal.pending_path(place)),
    ]

    def late_open(source, **options):
        while moves:
            os.replace(*moves.pop(0))
        return TensorFile(source, **options)

    monkeypatch.setattr(row_stream, "TensorFile", late_open)
    assert value_of(opened(path)) == 1
    assert moves == []
