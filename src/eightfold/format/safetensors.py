"""The safetensors container: a validated header, memory-mapped reading, and writing at known offsets.

    u64 little-endian header length | JSON header, padded with spaces | tensor bytes without holes

A file is not trusted: every name, dtype, shape and offset is checked against the file's size before a byte of
tensor data is touched. BF16 has no numpy type; such arrays are uint16 holding the bit patterns.

Not here: which file holds which tensor (checkpoint.py), and what a tensor means (scheme.py).

Source: the format's own README (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.config import DType
from eightfold.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The limit of the reference implementation: a longer header is an attack or damage.
MAX_HEADER_BYTES = 100_000_000

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
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    "header",
                    where=path,
                    got=f"{length} bytes announced in a file of {size}",
                    expected="a header inside the file",
                    action=_FETCH_AGAIN,
                )
            blob = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    entries = _parse_header(blob, path)
    infos = {name: _tensor_info(name, entry, path, 8 + length) for name, entry in entries.items()}
    _check_layout(infos, path, 8 + length, size)
    return infos


def _parse_header(blob: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise CheckpointError(
                    f"tensor {name}", where=path, got="two entries in the header", expected="one", action=_FETCH_AGAIN
                )
            seen[name] = value
        return seen

    try:
        header = json.loads(blob, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "header", where=path, got=f"no JSON ({error})", expected="a JSON object", action=_FETCH_AGAIN
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            "header", where=path, got=f"a JSON {type(header).__name__}", expected="an object", action=_FETCH_AGAIN
        )
    header.pop("__metadata__", None)
    return header


def _is_count(value: Any) -> bool:
    # bool is an int in Python: a size of `true` would pass arithmetic unnoticed.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    def lie(field: str, got: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{field} of {name}", where=path, got=got, expected=expected, action=_FETCH_AGAIN)

    if not isinstance(entry, dict):
        raise lie("header entry", repr(entry), "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise lie("dtype", repr(dtype), "a safetensors type name")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise lie("shape", repr(shape), "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise lie("data_offsets", repr(offsets), "two byte offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * _ELEMENT_BYTES[dtype]
    if end - begin != nbytes:
        raise lie("data_offsets", f"{end - begin} bytes", f"{nbytes} for {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


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


class MappedFile:
    """One safetensors file in memory, by pages as they are touched."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy-on-write: arrays come out writable, as torch wants them, while nothing can reach the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def array(self, info: TensorInfo) -> NDArray[Any]:
        """Return a view of a tensor, in its shape; BF16 as uint16 bit patterns."""
        import numpy as np

        count = math.prod(info.shape)
        if count == 0:
            return np.empty(info.shape, numpy_dtype(DType(info.dtype)))
        flat = np.frombuffer(self._map, numpy_dtype(DType(info.dtype)), count, info.begin)
        return flat.reshape(info.shape)

    def release(self, info: TensorInfo) -> None:
        """Let go of the pages that lie wholly inside a tensor; a later view reads them again."""
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """Return the little-endian numpy type; uint16 for BF16."""
    import numpy as np

    codes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1"}
    return np.dtype(codes[dtype.value])


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


# Bytes of a cache line, and of the widest vector.
ALIGNMENT = 64


class FileWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order, each once."""

    def __init__(self, path: Path, plan: list[PlannedTensor], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._pending: dict[str, tuple[PlannedTensor, int]] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        # Whole cache lines first, then wide elements: weights start at a multiple of ALIGNMENT, which makes reading
        # them from the mapped file faster, and all tensors at one of their element size.
        for tensor in sorted(plan, key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, -tensor.dtype.itemsize)):
            header[tensor.name] = {
                "dtype": tensor.dtype.value,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            self._pending[tensor.name] = (tensor, at)
            at += tensor.nbytes
        blob = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        blob += b" " * (-(8 + len(blob)) % ALIGNMENT)
        self._data_start = 8 + len(blob)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._write_at(len(blob).to_bytes(8, "little") + blob, 0)
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one tensor; its dtype and shape must be the planned ones."""
        tensor, at = self._pending.pop(name)
        assert array.dtype == numpy_dtype(tensor.dtype), (name, array.dtype, tensor.dtype)
        assert array.shape == tensor.shape, (name, array.shape, tensor.shape)
        if tensor.nbytes:
            import numpy as np

            self._write_at(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, self._data_start + at)

    def _write_at(self, data: bytes | memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Finish the file. Every planned tensor must have been written."""
        assert not self._pending, f"never written: {list(self._pending)}"
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is; twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
