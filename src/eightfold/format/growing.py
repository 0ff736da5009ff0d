"""A model directory that grows: a run that is killed leaves finished steps, and the next one goes on with them.

It grows where it is going to be, with a journal (journal.py) that tells what is finished. What makes a directory a
model comes last: config.json, then the closing line of the journal. A model that is to be replaced stays whole until
then: its successor grows in a hidden sibling, `.NAME.partial-quantize`, and the two change places at the end.

    OUT is                                            grows in     and is refused
    absent or empty                                   OUT
    the same, beside its complete successor           nowhere: the successor takes its place
    begun, by the same command                        OUT
    begun, by another one or an older version         OUT          without --overwrite
    complete, by the same command                     nowhere: there is nothing to do
    complete, by another one, or changed since        the sibling  without --overwrite
    anything else that `eightfold quantize` wrote     the sibling  without --overwrite
    somebody else's                                                always

Files that no run has written (owned.py) stay where they are beside what is begun; in a model that is to be replaced
they would go with it, so that is refused. So are links in what is begun, and a journal that came without its files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from eightfold.errors import CapacityError, EightfoldError, OutputError, PeerError, remember_kept, shortlist
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.journal import JOURNAL_NAME, WORK_NAME, Entry, Journal, progress_text, read_entries
from eightfold.format.owned import REPORT_NAME as REPORT_NAME
from eightfold.format.owned import (
    claimed_files,
    empty_folder,
    files_called_ours,
    has_written_name,
    is_as_sealed,
    is_its_own,
    noted_files,
    remove_files,
    replaced_note,
    require_no_links,
    says_its_files,
    seal,
    strange_entries,
)
from eightfold.format.sidecars import carried_over
from eightfold.format.writer import (
    DIRECTORY_MODE,
    is_mount_point,
    move_into,
    put_in_place,
    remove_dead_siblings,
    remove_replaced,
    require_directory_place,
    require_space,
    restore_replaced,
    write_json,
)
from eightfold.progress import Progress, silent

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
        grows = sibling(self.target) if self._is_beside else self.target
        if self._locks and self.path == grows and not self.journal.steps:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self._locks:
            with suppress(OSError):
                self.target.rmdir()

    def _open(self) -> None:
        target = self.target
        self._is_mount = is_mount_point(target)
        beside = sibling(target)
        remove_dead_siblings(beside.parent, f".{target.name}.partial-")
        remove_replaced(target)
        if (self._overwrite or not _content(target)) and (_is_ready(beside, self._head) or self._must_stay()):
            self._replaceable()
            self._is_beside, self._is_made = True, not beside.exists()
            self._take(beside)
        elif not self.is_complete:
            self._is_made = not target.exists()
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take(target)
        if not self._is_beside:
            _remove_abandoned(beside, is_empty=self.is_complete)
            replaced_note(target).unlink(missing_ok=True)

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
        if not self.journal.head or (self.journal.complete is None and not self._has_files()):
            self._require_untouched()
        require_no_links(path, self.target, self._claimed)
        if self.journal.head and (differences := self._differences()):
            if not self._overwrite:
                raise self._other_command(differences, "a model begun")
            self.restart()
        if not self.journal.head:
            self.journal.append(self._head)
        self.work.mkdir(mode=0o700, exist_ok=True)

    def _differences(self) -> list[str]:
        """Return what differs between what was begun here and what is asked for."""
        found = self._explain(self.journal.head, self._head)
        if not says_its_files(self.journal.entries):
            found.append("version of eightfold: one whose journal does not name its files")
        return found

    def _has_files(self) -> bool:
        """Whether what a journal tells of is there: a copy of the journal alone makes nothing ours."""
        found = (name for name in self._claimed if has_written_name(name) and (self.path / name).is_file())
        return self.work.is_dir() or next(found, None) is not None

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
            if self.journal.head:
                raise self._other_journal()
            self.journal.path.unlink()
            self._is_made = False
            raise OutputError(
                f"output directory {self.target}",
                got="files that another process put there meanwhile",
                expected="an empty one",
                action="Nothing was replaced; run again with another directory.",
            )

    def _other_journal(self) -> OutputError:
        return OutputError(
            f"output directory {self.target}",
            got="a journal without the files that it tells of",
            expected="both of one run",
            action=f"Choose another directory, or remove {JOURNAL_NAME} if the other files are yours.",
        )

    def restart(self) -> None:
        """Forget all that was written, as if nothing had been begun."""
        self._empty()
        self.journal.append(self._head)
        self.work.mkdir(mode=0o700, exist_ok=True)
        empty_folder(self.work)

    def _empty(self) -> None:
        """Remove what runs have written, and forget it; what somebody else has put there stays."""
        remove_files(self.path, self._claimed)  # first: with its lines and without its files, a journal is found out
        self.journal.clear()

    @property
    def _claimed(self) -> set[str]:
        entries = self.journal.entries
        claimed = claimed_files(entries)
        return claimed if says_its_files(entries) else claimed | files_called_ours(self.path, self._source)

    def require_free(self, names: Iterable[str]) -> None:
        """Refuse to write over files that no run here has written.

        Raises:
            OutputError: one is there.
        """
        if strange := [name for name in sorted(set(names) - self._claimed) if os.path.lexists(self.path / name)]:
            raise self._strange(strange, "none of these names", "run the same command again")

    def claim(self, names: Iterable[str]) -> None:
        """Note in the journal which files are going to be written.

        Raises:
            OutputError: one is there that no run here has written, or is a link.
        """
        names = set(names)
        self.require_free(names)
        require_no_links(self.path, self.target, names | self._claimed)
        if new := sorted(names - self._claimed):
            self.journal.append({"files": new})

    def _strange(self, names: list[str], expected: str, action: str) -> OutputError:
        return OutputError(
            f"output directory {self.target}",
            got=f"files that `eightfold quantize` did not write ({shortlist(names, 3)})",
            expected=expected,
            action=f"Move them elsewhere and {action}, or choose another directory.",
        )

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
            sealed = seal(self.path, sorted(self._claimed), checksums)
            self.path.chmod(DIRECTORY_MODE)
            self.journal.append({"complete": sealed})
        shutil.rmtree(self.work, ignore_errors=True)
        if self._is_beside and self._is_mount:
            self._move_into()
        elif self._is_beside:
            self._put_in_place()

    def _put_in_place(self) -> None:
        """Let the successor and what it replaces change places, which either happens or does not."""
        self._replaceable()
        try:
            put_in_place(self.path, self.target)
        except OSError as error:
            raise OutputError(
                f"output directory {self.target}",
                got=f"one that cannot be renamed ({error.strerror or error})",
                expected=f"that it can change places with {self.path}, where the new model is complete",
                action="Nothing was replaced. Empty it yourself and run the same command again.",
            ) from None

    def _move_into(self) -> None:
        """Replace a model in a mount point file by file, so that a killed run's successor knows what is to go."""
        assert self.journal.complete is not None
        gone = {Path(name).parts[0] for name in self._replaceable()}
        moved = {Path(name).parts[0] for name in self.journal.complete} - {path.name for path in self.path.iterdir()}
        content = [path for path in _content(self.target) if path.name in gone - moved]
        write_json(replaced_note(self.target), {"files": sorted({*gone, *(path.name for path in content)})})
        move_into(self.target, self.path, content, last=("config.json", JOURNAL_NAME))
        replaced_note(self.target).unlink()

    def _replaceable(self) -> set[str]:
        """Return the names of the files in the target that its successor replaces, which has to be all of them.

        Raises:
            OutputError: somebody else's are among them.
        """
        entries, names = read_entries(self.target), noted_files(self.target)
        if names:  # a killed run has begun to replace them, in a mount point
            names |= claimed_files(read_entries(sibling(self.target)) or [])
        if entries is None:
            names |= {CONFIG_NAME, REPORT_NAME, *carried_over(self._source)}
            names |= {path.name for path in _content(self.target) if has_written_name(path.name)}
        elif entries[-1:] and "complete" in entries[-1] and not is_its_own(self.target, entries[-1]["complete"]):
            raise self._other_journal()
        names |= {JOURNAL_NAME, *claimed_files(entries or [])}
        if strange := strange_entries(self.target, names, hidden=f".{self.target.name}.partial-"):
            raise self._strange(strange, "a model and nothing else, to replace it", "run the same command again")
        return names

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
        shutil.rmtree(self.work, ignore_errors=True)  # a journal that has lines goes before its folder
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
        inside = is_mount_point(target)
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


def _changed_files(path: Path, journal: Journal, progress: Progress) -> list[str]:
    """Return the files of a complete directory that are not what its closing line says. Files of others are ignored."""
    assert journal.complete is not None
    changed = []
    with progress("verify", len(journal.complete), "file") as task:
        for name, (size, checksum) in journal.complete.items():
            task.at(name)
            if not is_as_sealed(path / name, size, checksum):
                changed.append(name)
            task.advance()
    return changed
