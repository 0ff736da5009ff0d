"""A single file that is made: it grows beside its place, and gets its name when it is whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eightfold.errors import OutputError
from eightfold.format.output import require_space
from eightfold.format.shards import WriteBehind

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GrowingFile:
    """Context manager: `path` is what grows, and `finish` makes it the target.

    Leaving it without that removes what was written: a run that was stopped starts over.

    Attributes:
        target: the file to make.
        path: what grows, `.NAME.partial` beside it.
    """

    def __init__(
        self, target: Path, nbytes: int, *, source: Path, overwrite: bool, is_ours: Callable[[Path], bool]
    ) -> None:
        """Say what is to be made.

        Args:
            target: the file.
            nbytes: it has about.
            source: the directory that it is made of, outside of which it must lie.
            overwrite: replace a file at `target` that `is_ours`.
            is_ours: whether a file was written by the same command.
        """
        self.target, self.path = target, target.with_name(f".{target.name}.partial")
        self._nbytes, self._source, self._overwrite, self._is_ours = nbytes, source, overwrite, is_ours
        self._file, self._at = -1, 0

    def __enter__(self) -> GrowingFile:
        """Take the place where the file grows.

        Raises:
            OutputError: the target may not be replaced, its folder is not there, there is no room, or another process
                is writing it.
        """
        self._check()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
        except BlockingIOError:
            os.close(self._file)
            raise self._refused("another process that is writing it", "none", "Wait for it.") from None
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._behind = WriteBehind(self._file)
        return self

    def _check(self) -> None:
        folder = Path(os.path.realpath(self.target.parent))
        if not folder.is_dir():
            raise OutputError(f"no folder {self.target.parent}", expected=f"one to write {self.target.name} to")
        if folder.is_relative_to(os.path.realpath(self._source)):
            raise self._refused("a place inside the source", "one outside of it", "Choose another.")
        if os.path.lexists(self.target):
            if self.target.is_symlink() or not self.target.is_file():
                got = "a symbolic link" if self.target.is_symlink() else "a directory, or no plain file"
                raise self._refused(got, "a file, or nothing yet", "")
            if not self._overwrite:
                raise self._refused("a file", "nothing yet", "Choose another, or replace it with `overwrite`.")
            if not self._is_ours(self.target):
                action = "Move it elsewhere and run the same command again, or choose another."
                raise self._refused("a file that `eightfold export` did not write", "one that it did", action)
        require_space(folder, self.target, self._nbytes)

    def _refused(self, got: str, expected: str, action: str) -> OutputError:
        return OutputError(f"output file {self.target}", got=got, expected=expected, action=action)

    def go_to_end(self) -> None:
        """Go on behind what somebody else has written to `path`."""
        self._at = os.fstat(self._file).st_size

    def pad(self, alignment: int) -> None:
        """Write zeros up to a multiple of `alignment`."""
        self._write(memoryview(bytes(-self._at % alignment)))

    def write(self, array: NDArray[Any]) -> None:
        """Write the bytes of an array."""
        import numpy as np

        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        begin = self._at
        while data:
            written = os.pwrite(self._file, data, self._at)
            data, self._at = data[written:], self._at + written
        self._behind.wrote(begin, self._at)

    def finish(self) -> None:
        """See everything safely on disk, and give the file its name."""
        os.fsync(self._file)
        self._check()  # once more: time has passed
        self.path.rename(self.target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            if kind is not None:
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._file)
            self._file = -1
