"""Rows as they come, and the time a plain progress says is left."""

from __future__ import annotations

import itertools

import pytest

from dery_cli.runtime import terminal
from dery_cli.runtime.terminal import Terminal


def test_a_growing_table_has_one_heading_and_aligned_rows(capsys):
    table = Terminal().growing_table({"epoch": 8, "train loss": 8})
    assert capsys.readouterr().err == ""
    table.row(["0.50", "1.2345"])
    table.row([12, "0.1"])
    assert capsys.readouterr() == (
        "",
        "   epoch  train loss\n    0.50      1.2345\n      12         0.1\n",
    )


@pytest.mark.parametrize("options", [{"quiet": True}, {}])
def test_a_growing_table_is_not_for_quiet_or_following_processes(capsys, monkeypatch, options):
    if not options:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
    Terminal(**options).growing_table({"epoch": 8}).row(["1"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("known", "left"), [(None, "5"), (160.0, "160")])
def test_the_time_left_is_what_the_caller_knows_or_the_mean_pace(capsys, monkeypatch, known, left):
    """92 of 100 after 60 seconds, which a resumed task did not spend on all of them."""
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with Terminal().progress("training", 100) as bar:
        next(clock), next(clock)
        bar.update(92, "loss 1", known)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"training 92/100, about {left} s left  loss 1"


def test_a_growing_table_folds_its_headings_where_80_columns_end(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    columns = {"epoch": 7, "update": 13, "lr": 8, "train loss": 7, "valid loss": 7}
    columns |= {"valid top-1": 6, "images/s": 8, "time left": 8}
    table = Terminal().growing_table(columns)
    table.row(["100.00", "100000/200000", "1.00e-03", "2.3255", "2.1", "0.9", "1000", "1:02:03"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["train", "valid", "valid", "time"]
    assert lines[1].split() == [
        "epoch", "update", "lr", "loss", "loss", "top-1", "images/s", "left"
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert len(lines[2]) <= 80
