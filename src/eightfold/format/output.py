"""Every directory is made in one way: it grows in a hidden sibling and is renamed once, when it is whole.

    DIR/OUT             absent, empty, or an earlier output that --overwrite replaces; untouched until the end
    DIR/.OUT.partial    grows
        eightfold_journal.jsonl     what is made, what is finished, at last every file with its checksum; it is locked
        .eightfold-work/            what only a running command needs

A killed run leaves the sibling, and the same command goes on in it. Replacing takes two renames: OUT goes into the
work folder of its successor, as `old`, and the successor becomes OUT; then `old` is removed with the work folder. A run
that finds itself between the two undoes the first.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from eightfold.errors import (
    CapacityError,
    CheckpointError,
    EightfoldError,
    OutputError,
    PeerError,
    remember_kept,
    shortlist,
)
from eightfold.format.journal import (
    JOURNAL_NAME,
    WORK_NAME,
    Entry,
    Journal,
    closing_line,
    partial_path,
    progress_text,
    read_entries,
)
from eightfold.format.safetensors import checksum_of_file
from eightfold.format.target import QUANTIZE, check_target, files_in, has_content, not_empty
from eightfold.progress import Progress, by_bytes, silent
from eightfold.values import size_text

# As the reference tool leaves them: weights are read-only, nothing is open to others.
DIRECTORY_MODE, WEIGHTS_MODE, JSON_MODE = 0o750, 0o400, 0o600

# Room for headers, JSON files and rounding up to file system blocks, beside the tensors themselves.
_SPARE_BYTES = 64 << 20

# What differs between two first lines of a journal, for the user; empty when nothing does.
Explain = Callable[[Entry, Entry], list[str]]


class Output:
    """Context manager: `path` is where to write, and `finish` makes it the target.

    Leaving it with an error removes what was written, unless a step is finished and running again would help.

    Attributes:
        target: the directory to make.
        path: where it grows.
        overwrite: whether an earlier output may be replaced.
        is_complete: whether the target is what this command makes: then there is nothing to do, and no journal.
    """

    def __init__(
        self,
        target: Path,
        head: Entry,
        *,
        source: Path | None = None,
        explain: Explain | None = None,
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Say what is to be made.

        Args:
            target: the directory to make.
            head: the first line of its journal: `format`, `command`, and whatever else decides what it is.
            source: what it is made of, which it must not replace.
            explain: tells what differs between two first lines; None for a command that always starts over.
            overwrite: replace what the command has written at `target` before, or begun.
            progress: who is told.
        """
        self.target, self.path = target, partial_path(target)
        self.overwrite, self.is_complete = overwrite, False
        self._head, self._source, self._explain, self._progress = head, source, explain, progress
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        """What is finished; locked."""
        assert self._journal is not None
        return self._journal

    @property
    def work(self) -> Path:
        """Where files lie that only a run at work needs."""
        return self.path / WORK_NAME

    def __enter__(self) -> Output:
        """Lock the place where the directory grows.

        Raises:
            OutputError: the target cannot be made or replaced, another command has begun it (without `overwrite`), or
                another process is writing it.
        """
        try:
            self._open()
        except BaseException as error:
            self._close(keeps=bool(self._journal and (self._journal.steps or self._journal.complete)))
            if not isinstance(error, OSError):
                raise
            raise cannot_write(self.target, error) from None
        return self

    def _open(self) -> None:
        self.target = self._checked()
        self.path = partial_path(self.target)
        if self._is_made():
            return
        self._journal = lock_journal(self.path, "directory", self.target)
        if self._restore():
            self._checked()
            if self._is_made():
                self._close(keeps=True)
                return
        self._take()

    def _checked(self) -> Path:
        return check_target(self.target, self._head["command"], source=self._source, overwrite=self.overwrite)

    def _is_made(self) -> bool:
        """Whether the target is what this command makes; sets is_complete. Without `overwrite` it has to be."""
        entries = read_entries(self.target) or []
        sealed = closing_line(entries)
        if sealed is None:
            return False
        if self._explain is None:
            if self.overwrite:
                return False
            raise not_empty(self.target)
        if differences := self._differences(entries[0]):
            if self.overwrite:
                return False
            is_ours = entries[0].get("command", QUANTIZE) == self._head["command"]  # what `overwrite` replaces
            raise self.begun_otherwise(differences, "a model made", may_replace=is_ours)
        changed = _changed_files(self.target, sealed, self._progress)
        if changed and not self.overwrite:
            raise OutputError(
                f"output directory {self.target}",
                got=f"files changed since it was made ({shortlist(changed)})",
                expected="them as they were",
                action="Choose another directory, or make it anew with `overwrite`.",
            )
        self.is_complete = not changed
        if self.is_complete:
            shutil.rmtree(self.target / WORK_NAME, ignore_errors=True)  # a run was killed when all was in its place
        return self.is_complete

    def _differences(self, old: Entry) -> list[str]:
        before, now = old.get("command", QUANTIZE), self._head["command"]
        if before != now:
            return [f"command: {before} -> {now}"]
        return self._explain(old, self._head) if self._explain else []

    def begun_otherwise(self, differences: list[str], what: str, *, may_replace: bool = True) -> OutputError:
        """Return the refusal of what was made of something else, or in another way."""
        return begun_otherwise("directory", self.target, differences, what, may_replace=may_replace)

    def _restore(self) -> bool:
        """Put back what a killed run had moved away to replace it; return whether there was anything."""
        old = self._old
        if not old.exists():
            return False
        if has_content(self.target):
            raise OutputError(
                f"output directory {self.target}",
                got=f"a directory, and the one that was there before in {old}",
                expected="one of them",
                action="Move one of them elsewhere and run the same command again.",
            )
        old.rename(self.target)
        return True

    @property
    def _old(self) -> Path:
        return self.work / "old"

    def _take(self) -> None:
        """Go on with what was begun here, or begin."""
        journal = self.journal
        if journal.steps or journal.complete:
            differences = self._differences(journal.head)
            if differences and not self.overwrite:
                raise self.begun_otherwise(differences, "a model begun")
            if not differences and self._explain:
                if journal.complete:
                    self._put_in_place()
                else:
                    self.work.mkdir(mode=0o700, exist_ok=True)
                return
        self.restart()

    def restart(self) -> None:
        """Forget all that was written, as if nothing had been begun."""
        self._empty()
        self.work.mkdir(mode=0o700, exist_ok=True)
        self.journal.append(self._head)

    def _empty(self) -> None:
        """Remove what was written. The work folder stays, as other hosts may know it."""
        self.journal.clear()  # first: no line may tell of a file that is gone
        for path in self.path.iterdir():
            if path.name not in (JOURNAL_NAME, WORK_NAME):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._empty_work()

    def _empty_work(self) -> None:
        for path in self.work.iterdir() if self.work.is_dir() else ():
            with suppress(OSError):  # what another host holds open goes with the folder
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def require_space(self, nbytes: int) -> None:
        """Fail early when the file system cannot hold so many bytes more, and what goes with them.

        Raises:
            OutputError: fewer bytes are free.
        """
        require_space(self.path, self.target, nbytes)

    def finish(self, checksums: Mapping[str, int]) -> None:
        """Close the journal and make the directory the target.

        Args:
            checksums: checksum_of_file() of files, by name, for which it is known; of the others it is computed.

        Raises:
            OutputError: the target holds files of somebody else, or cannot be renamed; nothing was replaced.
        """
        sealed = _seal(self.path, checksums)
        self.path.chmod(DIRECTORY_MODE)
        self.journal.append({"complete": sealed})
        self._put_in_place()

    def _put_in_place(self) -> None:
        self._require_replaceable()
        self._empty_work()
        try:
            if has_content(self.target):
                self.work.mkdir(mode=0o700, exist_ok=True)
                self.target.rename(self._old)
            else:
                shutil.rmtree(self.work, ignore_errors=True)
            self.path.rename(self.target)
        except BaseException as error:  # Ctrl-C too
            if self._old.exists() and not self.target.exists():
                self._old.rename(self.target)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"output directory {self.target}",
                got=f"one that cannot be renamed ({error.strerror or error})",
                expected=f"that it can change places with {self.path}, where the new model is complete",
                action="Nothing was replaced. Empty it yourself and run the same command again.",
            ) from None
        self.is_complete = True
        shutil.rmtree(self.target / WORK_NAME, ignore_errors=True)

    def _require_replaceable(self) -> None:
        """Look at the target once more: time has passed."""
        if has_content(self.target) and not self.overwrite:
            raise OutputError(
                f"output directory {self.target}",
                got="files that another process put there meanwhile",
                expected="an empty one",
                action="Nothing was replaced; run again with another directory.",
            )
        self._checked()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is None:
            return
        # A signal may have come between a line and our note of it, or between the renaming and ours.
        entries = (read_entries(self.path) or []) if self._journal.is_in_place else []
        is_worth_keeping = any(not {"step", "complete"}.isdisjoint(entry) for entry in entries)
        keeps = error is None or (is_worth_keeping and is_helped_by_running_again(error))
        if error is not None and keeps and self._explain:
            done = progress_text(entries)
            remember_kept(error, f"{done} are finished in {self.path}. Run the same command to go on there.")
        self._close(keeps=keeps)

    def _close(self, *, keeps: bool) -> None:
        """Let go of the lock; remove what was written, unless it `keeps`."""
        if self._journal is None:
            return
        try:
            if not keeps and self._journal.is_in_place and not self._old.exists():
                with suppress(OSError):  # without its lines, what is left counts for nothing
                    self._empty()
                    shutil.rmtree(self.work, ignore_errors=True)
                    self._journal.path.unlink()
                    self.path.rmdir()
        finally:
            self._journal.close()
            self._journal = None


