"""What a value from a file, a request or an option has to be: a layer count of `true` is damage, not one layer."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from eightfold.errors import ConfigError, one_of

MOST_SHOWN = 60  # characters of a value in a message
MAX_INT = 2**63 - 1


class Kind(NamedTuple):
    """What a value has to be.

    Attributes:
        types: Python's types; a bool is a number only where bool is named.
        name: what is expected, as a message says it.
        above: numbers are greater than this.
        least: and at least this; texts have at least so many characters.
        most: numbers are at most this.
        outside: what is expected where a number is out of its range; empty: the limit that it exceeds.
        each: what the items of a list have to be.
        is_optional: whether None fits too.
        choices: a text is one of these; empty: any.
    """

    types: tuple[Any, ...]
    name: str
    above: float | None = None
    least: float | None = None
    most: float | None = None
    outside: str = ""
    each: Kind | None = None
    is_optional: bool = False
    choices: tuple[str, ...] = ()

    def misfit(self, value: Any) -> tuple[Any, str] | None:
        """Return what does not fit, the value or an item of it, and what was expected; None where all fits."""
        if value is None and self.is_optional:
            return None
        is_bool = isinstance(value, bool) and bool not in self.types
        if is_bool or not isinstance(value, self.types):
            return value, self.name
        if self.each is not None:
            return next(filter(None, map(self.each.misfit, value)), None)
        expected = self._missed(value)
        return None if expected is None else (value, expected)

    def fits(self, value: Any) -> bool:
        return self.misfit(value) is None

    def _missed(self, value: Any) -> str | None:
        if self.choices:
            return None if value in self.choices else self.name
        if isinstance(value, str):
            if len(value) < (self.least or 0):
                return self.name
            is_half = re.search("[\ud800-\udfff]", value)  # of a surrogate pair, which JSON can hold
            return "text that UTF-8 can hold" if is_half else None
        if float in self.types and not abs(value) <= sys.float_info.max:
            return self.outside or "a finite number"
        if self.above is not None and value <= self.above:
            return self.outside or f"greater than {self.above:g}"
        if self.least is not None and value < self.least:
            return self.outside or f"greater than or equal to {self.least:g}"
        if self.most is not None and value > self.most:
            return self.outside or f"less than or equal to {self.most:g}"
        return None


def whole(least: int, most: int = MAX_INT) -> Kind:
    """Return the kind of whole numbers in [least, most]."""
    name = f"a whole number of at least {least}" if most == MAX_INT else f"a whole number from {least} to {most}"
    return Kind((int,), name, least=least, most=most, outside=name)


def number(least: float, most: float = math.inf) -> Kind:
    """Return the kind of finite numbers in [least, most]."""
    name = f"a number of at least {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
    return Kind((int, float), name, least=least, most=most, outside=name)


def number_above(above: float, most: float = math.inf) -> Kind:
    """Return the kind of finite numbers in (above, most]."""
    name = f"a number above {above:g}" + ("" if most == math.inf else f" and up to {most:g}")
    return Kind((int, float), name, above=above, most=most, outside=name)


def optional(kind: Kind) -> Kind:
    """Return a kind that None fits too."""
    return kind._replace(is_optional=True)


def choice(*names: str) -> Kind:
    """Return the kind of texts that are one of these."""
    return Kind((str,), one_of(names), choices=names)


# In the words of our own formats and of requests.
WHOLE = Kind((int,), "a whole number")
SWITCH = Kind((bool,), "true or false")
STRING = Kind((str,), "a text")
LIST = Kind((list,), "a list")
OBJECT = Kind((dict,), "an object")
WORDS = Kind((str,), "a text that is not empty", least=1)

# In the words that config.json's readers know from pydantic.
COUNT = Kind((int,), "a valid integer", above=0)
INTEGER = Kind((int,), "a valid integer")
POSITIVE = Kind((int, float), "a valid number", above=0)
FLAG = Kind((bool,), "a valid boolean")
TEXT = Kind((str,), "a valid string")
TEXTS = Kind((list, tuple), "a list of strings", each=TEXT)
INTEGERS = Kind((list, tuple), "a list of integers", each=INTEGER)

# In the words of the command line.
PATH = Kind((Path,), "a path")
BYTES = Kind((int,), "a whole number of bytes", least=1, outside="at least 1 byte")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    flag: str = "",
    metavar: str = "",
    group: str = "",
    read: Callable[[str], Any] | None = None,
) -> Any:
    """Return a dataclass field from which an option of the command line can be made.

    Args:
        default: of the field; MISSING where it has to be given.
        kind: what the value has to be.
        help: one or two sentences.
        flag: the option's name, if it is not the field's with dashes.
        metavar: what stands for the value in the help.
        group: heading in the help.
        read: text -> value, or None where the text is none; empty: by the kind.
    """
    known = {"kind": kind, "help": help, "flag": flag, "metavar": metavar, "group": group, "read": read}
    return field(metadata=known) if default is MISSING else field(default=default, metadata=known)


def parse_size(text: str) -> int | None:
    """Return how many bytes a size such as 2GiB, 500M or 1000000 is; None if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    return None if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])


def mib(nbytes: int, digits: int = 0) -> str:
    """Render a size for a message in MiB, or in bytes where that would be nothing."""
    return f"{nbytes / 2**20:.{digits}f} MiB" if nbytes >= 2**20 else f"{nbytes:,} bytes"


def size_text(nbytes: int) -> str:
    """Return a size in the unit a person would choose, powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"


def is_token_ids(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a list of whole numbers, and not empty; a million of them take no time."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def shown(value: Any) -> str:
    """Render a value of any size and type for a message."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # an int of thousands of digits
        return f"a huge {type(value).__name__}"


def shown_as_json(value: Any) -> str:
    """Render a value of any size for a message, as JSON has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(shorten(value))
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**20 else shorten(str(value))


def shorten(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text, cut where it has more than so many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def require(kind: Kind, value: Any, name: str, where: Path) -> Any:
    """Return a value of a settings file: numbers that may have a fraction as float, lists of texts as tuples.

    Args:
        kind: what it has to be.
        value: what the file says; None where it says nothing.
        name: the key in the file.
        where: the file.

    Raises:
        ConfigError: it is not of this kind.
    """
    if value is None and kind.is_optional:
        return None
    misfit = (None, "a value") if value is None else kind.misfit(value)
    if misfit is not None:
        got, expected = ("nothing", "a value") if misfit[0] is None else (shown(misfit[0]), misfit[1])
        raise ConfigError(f'"{name}"', where=where, got=got, expected=expected)
    if kind.each is not None:
        return tuple(value)
    return float(value) if float in kind.types else value


def checked(raw: Mapping[str, Any], kinds: Mapping[str, Kind], where: Path) -> dict[str, Any]:
    """Return the values of those keys that a file has, each of its kind.

    Raises:
        ConfigError: one is not of its kind.
    """
    return {name: require(kind, raw[name], name, where) for name, kind in kinds.items() if name in raw}
