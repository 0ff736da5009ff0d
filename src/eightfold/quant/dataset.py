"""Calibration data: the texts of a file, or the set that ships with the package, to token ids.

A file is JSON as a whole, or JSON on each line; only a file in which no line is JSON is plain text, a row on each line.
A row of JSON is one of these:

    "text"
    {"inputs_pretokenized": row}, also `text` or `prompt`     other fields, such as `ans`, are left out
    {"messages": chat}, also `conversations`                  chat: [{"role": .., "content": ..}, ..],
    chat                                                      or `from` and `value`
    {"instruction": .., "input": .., "output": ..}            these texts, one below the other
    [row, row, ..]                                            several rows

Token ids are lists of integers in the place of rows, or objects with `input_ids`.

Source: the files of msModelSlim and MindIE. Of an object with a text and its answer they read the text alone.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError, ConfigError, InputError, one_of, shortlist
from eightfold.files import parse_value, read_text
from eightfold.messages import Message, MessageError, as_text, read_messages
from eightfold.tokenizer import Tokenizer
from eightfold.values import is_token_ids, shorten

TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")
CHAT_KEYS = ("messages", "conversations")
TASK_KEYS = ("instruction", "input", "output")

# How ShareGPT calls those who speak; a call is text there.
_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    "observation": "tool",
}

MAX_BYTES = 32 << 20
MAX_ROWS = 100_000
_MAX_NESTED = 8  # lists in lists

# Of a longer text only so much is tokenized, as a tokenizer takes 100 bytes and more for each token. Tokens have about
# four characters, and even those of white space hardly more than 64.
_LEAST_CHARS, _TOKEN_CHARS = 1 << 20, 64

# So many lines at least say whether a file is plain text, however few are wanted.
_LOOKED_AT = 1000

# How a line begins that is JSON, or was meant to be.
_LIKE_JSON = re.compile(r"""\s*(\{\s*(["']|$)|\[[\[\s]*(["'{]|$))""")

_EXPECTED = f"a text, or an object with {one_of((*TEXT_KEYS, *CHAT_KEYS, TASK_KEYS[0]))}"

_KINDS = {"code": (2, 11, 21, 26, 39, 43, 53), "prose": (0, 9, 23, 36, 44, 50, 55)}

# One row: a text, or a chat.
Row = str | list[Message]


def default_rows() -> list[Row]:
    """Return the set that ships with the package: prose, Chinese, code, dialogue."""
    text = files("eightfold.data").joinpath("calibration.jsonl").read_text(encoding="utf-8")
    return [row for line in text.splitlines() for row in _rows(json.loads(line))]


def rows_by_kind() -> dict[str, list[str]]:
    """Return some of the shipped texts: source code, and English prose."""
    rows = default_rows()
    return {kind: [text for at in places if isinstance(text := rows[at], str)] for kind, places in _KINDS.items()}


def require_words(texts: Sequence[str]) -> list[Row]:
    """Return texts as rows.

    Raises:
        InputError: one is empty.
    """
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise InputError(f"calibration text {number}", got="an empty text", expected="some words")
    return [*texts]


def silent(text: str) -> None:
    """Take no note."""


def read_rows(path: Path, limit: int | None = None, title: str = "calibration file") -> list[Row]:
    """Read a file of texts; `title` says what it is in messages.

    Raises:
        InputError: unreadable, too large, empty, or a malformed row, which is named by its number.
    """
    found: list[Row] = []
    most = min(limit or MAX_ROWS + 1, MAX_ROWS + 1)
    for place, value in _values(path, limit, title):
        try:
            found += _rows(value)
        except _RowError as error:
            raise InputError(place, where=path, got=error.got, expected=error.expected, action=error.action) from None
        except MessageError as error:
            raise InputError(f"{place} in {path}: {error}") from None
        if len(found) >= most:
            break
    found = found[:most]
    _require_few(found, path, title)
    if not found:
        raise InputError(title, where=path, got="no rows", expected="one text a line, or JSON")
    return found


def read_token_ids(path: Path, limit: int | None = None, vocab_size: int | None = None) -> list[list[int]]:
    """Read a file of token ids, one sample a row.

    Raises:
        InputError: unreadable, empty, a row that is not a list of token ids, or an id outside the vocabulary.
    """
    samples = []
    for place, value in _values(path, limit, "token id file"):
        ids = value.get("input_ids") if isinstance(value, dict) else value
        if not is_token_ids(ids):
            got = shorten(value if isinstance(value, str) else json.dumps(value))
            raise InputError(place, where=path, got=got, expected="a JSON list of token ids, such as [1, 42]")
        if vocab_size is not None and not (min(ids) >= 0 and max(ids) < vocab_size):
            outside = shorten(str(max(ids) if max(ids) >= vocab_size else min(ids)))
            raise InputError(place, where=path, got=f"token id {outside}", expected=f"0 to {vocab_size - 1}")
        samples.append(ids)
    if not samples:
        raise InputError("token id file", where=path, got="no rows", expected="one JSON list a line")
    return samples


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    note: Callable[[str], None] = silent,
    *,
    where: Path | None = None,
    vocab_size: int | None = None,
    context: int = 0,
) -> list[list[int]]:
    """Return each row's token ids: a text with the special tokens around it, a chat by the model's template.

    Args:
        rows: texts and chats.
        tokenizer: the model's.
        note: is told where chats stand that no template can render; they become lines of `role: content`.
        where: the file of the rows, for messages.
        vocab_size: of the model, where that is to be checked.
        context: how many tokens of a sample are of use; of a long text no more is looked at.

    Raises:
        InputError: a row has no tokens, is not Unicode, the template refuses it, or the tokenizer knows a token that
            the model does not.
    """
    chats = [number for number, row in enumerate(rows, 1) if not isinstance(row, str)]
    if problem := _template_problem(tokenizer) if chats else "":
        more = f" and {len(chats) - 1} more have" if len(chats) > 1 else " has"
        note(f"calibration row {chats[0]}{more} messages, and {problem}; they become lines such as `user: Hello`.")
    samples = []
    for number, row in enumerate(rows, 1):
        try:
            if is_plain := isinstance(row, str) or bool(problem):
                text = plain_text(row)
            else:
                messages = read_messages(row, tokenizer.template_source())
                text = tokenizer.render_chat(messages, add_generation_prompt=False)
            ids = tokenizer.encode(enough_for(context, text), special_tokens=is_plain)
        except InputError as error:
            place = f"calibration row {number}" if where is None else f"calibration row {number} in {where}"
            raise InputError(f"{place}: {error}") from None
        if not ids:
            raise InputError(
                f"calibration row {number}", where=where, got="a text without tokens", expected="some text"
            )
        if vocab_size is not None and max(ids) >= vocab_size:
            raise InputError(
                f"calibration row {number}",
                where=where,
                got=f"token id {max(ids)}",
                expected=f"0 to {vocab_size - 1}",
                action="The model's tokenizer has a token that the model lacks.",
            )
        samples.append(ids)
    return samples


def enough_for(tokens: int, text: str) -> str:
    """Return the beginning of a text that is sure to have so many tokens: all, unless it is very long."""
    return text[: max(_LEAST_CHARS, _TOKEN_CHARS * tokens)]


def plain_text(row: Row) -> str:
    """Return a text as it is, and a chat as lines of `role: content`."""
    return row if isinstance(row, str) else "\n".join(f"{each['role']}: {as_text(each)}" for each in row)


def begins_as_json(text: str) -> bool:
    """Return whether the first line of a file says that it has rows of JSON, and is no plain text."""
    first = next((line for _, line in _lines(text, 1)), "")
    return _LIKE_JSON.match(first) is not None


def _template_problem(tokenizer: Tokenizer) -> str:
    """Return why there is no chat template that can be read; empty where there is one."""
    try:
        if not tokenizer.has_chat_template:
            return "the model has no chat template"
        tokenizer.require_template()
    except CheckpointError as error:
        return f"its chat template cannot be read ({error})"
    return ""


def truncate(samples: Sequence[list[int]], max_tokens: int) -> tuple[list[list[int]], int]:
    """Cut samples to the model's context; return them and how many were cut."""
    cut = sum(len(sample) > max_tokens for sample in samples)
    return [sample[:max_tokens] for sample in samples], cut


def _values(path: Path, limit: int | None, title: str) -> list[tuple[str, Any]]:
    """Return what stands in each place of a file, values of JSON or lines of plain text; each has a row or more."""
    if limit is not None and limit < 1:
        raise ConfigError("limit", got=limit, expected="at least 1")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise InputError(title, where=path, got="a table", expected="JSON, or one text a line", action="Convert it.")
    text, is_cut = read_text(path, title, MAX_BYTES, cuts=limit is not None)
    if is_cut:
        text = text[: text.rfind("\n") + 1]
    most = min(limit or MAX_ROWS + 1, MAX_ROWS + 1)
    lines = _lines(text, max(most, _LOOKED_AT))
    try:
        whole = parse_value(text.encode())
    except ValueError as error:
        is_whole = bool(lines) and _is_broken_json(lines[0][1], error)
        if is_cut and (is_whole or not lines):
            got = f"a row or JSON of more than {MAX_BYTES >> 20} MiB"
            raise InputError(title, where=path, got=got, expected="less, or one row a line") from None
        if is_whole:
            raise _not_json(_place(error, title), path, error) from None
        found = _line_values(lines, path)
    else:
        is_one = not isinstance(whole, list) or is_token_ids(whole) or _is_chat(whole)
        items = [whole] if is_one else whole[:most]
        found = [(f"row {number}", item) for number, item in enumerate(items, 1)]
    _require_few(found[:most], path, title)
    return found[:most]


def _lines(text: str, most: int) -> list[tuple[str, str]]:
    """Return the first lines that are not blank, and what they are called."""
    numbered = enumerate(io.StringIO(text, newline=None), 1)
    return list(islice(((f"line {number}", line) for number, line in numbered if line.strip()), most))


def _require_few(rows: Sequence[Any], path: Path, title: str) -> None:
    if len(rows) > MAX_ROWS:
        got = f"more than {MAX_ROWS} rows"
        raise InputError(title, where=path, got=got, expected="fewer", action="Take the first: `calib_limit`.")


def _line_values(lines: Sequence[tuple[str, str]], path: Path) -> list[tuple[str, Any]]:
    """Return the values of lines, all of which are JSON, or none."""
    found: list[tuple[str, Any]] = []
    plain: list[tuple[str, Any]] = []
    for place, line in lines:
        try:
            found.append((place, parse_value(line.encode())))
        except ValueError as error:
            if _is_broken_json(line, error):
                raise _not_json(place, path, error) from None
            plain.append((place, line.strip()))
    if found and plain:
        raise InputError(
            plain[0][0],
            where=path,
            got="plain text",
            expected=f"JSON, as in {found[0][0]}",
            action='Write it as JSON too, such as {"text": "..."}.',
        )
    return found or plain


def _is_broken_json(line: str, error: ValueError) -> bool:
    """Return whether a line was meant as JSON, or begins some, and is none; `error` is that of what it begins."""
    is_syntax = isinstance(error, json.JSONDecodeError)  # else: too large, too deep, a key twice
    if not (_LIKE_JSON.match(line) if is_syntax else line.lstrip().startswith(("[", "{"))):
        return False
    try:
        parse_value(line.encode())
    except ValueError:
        return True
    return False


def _place(error: ValueError, title: str) -> str:
    return f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else title


def _not_json(place: str, path: Path, error: ValueError) -> InputError:
    return InputError(place, where=path, got=f"no JSON ({error})", expected="JSON as a whole, or one value a line")


class _RowError(Exception):
    """A row cannot be used."""

    def __init__(self, got: str, expected: str = _EXPECTED, action: str = "") -> None:
        super().__init__(got)
        self.got, self.expected, self.action = got, expected, action


def _rows(value: Any, depth: int = 0) -> list[Row]:
    """Return the rows that a value of JSON, or a line of plain text, holds; see the top of this file."""
    if isinstance(value, str):
        if not value.strip():
            raise _RowError("an empty text", "some words", "Remove it.")
        return [value]
    if _is_chat(value):
        return [_chat(value)]
    if is_token_ids(value):
        raise _RowError("numbers", _EXPECTED, "Give token ids as `calib_ids`.")
    if isinstance(value, list) and value:
        if depth == _MAX_NESTED:
            raise _RowError(f"lists nested more than {_MAX_NESTED} deep")
        return [row for item in value for row in _rows(item, depth + 1)]
    if isinstance(value, dict):
        return _rows_of_object(value, depth)
    raise _RowError(shorten(json.dumps(value)))


def _rows_of_object(value: dict[str, Any], depth: int) -> list[Row]:
    key = next((key for key in TEXT_KEYS if isinstance(value.get(key), (str, list))), None)
    if key is not None:
        return _rows(value[key], depth)
    for key in CHAT_KEYS:
        if _is_chat(value.get(key)):
            system = value.get("system")
            opening = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
            return [_chat([*opening, *value[key]])]
    if isinstance(value.get(TASK_KEYS[0]), str):
        parts = [value[key] for key in TASK_KEYS if isinstance(value.get(key), str) and value[key].strip()]
        return _rows("\n".join(parts))
    action = "Give token ids as `calib_ids`." if "input_ids" in value else ""
    names = shortlist(map(shorten, value)) if value else "nothing"
    raise _RowError(f"an object with {names}", _EXPECTED, action)


def _is_chat(value: Any) -> bool:
    """Return whether a value is meant as messages; what is wrong with one, _chat() says."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in value)


def _chat(given: Sequence[dict[str, Any]]) -> list[Message]:
    return read_messages([_renamed(message) if "from" in message else message for message in given], None)


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's words instead of ShareGPT's."""
    role, content = message["from"], message.get("value")
    return {"role": _ROLES.get(str(role), role), "content": content, **message}
