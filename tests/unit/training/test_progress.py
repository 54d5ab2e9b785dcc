"""The time left: the pace of each kind of update, and of reports."""

from __future__ import annotations

import pytest

from dery_cli.training import progress
from dery_cli.training.plan import make_plan
from dery_cli.training.progress import FULL_PER_FROZEN, Clock
from dery_cli.training.recipe import make_config


@pytest.fixture
def now(monkeypatch):
    """Seconds by a clock that the test sets."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time[0])
    return time


def plan(mode):
    config = make_config("default", mode=mode, steps=10, stitch_fraction=0.4, report_every=5)
    return make_plan(config, 640)


def spend(now, what, seconds):
    with what:
        now[0] += seconds


def test_there_is_no_time_left_to_tell_before_an_update():
    assert Clock().eta(plan("full"), 0, 2) is None


def test_updates_and_reports_have_their_own_pace(now):
    clock = Clock()
    for seconds in (2.0, 4.0):
        spend(now, clock.update(frozen=False), seconds)
    spend(now, clock.report(), 7.0)
    assert clock.eta(plan("full"), 2, 1) == 8 * 3.0 + 7.0
    assert clock.updates_per_second == pytest.approx(1 / 3)


def test_full_updates_are_not_taken_for_frozen_ones(now):
    clock, both = Clock(), plan("stitch-then-full")
    spend(now, clock.update(frozen=True), 2.0)
    assert clock.eta(both, 1, 0) == 3 * 2.0 + 6 * 2.0 * FULL_PER_FROZEN
    for _ in range(3):
        spend(now, clock.update(frozen=True), 2.0)
    spend(now, clock.update(frozen=False), 5.0)
    assert clock.eta(both, 5, 0) == 5 * 5.0


def test_updates_handed_to_a_device_count_from_when_it_was_waited_for(now):
    def wait():
        now[0] += 7.0

    clock = Clock(wait)
    for _ in range(4):
        spend(now, clock.update(frozen=False), 0.25)
    assert clock.eta(plan("full"), 4, 0) is None
    assert clock.updates_per_second == 0
    clock.settle()
    assert clock.updates_per_second == pytest.approx(4 / 8)
    assert clock.eta(plan("full"), 4, 0) == 6 * 2.0
    spend(now, clock.update(frozen=False), 0.25)  # not done yet: it makes the pace no faster
    assert clock.eta(plan("full"), 5, 0) == 5 * 2.0
    clock.settle()
    clock.settle()  # nothing to wait for
    assert clock.updates_per_second == pytest.approx(5 / 15.25)
