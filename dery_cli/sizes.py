"""Sizes and names as people write them: ``30M``, ``5G``, ``8ms``; read, shown and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from dery_cli.errors import UsageError
from dery_cli.types import is_name

_SUFFIXES = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgGbBtT]?)\s*")
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(us|ms|s)\s*")
_TIME_UNITS = {"us": 3, "ms": 6, "s": 9}

LARGEST = 2**31 - 1
"""More than any option has a use for; beyond it arithmetic and allocations would fail."""


MOST_SAMPLES, FEW_SAMPLES = 2048, 512
"""Images where nothing else is asked for: on a GPU, and on a CPU from ``LARGE`` pixels on."""
LARGE = 128


def parse_size(text: str, option: str) -> int:
    """``30M`` -> 30,000,000.

    Raises:
        UsageError: Not a positive number with one of the suffixes, or not a whole count.
    """
    match = _SIZE.fullmatch(text)
    accepted = "a positive number with k, M, G, B or T, such as 30M, 5G, 800k or 1.5B"
    if match is None:
        raise UsageError(f"{option}: '{text}' is not a size", f"accepted is {accepted}")
    value = Decimal(match[1]).scaleb(_SUFFIXES[match[2].lower()])
    if value != value.to_integral_value() or value <= 0:
        raise UsageError(
            f"{option}: '{text}' is not a positive whole count", f"accepted is {accepted}"
        )
    return int(value)


def parse_time(text: str, option: str) -> int:
    """``8ms`` -> 8,000,000 nanoseconds.

    Raises:
        UsageError: Not a positive number with a unit, or not whole nanoseconds.
    """
    match = _TIME.fullmatch(text)
    accepted = "accepted is a positive number with us, ms or s, such as 8ms, 800us or 0.5s"
    if match is None:
        raise UsageError(f"{option}: '{text}' is not a time", accepted)
    value = Decimal(match[1]).scaleb(_TIME_UNITS[match[2]])
    if value != value.to_integral_value() or value <= 0:
        raise UsageError(f"{option}: '{text}' is not a positive time in whole ns", accepted)
    return int(value)


def within(total: int, minimum: int | None, maximum: int | None) -> bool:
    """Whether a total keeps both limits, to the unit; None where there is none."""
    return (minimum is None or total >= minimum) and (maximum is None or total <= maximum)


def show_time(nanoseconds: float) -> str:
    """A time in milliseconds, as reports write it: 8_123_456 -> ``8.123 ms``."""
    return f"{nanoseconds / 1e6:,.3f} ms"


def show_duration(seconds: float) -> str:
    """A time to wait: 3723 -> ``1:02:03``, 123 -> ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_count(value: float) -> str:
    """A count as people write it: 24_890_000 -> ``24.89M``."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{suffix}"
    return f"{value:.0f}"


def show_shape(sides: Iterable[int]) -> str:
    """A tensor's shape or an image's sides: (3, 224, 224) -> ``3x224x224``."""
    return "x".join(str(side) for side in sides)


def show_range(values: Sequence[float]) -> str | None:
    """From the first value to the last: [4, 8, 32] -> ``4..32``; None without any."""
    if not values:
        return None
    first, last = f"{values[0]:g}", f"{values[-1]:g}"
    return first if first == last else f"{first}..{last}"


def show_decimals(value: float | None, digits: int = 4) -> str | None:
    """A share, score or loss: 0.87654 -> ``0.8765``; None, which tables show as a dash, stays."""
    return None if value is None else f"{value:.{digits}f}"


def some_of(names: Sequence[str], shown: int = 4) -> str:
    """The first few of many names: ``a, b, c, d and 12 more``."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def check_name(name: str, what: str) -> str:
    """A name for a donor, an assembly or a run: ``[a-z0-9._-]``, not starting with a dot or dash.

    Raises:
        UsageError: Another character.
    """
    if not is_name(name):
        raise UsageError(
            f"bad {what} name: '{name}'",
            "use lower-case letters, digits, '.', '_', '-', at most 200 of them",
        )
    return name


def check_at_least(option: str, value: float, minimum: float = 1) -> None:
    """Refuse an option's value below ``minimum``, not finite, or above ``LARGEST``.

    Raises:
        UsageError: It is.
    """
    _check_limits(option, value, value >= minimum, f"at least {_show(minimum)}", LARGEST)


def check_above(option: str, value: float, bound: float = 0) -> None:
    """Refuse an option's value that is not above ``bound``, not finite, or above ``LARGEST``.

    Raises:
        UsageError: It is.
    """
    _check_limits(option, value, value > bound, f"above {_show(bound)}", LARGEST)


def check_between(
    option: str, value: float, low: float, high: float, *, below: bool = False
) -> None:
    """Refuse an option's value outside of ``low`` to ``high``, or not finite.

    Args:
        option: What the user calls it.
        value: Of the option.
        low: Smallest value.
        high: Largest value.
        below: ``high`` itself is refused too.

    Raises:
        UsageError: It is.
    """
    inside = low <= value < high if below else low <= value <= high
    upper = f"below {_show(high)}" if below else f"at most {_show(high)}"
    _check_limits(option, value, inside, f"at least {_show(low)} and {upper}", high)


def check_seed(seed: int, option: str = "--seed") -> None:
    """Refuse a seed that Python, numpy or torch would not take.

    Raises:
        UsageError: It is negative, or of 64 bits and more.
    """
    check_between(option, seed, 0, 2**63 - 1)


def _check_limits(option: str, value: float, inside: bool, limits: str, most: float) -> None:
    if not math.isfinite(value):
        raise UsageError(f"{option} is {value}; it must be a number, {limits}")
    if not inside:
        raise UsageError(f"{option} is {value}; it must be {limits}")
    if value > most:
        raise UsageError(f"{option} is {value}; it must be at most {_show(most)}")


def _show(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def check_one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option's value that is none of ``choices``.

    Raises:
        UsageError: It is none; the message lists them.
    """
    if value not in choices:
        raise UsageError(f"{option} is '{value}'", f"choose from {', '.join(choices)}")


LIMITS = (
    "--max-params",
    "--min-params",
    "--max-flops",
    "--min-flops",
    "--max-latency",
    "--max-memory",
)
"""Options of a budget; each may list several values, ``10M,30M``."""


def split_limits(given: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Budgets as they are written, ``10M,30M`` for several, by what tells them apart.

    Where one limit lists several, there is a budget for each; where more than one does, they go in
    step. The key is empty where there is one budget only.

    Raises:
        UsageError: The lists differ in length, or a budget is listed twice.
    """
    words = {option: text.split(",") for option, text in given.items()}
    lists = {option: parts for option, parts in words.items() if len(parts) > 1}
    counts = {len(parts) for parts in lists.values()}
    if len(counts) > 1:
        told = ", ".join(f"{option} {len(parts)}" for option, parts in lists.items())
        raise UsageError(
            f"the budgets differ in number: {told}", "list as many for each, or one for all"
        )
    found: dict[str, dict[str, str]] = {}
    for place in range(counts.pop() if counts else 1):
        chosen = {o: parts[place if len(parts) > 1 else 0].strip() for o, parts in words.items()}
        key = "-".join(chosen[option].lower() for option in lists)
        if key in found:
            raise UsageError(f"the budget {key} is listed twice", "leave one out")
        found[key] = chosen
    return found


def budget_name(name: str, key: str) -> str:
    """What the assembly of one of several budgets is called."""
    return f"{name}-{key}" if key else name
