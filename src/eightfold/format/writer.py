"""A model directory that appears whole or not at all.

Everything is written into a hidden sibling, `.NAME.partial-*`, which is renamed at the very end. A killed run leaves
only such a sibling; the next run to the same place removes it. An open lock file tells a dead sibling from one that
another process is still writing.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eightfold.errors import OutputError
from eightfold.format.safetensors import FileWriter, PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As the reference tool leaves them: weights are read-only, nothing is open to others.
DIRECTORY_MODE, WEIGHTS_MODE, JSON_MODE = 0o750, 0o400, 0o600

# Room for headers, JSON files and rounding up to file system blocks, beside the tensors themselves.
_SPARE_BYTES = 64 << 20

_LOCK = ".lock"


class OutputDirectory:
    """Context manager: `path` is where to write; leaving without an error makes it the target.

    Raises:
        OutputError: the target exists and is not empty (without `overwrite`), is not a model directory (with it),
            or holds or lies inside the source.
    """

    def __init__(self, target: Path, *, source: Path | None, overwrite: bool = False) -> None:
        self.target = Path(os.path.realpath(target))
        self._prefix = f".{self.target.name}.partial-"
        self._overwrite = overwrite
        restore_replaced(self.target)
        require_directory_place(self.target, None if source is None else Path(os.path.realpath(source)))
        self._check_content()

    def _check_content(self) -> None:
        target = self.target
        if not self._content():
            return
        if not self._overwrite:
            raise OutputError(
                f"output directory {target}",
                got="a directory that is not empty",
                expected="a new or empty one",
                action="Choose another, or replace it with --overwrite.",
            )
        if not (target / "config.json").is_file():
            raise OutputError(
                f"output directory {target}",
                got="files that are no model (there is no config.json)",
                expected="a model directory to replace",
                action="Choose another, or empty it yourself.",
            )

    def _content(self) -> list[Path]:
        """Return what the target holds, apart from what runs into a mount point leave inside it."""
        if not self.target.is_dir():
            return []
        return [path for path in self.target.iterdir() if not path.name.startswith(self._prefix)]

    def __enter__(self) -> OutputDirectory:
        try:
            # Inside a mount point there is no sibling on the same file system to rename.
            self._inside = is_mount_point(self.target)
            parent = self.target if self._inside else self.target.parent
            parent.mkdir(parents=True, exist_ok=True)
            remove_dead_siblings(parent, self._prefix)
            remove_replaced(self.target)
            self.path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=parent))
            try:
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.target}: {error.strerror or error}",
                action="Choose a directory you may write to.",
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            os.close(self._lock)
            shutil.rmtree(self.path, ignore_errors=True)

    def require_space(self, nbytes: int) -> None:
        """Fail early when the file system cannot hold so many bytes of tensors and what goes with them.

        Raises:
            OutputError: fewer bytes are free.
        """
        require_space(self.path, nbytes, self.target)

    def _commit(self) -> None:
        for path in self.path.rglob("*"):
            path.chmod(final_mode(path))
        content = self._content()
        if content and not self._overwrite:
            raise OutputError(
                f"output directory {self.target}",
                got="files that another process put there meanwhile",
                expected="an empty one",
                action="Nothing was replaced; run again with another directory.",
            )
        if self._inside:
            (self.path / _LOCK).unlink()
            move_into(self.target, self.path, content, last=("config.json",))
            return
        self.path.chmod(DIRECTORY_MODE)
        put_in_place(self.path, self.target)
        (self.target / _LOCK).unlink()  # until here a killed run's sibling is known by it


def is_mount_point(path: Path) -> bool:
    """Whether a directory is where something is mounted, if only another directory of the same file system."""
    if not path.is_dir():
        return False
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # The fifth field; a space, a tab, a line feed and a backslash are written as octal numbers.
    points = (line.split(b" ")[4] for line in mounts)
    return os.fsencode(os.path.realpath(path)) in {
        re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point) for point in points
    }


def put_in_place(made: Path, target: Path) -> None:
    """Rename a directory to the target; an old one there goes only when that has worked."""
    if not target.is_dir() or not any(target.iterdir()):
        made.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=_replaced_prefix(target), dir=target.parent))
    try:
        target.rename(old / "old")
        made.rename(target)
    except BaseException:  # Ctrl-C too
        if not target.exists():
            (old / "old").rename(target)
        old.rmdir()
        raise
    (old / "old").rename(old / "gone")  # half removed, it must not be put back
    shutil.rmtree(old, ignore_errors=True)


def move_into(target: Path, made: Path, content: list[Path], last: tuple[str, ...]) -> None:
    """Replace the content of a mount point, which cannot be renamed; what makes it a model comes last."""

    def rank(path: Path) -> int:
        return last.index(path.name) if path.name in last else -1

    # Without its config.json the old model no longer looks like one while the new files arrive.
    for path in sorted(content, key=rank, reverse=True):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(made.iterdir(), key=rank):
        path.rename(target / path.name)
    made.rmdir()


def require_directory_place(target: Path, source: Path | None) -> None:
    """Refuse a target that is a file, or that holds or lies inside the source, if there is one; both are real paths.

    Raises:
        OutputError: it is.
    """
    if source is not None and (
        target == source or source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source))
    ):
        raise OutputError(
            f"output directory {target}",
            got=f"the source {source} in the same place",
            expected="a place outside of it",
            action="Choose another output directory.",
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"output directory {target}", got="a file", expected="a new or empty directory")


def require_space(path: Path, nbytes: int, target: Path) -> None:
    """Fail early when the file system of a path cannot hold so many bytes and what goes with them.

    Raises:
        OutputError: fewer bytes are free.
    """
    nbytes += _SPARE_BYTES
    free = shutil.disk_usage(path).free
    if free < nbytes:
        raise OutputError(
            f"disk space for {target}",
            got=f"{free / 1e9:.2f} GB free",
            expected=f"{nbytes / 1e9:.2f} GB",
            action="Free some space, or choose another disk.",
        )


def final_mode(path: Path) -> int:
    """Return the permissions of a file or folder of a finished model."""
    if path.is_dir():
        return DIRECTORY_MODE
    return WEIGHTS_MODE if path.suffix == ".safetensors" else JSON_MODE


def _replaced_prefix(target: Path) -> str:
    return f".{target.name}.replaced-"


def restore_replaced(target: Path) -> None:
    """Put back the model that a run set aside and was killed before it had put the new one in its place."""
    if target.exists():
        return
    for old in target.parent.glob(f"{glob.escape(_replaced_prefix(target))}*/old"):
        old.rename(target)
        old.parent.rmdir()
        return


def remove_replaced(target: Path) -> None:
    """Remove what was set aside, once there is a model in its place."""
    if target.exists():
        for old in target.parent.glob(f"{glob.escape(_replaced_prefix(target))}*"):
            shutil.rmtree(old, ignore_errors=True)


def remove_dead_siblings(parent: Path, prefix: str) -> None:
    """Remove what killed runs have left; a lock that nobody holds tells it from what is being written."""
    for sibling in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            lock = os.open(sibling / _LOCK, os.O_RDWR)
        except OSError:
            continue  # without a lock it is not ours to judge
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(sibling, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def split_shards(plan: list[PlannedTensor], part_bytes: int | None) -> list[list[PlannedTensor]]:
    """Distribute tensors, in order, over files: a new one starts when the next tensor would reach `part_bytes`."""
    if part_bytes is None:
        return [plan]
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.nbytes >= part_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def weight_file_names(stem: str, plan: list[PlannedTensor], part_bytes: int | None) -> list[str]:
    """Return the names of the files that a ShardedWriter is going to write."""
    if part_bytes is None:
        return _shard_names(stem, None)
    return [*_shard_names(stem, len(split_shards(plan, part_bytes))), _index_name(stem)]


def _shard_names(stem: str, count: int | None) -> list[str]:
    if count is None:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


class ShardedWriter:
    """Writes planned tensors into one file, or into numbered shards with an index."""

    def __init__(
        self,
        directory: Path,
        stem: str,
        plan: list[PlannedTensor],
        *,
        part_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        """Make the files, or with `resume` go on with those of an earlier writer; see FileWriter."""
        self._directory, self._stem, self._plan = directory, stem, plan
        shards = split_shards(plan, part_bytes)
        names = _shard_names(stem, None if part_bytes is None else len(shards))
        self._weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        self._has_index = part_bytes is not None
        self._files: dict[str, FileWriter] = {}
        try:
            for name, shard in zip(names, shards, strict=True):
                self._files[name] = FileWriter(directory / name, shard, metadata, resume=resume)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one planned tensor; BF16 as uint16 bit patterns."""
        self._files[self._weight_map[name]].write(name, array)

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Write the next elements of a planned tensor that comes in pieces; see FileWriter.append."""
        self._files[self._weight_map[name]].append(name, array)

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a tensor that is written."""
        return self._files[self._weight_map[name]].checksums[name]

    def file_checksums(self) -> dict[str, int]:
        """Return the CRC-32 of every weight file, by name, once all is written."""
        return {name: file.checksum() for name, file in self._files.items()}

    def take_over(self, name: str) -> int:
        """Leave a tensor as an earlier writer wrote it; return the CRC-32 of its bytes as they are in the file."""
        return self._files[self._weight_map[name]].take_over(name)

    def sync(self) -> None:
        """Return when what was written would survive a loss of power."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Finish all files and write the index of a sharded checkpoint."""
        for file in self._files.values():
            file.close()
        if self._has_index:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in self._plan)},
                "weight_map": self._weight_map,
            }
            write_json(self._directory / _index_name(self._stem), index)

    def abandon(self) -> None:
        """Close all files as they are, after a failure."""
        for file in self._files.values():
            file.abandon()


def total_bytes(plan: Iterable[PlannedTensor]) -> int:
    """Return the bytes of tensor data in a plan."""
    return sum(tensor.nbytes for tensor in plan)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented as the reference tool does."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
