"""The text a model is measured on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from eightfold.errors import InputError


def default_text() -> str:
    """Return the essays that ship with the package: enough for 12 chunks of 512 tokens of most vocabularies."""
    return files("eightfold.data").joinpath("evaluation.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file as it stands.

    Raises:
        InputError: unreadable, not UTF-8, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError("text", where=path, got=f"byte {error.start} that is not UTF-8", expected="UTF-8") from None
    if not text.strip():
        raise InputError("text", where=path, got="nothing", expected="some words")
    return text
