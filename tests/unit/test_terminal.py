"""Rows as they come, and the time a plain progress says is left."""

from __future__ import annotations

import itertools

import pytest

from dery_cli import terminal
from dery_cli.terminal import Terminal


def test_a_growing_table_has_one_heading_and_aligned_rows(capsys):
    table = Terminal().growing_table(["epoch", "train loss"])
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
    Terminal(**options).growing_table(["epoch"]).row(["1"])
    assert capsys.readouterr().err == ""


def test_the_time_left_of_a_resumed_task_counts_from_where_it_began(capsys, monkeypatch):
    """One step every 20 seconds: 8 of 100 are left after the second update."""
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with Terminal().progress("training", 100) as bar:
        bar.update(91)
        capsys.readouterr()
        bar.update(92)
    first = capsys.readouterr().err.splitlines()[0]
    left = float(first.partition("about ")[2].partition(" s left")[0])
    assert first.startswith("training 92/100")
    assert 20 * 8 <= left <= 60 * 8
