"""The answers of `run --input-file`: lines of JSON that are there as soon as they are known, and survive a crash.

One process at a time writes the file, which it locks. What a power failure or a full disk leaves of the last line is
cut off when the next run begins, and so are errors, which are then tried again. A line carries a fingerprint of what
it answers, `SETUP.REQUEST`: of the model and how it computes, and of the prompt and its parameters.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from eightfold.errors import OutputError
from eightfold.format.journal import LineFile

# How often the disk is waited for.
FSYNC_SECONDS = 5.0

_BEGIN = b'{"index": '
_ELSEWHERE = "Choose another --output-file, or begin anew with --overwrite."
_MODE = 0o644
_PIECE = 1 << 20  # bytes that are copied at a time


class AnswerFile:
    """Context manager: the file, open and locked. One that was made and stayed empty goes away again.

    Raises:
        OutputError: another process writes the file, or it is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        """Forget all that the file holds."""
        self._lines.truncate(0)

    def resume(self, fingerprints: Sequence[str]) -> set[int]:
        """Repair the file and return which prompts it answers; errors are taken out.

        Args:
            fingerprints: of each prompt.

        Raises:
            OutputError: a line is not this command's, or answers something else. The file is as it was.
        """
        answered, kept, end = set[int](), list[list[int]](), 0
        with self._lines.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                begin, end = end, end + len(raw)
                if not raw.endswith(b"\n") and _may_be_torn(raw):
                    break
                line = self._parse(raw, number)
                if "error" in line:
                    continue
                self._check(line, number, fingerprints)
                answered.add(line["index"])
                if kept and kept[-1][1] == begin:
                    kept[-1][1] = end
                else:
                    kept.append([begin, end])
        self._keep(kept)
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

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("index"), int) and isinstance(line.get("fingerprint"), str):
            return line
        raise OutputError(
            f"line {number}",
            where=self.path,
            got=repr(raw[:40].decode("utf-8", "replace")),
            expected="an answer that this command wrote",
            action=_ELSEWHERE,
        )

    def _check(self, line: Mapping[str, Any], number: int, fingerprints: Sequence[str]) -> None:
        """Refuse an answer to something else than what is asked now."""
        index, found = line["index"], line["fingerprint"]
        if not 0 <= index < len(fingerprints):
            got = f"an answer to prompt {index}, and {len(fingerprints)} prompts, counted from 0"
        elif found == fingerprints[index]:
            return
        elif found.partition(".")[0] == fingerprints[index].partition(".")[0]:
            got = f"an answer to prompt {index} when it had another text, id or parameters"
        else:
            got = "an answer of another model, chat template, --dynamic or --attention-mode"
        raise OutputError(f"line {number}", where=self.path, got=got, expected="one of this run", action=_ELSEWHERE)

    def _keep(self, kept: list[list[int]]) -> None:
        """Leave nothing in the file but these stretches of it."""
        size = sum(end - begin for begin, end in kept)
        if kept and kept[-1][1] != size:
            self._rewrite(kept)
        elif size != self._lines.size:
            self._lines.truncate(size)

    def _rewrite(self, kept: list[list[int]]) -> None:
        """Put another file in the place of this one, at once, and locked before anybody can see it."""
        old = self._lines
        new = LineFile(old.path.with_name(f".{old.path.name}.partial"))
        try:
            new.truncate(0)
            shutil.copymode(old.path, new.path)
            for begin, end in kept:
                for at in range(begin, end, _PIECE):
                    new.write(os.pread(old.file, min(end - at, _PIECE), at))
            new.sync()
            new.rename(old.path)
        except BaseException:
            new.path.unlink()
            new.close()
            raise
        old.close()
        self._lines = new


def _may_be_torn(raw: bytes) -> bool:
    """Whether bytes without an end of line are the beginning of an answer, as a crash leaves it."""
    begin = raw.rstrip(b"\0")[: len(_BEGIN)]
    return _BEGIN.startswith(begin)
