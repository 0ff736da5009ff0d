"""The options of a command: the fields of its dataclass, and of the dataclasses that they fill.

A command is a dataclass whose docstring is its help. A field made by values.setting() is an option, one by argument()
stands without a flag, and one by settings() holds a dict of those fields of another dataclass that were given.

Options take the next word whatever it is, so that a text may begin with a dash; none can be abbreviated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from eightfold.errors import ConfigError, EightfoldError
from eightfold.values import BYTES, PATH, SWITCH, TEXT, Kind, optional, parse_size, setting, shorten

HELP = ("-h", "--help")

_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
_SIZE = "a size such as 2GiB or 500MB"
_FIRST = "The options that matter first"  # heading for those that a command names in FIRST
_LEFT = 28  # columns for the flags in the help
_HUGE = 2**62  # limits beyond are those of the machine, which nobody has to be told


class Command(Protocol):
    """What a command of the program is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def execute(self) -> int | None:
        """Do it; return the exit code, None for 0."""


AnyCommand = TypeVar("AnyCommand", bound=Command)


def argument(metavar: str, help: str, kind: Kind = PATH) -> Any:
    """Return a field for a value, usually a path, that stands without a flag and has to be given."""
    return field(metadata={"kind": kind, "help": help, "metavar": metavar, "is_argument": True})


def model_path(text: str) -> Path:
    """Return the path of a model directory, or the id of a hub in its place; `./ORG/NAME` is only a path."""
    is_path = text.startswith(("./", "../")) and not os.path.lexists(text)
    return Path.cwd() / text if is_path else Path(text)


def model_argument(metavar: str, help: str) -> Any:
    """Return a field for a model, which may be the id of a hub: the command gets the directory, see models_of()."""
    help = f"{help} Or a hub's ORG/NAME[@REVISION], which is fetched."
    return field(metadata={"kind": PATH, "help": help, "metavar": metavar, "is_argument": True, "read": model_path})


def models_of(command: Command) -> dict[str, Path]:
    """Return the models that a command was given, by the names of its fields."""
    found = {each.name: getattr(command, each.name) for each in fields(command) if _is_model(each)}
    return {name: path for name, path in found.items() if path is not None}


def _is_model(field: Field[Any]) -> bool:
    return field.metadata.get("read") is model_path


def as_json(group: str = "") -> Any:
    """Return the field of a command that can print for programs."""
    return setting(False, SWITCH, "Print a JSON document as the last line.", flag="--json", group=group)


def add_bos(group: str = "") -> Any:
    """Return the field for whether BOS stands before a text."""
    help = "Put BOS before a text, or not. Default: as transformers 4 does with this model."
    return setting(None, optional(SWITCH), help, group=group)


def settings(source: type, *names: str, group: str = "", **defaults: Any) -> Any:
    """Return a field for the options that fill some fields of a dataclass: a dict of those that were given.

    Args:
        source: the dataclass.
        names: of its fields, in the order of the help.
        group: heading in the help.
        defaults: that are not the dataclass's, and stand in the dict if nothing else is given; None: the command has
            one of its own.
    """
    return field(metadata={"source": source, "names": names, "group": group, "defaults": defaults})


@dataclass(frozen=True)
class Option:
    """One thing that can be given.

    Attributes:
        name: the field that it fills.
        row: the field's metadata, as values.setting() makes it.
        default: MISSING where it has to be given.
        group: heading in the help.
        section: the command's field whose dict it goes into; empty: it is a field of the command.
    """

    name: str
    row: Mapping[str, Any]
    default: Any
    group: str
    section: str = ""

    @property
    def is_argument(self) -> bool:
        return "is_argument" in self.row

    @property
    def kind(self) -> Kind:
        kind: Kind = self.row["kind"]
        return kind.each or kind

    @property
    def repeats(self) -> bool:
        return self.row["kind"].each is not None

    @property
    def flags(self) -> dict[str, bool | None]:
        """Each spelling, and for a switch what it means. A switch that is not usually off can be turned off too."""
        flag = self.row.get("flag") or f"--{self.name.replace('_', '-')}"
        if bool not in self.kind.types:
            return {flag: None}
        return {flag: True} if self.default is False else {flag: True, f"--no-{flag[2:]}": False}

    @property
    def title(self) -> str:
        """What a message calls it: an argument by its metavar, a switch by what turns it from its default."""
        return str(self.row["metavar"]) if self.is_argument else list(self.flags)[-1]

    @property
    def metavar(self) -> str:
        """What stands for a value; empty for a switch."""
        if bool in self.kind.types:
            return ""
        return self.row.get("metavar") or "|".join(self.kind.choices) or _METAVARS[self.kind.types[-1].__name__]

    def value(self, text: str) -> Any:
        """Return what a text means.

        Raises:
            ConfigError: it is not of the option's kind.
        """
        kind = self.kind
        if kind is TEXT:
            return text  # whatever bytes it is: who uses it says what is wrong
        read = self.row.get("read") or kind.types[-1]
        try:
            found = read(text)
        except (ValueError, OverflowError):
            found = None
        if found is None:
            misfit: tuple[Any, str] | None = text, _SIZE if read is parse_size else kind.name
        else:
            misfit = kind.misfit(found)
        if misfit is not None:
            got = shorten(text) if text.strip() else repr(text)
            raise ConfigError(self.title, got=got, expected=misfit[1])
        return found


