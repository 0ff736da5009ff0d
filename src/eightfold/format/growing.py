"""A model directory that grows: a run that is killed leaves finished steps, and the next one goes on with them.

It grows where it is going to be, with a journal (journal.py) that tells what is finished. What makes a directory a
model comes last: config.json, then the closing line of the journal. A model that is to be replaced stays whole until
then: its successor grows in a hidden sibling, `.NAME.partial-quantize`, and the two change places at the end.

    OUT is                                            grows in     and is refused
    absent or empty                                   OUT
    begun, by the same command                        OUT
    begun, by another one                             OUT          without --overwrite
    complete, by the same command                     nowhere: there is nothing to do
    complete, by another one, or changed since        the sibling  without --overwrite
    anything else that `eightfold quantize` wrote     the sibling  without --overwrite
    somebody else's                                                always
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from eightfold.errors import CapacityError, EightfoldError, OutputError, PeerError, remember_kept, shortlist
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.journal import JOURNAL_NAME, WORK_NAME, Entry, Journal, progress_text, read_entries
from eightfold.format.safetensors import checksum_of
from eightfold.format.writer import (
    DIRECTORY_MODE,
    final_mode,
    move_into,
    put_in_place,
    remove_dead_siblings,
    remove_replaced,
    require_directory_place,
    require_space,
    restore_replaced,
)
from eightfold.progress import Progress, silent

REPORT_NAME = "eightfold_report.json"  # in everything that quantize has ever written
_PREFIX = "quant_model_"  # of weights, their index, and descriptions

# What differs between two first lines of a journal, for the user; empty when nothing does.
Explain = Callable[[Entry, Entry], list[str]]


class GrowingDirectory:
    """Context manager: `path` is where to write, and `finish` makes it the target.

    Leaving it with an error removes what was written, unless running again would help and a step is finished.

    Attributes:
        target: the directory to make.
        path: where it grows.
        journal: its journal, locked.
        is_complete: whether there is nothing to do.
    """

    def __init__(
        self,
        target: Path,
        *,
        source: Path,
        head: Entry,
        explain: Explain,
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Check the target.

        Raises:
            OutputError: it is somebody else's, not empty (without `overwrite`), or holds or lies inside the source.
        """
        check_target(target, source=source, overwrite=overwrite)
        self.target, self._source = Path(os.path.realpath(target)), source
        self._head, self._explain, self._overwrite, self._progress = head, explain, overwrite, progress
        self.is_complete = False
        self._is_beside = self._is_made = False
        self._locks: list[Journal] = []

    def __enter__(self) -> GrowingDirectory:
        try:
            self._open()
        except BaseException as error:
            self._forget_empty()
            self._unlock()
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write to {self.target}: {error.strerror or error}",
                action="Choose a directory you may write to.",
            ) from None
        return self

    def _forget_empty(self) -> None:
        """Remove a directory that this run has made and could write nothing into."""
        if not self._is_made:
            return
        if self._locks and not self.journal.steps:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self._locks:
            with suppress(OSError):
                self.target.rmdir()

    def _open(self) -> None:
        target = self.target
        self._is_mount = target.is_dir() and os.path.ismount(target)
        beside = sibling(target)
        remove_dead_siblings(beside.parent, f".{target.name}.partial-")
        remove_replaced(target)
        if self._overwrite and (_is_ready(beside, self._head) or self._must_stay()):
            self._is_beside, self._is_made = True, not beside.exists()
            self._take(beside)
        elif not self.is_complete:
            self._is_made = not target.exists()
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take(target)
        if not self._is_beside:
            _remove_abandoned(beside, is_empty=self.is_complete)

    def _must_stay(self) -> bool:
        """Whether the target holds a model that only its successor may replace. Sets is_complete."""
        content = _content(self.target)
        if JOURNAL_NAME not in {path.name for path in content}:
            return bool(content)
        self.path = self.target
        self.journal = self._lock(self.target)
        if self.journal.complete is None:
            self._unlock()
            return False
        self.is_complete = self._is_unchanged(self.journal)
        return not self.is_complete

    def _take(self, path: Path) -> None:
        """Make a directory the one that grows."""
        path.mkdir(mode=0o700, exist_ok=True)
        self.path, self.journal = path, self._lock(path)
        if self.journal.complete is not None and path == self.target:
            self.is_complete = self._is_unchanged(self.journal)
            return
        if not self.journal.head:
            self._require_untouched()
        elif differences := self._explain(self.journal.head, self._head):
            if not self._overwrite:
                raise self._other_command(differences, "a model begun")
            self.restart()
        if not self.journal.head:
            self.journal.append(self._head)
        self.work.mkdir(mode=0o700, exist_ok=True)

    def _lock(self, path: Path) -> Journal:
        journal = Journal(path)
        self._locks.append(journal)
        return journal

    def _unlock(self) -> None:
        for journal in self._locks:
            journal.close()
        self._locks.clear()

    @property
    def overwrites(self) -> bool:
        """Whether what is there may be replaced."""
        return self._overwrite

    @property
    def work(self) -> Path:
        """Where files lie that only a run at work needs."""
        return self.path / WORK_NAME

    def _is_unchanged(self, journal: Journal) -> bool:
        """Whether a complete directory is what this command would make; without --overwrite it has to be."""
        if differences := self._explain(journal.head, self._head):
            if self._overwrite:
                return False
            raise self._other_command(differences, "a model made")
        changed = _changed_files(self.target, journal, self._progress)
        if changed and not self._overwrite:
            raise OutputError(
                f"output directory {self.target}",
                got=f"files changed since it was made ({shortlist(changed)})",
                expected="them as they were",
                action="Choose another directory, or make it anew with --overwrite.",
            )
        if not changed and self.work.exists():  # a run was killed when it had closed the journal
            shutil.rmtree(self.work, ignore_errors=True)
        return not changed

    def _other_command(self, differences: list[str], what: str) -> OutputError:
        return OutputError(
            f"output directory {self.target}",
            got=f"{what} otherwise ({'; '.join(differences)})",
            expected="the same recipe and source",
            action="Choose another directory, or start over with --overwrite.",
        )

    def _require_untouched(self) -> None:
        """Refuse a place that somebody else has filled since it was looked at."""
        if [path for path in _content(self.path) if path.name not in (JOURNAL_NAME, WORK_NAME)]:
            self.journal.path.unlink()
            self._is_made = False
            raise OutputError(
                f"output directory {self.target}",
                got="files that another process put there meanwhile",
                expected="an empty one",
                action="Nothing was replaced; run again with another directory.",
            )

    def restart(self) -> None:
        """Forget all that was written, as if nothing had been begun."""
        self._empty()  # first: with its lines and without its files, a journal is found out
        self.journal.clear()
        self.journal.append(self._head)
        self.work.mkdir(mode=0o700, exist_ok=True)

    def _empty(self) -> None:
        """Remove what runs write; what somebody else has put there stays."""
        for path in self.path.iterdir():
            if self._is_written(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _is_written(self, name: str) -> bool:
        if name in (CONFIG_NAME, REPORT_NAME, WORK_NAME) or name.startswith(_PREFIX):
            return True
        return name != JOURNAL_NAME and (self._source / name).exists()  # carried over

    def require_space(self, nbytes: int) -> None:
        """Fail early when the file system cannot hold so many bytes more.

        Raises:
            OutputError: fewer bytes are free.
        """
        require_space(self.path, nbytes, self.target)

    def finish(self, checksums: dict[str, int]) -> None:
        """Close the journal and put the directory in its place.

        Args:
            checksums: CRC-32 of files, by name, for which it is known; of the others it is computed.
        """
        if self.journal.complete is None:
            sealed = _seal(self.path, checksums)
            self.path.chmod(DIRECTORY_MODE)
            self.journal.append({"complete": sealed})
        shutil.rmtree(self.work, ignore_errors=True)
        if self._is_beside and self._is_mount:
            move_into(self.target, self.path, self._replaced_content(), last=("config.json", JOURNAL_NAME))
        elif self._is_beside:
            put_in_place(self.path, self.target)

    def _replaced_content(self) -> list[Path]:
        """Return what is in the target, without what a killed run has moved there already."""
        assert self.journal.complete is not None
        moved = {Path(name).parts[0] for name in self.journal.complete} - {path.name for path in self.path.iterdir()}
        return [path for path in _content(self.target) if path.name not in moved]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                return
            # A signal may have come between a line and our note of it; a directory in its place is no longer at `path`.
            entries = read_entries(self.path) or self.journal.entries
            if self.is_complete or _is_worth_keeping(entries, error):
                done = progress_text(entries)
                remember_kept(error, f"{done} are finished in {self.path}. Run the same command to go on there.")
            else:
                self._discard()
        finally:
            self._unlock()

    def _discard(self) -> None:
        is_resumed = bool(self.journal.steps)
        self._empty()
        self.journal.path.unlink(missing_ok=True)
        if self._is_made or (is_resumed and not self._is_mount):
            with suppress(OSError):  # somebody else's files are there
                self.path.rmdir()


def check_target(target: Path, *, source: Path, overwrite: bool) -> None:
    """Refuse an output directory that can be refused without knowing what is going to be made.

    Raises:
        OutputError: it is somebody else's, not empty (without `overwrite`), or holds or lies inside the source.
    """
    target = Path(os.path.realpath(target))
    restore_replaced(target)
    require_directory_place(target, Path(os.path.realpath(source)))
    names = {path.name for path in _content(target)}
    if not names or JOURNAL_NAME in names:
        return
    if not overwrite:
        raise OutputError(
            f"output directory {target}",
            got="a directory that is not empty",
            expected="a new or empty one",
            action="Choose another, or replace it with --overwrite.",
        )
    if REPORT_NAME not in names and not sibling(target, inside=True).is_dir():
        raise OutputError(
            f"output directory {target}",
            got="files that `eightfold quantize` did not write",
            expected="a model that it made",
            action="Choose another, or empty it yourself.",
        )


def sibling(target: Path, inside: bool | None = None) -> Path:
    """Return where the successor of a target grows: beside it, or inside a mount point, which cannot be renamed."""
    if inside is None:
        inside = target.is_dir() and os.path.ismount(target)
    return (target if inside else target.parent) / f".{target.name}.partial-quantize"


def _is_worth_keeping(entries: list[Entry], error: BaseException) -> bool:
    """Whether a step is finished, and running again may not meet the error."""
    helps = not isinstance(error, EightfoldError) or isinstance(error, (OutputError, CapacityError, PeerError))
    return helps and any("step" in entry for entry in entries)


def _content(target: Path) -> list[Path]:
    """Return what a target holds, apart from what runs into a mount point leave inside it."""
    if not target.is_dir():
        return []
    return [path for path in target.iterdir() if not path.name.startswith(f".{target.name}.partial-")]


def _is_ready(path: Path, head: Entry) -> bool:
    """Whether a sibling is complete and only has to be put in place."""
    if not (path / JOURNAL_NAME).is_file():
        return False
    journal = Journal(path)
    try:
        return journal.complete is not None and journal.head == _plain(head)
    finally:
        journal.close()


def _plain(head: Entry) -> Entry:
    """Return an entry as it comes back from a file."""
    plain: Entry = json.loads(json.dumps(head))
    return plain


def _remove_abandoned(path: Path, *, is_empty: bool) -> None:
    """Remove a sibling that nobody is at work in and nobody can ask for any more; or only an empty one."""
    if is_empty or not (path / JOURNAL_NAME).is_file():
        with suppress(OSError):
            path.rmdir()
        return
    try:
        journal = Journal(path)
    except OutputError:
        return
    shutil.rmtree(path, ignore_errors=True)
    journal.close()


def _seal(path: Path, checksums: dict[str, int]) -> dict[str, list[int]]:
    """Give every file its mode, and see it safely on disk; return name -> size and CRC-32."""
    found = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        if name == JOURNAL_NAME or name.startswith("."):
            continue
        entry.chmod(final_mode(entry))
        if entry.is_file():
            file = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(file)
                size = os.fstat(file).st_size
                checksum = checksums[name] if name in checksums else checksum_of(file, 0, size)
            finally:
                os.close(file)
            found[name] = [size, checksum]
    _sync_directory(path)
    return found


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _changed_files(path: Path, journal: Journal, progress: Progress) -> list[str]:
    """Return the files of a complete directory that are not what its closing line says. Files of others are ignored."""
    assert journal.complete is not None
    changed = []
    with progress("verify", len(journal.complete), "file") as task:
        for name, (size, checksum) in journal.complete.items():
            task.at(name)
            if not _is_as_sealed(path / name, size, checksum):
                changed.append(name)
            task.advance()
    return changed


def _is_as_sealed(path: Path, size: int, checksum: int) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.fstat(file).st_size == size and checksum_of(file, 0, size) == checksum
    finally:
        os.close(file)
