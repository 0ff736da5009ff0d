"""A model's tokens as llguidance needs them: which bytes each one stands for in an answer that has a form.

Only ordinary tokens spell text, and blanks that were added to them. Every other added token, such as `<tool_call>` or
`<|im_end|>`, is one thing and no text, as is a stop token: llguidance's grammars may name it, but where a form has its
text, ordinary tokens spell that. Where a form leaves no choice, the text is cut into tokens as the model's tokenizer
cuts text that it does not look for added tokens in, because that is what the model knows best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

_MARK = b"\xff"  # llguidance's, before the name of a token that is no text
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")

# Characters that are cut into tokens at a time; llguidance asks again with each token.
_ENOUGH = 1024

# Parts of a decoder that only change what lies between tokens or at the ends of a text.
_BETWEEN = ("Fuse", "Strip")


class Vocabulary(NamedTuple):
    """What llguidance's tokenizer is made from: tokenizer.json, the number of ids, and those that end an answer."""

    text: str
    size: int
    stop_ids: list[int]

    def load(self, library: Any) -> tuple[Any, FormTokens]:
        """Return llguidance's tokenizer, and the tokens that it is made of.

        Raises:
            ValueError: it is not known how the tokens spell text.
        """
        tokens = FormTokens(self)
        return library.LLTokenizer(tokens, eos_token=tokens.ends), tokens


class FormTokens:
    """A tokenizer in the shape of llguidance's TokenizerWrapper.

    Attributes:
        tokens: the bytes that each id stands for; with a mark in front: its name.
        ends: the ids that end an answer. Without any, one that is no text has to serve.
    """

    is_tokenizer_wrapper = True
    special_token_ids: tuple[int, ...] = ()  # they have their mark already
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        self._stopped: BaseException | None = None
        content = json.loads(vocabulary.text)
        spelling = _Spelling(content.get("decoder"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        self._plain = Tokenizer.from_str(json.dumps(_without_added(content)))
        named = self._plain.get_vocab(with_added_tokens=False) | added
        no_text = {token for name, token in added.items() if not name.isspace()}.union(vocabulary.stop_ids)
        self.tokens = [b""] * vocabulary.size
        for name, token in named.items():
            if token < vocabulary.size:
                self.tokens[token] = _MARK + name.encode() if token in no_text else spelling.bytes_of(name)
        idle = (token for token, text in enumerate(self.tokens) if not text or token in no_text)
        self.ends = [token for token in vocabulary.stop_ids if token < vocabulary.size] or [next(idle, 0)]
        self.eos_token_id = self.ends[0]

    def __call__(self, text: str) -> list[int]:
        """Return the tokens that spell a text. llguidance calls this, and would take Ctrl-C for a fault of the form."""
        try:
            return self._cut(text)
        except BaseException as stop:
            if isinstance(stop, Exception) or type(stop).__name__ == "PanicException":  # a fault of the tokenizer
                raise
            self._stopped = stop
            return self._cut(text)

    def raise_stopped(self) -> None:
        """Raise what came while llguidance called."""
        if self._stopped is not None:
            stop, self._stopped = self._stopped, None
            raise stop

    def _cut(self, text: str) -> list[int]:
        # Of a long text only the first token counts, and what lies far behind does not change it.
        text = text[: max(_ENOUGH, 8 * self._most_bytes)]
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        content = text.encode()
        if max(ids, default=0) < len(self.tokens) and b"".join([self.tokens[token] for token in ids]) == content:
            return ids
        return list(self._longest(content))  # the tokenizer rewrites texts

    def _longest(self, content: bytes) -> Iterator[int]:
        """Cut bytes into tokens that are as long as possible, from the left."""
        at = 0
        while at < len(content):
            found = range(min(len(content), at + self._most_bytes), at, -1)
            end = next((end for end in found if content[at:end] in self._ids), None)
            if end is None:  # no token has this byte; the grammar will say so
                return
            yield self._ids[content[at:end]]
            at = end

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: token for token, text in enumerate(self.tokens) if text and text[:1] != _MARK}

    @cached_property
    def _most_bytes(self) -> int:
        """Of a token, names of those that are no text included."""
        return max(map(len, self.tokens), default=0)


class _Spelling:
    """How a decoder of tokenizer.json spells a token alone."""

    def __init__(self, decoder: Any) -> None:
        self._steps = [step for step in _parts(decoder, "decoders") if step["type"] not in _BETWEEN]
        kinds = [step["type"] for step in self._steps]
        known = all(kind in ("ByteLevel", "ByteFallback", "Metaspace", "Replace") for kind in kinds)
        if not known or not {"ByteLevel", "ByteFallback", "Metaspace"}.intersection(kinds):
            raise ValueError(f"a decoder of {' and '.join(kinds) or 'no kind'}, expected ByteLevel or ByteFallback")

    def bytes_of(self, name: str) -> bytes:
        for step in self._steps:
            kind = step["type"]
            if kind == "ByteLevel":
                return bytes(map(_BYTES.__getitem__, name)) if _BYTES.keys() >= set(name) else name.encode()
            if kind == "ByteFallback" and (byte := _BYTE.fullmatch(name)):
                return bytes.fromhex(byte[1])
            if kind == "Metaspace":
                name = name.replace(step.get("replacement", "▁"), " ")
            elif kind == "Replace" and "String" in step["pattern"]:
                name = name.replace(step["pattern"]["String"], step["content"])
        return name.encode()


def _byte_symbols() -> dict[str, int]:
    """Return the bytes that GPT-2's byte-level symbols stand for: a printable one itself, the others above 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_symbols()


def _parts(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json, which may be a sequence of them."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        for each in part[inner]:
            yield from _parts(each, inner)
    elif isinstance(part, dict):
        yield part


def _without_added(content: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json's content for texts that stand in the middle: without added tokens and spaces."""
    # Of normalizers only those stay that write a text in the vocabulary's alphabet: a form's text is not to be changed.
    alphabet = [step for step in _parts(content.get("normalizer"), "normalizers") if step["type"] == "Replace"]
    before = [dict(step) for step in _parts(content.get("pre_tokenizer"), "pretokenizers")]
    for step in before:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif "add_prefix_space" in step:
            step["add_prefix_space"] = False
    return {
        **content,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": alphabet} if alphabet else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before} if before else None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
