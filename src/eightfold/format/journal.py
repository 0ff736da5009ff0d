"""The journal of a quantization: what is finished, so that a killed run goes on where it stopped.

One JSON object a line, each with the CRC-32 of its own text; a last line that is torn counts as not written. The first
line says what is being made; then comes a line for each finished step; the line that says `complete` is the last, and
without it the directory is not a model. Directories of other tools have no journal.

    {"format": 1, "layers": 30, ..., "check": "1c291ca3"}
    {"files": [what is going to be written], "check": "..."}
    {"step": "embedding", ..., "check": "..."}
    {"step": "layer 0", ..., "check": "..."}
    {"complete": {file: [bytes, CRC-32]}, "check": "..."}

Not here: what the first line says of recipe and source (quant/identity.py), and what is done with it (quant/).
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError, OutputError

JOURNAL_NAME = "eightfold_journal.jsonl"

# What only a run at work needs: hidden states and the like.
WORK_NAME = ".eightfold-work"

FORMAT = 1

Entry = dict[str, Any]


class Journal:
    """An open journal, locked against other processes.

    Attributes:
        path: the file.
        entries: every whole line of it, in order.
    """

    def __init__(self, directory: Path) -> None:
        """Open the journal of a directory, or make an empty one.

        Raises:
            OutputError: another process is at work there.
            OSError: it cannot be opened.
        """
        self.path = directory / JOURNAL_NAME
        while (file := _locked(self.path)) is None:
            pass  # whoever had the lock has removed the file meanwhile
        self._file = file
        try:
            self.entries, self._end = parse(_read_all(file))
        except BaseException:
            os.close(file)
            raise

    @property
    def head(self) -> Entry:
        """The first line; empty when nothing was begun."""
        return self.entries[0] if self.entries else {}

    @property
    def steps(self) -> dict[str, Entry]:
        """The finished steps by name."""
        return {entry["step"]: entry for entry in self.entries if "step" in entry}

    @property
    def complete(self) -> Entry | None:
        """What the closing line says of each file; None without it."""
        return _complete(self.entries)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line, and return when it would survive a loss of power."""
        line = render(entry)
        os.ftruncate(self._file, self._end)  # what a killed run has left of a line
        at = self._end
        data = memoryview(line)
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written
        os.fsync(self._file)
        self._end = at
        self.entries.append(dict(entry))

    def clear(self) -> None:
        """Forget every line."""
        os.ftruncate(self._file, 0)
        self.entries, self._end = [], 0

    def close(self) -> None:
        """Let go of the file and the lock; twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _locked(path: Path) -> int | None:
    """Open and lock the file of this name; None when that is not what has been locked."""
    if path.is_symlink():
        raise OutputError(
            f"output directory {path.parent}",
            got=f"a symbolic link ({path.name})",
            expected="a file of its own",
            action="Remove the link, or choose another directory.",
        )
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            return file
    except BlockingIOError:
        os.close(file)
        raise _in_use(path.parent) from None
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _in_use(directory: Path) -> OutputError:
    return OutputError(
        f"output directory {directory}",
        got="another process that is writing there",
        expected="none",
        action="Wait for it, or choose another directory.",
    )


def _read_all(file: int) -> bytes:
    blob, size = b"", os.fstat(file).st_size
    while len(blob) < size and (piece := os.pread(file, size - len(blob), len(blob))):
        blob += piece
    return blob


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=True)


def render(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as a line that checks itself."""
    check = f"{zlib.crc32(_text(entry).encode()):08x}"
    return (_text({**entry, "check": check}) + "\n").encode()


def parse(blob: bytes) -> tuple[list[Entry], int]:
    """Return the entries up to the first line that is torn or damaged, and how many bytes they take."""
    entries: list[Entry] = []
    end = 0
    for line in blob.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if render({key: value for key, value in entry.items() if key != "check"}) != line:
                break
        except (ValueError, AttributeError, RecursionError):
            break
        del entry["check"]
        entries.append(entry)
        end += len(line)
    return entries, end


def _complete(entries: list[Entry]) -> Entry | None:
    found = entries[-1].get("complete") if entries else None
    return found if isinstance(found, dict) else None


def read_entries(directory: Path) -> list[Entry] | None:
    """Return the entries of a directory's journal, without a lock; None when it has none."""
    path = directory / JOURNAL_NAME
    try:
        return parse(path.read_bytes())[0]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def layers_done(entries: list[Entry]) -> int:
    """Return how many layers are written."""
    return sum(str(entry.get("step", "")).startswith("layer ") for entry in entries)


def progress_text(entries: list[Entry]) -> str:
    """Return how far a run has come: `12 of 30 layers`."""
    return f"{layers_done(entries)} of {entries[0].get('layers', '?') if entries else '?'} layers"


def require_finished(directory: Path) -> None:
    """Refuse a directory that a quantization has begun and not finished.

    Raises:
        CheckpointError: it has a journal without the closing line.
    """
    entries = read_entries(directory)
    if entries is None or _complete(entries) is not None:
        return
    raise CheckpointError(
        f"unfinished model {directory}",
        got=f"{progress_text(entries)}" if entries else "a quantization that had just begun",
        expected="all of them, the head and the closing line of its journal",
        action="Run the `eightfold quantize` command that began it again: it goes on where it stopped.",
    )
