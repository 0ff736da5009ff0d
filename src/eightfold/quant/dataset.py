"""Calibration data: lines of a file, or the set that ships with the package, to token ids.

A line is a JSON object with one of the keys of TEXT_KEYS, an object with `messages` (a chat), a JSON string, or plain
text. Token ids come as lines that are a JSON list of integers, or an object with `input_ids`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from eightfold.errors import ConfigError, InputError, one_of
from eightfold.tokenizer import Message, Tokenizer
from eightfold.values import is_token_ids, shorten

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")

# One row: a text, or a chat.
Row = str | list[Message]


def default_rows() -> list[Row]:
    """Return the set that ships with the package: prose, Chinese, code, dialogue."""
    text = files("eightfold.data").joinpath("calibration.jsonl").read_text(encoding="utf-8")
    return [_row(line, number, "calibration.jsonl") for number, line in enumerate(text.splitlines(), 1)]


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read a calibration file, one row a line; blank lines are skipped.

    Raises:
        InputError: unreadable, empty, or a malformed line, which is named by its number.
    """
    rows = [_row(line, number, path) for number, line in _lines(path, limit)]
    if not rows:
        raise InputError("calibration file", where=path, got="no rows", expected="one text a line")
    return rows


def read_token_ids(path: Path, limit: int | None = None, vocab_size: int | None = None) -> list[list[int]]:
    """Read a file of token ids, one sample a line.

    Raises:
        InputError: unreadable, empty, a line that is not a list of token ids, or an id outside the vocabulary.
    """
    samples = []
    for number, line in _lines(path, limit):
        value = _parse(line, number, path)
        ids = value.get("input_ids") if isinstance(value, dict) else value
        if not is_token_ids(ids):
            raise InputError(
                f"line {number}", where=path, got=shorten(line), expected="a JSON list of token ids, such as [1, 42]"
            )
        if vocab_size is not None and not (min(ids) >= 0 and max(ids) < vocab_size):
            outside = max(ids) if max(ids) >= vocab_size else min(ids)
            raise InputError(f"line {number}", where=path, got=f"token id {outside}", expected=f"0 to {vocab_size - 1}")
        samples.append(ids)
    if not samples:
        raise InputError("token id file", where=path, got="no rows", expected="one JSON list a line")
    return samples


def tokenize(rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[int]]:
    """Return each row's token ids: a text with the special tokens around it, a chat by the model's template.

    Raises:
        InputError: a row has no tokens.
    """
    samples = []
    for index, row in enumerate(rows):
        ids = tokenizer.encode(row) if isinstance(row, str) else _encode_chat(row, tokenizer)
        if not ids:
            raise InputError(
                f"calibration row {index} (counted from 0)", got="a text without tokens", expected="some text"
            )
        samples.append(ids)
    return samples


def truncate(samples: Sequence[list[int]], max_tokens: int) -> tuple[list[list[int]], int]:
    """Cut samples to the model's context; return them and how many were cut."""
    cut = sum(len(sample) > max_tokens for sample in samples)
    return [sample[:max_tokens] for sample in samples], cut


def _encode_chat(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(messages, add_generation_prompt=False)
    # A base model has no template; the words are what matters for activation ranges.
    return tokenizer.encode("\n".join(f"{message['role']}: {message['content']}" for message in messages))


def _lines(path: Path, limit: int | None) -> list[tuple[int, str]]:
    if limit is not None and limit < 1:
        raise ConfigError("limit", got=limit, expected="at least 1")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark first
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            "calibration file", where=path, got=f"byte {error.start} that is not UTF-8", expected="UTF-8 text"
        ) from None
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return numbered[:limit]


def _row(line: str, number: int, where: Any) -> Row:
    if not line.lstrip().startswith(("{", '"')):
        return line.strip()
    value = _parse(line, number, where)
    texts = [value] if isinstance(value, str) else [value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)]
    if texts:
        if not texts[0].strip():
            raise InputError(
                f"line {number}", where=where, got="an empty text", expected="some words", action="Remove it."
            )
        return texts[0]
    messages = value.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return messages
    raise InputError(
        f"line {number}",
        where=where,
        got=f"an object with {one_of(value) if value else 'nothing'}",
        expected=f"a text under {one_of(TEXT_KEYS)}, or messages with role and content",
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _parse(line: str, number: int, where: Any) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"line {number}", where=where, got=f"no JSON ({error})", expected="one JSON value a line"
        ) from None
