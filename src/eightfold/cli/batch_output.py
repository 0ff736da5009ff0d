"""The output of `eightfold run --input-file`: a file of answers that a later run resumes, or stdout.

One process at a time writes the file, which it locks. What a power failure or a full disk leaves of the last line is
cut off when the next run begins, and so are errors, which are then tried again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from eightfold.errors import OutputError
from eightfold.format.journal import LineFile

# How often the disk is waited for.
FSYNC_SECONDS = 5.0

_ELSEWHERE = "Choose another --output-file, or begin anew with --overwrite."
_MODE = 0o644
_MOST_OF_A_LINE = 256 << 20  # bytes; one that is longer is not of this command


@dataclass(frozen=True)
class Head:
    """What a line of the output says of itself.

    Attributes:
        index: of the request that it answers; None: of none that is asked now.
        name: what it answers, for messages.
        fingerprint: of the model and how it computes, and of the request: `SETUP.REQUEST`.
        failed: whether it is an error, which is tried again.
    """

    index: int | None
    name: str
    fingerprint: str
    failed: bool


class LineForm(NamedTuple):
    """A form of lines.

    Attributes:
        begin: how every line begins.
        head: a line's object -> what it says of itself; None where it is not of this form.
    """

    begin: bytes
    head: Callable[[dict[str, Any]], Head | None]


def _own_head(line: dict[str, Any]) -> Head | None:
    index, fingerprint = line.get("index"), line.get("fingerprint")
    if not isinstance(index, int) or not isinstance(fingerprint, str):
        return None
    return Head(index, f"prompt {index}", fingerprint, "error" in line)


OWN = LineForm(b'{"index": ', _own_head)


class AnswerFile:
    """Context manager: the file, open and locked. One that was made and stayed empty goes away again.

    Raises:
        OutputError: another process writes the file, or it is no file.
    """

    def __init__(self, path: Path, form: LineForm = OWN) -> None:
        self.path, self._form = path, form
        self._synced = time.monotonic()

    def __enter__(self) -> AnswerFile:
        self._is_new = not os.path.lexists(self.path)
        self._lines = self._opened(Path(os.path.realpath(self.path)))
        return self

    def _opened(self, path: Path) -> LineFile:
        if path.exists() and not path.is_file():
            raise OutputError("--output-file", got=self.path, expected="a file that can be read again")
        try:
            return LineFile(path, _MODE)
        except BlockingIOError:
            raise OutputError(
                "--output-file",
                where=self.path,
                got="a file that another run is writing",
                expected="one that is not in use",
                action="Wait for its end, or choose another.",
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_new and not self._lines.size:
                self.path.unlink()
            else:
                self._lines.sync()
        finally:
            self._lines.close()

    def clear(self) -> None:
        self._lines.truncate(0)

    def resume(self, fingerprints: Sequence[str]) -> set[int]:
        """Repair the file and return which prompts it answers; errors are taken out.

        Args:
            fingerprints: of each prompt.

        Raises:
            OutputError: a line is not this command's, or answers something else. The file is as it was.
        """
        answered, failed, end = set[int](), set[int](), 0
        with self._lines.path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(_MOST_OF_A_LINE), b""), 1):
                if not raw.endswith(b"\n") and len(raw) < _MOST_OF_A_LINE and self._may_be_torn(raw):
                    break
                head = self._head(raw, number)
                if head.failed:
                    failed.add(number)
                else:
                    answered.add(self._answered(head, number, fingerprints))
                end += len(raw)
        if failed:
            self._rewrite(failed, end)
        elif end != self._lines.size:
            self._lines.truncate(end)
        return answered

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line, whole or not at all.

        Raises:
            OSError: the disk is full.
        """
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
        line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        self._lines.write(line)
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            self._lines.sync()
            self._synced = time.monotonic()

    def _head(self, raw: bytes, number: int) -> Head:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        head = self._form.head(line) if isinstance(line, dict) else None
        if head is not None:
            return head
        raise OutputError(
            f"line {number}",
            where=self.path,
            got=repr(raw[:40].decode("utf-8", "replace")),
            expected="an answer that this command wrote",
            action=_ELSEWHERE,
        )

    def _answered(self, head: Head, number: int, fingerprints: Sequence[str]) -> int:
        """Return the index of what a line answers; refuse an answer to something else than what is asked now."""
        index, found = head.index, head.fingerprint
        if index is None:
            got = f"an answer to {head.name}, which is not asked for"
        elif not 0 <= index < len(fingerprints):
            got = f"an answer to {head.name}, and {len(fingerprints)} prompts, counted from 0"
        elif found == fingerprints[index]:
            return index
        elif found.partition(".")[0] == fingerprints[index].partition(".")[0]:
            got = f"an answer to {head.name} when it had another text, id or parameters"
        else:
            got = "an answer of another model, chat template, --dynamic or --attention-mode"
        raise OutputError(f"line {number}", where=self.path, got=got, expected="one of this run", action=_ELSEWHERE)

    def _rewrite(self, without: set[int], end: int) -> None:
        """Put a file without these lines in the place of this one, at once, and locked before anybody can see it."""
        old = self._lines
        new = LineFile(old.path.with_name(f".{old.path.name}.partial"))
        try:
            new.truncate(0)
            shutil.copymode(old.path, new.path)
            with old.path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    if number not in without and file.tell() <= end:
                        new.write(raw)
            new.sync()
            new.rename(old.path)
        except BaseException:
            new.path.unlink()
            new.close()
            raise
        old.close()
        self._lines = new

    def _may_be_torn(self, raw: bytes) -> bool:
        """Whether bytes without an end of line are the beginning of an answer, as a crash leaves it."""
        begin = raw.rstrip(b"\0")[: len(self._form.begin)]
        return self._form.begin.startswith(begin)


class Stdout:
    """Context manager: answers go to stdout, each as it comes; nothing is resumed."""

    def __enter__(self) -> Stdout:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def clear(self) -> None:
        pass

    def resume(self, fingerprints: Sequence[str]) -> set[int]:
        return set()

    def append(self, content: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
        sys.stdout.flush()
