"""A file of requests in whatever form: how its lines are read, and what the run does with the requests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from eightfold.cli import console
from eightfold.cli.batch_output import LineForm
from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import InputError
from eightfold.files import open_given, parse_value
from eightfold.values import shorten

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.outputs import RequestOutput

STANDARD = Path("-")  # standard input or output


@dataclass(frozen=True)
class Started:
    """A request whose prompts are tokens.

    Attributes:
        prompts: token ids of each.
        params: how tokens are chosen.
        write: the finished outputs of all prompts -> the line of the answer.
        cache_salt: only requests with the same one share keys and values of prompts.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    write: Callable[[Sequence[RequestOutput]], Mapping[str, Any]]
    cache_salt: str = ""


class Batch(Protocol):
    """All requests of a file; they are called by their index.

    Attributes:
        form: of the lines of answers.
        refusals: the errors by which a request is refused, and the run goes on.
        needs_template: whether there are chats.
    """

    refusals: tuple[type[Exception], ...]

    @property
    def form(self) -> LineForm: ...

    @property
    def needs_template(self) -> bool: ...

    def __len__(self) -> int: ...

    def add(self, fields: dict[str, Any], number: int) -> None:
        """Add the request of a line.

        Raises:
            LineError, EightfoldError: it is none.
        """

    def fingerprint(self, index: int) -> str:
        """Return 16 hexadecimal digits that differ where the request does."""

    def open(self, engine: Engine, setup: str) -> None:
        """Make ready to start requests: the engine is there. `setup` stands in every answer."""

    def start(self, index: int) -> Started:
        """Return a request as the engine gets it, or raise one of `refusals`."""

    def refused(self, index: int, error: Exception) -> Mapping[str, Any]:
        """Return the line of a request that was refused."""


class LineError(Exception):
    """A line is no request."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


def name_of(path: Path) -> str:
    """Return what an input is called in messages."""
    return "standard input" if path == STANDARD else str(path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, and their numbers.

    Raises:
        InputError: the file cannot be read, or a line is too long or not UTF-8.
    """
    with _opened(path) as file:
        try:
            for number, raw in enumerate(iter(lambda: file.readline(console.MAX_LINE_BYTES), b""), 1):
                if len(raw) == console.MAX_LINE_BYTES:
                    got = f"{console.MAX_LINE_BYTES >> 20} MiB or more"
                    action = "Split it: each line is one prompt."
                    raise InputError(f"line {number}", where=name_of(path), got=got, expected="less", action=action)
                line = _decoded(raw, number, path)
                if line.strip():
                    yield number, line
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot read {name_of(path)}: {reason}", action="Check the path.") from None


def _opened(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    return contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD else open_given(path, "prompt file")


def _decoded(raw: bytes, number: int, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        got = f"byte {error.start} that is not UTF-8"
        raise InputError(f"line {number}", where=name_of(path), got=got, expected="UTF-8 text") from None


def json_line(line: str) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        LineError: it is none.
    """
    expected = 'an object such as {"prompt": "Hello"}'
    try:
        fields = parse_value(line.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise LineError(f"no JSON ({error})", expected) from None
    if not isinstance(fields, dict):
        raise LineError(shorten(line), expected)
    return fields
