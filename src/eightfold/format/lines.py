"""A file of lines that survives a kill: one process writes it, and a line is there as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


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
