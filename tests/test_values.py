"""What a value has to be, and what is said when it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eightfold.errors import ConfigError, EightfoldError, shortlist
from eightfold.values import (
    COUNT,
    FLAG,
    INTEGER,
    POSITIVE,
    SWITCH,
    TEXT,
    TEXTS,
    WHOLE,
    WORDS,
    Kind,
    checked,
    is_token_ids,
    number,
    number_above,
    optional,
    require,
    shorten,
    shown,
    whole,
)

WHERE = Path("m/config.json")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (COUNT, 1, 1),
        (COUNT, 10**400, 10**400),
        (COUNT._replace(most=10), 10, 10),
        (INTEGER, -3, -3),
        (POSITIVE, 7, 7.0),
        (POSITIVE, 5e-324, 5e-324),
        (POSITIVE, int(sys.float_info.max), sys.float_info.max),
        (FLAG, False, False),
        (TEXT, "", ""),
        (TEXTS, [], ()),
        (TEXTS, ["a", ""], ("a", "")),
    ],
)
def test_what_a_value_becomes(kind, value, expected):
    found = require(kind, value, "key", WHERE)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (COUNT, None, "got nothing, expected a value"),
        (COUNT, 0, "got 0, expected greater than 0"),
        (COUNT, True, "got True, expected a valid integer"),
        (COUNT, 1.0, "got 1.0, expected a valid integer"),
        (COUNT._replace(most=10), 11, "got 11, expected less than or equal to 10"),
        (INTEGER, "1", "got '1', expected a valid integer"),
        (POSITIVE, 0, "got 0, expected greater than 0"),
        (POSITIVE, False, "got False, expected a valid number"),
        (POSITIVE, float("nan"), "got nan, expected a finite number"),
        (POSITIVE, float("-inf"), "got -inf, expected a finite number"),
        (POSITIVE, 10**400, f"got 1{'0' * 56}..., expected a finite number"),
        (COUNT, -(10**58), f"got -1{'0' * 58}, expected greater than 0"),
        (FLAG, 0, "got 0, expected a valid boolean"),
        (TEXT, 3, "got 3, expected a valid string"),
        (TEXTS, "ab", "got 'ab', expected a list of strings"),
        (TEXTS, ["a", 1], "got 1, expected a valid string"),
        (TEXTS, ["a", None], "got nothing, expected a value"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(kind: Kind, value, expected):
    with pytest.raises(ConfigError) as raised:
        require(kind, value, "key", WHERE)
    assert str(raised.value) == f'"key" in m/config.json: {expected}'


def test_of_an_object_those_keys_are_checked_that_it_has():
    assert checked({"a": 1, "other": ()}, {"a": POSITIVE, "b": FLAG}, WHERE) == {"a": 1.0}
    with pytest.raises(ConfigError, match=r'^"b" in m/config.json: got 1, expected a valid boolean$'):
        checked({"a": 1, "b": 1}, {"a": POSITIVE, "b": FLAG}, WHERE)


@pytest.mark.parametrize(
    ("kind", "inside", "outside", "expected"),
    [
        (WHOLE, [0, -5, 10**30], [True, 1.0, "1", None], "a whole number"),
        (whole(1, 3), [1, 3], [0, 4, True, 2.0], "a whole number from 1 to 3"),
        (whole(-1), [-1, 10**18], [-2, 2**63], "a whole number of at least -1"),
        (number(0), [0, 0.5, 1e300], [-1e-9, float("nan"), float("inf"), 10**400, False], "a number of at least 0"),
        (number(-2, 2), [-2, 2.0], [2.1, -3, None], "a number from -2 to 2"),
        (number_above(0, 1), [1e-9, 1], [0, 1.1], "a number above 0 and up to 1"),
        (number_above(0), [5e-324], [0.0, float("nan")], "a number above 0"),
        (SWITCH, [True, False], [0, "true", None], "true or false"),
        (WORDS, ["a"], ["", 5, None], "a text that is not empty"),
        (WORDS, ["\u20ac"], ["\ud800"], "text that UTF-8 can hold"),
        (optional(whole(0)), [None, 0], [-1], "a whole number of at least 0"),
    ],
)
def test_a_range_is_told_whole(kind, inside, outside, expected):
    assert [kind.misfit(value) for value in inside] == [None] * len(inside)
    assert [kind.misfit(value) for value in outside] == [(value, expected) for value in outside]


def test_of_a_list_the_first_item_that_does_not_fit_is_told():
    kind = Kind((list,), "a list", each=whole(0))
    assert kind.misfit([1, -2, True]) == (-2, "a whole number of at least 0")
    assert (kind.misfit((1,)), kind.fits([]), kind.fits([1, 2])) == (((1,), "a list"), True, True)


def test_token_ids():
    assert is_token_ids([0, -1, 10**30])
    assert not any(map(is_token_ids, ([], [True], [1, 2.0], ["1"], (1,), "1", None)))


def test_a_value_of_any_size_is_shown_in_sixty_characters():
    assert (shown("a" * 58), shown("a" * 59)) == (repr("a" * 58), "'" + "a" * 56 + "...")
    assert (shown(10**5000), shorten("abcdef", 5)) == ("a huge int", "ab...")


def test_a_message_shows_at_most_300_characters_of_each_value():
    error = EightfoldError("key " + "k" * 999, where="w" * 999, got=" g" * 99999, expected="e" * 301, action="Do it.")
    shown = [f"{c * 297}..." for c in "kwe"]
    assert str(error) == f"key {shown[0]} in {shown[1]}: got {('g ' * 149)[:297]}..., expected {shown[2]}. Do it."
    assert str(EightfoldError("a", got="g" * 300)) == f"a: got {'g' * 300}"
    assert len(str(EightfoldError("a " * 99999))) == 1500


def test_a_list_of_names_ends_where_a_message_does():
    assert shortlist(["a"] * 9) == "a, a, a, a, a, a, a, a and 1 more"
    assert shortlist(["n" * 100] * 9) == f"{'n' * 100}, {'n' * 100} and 7 more"
    assert len(shortlist(["n" * 9999] * 9)) < 300
