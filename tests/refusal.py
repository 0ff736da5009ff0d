"""What a refused command leaves behind: exit code 2, one line on stderr, and every directory as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Result

Command = Callable[..., Result]


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    """Return everything below a path, itself included: name -> mode and content (a link's: where it points)."""

    def content(entry: Path) -> bytes:
        if entry.is_symlink():
            return os.fsencode(entry.readlink())
        return entry.read_bytes() if entry.is_file() else b""

    entries = [path, *path.rglob("*")] if os.path.lexists(path) else []
    return {str(entry.relative_to(path)): (entry.lstat().st_mode, content(entry)) for entry in entries}


def error_line(result: Result) -> str:
    """Return the message of a failed command, which stands alone on stderr but for notes."""
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert result.code == 2, f"exit code {result.code}, stderr {result.err!r}"
    assert len(lines) == 1, f"stderr {result.err!r}"
    assert lines[0].startswith("eightfold: "), f"stderr {result.err!r}"
    return lines[0].removeprefix("eightfold: ")


def refused(cli: Command, *args: object, within: Path) -> str:
    """Run a command that must fail and leave no trace in a directory; return its message."""
    before = snapshot(within)
    message = error_line(cli(*args))
    after = snapshot(within)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not changed, f"the command left or changed {changed}"
    return message


def quantize_refused(cli: Command, source: Path, *options: object, scheme: str = "w8a16") -> str:
    """Quantize a model that must be refused into a new directory beside it; return the message."""
    return refused(cli, "quantize", source, source.parent / "out", "--scheme", scheme, *options, within=source.parent)


def both_refused(cli: Command, source: Path) -> str:
    """Inspect and quantize a model that both must refuse in the same words; return them."""
    message = refused(cli, "inspect", source, within=source.parent)
    assert quantize_refused(cli, source) == message
    return message