def options_of(command: type) -> list[Option]:
    """Return everything that a command can be given, in the order of its help."""
    return list(_options(command))


def _options(command: type) -> Iterator[Option]:
    for each in fields(command):
        row = each.metadata
        if "source" not in row:
            yield Option(each.name, row, each.default, row.get("group", ""))
            continue
        known = {known.name: known for known in fields(row["source"])}
        for name in row["names"]:
            default = row["defaults"].get(name, known[name].default)
            default = None if default is MISSING else default  # may be left out: what is filled asks for it
            yield Option(
                name, known[name].metadata, default, known[name].metadata.get("group") or row["group"], each.name
            )


def flags_of(command: type) -> dict[str, str]:
    """Return the flag of each parameter, by the parameter's `name` in backticks; by the bare one what turns it over."""
    flags = {}
    for option in _options(command):
        if not option.is_argument:
            flags[f"`{option.name}`"], flags[option.name] = next(iter(option.flags)), option.title
    return flags


def in_flags(message: EightfoldError | str, flags: Mapping[str, str]) -> str:
    """Return a message of the library, which names `parameters`, with flags in their places.

    Args:
        message: names stand in backticks; of a ConfigError the first words may be one without.
        flags: what each parameter is called on the command line, as flags_of() tells.
    """
    text = re.sub(r"`\w+`", lambda match: flags.get(match[0], match[0]), str(message))
    what, colon, rest = text.partition(": ")
    return flags[what] + colon + rest if isinstance(message, ConfigError) and what in flags else text


def parse(command: type[AnyCommand], words: Sequence[str], program: str) -> AnyCommand | None:
    """Return the command that the words ask for, or None if they ask for help.

    Args:
        command: its dataclass.
        words: behind the command's name.
        program: what the user has typed before them.

    Raises:
        ConfigError: an option is unknown, has no value or one that makes no sense; an argument is missing.
    """
    given = _Given(options_of(command))
    with usage_of(program):
        return None if given.take(words) else command(**given.values(command))


@contextmanager
def usage_of(program: str) -> Iterator[None]:
    """Say where the help is when words make no sense."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}. Try: {program} --help") from None


class _Given:
    """What the words say."""

    def __init__(self, options: list[Option]) -> None:
        self._options = options
        self._by_flag = {
            flag: (option, meaning)
            for option in options
            if not option.is_argument
            for flag, meaning in option.flags.items()
        }
        self._missing = [option for option in options if option.is_argument]
        self._found: dict[str, Any] = {}

    def take(self, words: Sequence[str]) -> bool:
        """Take all words; return whether help is asked for."""
        waiting, ended = iter(words), False
        for word in waiting:
            if word == "--" and not ended:
                ended = True
            elif ended or not word.startswith("-") or word == "-":
                self._take_argument(word)
            elif word in HELP:
                return True
            else:
                self._take_option(word, waiting)
        return False

    def _take_argument(self, word: str) -> None:
        if not self._missing:
            arguments = " ".join(option.title for option in self._options if option.is_argument)
            raise ConfigError("argument", got=shorten(word), expected=f"only {arguments}" if arguments else "none")
        option = self._missing.pop(0)
        self._found[option.name] = option.value(word)

    def _take_option(self, word: str, waiting: Iterator[str]) -> None:
        flag, equals, text = word.partition("=")
        if flag not in self._by_flag:
            raise unknown("option", flag, self._by_flag)
        option, meaning = self._by_flag[flag]
        if meaning is not None:
            if equals:
                raise ConfigError(flag, got=f"the value {shorten(text)}", expected="none")
            self._found[option.name] = meaning
            return
        value = text if equals else next(waiting, None)
        if value is None:
            raise ConfigError(flag, got="no value", expected=option.metavar)
        found = option.value(value)
        self._found[option.name] = (*self._found.get(option.name, ()), found) if option.repeats else found

    def values(self, command: type) -> dict[str, Any]:
        """Return the command's fields.

        Raises:
            ConfigError: what has to be given was not.
        """
        values: dict[str, Any] = {
            each.name: {name: value for name, value in each.metadata["defaults"].items() if value is not None}
            for each in fields(command)
            if "source" in each.metadata
        }
        for option in self._options:
            if option.name in self._found:
                into = values[option.section] if option.section else values
                into[option.name] = self._found[option.name]
            elif option.default is MISSING:
                raise ConfigError(option.title, got="none", expected=option.kind.name)
        return values


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not known, with the one that was probably meant."""
    import difflib

    near = difflib.get_close_matches(name, list(known), 1)
    return ConfigError(what, got=shorten(name), expected=near[0] if near else "a known one")


