"""Records know themselves: every kind of damage is told apart, and none is more than an error."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import pytest

from dery_cli.errors import DeryError, ExitCode, StaleError
from dery_cli.io import records
from dery_cli.io.artifacts import write_record
from dery_cli.io.records import Artifact, parse_record
from dery_cli.io.schema import SchemaError
from tests.unit.io.samples import HINT, KIND, PARENT, edit, read, record, sealed, write


@pytest.fixture
def path(tmp_path):
    write_record(tmp_path / "sample.json", record(7))
    return tmp_path / "sample.json"


def test_the_hash_covers_everything_but_library_versions(path, monkeypatch):
    base = record(1)
    for other in (
        record(2),
        record(1, seed=3),
        record(1, options={"k": 4}),
        Artifact(kind=KIND, parents={"of": "0" * 64}, data={"value": 1}),
    ):
        assert other.sha256 != base.sha256
    monkeypatch.setattr(records, "library_versions", lambda: {"torch": "99"})
    assert write_record(path, base).sha256 == base.sha256
    assert read(path).sha256 == base.sha256


def test_an_edit_of_the_library_versions_is_noticed_too(path):
    edit(path, lambda body: body["libraries"].update(torch="99"))
    with pytest.raises(DeryError, match="was altered: its checksum is"):
        read(path)


def test_a_record_of_before_there_were_checksums_is_read(path):
    edit(path, lambda body: body.pop("checksum"))
    assert read(path).data == {"value": 7}


@pytest.mark.parametrize(
    ("change", "error", "text", "hint"),
    [
        (lambda b: b["data"].update(value=8), DeryError, "was altered: its sha256 is", "rerun"),
        (lambda b: b.update(version=9), DeryError, "written by a newer dery (format 9", "upgrade"),
        (lambda b: b.update(version=2), StaleError, "is in the older format 2", HINT),
        (lambda b: b.update(version=0), StaleError, "is in the older format 0", HINT),
        (lambda b: b.update(format="dery-sample"), StaleError, "older format dery-sample", HINT),
        (lambda b: b.update(format="dery/zoo"), DeryError, "holds 'dery/zoo', not", "rerun"),
        (lambda b: b.update(format=None), DeryError, "is damaged: it is not a dery record", "re"),
        (lambda b: b.update(version="two"), DeryError, "is damaged: version is 'two'", "rerun"),
        (lambda b: b.update(version=None), DeryError, "is damaged: version is null", "rerun"),
        (lambda b: b.update(version=[1]), DeryError, "is damaged: version is a list of 1", "rerun"),
        (lambda b: b.update(version=True), DeryError, "is damaged: version is true", "rerun"),
        (lambda b: b.pop("data"), DeryError, "is damaged: it has no field 'data'", "rerun"),
        (lambda b: b.update(more=1), DeryError, "is damaged: it has a field 'more'", "rerun"),
    ],
)
def test_what_is_wrong_is_told_apart(path, change, error, text, hint):
    edit(path, change)
    with pytest.raises(DeryError) as caught:
        read(path)
    assert type(caught.value) is error
    assert caught.value.message.startswith(str(path))
    assert text in caught.value.message
    assert hint in caught.value.hint
    assert HINT in caught.value.hint
    assert caught.value.exit_code == (ExitCode.STALE if error is StaleError else ExitCode.FAILED)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "is no JSON, or cut short"),
        (b"null", "it is null"),
        (b"[]", "it is a list of 0"),
        (b'"text"', "it is 'text'"),
        (b"{}", "not a dery record"),
        (b"\xff\xfe{}", "is no UTF-8 at byte 0"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "a is nested too deeply"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "is no JSON"),
        (b'{"x": NaN}', "x is nan"),
        (b'{"x": 1e999}', "x is inf"),
    ],
    ids=range(12),
)
def test_what_is_no_record_at_all(path, raw, text):
    path.write_bytes(raw)
    with pytest.raises(DeryError) as caught:
        read(path)
    assert f"{path} is damaged: " in caught.value.message
    assert text in caught.value.message
    assert caught.value.hint == f"rerun: {HINT}"


def test_a_record_that_is_cut_short_anywhere(path):
    whole = path.read_bytes()
    for stop in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:stop])
        with pytest.raises(DeryError, match="is damaged"):
            read(path)


def test_any_flipped_byte_is_noticed_or_means_nothing(path):
    """White space between the fields is all that no hash covers."""
    whole, before = path.read_bytes(), read(path)
    for place in range(len(whole)):
        for flip in (0x01, 0x80):
            changed = bytearray(whole)
            changed[place] ^= flip
            path.write_bytes(changed)
            with contextlib.suppress(DeryError):
                assert read(path) == before
                assert whole[place : place + 1] in b" \n"


@pytest.mark.parametrize("wrong", [None, "x", -1, 1.5, True, [], [1], {}, {"a": {}}, 10**300])
def test_no_type_anywhere_gives_anything_but_an_error(path, wrong):
    """As somebody would write it who can compute the hashes."""
    body = json.loads(path.read_text())
    for key in body:
        raw = json.dumps(sealed({**copy.deepcopy(body), key: wrong})).encode()
        with contextlib.suppress(DeryError):
            parse_record(raw, KIND, path, HINT)
            # the hashes were recomputed; nothing is asked of options, and not much of these
            assert key in ("options", "seed", "sha256", "checksum", "libraries", "files")


def test_the_kind_is_asked_on_reading(path):
    edit(path, lambda body: body["data"].update(value=-1), seal=True)
    with pytest.raises(DeryError, match=r"is damaged: data\.value is -1, not a whole"):
        read(path)
    edit(path, lambda body: body.update(data={"value": 1}, parents={}), seal=True)
    with pytest.raises(DeryError, match="is damaged: parents has no field 'of'"):
        read(path)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (record(-1), "data.value is -1"),
        (Artifact(kind=KIND, parents={}, data={"value": 1}), "parents has no field 'of'"),
        (record(1, options={"x": math.nan}), "cannot be written"),
        (record(1, options={"x": object()}), "cannot be written"),
        (record(1, options={10: 1, 9: 1}), "names that are no texts"),
        (Artifact(kind=KIND, parents={"of": "short"}, data={"value": 1}), "parents.of is 'short'"),
    ],
)
def test_the_kind_is_asked_on_writing_and_nothing_is_changed(path, bad, text):
    before = path.read_bytes()
    with pytest.raises(SchemaError):
        bad.to_bytes()
    with pytest.raises(DeryError) as caught:
        write_record(path, bad)
    assert f"{path} is not written: " in caught.value.message
    assert text in caught.value.message
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_name_that_is_no_unicode_comes_back(path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_record(path, record(1, options={"data": name}))
    assert path.read_bytes().decode("utf-8")
    assert read(path).options == {"data": name}


@pytest.mark.parametrize("name", ["../victim.txt", "/victim.txt", "a/b", "..", ""])
def test_a_record_names_files_beside_it_and_nothing_else(tmp_path, name):
    """Anybody's record may lie there: neither it nor a pending one reaches out of its folder."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "victim.txt.pending").write_text("evil")
    path = tmp_path / "inner" / "sample.json"
    write(path, 1)
    edit(path, lambda body: body["files"].update({name: PARENT}), seal=True)
    pending = path.with_name("sample.json.pending")
    path.rename(pending)
    with pytest.raises(StaleError, match="none there"):
        read(path)
    path.write_bytes(pending.read_bytes())
    with pytest.raises(DeryError, match="is damaged: files"):
        read(path)
    write(path, 2)  # and the next writer just removes it
    assert read(path).data == {"value": 2}
    assert victim.read_text() == "mine"
