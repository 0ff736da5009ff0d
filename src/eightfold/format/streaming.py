"""Tensors that are written step by step, and what an earlier run has left of them.

    journal: the first line | {"step": "layer 0", "tensors": {name: CRC-32}} | ...

What makes tensors with torch takes the parts (quant/writing.py); what only copies or repacks them gives a list of items
to write_items(), which holds a piece of one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eightfold.errors import OutputError, shortlist
from eightfold.format.directory import copy_files, list_sidecars, resolve_auto_map
from eightfold.format.journal import Entry
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, ShardedWriter, total_bytes
from eightfold.format.stored import StoredTensors
from eightfold.format.tokenizer_files import write_for_both
from eightfold.progress import Progress, by_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Damaged(Exception):
    """What an earlier run has left is not what its journal says."""


@dataclass(frozen=True)
class Item:
    """One tensor of an output.

    Attributes:
        planned: its name, dtype and shape.
        step: of the journal.
        pieces: makes its elements, in order, in arrays of the planned dtype.
    """

    planned: PlannedTensor
    step: str
    pieces: Callable[[], Iterable[NDArray[Any]]]


def write_items(
    output: Output,
    stem: str,
    items: Sequence[Item],
    *,
    title: str,
    part_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress,
) -> dict[str, int]:
    """Write all tensors of an output, or those that an earlier run has not written.

    Args:
        output: open, and not complete.
        stem: of the names of the files.
        items: those of a step stand together.
        title: of the progress bar.
        part_bytes: start a new file at this size; None writes one file.
        metadata: of the header.
        progress: who is told.

    Returns:
        checksum_of_file() of every file, by name, for Output.finish().
    """
    try:
        return _write(output, stem, items, title, part_bytes, metadata, progress)
    except Damaged:
        output.restart()
        return _write(output, stem, items, title, part_bytes, metadata, progress)


def _write(
    output: Output,
    stem: str,
    items: Sequence[Item],
    title: str,
    part_bytes: int | None,
    metadata: Mapping[str, str] | None,
    progress: Progress,
) -> dict[str, int]:
    planned = [item.planned for item in items]
    steps: dict[str, list[Item]] = {}
    for item in items:
        steps.setdefault(item.step, []).append(item)
    with open_writer(output, stem, planned, part_bytes, metadata) as files:
        written = take_over(output.journal.entries, files, progress)
        output.require_space(total_bytes(tensor for tensor in planned if tensor.name not in written))
        with by_bytes(progress, title, total_bytes(planned)) as task:
            for step, members in steps.items():
                is_written = step in output.journal.steps
                for item in members:
                    if not is_written:
                        task.at(item.planned.name)
                        _write_item(files, item)
                    task.advance(item.planned.nbytes)
                if not is_written:
                    files.sync()
                    names = [item.planned.name for item in members]
                    output.journal.append({"step": step, "tensors": {name: files.checksums[name] for name in names}})
    return files.file_checksums()


def _write_item(files: ShardedWriter, item: Item) -> None:
    for piece in item.pieces():
        files.append(item.planned.name, piece)


def open_writer(
    output: Output,
    stem: str,
    planned: list[PlannedTensor],
    part_bytes: int | None,
    metadata: Mapping[str, str] | None = None,
) -> ShardedWriter:
    """Return the writer of the weights: new, or where an earlier run has begun to write.

    Raises:
        Damaged: the files of an earlier run are not what they were.
    """
    is_begun = any("tensors" in entry for entry in output.journal.entries)
    for file in output.path.glob("*.safetensors*"):
        if is_begun:
            file.chmod(0o600)
        else:
            file.unlink()
    try:
        return ShardedWriter(output.path, stem, planned, part_bytes=part_bytes, metadata=metadata, resume=is_begun)
    except OutputError as error:
        raise Damaged(str(error)) from None


def take_over(entries: Sequence[Entry], files: ShardedWriter, progress: Progress) -> set[str]:
    """Leave what an earlier run has written; return the names of those tensors.

    Raises:
        Damaged: some are not what it has written.
    """
    steps = [entry for entry in entries if "tensors" in entry]
    if not steps:
        return set()
    with progress("verify", len(steps), "step") as task:
        for entry in steps:
            task.at(entry["step"])
            checksums = entry["tensors"].items()
            if damaged := [name for name, checksum in checksums if files.take_over(name) != checksum]:
                raise Damaged(shortlist(damaged, 3))
            task.advance()
    return {name for entry in steps for name in entry["tensors"]}


def copy_companions(stored: StoredTensors, output: Output) -> tuple[Mapping[str, Any], list[str]]:
    """Copy the files that go with the weights; return the config to write, and notes for the user."""
    raw, modules, note = resolve_auto_map(stored.config_raw, stored.directory)
    copy_files([*list_sidecars(stored.directory), *modules], stored.directory, output.path)
    return raw, [text for text in (note, write_for_both(output.path)) if text]


_PIECE_BYTES = 8 << 20  # what is copied at a time, as it stays in the caches


def pieces_of(stored: StoredTensors, name: str) -> Iterator[NDArray[Any]]:
    """Yield the elements of a stored tensor in order, some whole rows at a time, and let go of each again."""
    array = stored.array(name)
    rows = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
    row_bytes = max(1, rows.shape[1] * rows.itemsize)
    step = max(1, _PIECE_BYTES // row_bytes)
    for at in range(0, len(rows), step):
        piece = rows[at : at + step]
        yield piece
        stored.release_part(name, at * row_bytes, (at + len(piece)) * row_bytes)
