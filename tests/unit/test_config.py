"""Sizes, names and options."""

from __future__ import annotations

import math

import pytest

from dery_cli.errors import UsageError
from dery_cli.sizes import (
    check_above,
    check_at_least,
    check_between,
    check_name,
    check_seed,
    parse_size,
    parse_time,
    show_count,
    show_time,
)
from dery_cli.stages.assemble.config import AssembleConfig, Budget
from dery_cli.stages.embed.config import EmbedConfig
from dery_cli.stages.partition.config import PartitionConfig


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("30M", 30_000_000),
        ("5G", 5_000_000_000),
        ("800k", 800_000),
        ("1.5B", 1_500_000_000),
        ("0.25m", 250_000),
        ("7", 7),
        (" 2T ", 2_000_000_000_000),
        ("1.234567M", 1_234_567),
        (".5K", 500),
    ],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_size(text, "--max-params") == count


@pytest.mark.parametrize("text", ["30Q", "", "M", "-3M", "0", "0k", "1.5", "1e6", "1,000", "nan"])
def test_a_wrong_size_says_what_is_accepted(text):
    with pytest.raises(UsageError, match="--max-params") as caught:
        parse_size(text, "--max-params")
    assert "30M, 5G, 800k or 1.5B" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1_000, "1.00k"), (24_890_000, "24.89M"), (4.47e9, "4.47G"), (2e12, "2.00T")],
)
def test_counts_are_shown_as_they_are_read(count, text):
    assert show_count(count) == text


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("8ms", 8_000_000),
        ("0.5s", 500_000_000),
        ("800us", 800_000),
        (" 1.5 ms ", 1_500_000),
        (".25s", 250_000_000),
        ("8.123456ms", 8_123_456),
    ],
)
def test_times_are_read_as_people_write_them(text, nanoseconds):
    assert parse_time(text, "--max-latency") == nanoseconds


@pytest.mark.parametrize("text", ["8", "", "ms", "8m", "-1ms", "0ms", "1e3ms", "0.1234us", "8 MS"])
def test_a_wrong_time_says_what_is_accepted(text):
    with pytest.raises(UsageError, match="--max-latency") as caught:
        parse_time(text, "--max-latency")
    assert "8ms, 800us or 0.5s" in caught.value.hint


def test_times_are_shown_in_milliseconds():
    assert show_time(8_123_456) == "8.123 ms"
    assert show_time(1_234_000_000) == "1,234.000 ms"


def test_budgets_of_latency_and_memory():
    budget = Budget(max_latency=8_000_000, max_memory=200_000_000)
    assert budget.admits(1, 1, latency=8_000_000, memory=200_000_000)
    assert not budget.admits(1, 1, latency=8_000_001, memory=1)
    assert not budget.admits(1, 1, latency=1, memory=200_000_001)
    assert str(budget) == "at most 8.000 ms, at most 200.00M bytes of memory"


def test_budgets():
    budget = Budget(max_params=30_000_000, max_flops=5_000_000_000, min_flops=1_000_000_000)
    assert budget.admits(30_000_000, 5_000_000_000)
    assert not budget.admits(30_000_001, 5_000_000_000)
    assert not budget.admits(1, 5_000_000_001)
    assert not budget.admits(1, 999_999_999)
    assert str(budget) == (
        "at most 30.00M params, at most 5.00G multiply-adds, at least 1.00G multiply-adds"
    )
    assert str(Budget()) == "no limit"
    with pytest.raises(UsageError, match=r"--min-flops 2\.00G is above --max-flops 1\.00G"):
        Budget(max_flops=1_000_000_000, min_flops=2_000_000_000)


@pytest.mark.parametrize("name", ["a", "resnet18.a1_in1k", "x-1", "9"])
def test_good_names(name):
    assert check_name(name, "donor") == name


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "A", "a/b", "a b", "..", "a\n"])
def test_bad_names(name):
    with pytest.raises(UsageError, match="bad donor name"):
        check_name(name, "donor")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite_passes(value):
    for check in (
        lambda: check_at_least("--x", value, 0),
        lambda: check_above("--x", value),
        lambda: check_between("--x", value, 0, 1),
        lambda: check_between("--x", value, 0, 1, below=True),
    ):
        with pytest.raises(UsageError, match=f"--x is {value}; it must be a number, "):
            check()


@pytest.mark.parametrize(
    ("check", "value", "text"),
    [
        (check_at_least, 0, "--x is 0; it must be at least 1"),
        (check_at_least, 2**31, "--x is 2147483648; it must be at most 2147483647"),
        (check_above, 0.0, "--x is 0.0; it must be above 0"),
        (check_above, 1e300, r"--x is 1e\+300; it must be at most 2147483647"),
    ],
)
def test_numbers_out_of_range_are_named_with_their_limits(check, value, text):
    with pytest.raises(UsageError, match=f"^{text}$"):
        check("--x", value)


def test_both_ends_of_a_range():
    check_between("--x", 0, 0, 1)
    check_between("--x", 1, 0, 1)
    check_between("--x", 0.999, 0, 1, below=True)
    with pytest.raises(UsageError, match=r"^--x is 1; it must be at least 0 and below 1$"):
        check_between("--x", 1, 0, 1, below=True)
    with pytest.raises(UsageError, match=r"^--x is 1\.5; it must be at least 0 and at most 1$"):
        check_between("--x", 1.5, 0, 1)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_a_library_would_refuse(seed):
    check_seed(2**63 - 1)
    with pytest.raises(UsageError, match=f"--seed is {seed}"):
        check_seed(seed)


def test_options_hold_everything_that_changes_the_answer():
    assert set(EmbedConfig(data="demo").options()) == {
        "data",
        "samples",
        "grid",
        "grid_samples",
        "batch_size",
        "dtype",
        "crop",
        "skip_bad",
        "precision",
    }
    assert set(PartitionConfig().options()) == {
        "blocks",
        "eps",
        "restarts",
        "size",
        "metric",
        "max_seconds",
    }
    others = {"name", "seed", "require_optimal", "device", "workers", "explain"}
    fields = set(AssembleConfig.__dataclass_fields__) - others
    assert set(AssembleConfig().options()) == fields - {"purpose"} | {"for"}
