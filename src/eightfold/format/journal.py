"""The journal of an output: what is being made and what is finished, so that a killed run goes on where it stopped.

One JSON object a line, each with the CRC-32 of its own text; a last line that is torn counts as not written. The first
line says what is being made; then comes a line for each finished step; the line that says `complete` is the last, and
without it the directory is not a model. Directories of other tools have no journal.

    {"format": 2, "command": "quantize", "layers": 30, ..., "check": "1c291ca3"}
    {"step": "embedding", ..., "check": "..."}
    {"step": "layer 0", ..., "check": "..."}
    {"complete": {file: [bytes, CRC-32]}, "check": "..."}

Not here: what the first line says of recipe and source (quant/identity.py), and what is done with it (output.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError
from eightfold.files import has_file, read_file

JOURNAL_NAME = "eightfold_journal.jsonl"

# What only a run at work needs: hidden states and the like.
WORK_NAME = ".eightfold-work"

FORMAT = 2

Entry = dict[str, Any]


def partial_path(target: Path) -> Path:
    """Return where a directory grows until it is whole."""
    return target.parent / f".{target.name}.partial"


class LineFile:
    """An open file, locked against other processes, to which lines are appended.

    Attributes:
        path: the file.
        size: where the next line goes; what lies behind is torn, and is cut off when it comes.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        """Open the file, or make it with these permissions.

        Raises:
            BlockingIOError: another process has it locked.
            OSError: it cannot be opened, or is a symbolic link.
        """
        self.path = path
        while (file := _open_locked(path, mode)) is None:
            pass  # whoever had the lock has removed or replaced the file meanwhile
        self.file = file
        self.size = os.fstat(file).st_size

    def write(self, line: bytes) -> None:
        """Append a line.

        Raises:
            OSError: the disk is full; the line is then not there.
        """
        os.ftruncate(self.file, self.size)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self.file, line[written:], self.size + written)
        except OSError as error:
            os.ftruncate(self.file, self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.size += len(line)

    def sync(self) -> None:
        """Return when all lines would survive a loss of power."""
        os.fsync(self.file)

    def truncate(self, size: int) -> None:
        """Forget what lies behind so many bytes."""
        os.ftruncate(self.file, size)
        os.fsync(self.file)
        self.size = size

    def rename(self, path: Path) -> None:
        """Give the file another name; what has that name is replaced."""
        self.path = self.path.replace(path)

    @property
    def is_in_place(self) -> bool:
        """Whether this is still the file of that name."""
        return _is_at(self.file, self.path)

    def close(self) -> None:
        """Let go of the file and the lock; twice is allowed."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _open_locked(path: Path, mode: int) -> int | None:
    """Open and lock the file of this name; None when that is no longer what has been locked."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


class Journal(LineFile):
    """An open journal.

    Attributes:
        entries: every whole line of it, in order.
    """

    def __init__(self, directory: Path) -> None:
        """Open the journal of a directory, or make an empty one; see LineFile."""
        super().__init__(directory / JOURNAL_NAME)
        try:
            self.entries, self.size = parse(read_file(self.path))
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Entry:
        """The first line; empty when nothing was begun."""
        return self.entries[0] if self.entries else {}

    @property
    def steps(self) -> dict[str, Entry]:
        """The finished steps by name."""
        return {entry["step"]: entry for entry in self.entries if isinstance(entry.get("step"), str)}

    @property
    def complete(self) -> Entry | None:
        """What the closing line says of each file; None without it."""
        return closing_line(self.entries)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line, and return when it would survive a loss of power."""
        self.write(render(entry))
        self.sync()
        self.entries.append(dict(entry))

    def clear(self) -> None:
        """Forget every line."""
        self.truncate(0)
        self.entries = []


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


def closing_line(entries: Sequence[Entry]) -> Entry | None:
    """Return what the last line says of each file, if it is the one that completes a directory."""
    found = entries[-1].get("complete") if entries else None
    if not isinstance(found, dict):
        return None
    is_ours = all(
        isinstance(sealed, list) and len(sealed) == 2 and all(type(number) is int for number in sealed)
        for sealed in found.values()
    )
    is_inside = not any(name.startswith("/") or ".." in name.split("/") or "\0" in name for name in found)
    return found if is_ours and is_inside else None


def read_entries(directory: Path) -> list[Entry] | None:
    """Return the entries of a directory's journal, without a lock; None when it has none."""
    path = directory / JOURNAL_NAME
    return parse(read_file(path))[0] if has_file(path) else None


def layers_done(entries: Sequence[Entry]) -> int:
    """Return how many layers are written."""
    return sum(str(entry.get("step", "")).startswith("layer ") for entry in entries)


def progress_text(entries: Sequence[Entry]) -> str:
    """Return how far a quantization has come: `12 of 30 layers`."""
    return f"{layers_done(entries)} of {entries[0].get('layers', '?') if entries else '?'} layers"


def require_finished(directory: Path) -> None:
    """Refuse a model that a command has begun and not finished, where it grows and where it is going to be.

    Raises:
        CheckpointError: it has a journal without the closing line.
    """
    entries = read_entries(directory if directory.exists() else partial_path(directory))
    if entries is None or (directory.exists() and closing_line(entries) is not None):
        return
    head = entries[0] if entries else {}
    raise CheckpointError(
        f"unfinished model {directory}",
        got=progress_text(entries) if "layers" in head else "one that had just begun",
        expected="a complete one",
        action=f"Run the `eightfold {head.get('command', 'quantize')}` command that began it again.",
    )
