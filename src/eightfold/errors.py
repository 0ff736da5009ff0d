"""The closed tree of errors a user can meet.

Every message is one line of the form

    <what> in <where>: got <x>, expected <y>. <what to do next>

in which only the first part is always there. The command line prints it on stderr and exits with 2. Of a value, which
may be a whole file, it shows at most MOST_OF_A_VALUE characters.
"""

from __future__ import annotations

import re
from typing import Any

MOST_OF_A_VALUE = 300
_MOST_OF_A_MESSAGE = 1500  # which can be the first part of another one


def brief(value: Any, most: int = MOST_OF_A_VALUE) -> str:
    """Render a value on one line, cut where it has more than so many characters."""
    text = str(value)
    text = " ".join((text if len(text) <= 16 * most else text[: 16 * most]).split())
    return text if len(text) <= most else text[: most - 3] + "..."


class EightfoldError(Exception):
    """Something outside the program is not as it must be: a file, an option, the machine."""

    def __init__(
        self, what: str, *, where: Any = None, got: Any = None, expected: Any = None, action: str = ""
    ) -> None:
        text = clipped(what) if where is None else f"{clipped(what)} in {brief(where)}"
        facts = [f"{word} {brief(fact)}" for word, fact in (("got", got), ("expected", expected)) if fact is not None]
        if facts:
            text += ": " + ", ".join(facts)
        if action:
            text += f". {clipped(action)}"
        super().__init__(" ".join(text.split()))


def clipped(text: str) -> str:
    """Render a text of ours with names in it: the names are cut, the text only where it would flood the terminal."""
    return brief(re.sub(rf"\S{{{MOST_OF_A_VALUE + 1},}}", lambda name: brief(name[0]), text), _MOST_OF_A_MESSAGE)


class CheckpointError(EightfoldError):
    """A model directory is missing, damaged, or not what its own files say."""


class ConfigError(EightfoldError):
    """A config.json, a recipe or an option has a value that makes no sense."""


class UnsupportedError(EightfoldError):
    """The input is sound, but this program does not know it: architecture, scheme, dtype."""


class CapacityError(EightfoldError):
    """A request does not fit the model's context or the machine."""


class BusyError(CapacityError):
    """A request does not fit beside those that are answered now; later it may."""


class InputError(EightfoldError):
    """A text or calibration file given by the user cannot be used."""


class OutputError(EightfoldError):
    """The output directory cannot be written as asked."""


class DependencyError(EightfoldError):
    """An optional package is needed for this command."""


class PeerError(EightfoldError):
    """Another process that takes part in the work has ended or cannot be reached."""


def remember_kept(error: BaseException, text: str) -> None:
    """Note on an error what work it has left intact, in a sentence that also says how to go on."""
    error.__dict__["kept"] = text


def kept_work(error: BaseException) -> str | None:
    """Return what remember_kept() has noted."""
    return error.__dict__.get("kept")


def plural(count: int, noun: str) -> str:
    """Render a number with its noun and verb: `1 tensor is`, `3 tensors are`."""
    return f"1 {noun} is" if count == 1 else f"{count} {noun}s are"


def one_of(names: Any) -> str:
    """Render known names for an error message: `a, b or c`."""
    items = [str(name) for name in names]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " or " + items[-1]


def shortlist(names: Any, limit: int = 8) -> str:
    """Render many names without flooding the terminal: the first few, as far as they fit, and how many more."""
    items = [brief(name, 120) for name in names]
    shown = next((n for n in range(min(limit, len(items)), 1, -1) if len(", ".join(items[:n])) < 270), 1)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
