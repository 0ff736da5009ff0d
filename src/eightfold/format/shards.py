"""Planned tensors as one safetensors file, or as numbered shards with an index.

The tensors are known beforehand, so headers come first; tensors then come in any order, each to its place, and an
interrupted writer's files can be gone on with. What is written goes to the disk a window behind the writer, and is
dropped from memory: files larger than memory would fill it (docs/scale.md).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.config import DType
from eightfold.errors import OutputError
from eightfold.files import write_json
from eightfold.format.safetensors import checksum_of, checksum_of_parts, drop, numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of a cache line, and of the widest vector.
ALIGNMENT = 64

# Written bytes are handed to the disk in windows of this size. Smaller ones cost seeks, larger ones memory: three are
# on their way at most.
WINDOW = 64 << 20

# Of fcntl.h: wait for what is being written, begin to write, wait again.
_BEGIN, _FINISH = 2, 7


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def total_bytes(plan: Iterable[PlannedTensor]) -> int:
    """Return the bytes of tensor data in a plan."""
    return sum(tensor.nbytes for tensor in plan)


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


class WriteBehind:
    """Sends what is written to the disk a window behind the writer, and drops it from memory.

    An error of the disk is raised here: whoever waits for writing is told of it, and fsync then is not told again.
    Where a system has no such call nothing happens.
    """

    def __init__(self, file: int, window: int = WINDOW) -> None:
        self._file, self._window = file, window
        self._open: list[tuple[int, int]] = []  # (begin, end) of what was written since the last window
        self._begun: list[tuple[int, int]] = []  # the window before
        self._nbytes = 0

    def wrote(self, begin: int, end: int) -> None:
        """Take note of bytes that were written."""
        if self._open and self._open[-1][1] == begin:
            self._open[-1] = self._open[-1][0], end
        else:
            self._open.append((begin, end))
        self._nbytes += end - begin
        if self._nbytes >= self._window:
            self._turn()

    def _turn(self) -> None:
        sync = _sync_file_range()
        if sync is not None:
            for begin, end in self._open:
                _require(sync(self._file, begin, end - begin, _BEGIN))
            for begin, end in self._begun:
                _require(sync(self._file, begin, end - begin, _FINISH))
                drop(self._file, begin, end)
        self._open, self._begun, self._nbytes = [], self._open, 0


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call: Callable[[int, int, int, int], int] = function
    return call


def _require(result: int) -> None:
    """Raise what a call has failed with, unless the system cannot do it with such a file."""
    error = ctypes.get_errno()
    if result < 0 and error not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM, errno.EINTR):
        raise OSError(error, os.strerror(error))


class _Shard:
    """One open file.

    Attributes:
        path: the file.
        places: where the bytes of each tensor begin in it, in the order of the file.
        header_checksum: CRC-32 of what comes before the tensors.
    """

    def __init__(self, path: Path, plan: list[PlannedTensor], metadata: Mapping[str, str] | None, resume: bool) -> None:
        self.path = path
        header, offsets = _lay_out(plan, metadata)
        self.places = {name: len(header) + offset for name, offset in offsets.items()}
        self.header_checksum = zlib.crc32(header)
        try:
            self.file = os.open(path, os.O_RDWR if resume else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            raise self._not_the_one("no such file") from None
        self._behind, self._is_dirty = WriteBehind(self.file), True
        try:
            if not resume:
                self.write(header, 0)
            elif os.pread(self.file, len(header), 0) != header:
                raise self._not_the_one("another header")
        except BaseException:
            self.close()
            raise

    def _not_the_one(self, got: str) -> OutputError:
        action = "Delete the directory with this file, and start again."
        expected = "what an earlier run has begun"
        return OutputError("weights to go on with", where=self.path, got=got, expected=expected, action=action)

    def write(self, data: bytes | memoryview, at: int) -> None:
        self._is_dirty = True
        begin = at
        while data:
            written = os.pwrite(self.file, data, at)
            data, at = data[written:], at + written
        self._behind.wrote(begin, at)

    def sync(self) -> None:
        if self._is_dirty:
            os.fdatasync(self.file)
            self._is_dirty = False

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _lay_out(plan: list[PlannedTensor], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Give every tensor its place; return the header, and where each begins behind it, in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, at = {}, 0
    # Whole cache lines first, then wide elements: weights start at a multiple of ALIGNMENT, which makes reading
    # them from the mapped file faster, and all tensors at one of their element size.
    for tensor in sorted(plan, key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, -tensor.dtype.itemsize)):
        header[tensor.name] = {
            "dtype": tensor.dtype.value,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        offsets[tensor.name] = at
        at += tensor.nbytes
    blob = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-(8 + len(blob)) % ALIGNMENT)
    return len(blob).to_bytes(8, "little") + blob, offsets


class ShardedWriter:
    """Context manager: writes planned tensors into one file, or into numbered shards with an index, each tensor once.

    Attributes:
        checksums: CRC-32 of the bytes of every tensor that is written.
    """

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
        """Make the files, or with `resume` go on with those that an earlier writer of the same plan has left.

        Raises:
            OutputError: a file to go on with is not there, or of another plan.
            OSError: one cannot be written.
        """
        self.checksums: dict[str, int] = {}
        self._pending = {tensor.name: tensor for tensor in plan}
        self._begun: dict[str, tuple[int, int]] = {}  # of a tensor that comes in pieces: bytes written, their CRC-32
        self._nbytes = total_bytes(plan)
        self._index = None if part_bytes is None else directory / f"{stem}.safetensors.index.json"
        shards = split_shards(plan, part_bytes)
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, _Shard] = {}  # in the order of the plan
        try:
            for i, tensors in enumerate(shards, 1):
                part = "" if part_bytes is None else f"-{i:05d}-of-{len(shards):05d}"
                shard = _Shard(directory / f"{stem}{part}.safetensors", tensors, metadata, resume)
                self._shards.append(shard)
                self._shard_of.update({tensor.name: shard for tensor in tensors})
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.abandon() if kind else self.close()

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one tensor; its dtype and shape must be the planned ones; BF16 as uint16 bit patterns."""
        assert array.shape == self._pending[name].shape, (name, array.shape, self._pending[name].shape)
        self.append(name, array)

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Write the next elements of a tensor that comes in pieces, from its first element to its last."""
        tensor, shard = self._pending[name], self._shard_of[name]
        assert array.dtype == numpy_dtype(tensor.dtype), (name, array.dtype, tensor.dtype)
        begun, checksum = self._begun.get(name, (0, 0))
        assert begun + array.nbytes <= tensor.nbytes, (name, begun, array.nbytes, tensor.nbytes)
        if array.nbytes:
            import numpy as np

            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(data, checksum)
            shard.write(data, shard.places[name] + begun)
        self._begun[name] = begun + array.nbytes, checksum
        if begun + array.nbytes == tensor.nbytes:
            self.checksums[name] = checksum
            del self._pending[name], self._begun[name]

    def take_over(self, name: str) -> int:
        """Leave a tensor as an earlier writer wrote it; return the CRC-32 of its bytes as they are in the file."""
        tensor, shard = self._pending.pop(name), self._shard_of[name]
        begin = shard.places[name]
        self.checksums[name] = checksum_of(shard.file, begin, begin + tensor.nbytes)
        return self.checksums[name]

    def file_checksums(self) -> dict[str, int]:
        """Return what checksum_of_file() would say of every file, by name, once all is written."""
        return {
            shard.path.name: checksum_of_parts([shard.header_checksum, *map(self.checksums.__getitem__, shard.places)])
            for shard in self._shards
        }

    def sync(self) -> None:
        """Return when what was written would survive a loss of power."""
        for shard in self._shards:
            shard.sync()

    def close(self) -> None:
        """Finish all files, for which every tensor must have been written, and write the index."""
        assert not self._pending, f"never written: {list(self._pending)}"
        self.abandon()
        if self._index is not None:
            weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
            write_json(self._index, {"metadata": {"total_size": self._nbytes}, "weight_map": weight_map})

    def abandon(self) -> None:
        """Close all files as they are; twice is allowed."""
        for shard in self._shards:
            shard.close()
