"""A single file that is made: it grows in a hidden folder beside its place, and gets its name when it is whole.

    FOLDER/NAME             absent, or an earlier output that --overwrite replaces; untouched until the end
    FOLDER/.NAME.partial/   the journal, and NAME as far as it has grown

The file is written from its first byte to its last. A line of the journal says up to which byte a step has come, and
the CRC-32 of what it wrote; all of that is safely on disk before the line is. What lies behind the last line is
written anew.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eightfold.errors import OutputError, remember_kept
from eightfold.format.journal import WORK_NAME, Entry, Journal, partial_path, progress_text
from eightfold.format.output import (
    Explain,
    begun_otherwise,
    cannot_write,
    is_helped_by_running_again,
    lock_journal,
    require_space,
)
from eightfold.format.safetensors import checksum_of
from eightfold.format.shards import WriteBehind
from eightfold.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GrowingFile:
    """Context manager: `path` is what grows, and `finish` makes it the target.

    Leaving it with an error removes what was written, unless a step is finished and running again would help.

    Attributes:
        target: the file to make.
        folder: where it grows.
        path: what grows.
        overwrite: whether an earlier output may be replaced.
    """

    def __init__(
        self,
        target: Path,
        head: Entry,
        nbytes: int,
        *,
        source: Path,
        explain: Explain,
        overwrite: bool,
        is_ours: Callable[[Path], bool],
    ) -> None:
        """Say what is to be made.

        Args:
            target: the file.
            head: the first line of its journal: whatever decides what it is.
            nbytes: it has about.
            source: the directory that it is made of, outside of which it must lie.
            explain: tells what differs between two first lines.
            overwrite: replace a file at `target` that `is_ours`, or what was begun otherwise.
            is_ours: whether a file was written by the same command.
        """
        self.target, self.folder = target, partial_path(target)
        self.path, self.overwrite = self.folder / target.name, overwrite
        self._head, self._nbytes, self._source, self._explain = head, nbytes, source, explain
        self._is_ours = is_ours
        self._journal: Journal | None = None
        self._file, self._at, self._begin, self._checksum = -1, 0, 0, 0

    @property
    def journal(self) -> Journal:
        """What is finished; locked."""
        assert self._journal is not None
        return self._journal

    @property
    def work(self) -> Path:
        """Where files lie that only a run at work needs."""
        return self.folder / WORK_NAME

    def __enter__(self) -> GrowingFile:
        """Take the place where the file grows, with what an earlier run has left there.

        Raises:
            OutputError: the target may not be replaced, its folder is not there, there is no room, something else was
                begun (without `overwrite`), or another process is writing it.
        """
        self._check()
        try:
            self._journal = lock_journal(self.folder, "file", self.target)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._behind = WriteBehind(self._file)
            self._take()
            require_space(self.folder, self.target, self._nbytes - os.fstat(self._file).st_size)
        except BaseException as error:
            self._close(keeps=bool(self._journal and self._journal.steps))
            if not isinstance(error, OSError):
                raise
            raise cannot_write(self.target, error) from None
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
            if not self.overwrite:
                raise self._refused("a file", "nothing yet", "Choose another, or replace it with `overwrite`.")
            if not self._is_ours(self.target):
                action = "Move it elsewhere and run the same command again, or choose another."
                raise self._refused("a file that `eightfold export` did not write", "one that it did", action)

    def _refused(self, got: str, expected: str, action: str) -> OutputError:
        return OutputError(f"output file {self.target}", got=got, expected=expected, action=action)

    def _take(self) -> None:
        """Go on with what was begun here, or begin."""
        if self.journal.steps:
            differences = self._explain(self.journal.head, self._head)
            if not differences:
                return
            if not self.overwrite:
                raise self.begun_otherwise(differences, "one begun")
        self.restart()

    def begun_otherwise(self, differences: list[str], what: str) -> OutputError:
        """Return the refusal of what was made of something else, or in another way."""
        return begun_otherwise("file", self.target, differences, what)

    def restart(self) -> None:
        """Forget all that was written, as if nothing had been begun."""
        self.journal.clear()  # first: no line may tell of bytes that are gone
        os.ftruncate(self._file, 0)
        self._at = self._begin = self._checksum = 0
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(mode=0o700)
        self.journal.append(self._head)

    def take_over(self, steps: Sequence[str], progress: Progress) -> int:
        """Leave what an earlier run has written, and go on behind it; begin anew if it is not what it was.

        Args:
            steps: names of all steps, in order.
            progress: who is told.

        Returns:
            How many of them are written.
        """
        lines = [entry for entry in self.journal.entries if "step" in entry]
        if not lines:
            return 0
        with progress("verify", len(lines), "step") as task:
            for name, line in zip(steps, lines, strict=False):
                task.at(name)
                end, checksum = line["end"], checksum_of(self._file, self._at, line["end"])
                if (line["step"], line["checksum"]) != (name, checksum):
                    self.restart()
                    return 0
                self._at = self._begin = end
                task.advance()
        os.ftruncate(self._file, self._at)
        return len(lines)

    def include(self) -> None:
        """Take what somebody else has written to `path`, and go on behind it."""
        self._at = os.fstat(self._file).st_size
        self._checksum = checksum_of(self._file, self._begin, self._at)

    def pad(self, alignment: int) -> None:
        """Write zeros up to a multiple of `alignment`."""
        self._write(memoryview(bytes(-self._at % alignment)))

    def write(self, array: NDArray[Any]) -> None:
        """Write the bytes of an array."""
        import numpy as np

        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        begin = self._at
        self._checksum = zlib.crc32(data, self._checksum)
        while data:
            written = os.pwrite(self._file, data, self._at)
            data, self._at = data[written:], self._at + written
        self._behind.wrote(begin, self._at)

    def close_step(self, name: str) -> None:
        """Note that a step is finished, when what it wrote would survive a loss of power."""
        os.fdatasync(self._file)
        self.journal.append({"step": name, "end": self._at, "checksum": self._checksum})
        self._begin, self._checksum = self._at, 0

    def finish(self) -> None:
        """See everything safely on disk, and give the file its name."""
        os.fsync(self._file)
        self._check()  # once more: time has passed
        self.path.rename(self.target)
        self._close(keeps=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeps = error is not None and bool(self._journal and self._journal.steps) and is_helped_by_running_again(error)
        if keeps and error is not None:
            done = progress_text(self.journal.entries)
            remember_kept(error, f"{done} are finished in {self.folder}. Run the same command to go on there.")
        self._close(keeps=keeps)

    def _close(self, *, keeps: bool) -> None:
        """Let go of the lock; remove the folder, unless it `keeps`."""
        try:
            if self._journal is not None and not keeps and self._journal.is_in_place:
                with suppress(OSError):  # without its lines, what is left counts for nothing
                    self._journal.clear()
                    self.path.unlink(missing_ok=True)
                    shutil.rmtree(self.work, ignore_errors=True)
                    self._journal.path.unlink()
                    self.folder.rmdir()
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            if self._journal is not None:
                self._journal.close()
                self._journal = None
