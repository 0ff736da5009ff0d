"""The texts of single tokens, and log-probabilities as OpenAI and vLLM write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from eightfold.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from eightfold.engine.sampler import Sampled
    from eightfold.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not
_SINGLE_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how vocabularies that have no bytes otherwise write one


def _byte_symbols() -> dict[str, int]:
    """Return which byte each symbol of a byte-level vocabulary stands for.

    Bytes that are printable in Latin-1 stand for themselves, the others in order for symbols from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


class Offsets:
    """Where the tokens of a text begin, in characters; a token within a character begins where the character does.

    Attributes:
        begin: of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool) -> None:
        self.begin = 0
        self._decoder, self._taken = StreamDecoder(tokenizer, keep_special=keep_special), 0
        self._decode = partial(tokenizer.decode, keep_special=keep_special)

    def take(self, token: int) -> int:
        """Return where the next token begins."""
        begin, text = self._taken, self._decoder.push(token)
        self._taken += len(text)
        if text.startswith(REPLACEMENT):  # of tokens before this one, which turn out to be no character
            begin = max(self._taken - len(self._decode([token])), begin)
        return self.begin + begin


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(65536)(self._of)
        self.bytes_of = lru_cache(65536)(self._bytes_of)

    def _of(self, token: int) -> str:
        """Return a token's text; of a token that is part of a character its bytes, as OpenAI shows them."""
        text = self._tokenizer.decode([token], keep_special=True)
        if REPLACEMENT not in text:
            return text
        known = self.bytes_of(token)
        return text if known is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def _bytes_of(self, token: int) -> bytes | None:
        """Return a token's bytes; None where they are not known."""
        text = self._tokenizer.decode([token], keep_special=True)
        if REPLACEMENT not in text:
            return text.encode("utf-8", "replace")
        piece = self._tokenizer.piece(token) or ""
        single = _SINGLE_BYTE.fullmatch(piece)
        if single:
            return bytes.fromhex(single[1])
        codes = [_BYTE_OF.get(symbol) for symbol in piece]
        known = [code for code in codes if code is not None]
        return bytes(known) if known and len(known) == len(codes) else None

    def offsets(self, *, keep_special: bool) -> Offsets:
        """Return what says where the tokens of a text begin, in which special ones may be left out."""
        return Offsets(self._tokenizer, keep_special=keep_special)

    def offsets_of_prompt(self, token_ids: Sequence[int], before: int) -> list[int]:
        """Return where a prompt's tokens begin in its text, of which the first ones are no part."""
        offsets = self.offsets(keep_special=True)
        return [0] * before + [offsets.take(token) for token in token_ids[before:]]

    def chat_logprobs(self, sampled: Sequence[Sampled] | None) -> dict[str, Any] | None:
        """Return what stands under `logprobs` of a chat's choice; None where they were not asked for."""
        if sampled is None:
            return None
        content = [
            {
                **self._named(each.token_id, each.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in each.top],
            }
            for each in sampled
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        known = self.bytes_of(token)
        return {
            "token": self.of(token),
            "logprob": finite(logprob),
            "bytes": None if known is None else list(known),
        }

    def prompt_logprobs(self, sampled: Sequence[Sampled | None]) -> list[Any]:
        """Return vLLM's `prompt_logprobs`: for each token of the prompt what was likely there, by token id."""
        return [
            None
            if each is None
            else {
                str(token): {"logprob": finite(logprob), "decoded_token": self.of(token)}
                for token, logprob in (*each.top, (each.token_id, each.logprob))
            }
            for each in sampled
        ]


def finite(logprob: float | None) -> float | None:
    """Return a number that JSON has."""
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
