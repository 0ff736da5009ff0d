"""What is asked: texts, files, chats and token ids of a command line, as token ids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from eightfold.errors import ConfigError, InputError, UnsupportedError
from eightfold.messages import Message, read_messages
from eightfold.tokenizer import Tokenizer

# A text, a chat, or token ids.
Prompt = str | list[Message] | list[int]

# What the adapter of a prompt without one is called.
BASE = (None, "", "base")


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of a command line.

    Raises:
        InputError, ConfigError, UnsupportedError: a file, or the value of a flag, that cannot be used.
    """
    if args.is_chat_model and args.input_file is not None:
        return [*read_chats(Path(args.input_file))]
    if args.input_dict is not None:
        prompts: list[Prompt] = [*read_input_dict(args.input_dict)]
    elif args.input_ids is not None:
        prompts = [*args.input_ids]
    else:
        prompts = [text_or_file(text) for text in args.input_texts]
    if not args.is_chat_model:
        return prompts
    return [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]


def text_or_file(text: str) -> str:
    """Return a text, or the content of the file that it names."""
    path = Path(text)
    try:
        if not path.is_file():
            return text
    except (OSError, ValueError):  # too long for a name, or a null byte
        return text
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "text file", where=path, got=f"byte {error.start} that is not UTF-8", expected="UTF-8 text"
        ) from None


def read_input_dict(entries: Any) -> list[str]:
    """Return the prompts of --input_dict.

    Raises:
        ConfigError: not a list of objects with a prompt.
        UnsupportedError: a prompt with an adapter.
    """
    if not isinstance(entries, list) or not entries:
        raise ConfigError("--input_dict", got=json.dumps(entries), expected='a list such as [{"prompt": "Hello"}]')
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError("--input_dict", got=json.dumps(entry), expected='an object such as {"prompt": "Hello"}')
        if entry.get("adapter") not in BASE:
            raise UnsupportedError("--input_dict", got=f"adapter {entry['adapter']}", action="LoRA is not made.")
    return [entry["prompt"] for entry in entries]


def read_chats(path: Path) -> list[list[Message]]:
    """Return the chats of --input_file, one a line.

    Raises:
        InputError: unreadable, empty, or a line that is no list of messages.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            "chat file", where=path, got=f"byte {error.start} that is not UTF-8", expected="UTF-8 text"
        ) from None
    chats = [_chat(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise InputError("chat file", where=path, got="no rows", expected="one chat a line")
    return chats


def _chat(line: str, number: int, where: Path) -> list[Message]:
    try:
        messages = json.loads(line)
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not messages:
        expected = 'a list such as [{"role": "user", "content": "Hello"}]'
        raise InputError(f"line {number}", where=where, got=line[:60], expected=expected)
    try:
        return read_messages(messages, None)
    except InputError as error:
        raise InputError(f"line {number} in {where}: {error}") from None


def encode(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Return a prompt's token ids; the tokenizer may be absent where prompts are ids already."""
    if isinstance(prompt, str):
        assert tokenizer is not None
        return tokenizer.encode(prompt)
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return ids
    assert tokenizer is not None
    messages = read_messages(prompt, tokenizer.template_source())
    return tokenizer.encode_chat(messages, add_generation_prompt=True)
