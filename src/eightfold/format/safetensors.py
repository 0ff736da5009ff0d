"""The safetensors container: a validated header, memory-mapped reading, and checksums.

    u64 little-endian header length | JSON header, padded with spaces | tensor bytes without holes

A file is not trusted: every name, dtype, shape and offset is checked against the file's size before a byte of
tensor data is touched. BF16 has no numpy type; such arrays are uint16 holding the bit patterns.

Not here: writing (shards.py), which file holds which tensor (checkpoint.py), and what a tensor means (scheme.py).

Source: the format's own README (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.files import open_regular, parse_json, refuse_pointer
from eightfold.progress import printable
from eightfold.values import MAX_INT, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The reference implementation takes 100 MB. A header has about 150 bytes for each tensor of one file.
MAX_HEADER_BYTES = 64 << 20

MAX_DIMENSIONS = 8

_FETCH_AGAIN = "The file is damaged; fetch or write it again."

# Every element type of the container, so that foreign tensors are named and not called damage.
_ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  # a safetensors name; those of DType are the ones this program reads
    shape: tuple[int, ...]
    file: Path
    begin: int  # bytes from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and validate the header of one safetensors file.

    Returns:
        Tensors by name, in file order.

    Raises:
        CheckpointError: the file is truncated, or its header lies.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size, begin = os.fstat(file.fileno()).st_size, file.read(8)
            refuse_pointer(begin, path)
            length = int.from_bytes(begin, "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    "header",
                    where=path,
                    got=f"{length} bytes announced in a file of {size}",
                    expected="a header inside the file"
                    if size < 8 or length > size - 8
                    else f"at most {MAX_HEADER_BYTES} bytes",
                    action=_FETCH_AGAIN,
                )
            blob = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    entries = parse_json(blob, path, "header")
    entries.pop("__metadata__", None)
    infos = {name: _tensor_info(name, entry, path, 8 + length) for name, entry in entries.items()}
    _check_layout(infos, path, 8 + length, size)
    return infos


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    # Its very type: bool is an int in Python, and a size of `true` would pass arithmetic unnoticed.
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110 (of a file's thousands of entries all() takes twice as long)
        if type(value) is not int or not 0 <= value <= MAX_INT:
            return False
    return True


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _lie(name, path, "header entry", shown(entry), "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise _lie(name, path, "dtype", shown(dtype), "a safetensors type name")
    if not _are_counts(shape):
        raise _lie(name, path, "shape", shown(shape), "a list of sizes below 2^63")
    if len(shape) > MAX_DIMENSIONS:
        raise _lie(name, path, "shape", f"{len(shape)} dimensions", f"at most {MAX_DIMENSIONS}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _lie(name, path, "data_offsets", shown(offsets), "two byte offsets below 2^63")
    begin, end = offsets
    nbytes = math.prod(shape) * _ELEMENT_BYTES[dtype]
    if end - begin != nbytes:
        raise _lie(name, path, "data_offsets", f"{end - begin} bytes", f"{nbytes} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _lie(name: str, path: Path, field: str, got: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{field} of {name}", where=path, got=got, expected=expected, action=_FETCH_AGAIN)


def _check_layout(infos: Mapping[str, TensorInfo], path: Path, data_start: int, size: int) -> None:
    at = data_start
    for info in sorted(infos.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != at:
            kind = "overlaps its neighbour" if info.begin < at else "leaves a hole before it"
            raise CheckpointError(
                f"data_offsets of {info.name}",
                where=path,
                got=f"a place that {kind}",
                expected=f"offset {at - data_start}",
                action=_FETCH_AGAIN,
            )
        at = info.end
    if at != size:
        kind = "truncated" if size < at else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"{path.name} is {kind}", where=path.parent, got=f"{size} bytes", expected=f"{at}", action=_FETCH_AGAIN
        )


# Is told of each mapping: address, bytes and file, and of the same address with no bytes when it goes.
_tell: Callable[[int, int, str], object] | None = None


def tell_of_mappings(tell: Callable[[int, int, str], object] | None) -> None:
    """Let a function know which memory is which file, from now on."""
    global _tell
    _tell = tell


# Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """One file in memory, by pages as they are touched."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        weakref.finalize(self, os.close, self._file)
        self.nbytes = os.fstat(self._file).st_size
        # Copy-on-write: arrays come out writable, as torch wants them, while nothing can reach the file.
        # The system need not set memory aside for copies that nobody makes: a file may be larger than all of it.
        flags, pages = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(self._file, 0, flags, pages) if self.nbytes else b""
        if _tell is not None and self.nbytes:
            address = self.raw(0, 1).__array_interface__["data"][0]
            _tell(address, self.nbytes, " ".join(printable(str(path)).split()))
            weakref.finalize(self._map, _tell, address, 0, "").atexit = False

    def array(self, info: TensorInfo) -> NDArray[Any]:
        """Return a view of a tensor, in its shape; BF16 as uint16 bit patterns, float8 and the like as uint8."""
        import numpy as np

        if info.end > self.nbytes:
            raise CheckpointError(
                f"{info.file.name} is truncated",
                where=info.file.parent,
                got=f"{self.nbytes} bytes",
                expected=f"at least {info.end}, as when it was opened",
                action=_FETCH_AGAIN,
            )
        count, dtype = math.prod(info.shape), _stored_dtype(info.dtype)
        if count == 0:
            return np.empty(info.shape, dtype)
        return np.frombuffer(self._map, dtype, count, info.begin).reshape(info.shape)

    def raw(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Return a view of bytes."""
        import numpy as np

        return np.frombuffer(self._map, np.uint8, end - begin, begin)

    def release(self, begin: int, end: int) -> None:
        """Let go of the pages that lie wholly between two offsets of the file; a later view reads them again."""
        at, length = whole_pages(begin, end)
        if length and hasattr(mmap, "MADV_DONTNEED") and isinstance(self._map, mmap.mmap):
            self._map.madvise(mmap.MADV_DONTNEED, at, length)
            drop(self._file, begin, end)


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """Return the little-endian numpy type; uint16 for BF16, uint8 for F8_E4M3."""
    import numpy as np

    codes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "F8_E4M3": "u1"}
    return np.dtype(codes[dtype.value])


@functools.cache
def _stored_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    return np.dtype("u1") if name in ("BOOL", "U8", "F8_E5M2", "F8_E8M0") else numpy_dtype(DType(name))


_CHUNK_BYTES = 4 << 20  # what is read at a time where only a checksum is wanted


def checksum_of(file: int, begin: int, end: int) -> int:
    """Return the CRC-32 of an open file's bytes from `begin` to `end`, or to where it ends."""
    checksum = 0
    while begin < end:
        data = os.pread(file, min(_CHUNK_BYTES, end - begin), begin)
        if not data:
            break
        checksum = zlib.crc32(data, checksum)
        begin += len(data)
    return checksum


def checksum_of_parts(checksums: Iterable[int]) -> int:
    """Return the CRC-32 of the CRC-32s of parts: parts that are known one by one need not be read again."""
    return zlib.crc32(b"".join(checksum.to_bytes(4, "little") for checksum in checksums))


def checksum_of_file(path: Path, told: Callable[[int], None] = lambda nbytes: None) -> int:
    """Return the CRC-32 of a file; of a safetensors file, that of the CRC-32s of its header and its tensors.

    Args:
        path: the file.
        told: gets the number of bytes of each tensor that has been read.

    Raises:
        CheckpointError: the header of a safetensors file lies.
        OSError: it cannot be read.
    """

    def of_tensor(info: TensorInfo) -> int:
        checksum = checksum_of(file, info.begin, info.end)
        told(info.end - info.begin)
        return checksum

    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        if path.suffix != ".safetensors":
            return checksum_of(file, 0, size)
        infos = sorted(read_header(path).values(), key=lambda info: (info.begin, info.end))
        header = checksum_of(file, 0, infos[0].begin if infos else size)
        return checksum_of_parts([header, *map(of_tensor, infos)])
    finally:
        os.close(file)


def whole_pages(begin: int, end: int) -> tuple[int, int]:
    """Return the begin and the length of the pages that lie wholly between two offsets."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(0, last - first) * mmap.PAGESIZE


def drop(file: int, begin: int, end: int) -> None:
    """Let the kernel forget what it holds of an open file, in whole pages; what is not on disk yet stays.

    For files larger than memory that is of no use to anyone, and finding new pages was measured to take longer than the
    disk does (docs/scale.md).
    """
    at, length = whole_pages(begin, end)
    if length and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, at, length, os.POSIX_FADV_DONTNEED)
