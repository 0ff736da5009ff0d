"""What a value has to be, and what is said when it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eightfold.errors import ConfigError
from eightfold.values import COUNT, FLAG, INTEGER, POSITIVE, TEXT, TEXTS, Kind, checked, require

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
