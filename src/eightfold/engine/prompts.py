"""The prompts of a program: texts, token ids, and vLLM's objects with either, alone or in a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eightfold.errors import InputError, one_of
from eightfold.tokenizer import Tokenizer
from eightfold.values import WORDS, shown

# What LLM.generate takes for one prompt.
PromptLike = str | Sequence[int] | Mapping[str, Any]

_EXPECTED = "a text, a list of token ids, or an object with prompt or prompt_token_ids"
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read.

    Attributes:
        token_ids: at least none; the engine refuses an empty prompt.
        text: where it was given.
        cache_salt: only prompts with the same one share keys and values.
    """

    token_ids: Sequence[int]
    text: str | None = None
    cache_salt: str = ""


def read_prompts(given: Any, tokenizer: Tokenizer) -> list[Prompt]:
    """Return prompts; one alone is a list of it.

    Raises:
        InputError: one is none. The place is named.
    """
    if isinstance(given, (str, Mapping)) or _is_token_ids(given):
        return [_prompt(given, tokenizer, "prompts")]
    if not _is_list(given):
        raise _wrong("prompts", given, f"{_EXPECTED}, or a list of these")
    return [_prompt(each, tokenizer, f"prompts[{at}]") for at, each in enumerate(given)]


def _prompt(given: Any, tokenizer: Tokenizer, where: str) -> Prompt:
    if isinstance(given, str):
        return Prompt(_encoded(given, tokenizer, where), given)
    if isinstance(given, Mapping):
        return _of_object(given, tokenizer, where)
    if not _is_list(given):
        raise _wrong(where, given, _EXPECTED)
    return Prompt(_require_ids(given, where))


def _of_object(given: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Prompt:
    values = {key: value for key, value in given.items() if value is not None}
    strange = [key for key in values if key not in _KEYS]
    if strange:
        raise _wrong(where, strange[0], f"an object with {one_of(_KEYS)}")
    text, ids, salt = (values.get(key) for key in _KEYS)
    if text is None and ids is None:
        raise InputError(where, got="an object without a prompt", expected=_EXPECTED)
    if text is not None and not isinstance(text, str):
        raise _wrong(f"{where}.prompt", text, "a text")
    if salt is not None and not WORDS.fits(salt):
        raise _wrong(f"{where}.cache_salt", salt, WORDS.name)
    if ids is None:
        ids = _encoded(text or "", tokenizer, f"{where}.prompt")
    elif not _is_list(ids):
        raise _wrong(f"{where}.prompt_token_ids", ids, "a list of token ids")
    return Prompt(_require_ids(ids, f"{where}.prompt_token_ids"), text, salt or "")


def _encoded(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes, bytearray, memoryview))


def _is_token_ids(given: Any) -> bool:
    """Return whether a list is meant as token ids, which are then checked; a list of nothing has no prompts."""
    return _is_list(given) and len(given) > 0 and isinstance(given[0], int)


def _require_ids(ids: Sequence[Any], where: str) -> Sequence[int]:
    if not set(map(type, ids)) <= {int}:
        at = next(at for at, token in enumerate(ids) if type(token) is not int)
        raise _wrong(f"{where}[{at}]", ids[at], "a token id")
    return ids


def _wrong(where: str, value: Any, expected: str) -> InputError:
    return InputError(where, got=shown(value), expected=expected)