def cannot_write(target: Path, error: OSError) -> OutputError:
    """Return the refusal of a place that the system does not let us write to."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(
        f"cannot write to {target}: {error.strerror or error}",
        action="Free some space, or choose another disk." if is_full else "Choose a directory you may write to.",
    )


def begun_otherwise(
    kind: str, target: Path, differences: list[str], what: str, *, may_replace: bool = True
) -> OutputError:
    """Return the refusal to go on with a directory or file that was made of something else, or in another way."""
    return OutputError(
        f"output {kind} {target}",
        got=f"{what} otherwise ({'; '.join(differences)})",
        expected="the same recipe and source",
        action=f"Choose another {kind}" + (", or start over with `overwrite`." if may_replace else "."),
    )


def is_helped_by_running_again(error: BaseException) -> bool:
    """Whether the same command may get further: bad input is met again."""
    return not isinstance(error, EightfoldError) or isinstance(error, (OutputError, CapacityError, PeerError))


def lock_journal(path: Path, kind: str, target: Path) -> Journal:
    """Make the directory in which an output grows, and lock its journal.

    Args:
        path: the directory.
        kind: what is going to be made, a directory or a file.
        target: where.

    Raises:
        OutputError: it holds what is not ours, or another process is writing there.
    """
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            if path.is_symlink() or (any(path.iterdir()) and not (path / JOURNAL_NAME).exists()):
                raise OutputError(
                    f"{path}, where the output grows",
                    got="files that eightfold did not write",
                    expected="nothing there",
                    action="Move them elsewhere and run the same command again.",
                )
            _require_unshared(path)
            return Journal(path)
        except FileNotFoundError:
            pass  # renamed or removed by the process that had it until just now
        except BlockingIOError:
            raise OutputError(
                f"output {kind} {target}",
                got="another process that is writing there",
                expected="none",
                action=f"Wait for it, or choose another {kind}.",
            ) from None


def require_space(folder: Path, target: Path, nbytes: int) -> None:
    """Fail early when the file system of a folder cannot hold so many bytes more, and what goes with them.

    Raises:
        OutputError: fewer bytes are free than `target` takes.
    """
    nbytes += _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"disk space for {target}",
            got=f"{size_text(free)} free",
            expected=size_text(nbytes),
            action="Free some space, or choose another disk.",
        )


def _require_unshared(directory: Path) -> None:
    """Refuse to write where files have names elsewhere too: what is written would change them there.

    Raises:
        OutputError: something in the directory is a link, a file with a second name, or no plain file.
    """
    for folder, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            path = Path(folder, name)
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) and not (stat.S_ISREG(info.st_mode) and info.st_nlink == 1):
                is_file = stat.S_ISREG(info.st_mode)
                raise OutputError(
                    f"{path}, which a run has begun",
                    got="a hard link" if is_file else "a link" if path.is_symlink() else "no plain file",
                    expected="a file that has no other name",
                    action="Move it elsewhere, or choose another output directory.",
                )
        if Path(folder) == directory / WORK_NAME and "old" in folders:
            folders.remove("old")  # an earlier output, which is only renamed or removed


def _seal(directory: Path, checksums: Mapping[str, int]) -> dict[str, list[int]]:
    """Give every file and folder its mode, and see it safely on disk; return name -> size and CRC-32."""
    sealed = {}
    for name in sorted(files_in(directory) - {JOURNAL_NAME}):
        path = directory / name
        path.chmod(WEIGHTS_MODE if path.suffix == ".safetensors" else JSON_MODE)
        _sync(path)
        sealed[name] = [path.stat().st_size, checksums[name] if name in checksums else checksum_of_file(path)]
    for folder in {directory, *((directory / name).parent for name in sealed)}:
        folder.chmod(DIRECTORY_MODE)
        _sync(folder)
    return sealed


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def verify_files(directory: Path, progress: Progress = silent) -> list[str]:
    """Compare the files of a directory with the sizes and checksums in its journal; return those that differ.

    Raises:
        CheckpointError: it has no journal, or none that lists its files.
    """
    sealed = closing_line(read_entries(directory) or [])
    if sealed is None:
        raise CheckpointError(
            JOURNAL_NAME,
            where=directory,
            got="no list of files with checksums",
            expected="the journal of a finished model",
            action="Only directories that eightfold has made have one.",
        )
    return _changed_files(directory, sealed, progress)


def _changed_files(directory: Path, sealed: Entry, progress: Progress) -> list[str]:
    """Return the files of a complete directory that are not what its closing line says. Other files are ignored."""
    changed = []
    there = [directory / name for name in sealed if (directory / name).is_file()]
    with by_bytes(progress, "verify", sum(path.stat().st_size for path in there)) as task:
        for name, expected in sealed.items():
            task.at(name)
            path = directory / name
            try:
                found = [path.stat().st_size, checksum_of_file(path, task.advance)]
            except (OSError, CheckpointError):
                found = []
            if found != expected:
                changed.append(name)
    return changed
