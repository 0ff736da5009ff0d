"""Files of a model directory, and those that a user names, opened and read as what they are: somebody else's.

Only regular files are opened, and never waited for: a FIFO would block, a device may do anything. What is read whole
has a limit, stated here. JSON is parsed in linear time and bounded memory; keys stand once.

What is read may lie behind a link, wherever that points to, since it is parsed and refused when it is not what it has
to be. What is copied byte for byte may not (format/directory.py).
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from eightfold.errors import CheckpointError, InputError, OutputError

MAX_JSON_BYTES = 16 << 20  # config.json and other settings
MAX_LIST_BYTES = 64 << 20  # a description, an index, a journal: a line for each tensor; tokenizer.json
MAX_DEPTH = 64  # objects and lists inside each other
MAX_MARKS = 4_000_000  # brackets, colons and commas: each value takes about 100 bytes in memory

_LFS = b"version https://git-lfs"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path) -> os.stat_result:
    """Refuse what is not a regular file, links followed.

    Raises:
        CheckpointError: not there, a link to what is not there, or a directory, FIFO, socket or device.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        got, action = "no such file", ""
        if path.is_symlink():
            got = f"a link to {path.readlink()}, which is not there"
            action = "Fetch the model again."
        raise _unfit(path, got, action) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise _unfit(path, _KINDS.get(stat.S_IFMT(status.st_mode), "no file"), "")
    return status


def _unfit(path: Path, got: str, action: str) -> CheckpointError:
    return CheckpointError(path.name, where=path.parent, got=got, expected="a regular file", action=action)


def has_file(path: Path) -> bool:
    """Return whether a file is there.

    Raises:
        CheckpointError: something of that name is there that is no regular file, or a link to nothing.
    """
    if not os.path.lexists(path):
        return False
    require_regular(path)
    return True


def open_regular(path: Path) -> int:
    """Open a regular file for reading; return its descriptor.

    Raises:
        CheckpointError: it is none, or may not be read.
    """
    require_regular(path)  # before it is opened, which alone can make a device act
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):  # replaced meanwhile
        os.close(file)
        raise _unfit(path, "something else meanwhile", "")
    return file


def read_file(path: Path, most: int = MAX_LIST_BYTES) -> bytes:
    """Return the bytes of a file.

    Raises:
        CheckpointError: no regular file, unreadable, more than `most` bytes, or a Git LFS pointer.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            blob = file.read(min(most, size) + 1) if size <= most else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if max(size, len(blob)) > most:
        got, expected = f"{max(size, len(blob)) >> 20} MiB", f"at most {most >> 20} MiB"
        raise CheckpointError("size", where=path, got=got, expected=expected)
    refuse_pointer(blob, path)
    return blob


def refuse_pointer(begin: bytes, path: Path) -> None:
    """Refuse a file whose first bytes are those of a Git LFS pointer.

    Raises:
        CheckpointError: it is one.
    """
    if begin.startswith(_LFS[: max(8, len(begin))]):
        raise CheckpointError(
            path.name,
            where=path.parent,
            got="a Git LFS pointer",
            expected="the file itself",
            action="Fetch what it points to: git lfs pull.",
        )


def parse_value(blob: bytes) -> Any:
    """Return the value of a JSON text, in linear time and bounded memory.

    Raises:
        ValueError: no JSON, a key twice, or too many values or too deep.
    """
    if sum(map(blob.count, (b"{", b"[", b":", b","))) > MAX_MARKS:
        raise ValueError(f"more than {MAX_MARKS:,} values")
    too_deep = f"values more than {MAX_DEPTH} deep"
    try:
        value = json.loads(blob, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if type(outer) is dict or type(outer) is list
            for inner in (outer.values() if type(outer) is dict else outer)
        ]
        if not level:
            return value
    raise ValueError(too_deep)


class RepeatedKey(ValueError):
    """A key stands twice in an object of JSON."""

    def __init__(self, name: str) -> None:
        super().__init__(f'the key "{name}" twice')
        self.name = name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKey(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def parse_json(blob: bytes, where: Path, what: str = "JSON") -> dict[str, Any]:
    """Return the object that a JSON text is.

    Args:
        blob: the text.
        where: the file, for messages.
        what: which part of it, for messages.

    Raises:
        CheckpointError: no JSON, no object, a key twice, or too many values or too deep for a file of settings.
    """

    fact: Any
    try:
        value = parse_value(blob)
        if isinstance(value, dict):
            return value
        fact = f"a {type(value).__name__}"
    except RepeatedKey as error:
        key = f'key "{error.name}"'
        raise CheckpointError(key, where=where, got="two values", expected="one", action="Remove one.") from None
    except ValueError as error:
        fact = error
    raise CheckpointError(what, where=where, got=fact, expected="a JSON object", action="Fetch the file again.")


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object, without duplicate keys.

    Raises:
        CheckpointError: unreadable, longer than `most` bytes, not JSON, or not an object.
    """
    return parse_json(read_file(path, most), path)


_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}


def open_given(path: Path, title: str) -> BinaryIO:
    """Open a file that a user has given, for reading; a pipe, which would be waited for, or a device is refused.

    Raises:
        InputError: it is not a regular file, or may not be read. `title` says what it is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}", action="Check the path.") from None
    if not stat.S_ISREG(mode):
        raise InputError(title, where=path, got=_KINDS.get(stat.S_IFMT(mode), "no file"), expected="a file with text")
    return os.fdopen(open_regular(path), "rb")


def read_text(path: Path, title: str, most: int, *, cuts: bool = False) -> tuple[str, bool]:
    """Read a text that a user has given: UTF-8, or UTF-16 with the mark that says so.

    Args:
        path: of the file.
        title: what it is, for messages.
        most: bytes.
        cuts: of a larger file, return the beginning.

    Returns:
        The text without a byte order mark, and whether it was cut.

    Raises:
        InputError: not a regular file, unreadable, too large, or not text.
    """
    with open_given(path, title) as file:
        try:
            raw = file.read(most + 1)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None
    is_cut, raw = len(raw) > most, raw[:most]
    if is_cut and not cuts:
        raise InputError(title, where=path, got=f"more than {most >> 20} MiB", expected="less", action="Take a part.")
    packed = next((name for start, name in _PACKED.items() if raw.startswith(start)), None)
    if packed is not None:
        raise InputError(title, where=path, got=f"a {packed} file", expected="text", action="Unpack or convert it.")
    form = "UTF-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    decoder = codecs.getincrementaldecoder("utf-16" if form == "UTF-16" else "utf-8-sig")()
    try:
        text = decoder.decode(raw, not is_cut)
    except UnicodeDecodeError as error:
        got = f"byte {error.start} that is not {form}"
        raise InputError(title, where=path, got=got, expected="UTF-8 text") from None
    if "\0" in text:
        got = f"a NUL character at {text.index(chr(0))}"
        raise InputError(title, where=path, got=got, expected="UTF-8 text")
    return text, is_cut


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole, in the place of one that may be there.

    Raises:
        OutputError: there is something that is no file.
        OSError: it cannot be written; what was there is left.
    """
    if path.exists() and not path.is_file():
        got = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "no file")
        raise OutputError(f"cannot write {path}", got=got, expected="a file, or nothing yet")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented as the reference tool does."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