def help_text(command: type, program: str) -> str:
    """Return the help of a command: what it does, what it takes by groups, and what else there is to know."""
    from inspect import cleandoc

    options = options_of(command)
    usage = " ".join([f"Usage: {program} [OPTIONS]", *(option.title for option in options if option.is_argument)])
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    intro = 1 + next((n for n, text in enumerate(paragraphs) if text.startswith("Example:")), 0)
    first = getattr(command, "FIRST", ())
    groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], _FIRST: []}
    for option in options:
        heading = _FIRST if option.name in first else option.group or "Options"
        heading = "Arguments" if option.is_argument else heading
        groups.setdefault(heading, []).append((_left(option), _right(option)))
    groups["Options"] = [*groups.pop("Options", []), (", ".join(HELP), "Show this help and exit.")]
    lists = [listing(heading, rows) for heading, rows in groups.items() if rows]
    return "\n\n".join([usage, *map(filled, paragraphs[:intro]), *lists, *map(filled, paragraphs[intro:])])


def listing(heading: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return names and what they are, in two columns below a heading."""
    import textwrap

    lines = [f"{heading}:"]
    for left, right in rows:
        texts = textwrap.wrap(right, _width() - _LEFT - 2, break_on_hyphens=False)
        if len(left) >= _LEFT:
            lines.append(f"  {left}")
            left = ""
        lines += [f"  {left if number == 0 else '':{_LEFT}}{text}" for number, text in enumerate(texts)]
    return "\n".join(lines)


def filled(paragraph: str) -> str:
    """Return a paragraph as wide as the terminal, and no wider than is easy to read."""
    import textwrap

    return textwrap.fill(paragraph, _width(), break_on_hyphens=False, break_long_words=False)


def _width() -> int:
    from shutil import get_terminal_size

    return max(60, min(get_terminal_size().columns, 100))


def _left(option: Option) -> str:
    if option.is_argument:
        return option.title
    return f"{', '.join(option.flags)} {option.metavar}".rstrip()


def _right(option: Option) -> str:
    facts = [
        "" if option.row.get("read") else _limits(option.kind),
        "may be repeated" if option.repeats else "",
        _default(option),
    ]
    shown = "; ".join(filter(None, facts))
    return f"{option.row['help']} [{shown}]" if shown else str(option.row["help"])


def _limits(kind: Kind) -> str:
    least = None if kind.least is None or kind.least < -_HUGE else f"{kind.least:g}"
    most = None if kind.most is None or kind.most > _HUGE else f"{kind.most:g}"
    if kind is BYTES or int not in kind.types:
        return ""
    if kind.above is not None:
        return f"above {kind.above:g}" + (f", up to {most}" if most else "")
    if least and most:
        return f"{least} to {most}"
    return f"{least} or more" if least else f"up to {most}" if most else ""


def _default(option: Option) -> str:
    if option.default is MISSING:
        return "" if option.is_argument else "required"
    if option.default is True:
        return "default: on"
    default = option.default.value if isinstance(option.default, Enum) else option.default
    if default is None or default is False or option.repeats or not option.kind.fits(default):
        return ""
    return f"default: {default:g}" if isinstance(default, float) else f"default: {default}"
