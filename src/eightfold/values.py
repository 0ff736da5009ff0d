"""What the values of a settings file have to be, checked strictly: a layer count of `true` is damage, not one layer.

pydantic does this and more, but importing it takes longer than everything else that an answer needs of this package.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.errors import ConfigError

_MOST_SHOWN = 60  # characters of a value in a message


class Kind(NamedTuple):
    """What a value has to be.

    Attributes:
        types: of Python; a bool is no number.
        name: of these types, in messages.
        above: a number is greater than this.
        most: and at most this.
    """

    types: tuple[Any, ...]
    name: str
    above: float | None = None
    most: float | None = None

    def problem(self, value: Any) -> str | None:
        """Return what a value should have been; None where it is that."""
        is_bool = isinstance(value, bool) and bool not in self.types
        if is_bool or not isinstance(value, self.types):
            return self.name
        if float in self.types and not abs(value) <= sys.float_info.max:
            return "a finite number"
        if self.above is not None and value <= self.above:
            return f"greater than {self.above:g}"
        if self.most is not None and value > self.most:
            return f"less than or equal to {self.most:g}"
        return None


COUNT = Kind((int,), "a valid integer", above=0)
INTEGER = Kind((int,), "a valid integer")
POSITIVE = Kind((int, float), "a valid number", above=0)
FLAG = Kind((bool,), "a valid boolean")
TEXT = Kind((str,), "a valid string")
TEXTS = Kind((list, tuple), "a list of strings")


def require(kind: Kind, value: Any, name: str, where: Path) -> Any:
    """Return a value that is of its kind: numbers that may have a fraction as float, lists of texts as tuples.

    Args:
        kind: that it has to be of.
        value: None for one that is absent.
        name: by which the file knows it.
        where: the file.

    Raises:
        ConfigError: it is not of this kind.
    """
    if kind is TEXTS and isinstance(value, TEXTS.types):
        return tuple(require(TEXT, text, name, where) for text in value)
    problem = "a value" if value is None else kind.problem(value)
    if problem is not None:
        got = "nothing" if value is None else repr(value)
        shown = got if len(got) <= _MOST_SHOWN else f"{got[: _MOST_SHOWN - 3]}..."
        raise ConfigError(f'"{name}"', where=where, got=shown, expected=problem)
    return float(value) if float in kind.types else value


def checked(raw: Mapping[str, Any], kinds: Mapping[str, Kind], where: Path) -> dict[str, Any]:
    """Return the values of those keys that a file has, each of its kind.

    Raises:
        ConfigError: one is not of its kind.
    """
    return {name: require(kind, raw[name], name, where) for name, kind in kinds.items() if name in raw}
