"""What adding several models comes to."""

from __future__ import annotations

import pytest

from dery_cli.errors import DeryError, UsageError
from dery_cli.stages.zoo.config import AddConfig
from dery_cli.stages.zoo.run import Added


def added(**failed):
    return Added(donors=[], unchanged=["x"], failed=failed, zoo=["x"])


def test_nothing_failed():
    assert added().failure() is None


def test_the_failure_is_the_users_only_where_all_are():
    mine = added(a=UsageError("bad size"), b=UsageError("bad size")).failure()
    assert isinstance(mine, UsageError)
    assert mine.message == "2 of 3 models were not added: a, b"
    both = added(a=UsageError("bad size"), b=DeryError("no network")).failure()
    assert type(both) is DeryError
    assert both.details == {"failed": {"a": "bad size", "b": "no network"}, "added": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to add"),
        (
            {"specs": ("demo/a", "demo/b"), "name": "c"},
            "--as, --weights, --license, --task and --source go with a single SPEC",
        ),
        (
            {"manifest": "demo", "name": "c"},
            "--as, --weights, --license, --task and --source go with a single SPEC",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        AddConfig(**options)
