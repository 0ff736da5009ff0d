"""Where a chat is read and written: the lines of a pipe, or a terminal at which a person types."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from eightfold.cli.console import MAX_LINE_BYTES
from eightfold.errors import InputError
from eightfold.progress import printable, unfiltered

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, MORE = "> ", ". "

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_FENCE = "```"


class Pipe:
    """Context manager: each line of stdin is a turn. Ctrl-C ends the program, as it does with any other."""

    interrupted = False

    def __init__(self) -> None:
        self._number = 0
        self._thinks = False

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self) -> str | None:
        """Return the next line, with those behind it if it ends in a backslash; None at the end.

        Raises:
            InputError: it is not UTF-8.
        """
        text = self._line()
        while text is not None and text.endswith("\\"):
            more = self._line()
            if more is None:
                return text[:-1]
            text = f"{text[:-1]}\n{more}"
        return text

    def _line(self) -> str | None:
        raw = sys.stdin.buffer.readline(MAX_LINE_BYTES)
        self._number += 1
        if len(raw) == MAX_LINE_BYTES:
            got = f"{MAX_LINE_BYTES >> 20} MiB or more"
            raise InputError(f"line {self._number} of stdin", got=got, expected="less", action="Paste less at once.")
        try:
            return raw.decode().rstrip("\r\n") if raw else None
        except UnicodeDecodeError as error:
            got = f"byte {error.start} that is not UTF-8"
            raise InputError(f"line {self._number} of stdin", got=got, expected="UTF-8 text") from None

    def think(self, text: str) -> None:
        """Write a piece of what the model thinks, which is no answer."""
        self._thinks = True
        sys.stderr.write(text)
        sys.stderr.flush()

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        if self._thinks:
            self._thinks = False
            self.note("")
        sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self) -> None:
        """End an answer."""
        self.write("\n")

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        print(text, file=sys.stderr, flush=True)


class Wrapper:
    """Breaks text between words, as it comes, so that lines fit a width.

    Lines of code, between lines that begin with three backticks, are left whole: they are there to be copied.

    Args:
        width: cells of a terminal.
    """

    def __init__(self, width: int) -> None:
        self._width, self._column = width, 0
        self._word, self._cells = "", 0  # that is not complete, and its width
        self._is_begin = True  # of a line of the text
        self._is_code = False

    def push(self, text: str) -> str:
        """Return what can be shown of this text and that before it; of the last word more may come."""
        from prompt_toolkit.utils import get_cwidth

        shown = ""
        for character in text:
            if character.isspace():
                shown += self._end_word() + self._space(character)
                continue
            cells = get_cwidth(character)
            if cells > 1 or self._cells + cells > self._width:  # ideographs stand alone, and some words fill the line
                shown += self._end_word()
            self._word += character
            self._cells += cells
        return shown

    def finish(self) -> str:
        """Return the word that was not complete."""
        return self._end_word()

    def _end_word(self) -> str:
        word, cells, self._word, self._cells = self._word, self._cells, "", 0
        if not word:
            return ""
        if self._is_begin and word.startswith(_FENCE):
            self._is_code = not self._is_code
        self._is_begin = False
        breaks = not self._is_code and self._column > 0 and self._column + cells > self._width
        self._column = cells if breaks else self._column + cells
        return "\n" + word if breaks else word

    def _space(self, character: str) -> str:
        if character == "\n":
            self._column, self._is_begin = 0, True
            return character
        if self._column + 1 > self._width and not self._is_code:
            return ""  # the next word begins a line
        self._column += 1
        return character


class Terminal(Pipe):
    """Context manager: a person types, and Ctrl-C means something.

    While a message is asked for, Ctrl-C drops what is typed, and the second one in a row ends the conversation. At
    other times it only sets `interrupted`.

    Args:
        commands: words that Tab completes.
    """

    def __init__(self, commands: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._warned = False
        is_capable = os.environ.get("TERM", "dumb") != "dumb"
        self._colours = is_capable and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._wraps = is_capable and sys.stdout.isatty()
        self._wrapper: Wrapper | None = None
        self._asks = False
        self._session = _session(commands, self._colours) if is_capable else None

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

    def _line(self) -> str | None:
        """Return what is typed at a terminal that can do no more than show lines; None at the end."""
        self._asks = True
        try:
            return input(PROMPT)
        except EOFError:
            return None
        finally:
            self._asks = False

    def read(self) -> str | None:
        """Return what the person says next; None at the end."""
        while True:
            try:
                text = self._session.prompt() if self._session is not None else super().read()
            except KeyboardInterrupt:
                if self._warned:
                    return None
                self._warned = True
                self.note("(Ctrl-C again ends the chat, and so do Ctrl-D and /exit)")
            except EOFError:
                return None
            else:
                self._warned = self.interrupted = False
                return text

    def think(self, text: str) -> None:
        """Show what the model thinks, paler than its answer."""
        if not self._wraps:  # stdout is a file, which only gets answers
            super().think(text)
            return
        if not self._thinks:
            self._thinks = True
            self._show("(thinking)\n", pale=True)
        self._show(self._broken(text), pale=True)

    def write(self, text: str) -> None:
        """Show a piece of an answer, broken between words."""
        if not self._wraps:
            super().write(text)
            return
        if self._thinks and text:
            self._end_text("\n\n")
        self._show(self._broken(text))

    def finish(self) -> None:
        """End an answer."""
        if self._wraps:
            self._end_text("\n")
        else:
            super().finish()

    def _broken(self, text: str) -> str:
        self._wrapper = self._wrapper or Wrapper(shutil.get_terminal_size().columns)
        return self._wrapper.push(printable(text))

    def _end_text(self, end: str) -> None:
        rest = self._wrapper.finish() if self._wrapper is not None else ""
        self._show(rest + end, pale=self._thinks)
        self._wrapper, self._thinks = None, False

    def _show(self, text: str, *, pale: bool = False) -> None:
        stream = unfiltered(sys.stdout)
        stream.write(f"{_DIM}{text}{_PLAIN}" if pale and self._colours and text else text)
        stream.flush()

    def note(self, text: str) -> None:
        if self._wraps:
            wrapper = Wrapper(shutil.get_terminal_size().columns)
            text = wrapper.push(text) + wrapper.finish()
        if self._colours and text:
            print(f"{_DIM}{printable(text)}{_PLAIN}", file=unfiltered(sys.stderr), flush=True)
        else:
            super().note(text)


def _session(commands: tuple[str, ...], colours: bool) -> PromptSession[str]:
    """Return what reads messages: with history, completion and many lines at a time."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.output import create_output

    shown = sys.stdout if sys.stdout.isatty() else sys.stderr
    return PromptSession(
        [("bold ansigreen" if colours else "", PROMPT)],
        multiline=True,
        prompt_continuation=lambda width, number, wraps: " " * width if wraps else MORE,
        key_bindings=_keys(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        output=create_output(unfiltered(shown)),
    )


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(_send)
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _send(event: KeyPressEvent) -> None:
    """Send what is typed; a backslash at its end stands for a new line."""
    buffer = event.current_buffer
    if buffer.document.is_cursor_at_the_end and buffer.document.char_before_cursor == "\\":
        buffer.delete_before_cursor()
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()
