"""Answers of a given form: which tokens may come next, by llguidance.

A mask has one bit for each token of the vocabulary, lowest bit first, in words of 32 bits; a one lets the token pass.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.errors import DependencyError, InputError
from eightfold.tokenizer import Tokenizer
from eightfold.values import shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEPT = 64  # compiled forms
MAX_REASON = 300  # characters of llguidance's message

# JSON has at most so much space between two symbols, or a small model may go on with spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


class Grammar:
    """How far one answer has come in its form."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Write the mask (W,) of tokens that may come next: only the stop tokens once the answer is complete."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, mask.reshape(1, -1))

    def accept(self, token: int) -> bool:
        """Go on by a token. False: the form does not allow it, or became too complex; only stop tokens can follow."""
        return bool(self._matcher.consume_token(token))

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can be added, or nothing could be understood any more."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes grammars for one tokenizer. Threads may share it.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; ids without a token are never allowed.
        stop_ids: tokens that end an answer, allowed where the form is complete.

    Raises:
        DependencyError: llguidance is not installed.
        InputError: llguidance cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._library = _library()
        path = tokenizer.directory / "tokenizer.json"
        try:
            self._tokenizer = self._library.LLTokenizer(
                path.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=sorted(stop_ids) or None
            )
        except Exception as error:  # the library raises ValueError, and what Rust panics with
            raise InputError("tokenizer for structured output", where=path, got=error) from None
        self._kept: OrderedDict[StructuredOutput, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, structured: StructuredOutput) -> Grammar:
        """Return a grammar at its beginning. One that was asked for lately costs little.

        Raises:
            InputError: the schema, expression or grammar is wrong or too complex; llguidance's words say why.
        """
        with self._lock:
            matcher = self._kept.get(structured)
            if matcher is not None:
                self._kept.move_to_end(structured)
        if matcher is None:
            matcher = self._compile(structured)
        with self._lock:
            self._kept[structured] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return Grammar(matcher.deep_copy())

    def _compile(self, structured: StructuredOutput) -> Any:
        name, text = _source(self._library, structured)
        matcher = self._library.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise InputError(f"structured {name}", got=_reason(matcher), expected="one that llguidance understands")
        return matcher


def fill_masks(grammars: Sequence[Grammar], vocab_size: int) -> NDArray[np.int32]:
    """Return the masks (len(grammars), W) of several answers."""
    masks = np.empty((len(grammars), mask_words(vocab_size)), np.int32)
    for grammar, mask in zip(grammars, masks, strict=True):
        grammar.fill(mask)
    return masks


def mask_words(vocab_size: int) -> int:
    """Return W, the words of a mask."""
    return -(-vocab_size // 32)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DependencyError(
            "structured output needs llguidance",
            got="none installed",
            action="Install it: pip install 'eightfold[serve]'",
        ) from None
    return llguidance


def _reason(matcher: Any) -> str:
    """Return on one line what is wrong, without the state that llguidance appends."""
    return shorten(" ".join(matcher.get_error().split("<state>")[0].split()), MAX_REASON)


def _source(library: Any, structured: StructuredOutput) -> tuple[str, str]:
    """Return what was given and llguidance's grammar of it."""
    make = library.LLMatcher
    if structured.regex is not None:
        return "regex", make.grammar_from_regex(structured.regex)
    if structured.grammar is not None:
        return "grammar", make.grammar_from_lark(structured.grammar)
    if structured.choices:
        return "choices", make.grammar_from_lark("start: " + " | ".join(map(json.dumps, structured.choices)))
    schema = '{"type": "object"}' if structured.json_schema is None else structured.json_schema
    return "json_schema", make.grammar_from_json_schema(schema, defaults=JSON_OPTIONS)
