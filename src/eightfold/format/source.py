"""What a directory is made of: its source, as the first line of a journal knows it, and as two of them differ.

A weight file counts by its size and the CRC-32 of its bytes: of all in a small model, of the header and samples of
every tensor in a large one. Times do not count, so that a copy of the source is the same source. What enters the
output of an unfinished run must be one source to the last byte, so there a large one's times count too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from eightfold.errors import OutputError, shortlist
from eightfold.files import open_regular, write_json
from eightfold.format.description import find_description
from eightfold.format.directory import CONFIG_NAME, list_sidecars, resolve_auto_map
from eightfold.format.journal import Entry, Journal
from eightfold.format.safetensors import TensorInfo, checksum_of, checksum_of_parts
from eightfold.format.stored import StoredTensors

WHOLE_BYTES = 1 << 30  # up to this size, all of a source counts
_SAMPLE_BYTES = 4096  # of each of these many places of a tensor
_PLACES = 4

_TIMES_NAME = "times.json"


def source_facts(stored: StoredTensors) -> dict[str, list[int]]:
    """Return the files of a model that something is made of: name -> size, and CRC-32 of what counts of it."""
    return {_name_of(stored, path): _file_identity(stored, path) for path in source_files(stored)}


def source_differences(old: Entry, new: Entry) -> list[str]:
    """Return what differs between what two first lines say of their source."""
    old_files, new_files = old.get("source", {}), json.loads(json.dumps(new.get("source", {})))
    changed = [name for name in sorted({**old_files, **new_files}) if old_files.get(name) != new_files.get(name)]
    found = []
    for name in changed[:3]:
        change = (
            "has changed" if name in old_files and name in new_files else "is new" if name in new_files else "is gone"
        )
        found.append(f"source: {name} {change}")
    if len(changed) > 3:
        found.append(f"and {len(changed) - 3} more files of the source")
    return found


def _is_large(stored: StoredTensors) -> bool:
    return sum(path.stat().st_size for path in {info.file for info in stored.tensors.values()}) > WHOLE_BYTES


def source_files(stored: StoredTensors) -> list[Path]:
    """Return the files of a model that are read to make another one, sorted by name."""
    found = {info.file for info in stored.tensors.values()}
    if (description := find_description(stored.directory)) is not None:
        found.add(description)
    _, modules, _ = resolve_auto_map(stored.config_raw, stored.directory)
    return sorted({stored.directory / CONFIG_NAME, *found, *list_sidecars(stored.directory), *modules})


def _name_of(stored: StoredTensors, path: Path) -> str:
    """Return a file's path inside the model, wherever that is: names alone may be the same in two folders."""
    return path.relative_to(stored.directory).as_posix()


def _file_identity(stored: StoredTensors, path: Path) -> list[int]:
    """Return a file's size and the CRC-32 of what counts of it."""
    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        infos = [info for info in stored.tensors.values() if info.file == path]
        if not infos or not _is_large(stored):
            return [size, checksum_of(file, 0, size)]
        return [size, checksum_of_parts(checksum_of(file, begin, end) for begin, end in _sampled_spans(infos))]
    finally:
        os.close(file)


def _sampled_spans(infos: Sequence[TensorInfo]) -> Iterator[tuple[int, int]]:
    yield 0, min((info.begin for info in infos), default=0)
    for info in infos:
        for place in range(_PLACES):
            begin = info.begin + max(0, info.nbytes - _SAMPLE_BYTES) * place // (_PLACES - 1)
            yield begin, min(begin + _SAMPLE_BYTES, info.end)


def _file_times(stored: StoredTensors) -> dict[str, int]:
    """Return when the weight files of a large model, of which identity() sees samples, were last changed."""
    files = {info.file for info in stored.tensors.values()} if _is_large(stored) else set()
    return {_name_of(stored, path): path.stat().st_mtime_ns for path in files}


class Held(Protocol):
    """What grows of a source: a directory or a file, with a journal."""

    overwrite: bool

    @property
    def journal(self) -> Journal:
        """What is finished."""

    @property
    def work(self) -> Path:
        """Where files lie that only a run at work needs."""

    def begun_otherwise(self, differences: list[str], what: str) -> OutputError:
        """Return the refusal of what was made of something else."""

    def restart(self) -> None:
        """Forget all that was written."""


def hold_source(stored: StoredTensors, output: Held) -> None:
    """See to it that all of an output is made of one source: of a run that goes on, that it has not changed since.

    Raises:
        OutputError: a large weight file has changed since the run began.
    """
    if output.journal.steps:
        require_same_times(stored, output)
    if not output.journal.steps:
        keep_times(stored, output)


def keep_times(stored: StoredTensors, output: Held) -> None:
    """Note for a new start of this run when the weight files were last changed."""
    write_json(output.work / _TIMES_NAME, _file_times(stored))


def require_same_times(stored: StoredTensors, output: Held) -> None:
    """Refuse a large weight file that has changed since the run began, or begin anew where that is wished.

    Raises:
        OutputError: one has changed.
    """
    try:
        before = json.loads((output.work / _TIMES_NAME).read_text())
    except (OSError, ValueError):
        return  # removed at the end: nothing more is read of the source's weights
    changed = [name for name, time in _file_times(stored).items() if before.get(name) != time]
    if changed and not output.overwrite:
        raise output.begun_otherwise([f"source: {shortlist(changed, 3)} changed since"], "a model begun")
    if changed:
        output.restart()
