"""What may stand in a JSON file, as checks that are put together and say what is wrong where.

A check takes a value, and raises ``SchemaError`` or returns nothing:

    donor = fields({"name": plain_name, "nodes": list_of(integer(0), least=2)})
    donor({"name": "a", "nodes": [1, "b"]})  # .nodes[1] is 'b', not a whole number from 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dery_cli.types import is_file_name, is_name

Check = Callable[[Any], None]

MAX_DEPTH = 32
"""Records nest less deeply by far; what nests more is no record."""
_INT64 = 1 << 63
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SchemaError(ValueError):
    """A value is not what its place asks for; as text it is one line.

    Args:
        problem: What is wrong, as the rest of a sentence that begins with the place.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.place = ""

    def below(self, step: str) -> SchemaError:
        """The same error, met one step further in."""
        self.place = step + self.place
        return self

    def __str__(self) -> str:
        return f"{self.place.removeprefix('.') or 'it'} {self.problem}"


def refused(value: Any, wanted: str) -> SchemaError:
    """The error for a value that is not ``wanted``."""
    return SchemaError(f"is {_shown(value)}, not {wanted}")


def any_text(value: Any) -> None:
    """A text."""
    if not isinstance(value, str):
        raise refused(value, "a text")


def boolean(value: Any) -> None:
    """``true`` or ``false``."""
    if not isinstance(value, bool):
        raise refused(value, "true or false")


def plain_name(value: Any) -> None:
    """What may name a donor, an assembly or a run."""
    if not is_name(value):
        raise refused(value, "a plain name")


def file_name(value: Any) -> None:
    """What may name a file beside a record: never a path."""
    if not is_file_name(value):
        raise refused(value, "the name of a file beside the record")


def sha256(value: Any) -> None:
    """A SHA-256 in hexadecimal."""
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise refused(value, "a sha256")


def integer(low: int = -_INT64, high: int = _INT64 - 1) -> Check:
    """A whole number within both limits."""
    wanted = f"a whole number{_limits(low, -_INT64, high, _INT64 - 1)}"

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refused(value, wanted)

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number within both limits."""
    wanted = f"a finite number{_limits(low, -math.inf, high, math.inf)}"

    def check(value: Any) -> None:
        if not _is_number(value) or not low <= value <= high:
            raise refused(value, wanted)

    return check


def one_of(*choices: str) -> Check:
    """One of a few texts."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise refused(value, f"one of {', '.join(choices)}")

    return check


def optional(inner: Check) -> Check:
    """``null``, or what ``inner`` asks for."""

    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def both(*checks: Check) -> Check:
    """What all of the checks let pass, asked in order."""

    def check(value: Any) -> None:
        for inner in checks:
            inner(value)

    return check


def list_of(inner: Check, least: int = 0) -> Check:
    """A list of ``least`` or more entries, each of which ``inner`` lets pass."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise refused(value, f"a list of at least {least}" if least else "a list")
        for place, item in enumerate(value):
            try:
                inner(item)
            except SchemaError as error:
                raise error.below(f"[{place}]") from None

    return check


def row(*checks: Check) -> Check:
    """A list with one entry for each check."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise refused(value, f"a list of {len(checks)}")
        for place, (item, inner) in enumerate(zip(value, checks, strict=True)):
            try:
                inner(item)
            except SchemaError as error:
                raise error.below(f"[{place}]") from None

    return check


def mapping(inner: Check, key: Check = any_text) -> Check:
    """An object whose names ``key`` and whose values ``inner`` lets pass."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise refused(value, "an object")
        for entry, item in value.items():
            try:
                key(entry)
                inner(item)
            except SchemaError as error:
                raise error.below(_step(entry)) from None

    return check


def fields(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] = MappingProxyType({}),
    *,
    more: Check | None = None,
) -> Check:
    """An object with these fields.

    Args:
        required: Fields that must be there.
        optional: Fields that may.
        more: What any other field must be; None allows no other.
    """
    known = {**required, **optional}

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise refused(value, "an object")
        for entry in required:
            if entry not in value:
                raise SchemaError(f"has no field '{entry}'")
        for entry, item in value.items():
            inner = known.get(entry, more)
            if inner is None:
                raise SchemaError(f"has a field {_shown(entry)}, which it must not have")
            try:
                inner(item)
            except SchemaError as error:
                raise error.below(_step(entry)) from None

    return check


def plain(value: Any) -> None:
    """Anything that JSON has, finite and not nested beyond ``MAX_DEPTH``."""
    _plain(value, MAX_DEPTH)


def _plain(value: Any, depth: int) -> None:
    if depth == 0:
        raise SchemaError("is nested too deeply")
    if isinstance(value, dict):
        for entry, item in value.items():
            try:
                _plain(item, depth - 1)
            except SchemaError as error:
                raise error.below(_step(entry)) from None
    elif isinstance(value, list):
        for item in value:
            _plain(item, depth - 1)
    elif not (value is None or isinstance(value, bool | str) or _is_number(value)):
        raise refused(value, "what a record may hold")


plain_object = fields({}, more=plain)
"""An object of anything."""


def _limits(low: float, lowest: float, high: float, highest: float) -> str:
    """The limits in words, where there are any."""
    words = "" if low == lowest else f" from {low}"
    return words if high == highest else f"{words} to {high}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 1023


def _step(entry: str) -> str:
    simple = entry.isidentifier() and entry.isascii() and len(entry) <= 40
    return f".{entry}" if simple else f"[{_shown(entry)}]"


def _shown(value: Any) -> str:
    """A value in a few words that no terminal takes for anything else."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= _INT64:
        return "a number beyond 64 bits"
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
