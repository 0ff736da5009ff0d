"""Files of JSON: read as strictly as anything from outside, and written as the reference tool writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented as the reference tool does."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, stays the escape it was.
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
