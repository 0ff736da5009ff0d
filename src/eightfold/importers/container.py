"""The GGUF container: metadata and tensors of a file, or of all parts of a split one, checked before they are used.

    "GGUF" | u32 version | u64 tensors | u64 fields | fields | descriptions of tensors | padding | tensor bytes

A file is not trusted: counts, lengths, types, shapes and places are checked against the file and against limits that
are several times what models in use have. Letters: K inputs of a row, N rows.

Source: the format's specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.errors import CheckpointError, shortlist
from eightfold.files import has_file, refuse_pointer
from eightfold.format.safetensors import MappedFile
from eightfold.values import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_FIELDS = 10_000
MAX_TENSORS = 100_000
MAX_TEXT = 16 << 20  # bytes of a text; templates of chats have some thousands
MAX_ITEMS = 2_000_000  # of all lists together: the largest vocabularies with scores, types and merges have 1.3 million
MAX_SHOWN_ITEMS = 1000  # of a list that is kept
MAX_DIMENSIONS = 4
MAX_PARTS = 1000

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ALIGNMENT = "general.alignment"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: shape outputs first, type by its number."""

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int  # bytes from the start of the file
    end: int
    file: MappedFile

    def rows(self) -> NDArray[np.uint8]:
        """Return the bytes, one row of the tensor a row."""
        return self.file.raw(self.begin, self.end).reshape(*self.shape[:-1], -1)


@dataclass
class Container:
    """What a GGUF file says: metadata by key, without long lists, and tensors by name."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def read_container(path: Path, sizes: dict[int, tuple[int, int]]) -> Container:
    """Read a file, or all parts of a split one; `path` becomes that of the part with the metadata.

    Args:
        path: the file, or any of the parts.
        sizes: of each type of tensor: elements and bytes of a block.

    Raises:
        CheckpointError: damaged, beyond the limits, or a part is not there.
    """
    first = _Reader(path, sizes).read()
    count = first.fields.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return first
    parts = _parts(path, count)
    whole = first if parts[0] == path else _Reader(parts[0], sizes).read()
    for i, part in enumerate(parts):
        read = first if part == path else _Reader(part, sizes).read()
        if (read.fields.get("split.no"), read.fields.get("split.count")) != (i, count):
            raise CheckpointError(
                "part", where=part, got=shown(read.fields.get("split.no")), expected=f"split.no {i} of {count}"
            )
        if twice := whole.tensors.keys() & read.tensors.keys() if i else ():
            raise CheckpointError("tensor names", where=part, got=f"{min(twice)} twice", expected="each once")
        whole.tensors.update(read.tensors)
    return whole


def _parts(path: Path, count: int) -> list[Path]:
    """Return the paths of all parts beside one of them."""
    name = _PART.fullmatch(path.name)
    merge = "merge all of them into one file with llama.cpp: llama-gguf-split --merge FIRST OUT.gguf"
    if name is None or int(name[3]) != count or count > MAX_PARTS:
        raise CheckpointError(
            "split file",
            where=path,
            got=f"one of {count} parts",
            expected=f"the names NAME-00001-of-{count:05d}.gguf",
            action=f"Give the parts their names back, or {merge}",
        )
    parts = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if absent := [part.name for part in parts if not has_file(part)]:
        raise CheckpointError(
            "parts of a split file",
            where=path.parent,
            got=f"no {shortlist(absent)}",
            expected=f"all {count}",
            action=f"Fetch the missing parts, or {merge}",
        )
    return parts


class _Reader:
    """Walks through the head of one file."""

    def __init__(self, path: Path, sizes: dict[int, tuple[int, int]]) -> None:
        self._path, self._sizes = path, sizes
        self._at, self._items = 0, 0
        self._file = MappedFile(path)
        self._size = self._file.nbytes

    def read(self) -> Container:
        refuse_pointer(self._take(min(64, self._size)), self._path)
        self._at = 0
        if (magic := self._take(4)) != b"GGUF":
            raise self._damage(f"no GGUF file (it begins with {magic!r})")
        if (version := self._number("I")) not in _VERSIONS:
            raise self._damage(f"version {version}, and not {_VERSIONS[0]} or {_VERSIONS[1]}, little-endian")
        tensors, fields = self._count(MAX_TENSORS, "tensors"), self._count(MAX_FIELDS, "fields")
        found = Container(self._path)
        for _ in range(fields):
            key = self._text()
            if key in found.fields:
                raise self._damage(f"two fields {shown(key)}")
            found.fields[key] = self._value(self._number("I"))
        heads = [(self._text(), *self._shape_kind_offset()) for _ in range(tensors)]
        found.tensors = self._placed(heads, found.fields.get(_ALIGNMENT, 32))
        return found

    def _damage(self, got: str) -> CheckpointError:
        return CheckpointError(
            "container", where=self._path, got=got, expected="a whole GGUF file", action="Fetch it again."
        )

    def _take(self, nbytes: int) -> bytes:
        if nbytes > self._size - self._at:
            raise self._damage(
                f"a file that ends at byte {self._size}, too early" if nbytes <= MAX_TEXT else "a length beyond its end"
            )
        self._at += nbytes
        return self._file.raw(self._at - nbytes, self._at).tobytes()

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _count(self, most: int, what: str) -> int:
        count = int(self._number("Q"))
        if count > most:
            raise self._damage(f"{count} {what}, and not at most {most}")
        return count

    def _text(self) -> str:
        try:
            return self._take(self._count(MAX_TEXT, "bytes of a text")).decode()
        except UnicodeDecodeError:
            raise self._damage(f"text that is not UTF-8 before byte {self._at}") from None

    def _value(self, kind: int) -> Any:
        """Return a value; None for a long list."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise self._damage(f"a field of type {kind}")
        kind, count = self._number("I"), self._count(MAX_ITEMS, "items of a list")
        self._items += count
        if self._items > MAX_ITEMS or kind == _LIST:
            raise self._damage("lists of lists" if kind == _LIST else f"lists of more than {MAX_ITEMS} items in all")
        if count <= MAX_SHOWN_ITEMS:
            return [self._value(kind) for _ in range(count)]
        if kind in _NUMBERS:
            self._take(count * struct.calcsize(_NUMBERS[kind]))
        else:
            for _ in range(count):
                self._value(kind)
        return None

    def _shape_kind_offset(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damage(f"a tensor of {dimensions} dimensions")
        shape = tuple(reversed([int(self._number("Q")) for _ in range(dimensions)]))
        return shape, self._number("I"), self._number("Q")

    def _placed(self, heads: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, StoredTensor]:
        """Return the tensors in their places: inside of the file, each in its own."""
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damage(f"alignment {shown(alignment)}")
        data = -(-self._at // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in heads:
            if name in found:
                raise self._damage(f"tensor {shown(name)} twice")
            if kind not in self._sizes:
                raise self._damage(f"tensor {shown(name)} of type {kind}")
            block, nbytes = self._sizes[kind]
            if min(shape) < 1 or max(shape) >= 2**63 or shape[-1] % block or offset % alignment:
                raise self._damage(f"tensor {shown(name)} of shape {shown(list(shape))} at {offset}")
            end = data + offset + math.prod(shape) // block * nbytes
            if end > self._size:
                raise self._damage(f"a file that ends before tensor {shown(name)} does")
            found[name] = StoredTensor(name, shape, kind, data + offset, end, self._file)
        at = 0
        for tensor in sorted(found.values(), key=lambda tensor: tensor.begin):
            if tensor.begin < at:
                raise self._damage(f"tensor {shown(tensor.name)} in the place of another")
            at = tensor.end
        return found
