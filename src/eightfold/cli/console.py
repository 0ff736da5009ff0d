"""What a person sees and types: notes, JSON for programs, tables, and the lines of a chat."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from eightfold.errors import DependencyError, InputError, clipped
from eightfold.progress import CONTROLS, printable, unfiltered
from eightfold.progress import bars as bars

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint


def note(text: str) -> None:
    """Tell the user something that is not an error."""
    print(f"note: {clipped(text)}", file=sys.stderr)


def opened(model: Path) -> Checkpoint:
    """Open a model directory, and say what a user should know of its files."""
    from eightfold.format.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    for text in checkpoint.notes:
        note(text)
    return checkpoint


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON document as one line of stdout; what is not a number becomes null.

    Control characters are escaped, also those that JSON does not mind: the line may be read in a terminal.
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    print(text.translate({code: f"\\u{code:04x}" for code in CONTROLS}), flush=True)


def require_torch(command: str) -> None:
    """Import torch for a command, with a malloc that does not hoard and threads that do not spin.

    Raises:
        DependencyError: it is not installed.
    """
    from eightfold.machine import tame_malloc
    from eightfold.model.native import name_cut_files

    tame_malloc()
    name_cut_files()
    # OpenMP's threads spin while they wait for each other. With one core busy elsewhere that was measured to take
    # three times as long as waiting asleep; on an idle machine the difference is small.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise DependencyError(
            f"eightfold {command} needs torch",
            got="none installed",
            action="Install it: pip install 'eightfold[quantize]'",
        ) from None


@contextmanager
def loading() -> Iterator[None]:
    """Load a model, soon.

    Garbage is not looked for meanwhile: what loading makes stays, and looking through it takes 15 ms. numpy gets a BLAS
    of one thread, as nothing is multiplied with it: other threads spin for 50 ms when they start, on cores that are
    needed then.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        _import_numpy()
        yield
    finally:
        if collects:
            gc.enable()


def _import_numpy() -> None:
    threads = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or threads in os.environ:
        return
    os.environ[threads] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[threads]  # torch may bring a BLAS of its own


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> list[str]:
    """Return the lines of a plain table; columns from `right_from` on are flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.rjust(w) if i >= right_from else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()

    return [line(row) for row in (header, *rows)]


PROMPT, MORE = "> ", ". "

MAX_LINE_BYTES = 16 << 20  # of a prompt, in a pipe or a file

# A terminal that knows it wraps pasted text into marks, by which readline keeps it together.
_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Pipe:
    """Context manager: each line of stdin is a turn. Ctrl-C ends the program, as it does with any other."""

    interrupted = False

    def __init__(self) -> None:
        self._number = 0

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self) -> str | None:
        """Return the next line, with those behind it if it ends in a backslash; None at the end.

        Raises:
            InputError: it is not UTF-8.
        """
        text = self._line(PROMPT)
        while text is not None and text.endswith("\\"):
            more = self._line(MORE)
            if more is None:
                return text[:-1]
            text = f"{text[:-1]}\n{more}"
        return text

    def _line(self, prompt: str) -> str | None:
        raw = sys.stdin.buffer.readline(MAX_LINE_BYTES)
        self._number += 1
        if len(raw) == MAX_LINE_BYTES:
            got = f"{MAX_LINE_BYTES >> 20} MiB or more"
            raise InputError(f"line {self._number} of stdin", got=got, expected="less")
        try:
            return raw.decode().rstrip("\r\n") if raw else None
        except UnicodeDecodeError as error:
            got = f"byte {error.start} that is not UTF-8"
            raise InputError(f"line {self._number} of stdin", got=got, expected="UTF-8 text") from None

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        print(text, file=sys.stderr, flush=True)


class Terminal(Pipe):
    """Context manager: a person types, and Ctrl-C means something.

    While a line is asked for, Ctrl-C ends that line, and the second one in a row the conversation. At other times it
    only sets `interrupted`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asks = self._warned = False
        self._is_capable = os.environ.get("TERM", "dumb") != "dumb"
        self._dims = self._is_capable and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._writes = sys.stdout.isatty()
        self._keeps_pastes = _load_readline() and self._is_capable and self._writes

    def __enter__(self) -> Pipe:
        self._previous = signal.getsignal(signal.SIGINT)
        if self._previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._asks:
            raise KeyboardInterrupt
        self.interrupted = True

    def read(self) -> str | None:
        """Return what the person says next: a line, a paste, or lines that end in a backslash; None at the end."""
        while True:
            try:
                text = self._ask()
            except KeyboardInterrupt:
                if self._warned:
                    self.note("")
                    return None
                self._warned = True
                self.note("\n(Ctrl-C again ends the chat, and so do Ctrl-D and /exit)")
            else:
                self._warned = self.interrupted = False
                if text is None:
                    self.note("")
                return text

    def _ask(self) -> str | None:
        self._asks = True
        try:
            return super().read()
        finally:
            self._asks = False

    def _line(self, prompt: str) -> str | None:
        with self._pasting():
            try:
                if self._writes:
                    return input(prompt)
                sys.stderr.write(prompt)  # stdout is a file, which only gets answers
                sys.stderr.flush()
                return input()
            except EOFError:
                return None

    @contextlib.contextmanager
    def _pasting(self) -> Iterator[None]:
        if not self._keeps_pastes:
            yield
            return
        raw = unfiltered(sys.stdout)
        raw.write(_PASTE_ON)
        try:
            yield
        finally:
            raw.write(_PASTE_OFF)
            raw.flush()

    def note(self, text: str) -> None:
        if self._dims and text:
            print(f"{_DIM}{printable(text)}{_PLAIN}", file=unfiltered(sys.stderr), flush=True)
        else:
            super().note(text)


def _load_readline() -> bool:
    """Load line editing and history if Python has them; return whether pasted text stays together."""
    try:
        import readline
    except ImportError:
        return False
    return "libedit" not in (readline.__doc__ or "")
