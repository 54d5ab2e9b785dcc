"""Checks of plain data: each says in one line what is wrong where."""

from __future__ import annotations

import math

import pytest

from dery_cli.io.schema import (
    MAX_DEPTH,
    SchemaError,
    any_text,
    boolean,
    both,
    fields,
    file_name,
    integer,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    plain,
    plain_name,
    row,
    sha256,
)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (any_text, ["", "x"], [None, 1, ["x"]]),
        (boolean, [True, False], [0, 1, None, "true"]),
        (plain_name, ["a", "a.b_c-1"], ["", "../a", "/a", "A", ".a", 1, None]),
        (file_name, ["a.json", "A"], ["", "..", "a/b", "/a", ".a", 1, None]),
        (sha256, ["0" * 64], ["0" * 63, "G" * 64, 0, None]),
        (integer(), [0, -1, 2**63 - 1], [1.0, True, None, "1", 2**63, 10**400]),
        (integer(1, 3), [1, 2, 3], [0, 4]),
        (number(), [0, -1, 1.5], [True, None, "1", math.nan, math.inf, 10**400]),
        (number(0, 1), [0, 0.5, 1], [-0.1, 1.1]),
        (one_of("a", "b"), ["a", "b"], ["c", None, 1, ["a"]]),
        (optional(integer()), [None, 1], ["1"]),
        (both(any_text, one_of("a")), ["a"], ["b", 1]),
        (list_of(integer()), [[], [1, 2]], [None, {}, ["1"], "12"]),
        (list_of(integer(), least=1), [[1]], [[]]),
        (row(integer(), any_text), [[1, "a"]], [[1], [1, "a", 2], ["a", 1], {}]),
        (mapping(integer(), key=plain_name), [{}, {"a": 1}], [{"A": 1}, {"a": "1"}, []]),
        (fields({"a": integer()}, {"b": boolean}), [{"a": 1}, {"a": 1, "b": True}], [{}, {"b": 1}]),
        (fields({"a": integer()}), [{"a": 1}], [{"a": 1, "c": 2}, [], None]),
        (fields({"a": integer()}, more=plain), [{"a": 1, "c": [2]}], [{"a": 1, "c": math.nan}]),
        (plain, [None, {"a": [1, 1.5, "x", True]}], [math.nan, [math.inf], {"a": -math.inf}]),
    ],
)
def test_what_passes_and_what_does_not(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(SchemaError) as caught:
            check(value)
        assert "\n" not in str(caught.value)


def test_the_place_is_named_from_outside_in():
    check = fields({"donors": list_of(fields({"nodes": mapping(row(integer(0)))}))})
    with pytest.raises(SchemaError) as caught:
        check({"donors": [{"nodes": {}}, {"nodes": {"a b": [-5]}}]})
    assert str(caught.value) == ("donors[1].nodes['a b'][0] is -5, not a whole number from 0")
    with pytest.raises(SchemaError) as caught:
        check({"donors": [{}]})
    assert str(caught.value) == "donors[0] has no field 'nodes'"
    with pytest.raises(SchemaError) as caught:
        check([])
    assert str(caught.value) == "it is a list of 0, not an object"


def test_nesting_is_bounded():
    value: object = 1
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    plain(value)
    with pytest.raises(SchemaError, match="nested too deeply"):
        plain([value])


def test_what_is_shown_of_a_value_is_short_and_sends_nothing_to_a_terminal():
    for value in ("\x1b[31m" * 1000, 10**4000, {"a": "b" * 1000}, {"\x1b[2J" * 90: 1}):
        with pytest.raises(SchemaError) as caught:
            fields({}, more=boolean)(value if isinstance(value, dict) else {"a": value})
        assert len(str(caught.value)) < 200
        assert "\x1b" not in str(caught.value)
