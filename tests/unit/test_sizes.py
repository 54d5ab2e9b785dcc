"""How numbers are shown, and what keeps a limit."""

from __future__ import annotations

import pytest

from dery_cli.errors import UsageError
from dery_cli.sizes import check_name, show_decimals, show_duration, show_range, show_shape, within


@pytest.mark.parametrize(
    ("minimum", "maximum", "kept"),
    [
        (None, None, True),
        (7, 7, True),
        (8, None, False),
        (None, 6, False),
        (None, 7, True),
        (7, None, True),
    ],
)
def test_limits_are_inclusive(minimum, maximum, kept):
    assert within(7, minimum, maximum) is kept


def test_shapes():
    assert show_shape((3, 224, 160)) == "3x224x160"


def test_what_is_not_known_stays_none():
    assert show_decimals(0.87654) == "0.8765"
    assert show_decimals(12.345, 1) == "12.3"
    assert show_decimals(None) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (123.4, "2:03"), (3599.6, "1:00:00"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert show_duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "text"), [([], None), ([8.0, 8.0], "8"), ([4.0, 8.0, 32.0], "4..32"), ([19], "19")]
)
def test_ranges(values, text):
    assert show_range(values) == text


def test_names_are_short_enough_for_files():
    assert check_name("a" * 200, "donor") == "a" * 200
    with pytest.raises(UsageError, match="bad donor name"):
        check_name("a" * 201, "donor")
