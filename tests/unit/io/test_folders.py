"""The folder is written as a whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from dery_cli.errors import DeryError, UsageError
from dery_cli.io.folders import check_place, new_folder

METADATA = "metadata.json"
OF = {"command": "dery export", "file": METADATA, "schema": "dery/export", "hint": "give another"}


def export(place, text="x"):
    with new_folder(place) as work:
        (work / METADATA).write_text(f'{{"schema": "dery/export", "text": "{text}"}}')


def test_a_new_folder_takes_its_place_at_the_end(tmp_path):
    place = tmp_path / "deep" / "out"
    with new_folder(place) as work:
        (work / "a").write_text("x")
        assert not place.exists()
    assert (place / "a").read_text() == "x"
    assert [p.name for p in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeryError("no")])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "deep" / "out") as work:
            (work / "a").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_the_earlier_export_stays(tmp_path):
    place = tmp_path / "out"
    export(place, "old")
    with pytest.raises(DeryError, match="the disk is full"), new_folder(place):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "old" in (place / METADATA).read_text()
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_that_cannot_be_renamed_leaves_the_earlier_one(tmp_path, monkeypatch):
    place = tmp_path / "out"
    export(place, "old")
    replace = os.replace

    def once(source, target):
        if ".part-" in str(source) and not str(source).endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(DeryError, match="could not write"):
        export(place, "new")
    assert "old" in (place / METADATA).read_text()
    assert list(tmp_path.iterdir()) == [place]


def test_an_earlier_export_is_replaced_with_force_alone(tmp_path):
    place = tmp_path / "out"
    export(place, "old")
    with pytest.raises(UsageError, match="is there already"):
        check_place(place, force=False, **OF)
    assert check_place(place, force=True, **OF) == place
    export(place, "new")
    assert "new" in (place / METADATA).read_text()
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("what", ["folder", "file", "link", "other"])
def test_what_is_no_export_is_never_replaced(tmp_path, what):
    place = tmp_path / "out"
    if what == "file":
        place.write_text("x")
    elif what == "link":
        export(tmp_path / "real")
        place.symlink_to(tmp_path / "real")
    else:
        place.mkdir()
        if what == "other":
            (place / METADATA).write_text('{"schema": "else"}')
    with pytest.raises(UsageError, match="no folder that dery export wrote"):
        check_place(place, force=True, **OF)
