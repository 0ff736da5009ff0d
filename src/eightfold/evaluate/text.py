"""The text a model is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from eightfold.errors import ConfigError, InputError


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


def cut_chunks(token_ids: Sequence[int], chunks: int, chunk_len: int) -> list[list[int]]:
    """Return the first chunks of equal length, at most as many as the text fills.

    Raises:
        InputError: the text does not fill a single chunk.
        ConfigError: a chunk of fewer than two tokens predicts nothing.
    """
    if chunk_len < 2 or chunks < 1:
        raise ConfigError("chunks", got=f"{chunks} of {chunk_len} tokens", expected="at least 1 of at least 2 tokens")
    available = min(chunks, len(token_ids) // chunk_len)
    if available < 1:
        raise InputError(
            "text",
            got=f"{len(token_ids)} tokens",
            expected=f"at least one chunk of {chunk_len}",
            action="Lower `chunk_len`.",
        )
    return [list(token_ids[i * chunk_len : (i + 1) * chunk_len]) for i in range(available)]
