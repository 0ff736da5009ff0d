"""Files of JSON: read as strictly as anything from outside, and written as the reference tool writes them."""

from __future__ import annotations

import codecs
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError, InputError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object, without duplicate keys.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(
                f'key "{repeated}"', where=path, got="two values", expected="one", action="Remove one."
            )
        return seen

    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CheckpointError(path.name, where=path.parent, got="no such file", expected="a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "JSON", where=path, got=error, expected="a JSON object", action="Fetch the file again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError("JSON", where=path, got=f"a {type(value).__name__}", expected="an object")
    return value


_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}


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
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            got = "a directory" if path.is_dir() else "a pipe or device"
            raise InputError(title, where=path, got=got, expected="a file with text")
        with path.open("rb") as file:
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented as the reference tool does."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
