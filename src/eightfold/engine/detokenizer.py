"""From tokens to text as they come: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from eightfold.engine.sampling_params import SamplingParams
from eightfold.tokenizer import StreamDecoder, Tokenizer


class Detokenizer:
    """The text of one answer, token by token; what a token costs does not depend on those before it.

    A stop string is found at the character that completes it, however the text is cut into tokens; where several end
    there, the longest counts. Until an answer has `min_tokens` tokens none is found.

    Attributes:
        stop_reason: the stop string that was found; the text ends before it, or with it if that was asked for.
        token_count: how many tokens were used; those behind the one that completed a stop string are not.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.stop_reason: str | None = None
        self.token_count = 0
        self._decoder = StreamDecoder(tokenizer, keep_special=not params.skip_special_tokens)
        self._stops = [_Stop(text) for text in params.stops]
        self._includes, self._min_tokens = params.include_stop_str_in_output, params.min_tokens
        self._parts = list[str]()
        self._held = ""  # text that a stop string may begin with

    @property
    def text(self) -> str:
        """All text that was released."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; return the text that is certain now, often none. After a stop string tokens are ignored."""
        released = ""
        for token in token_ids:
            if self.stop_reason is not None:
                break
            self.token_count += 1
            released += self._take(self._decoder.push(token))
        return self._release(released)

    def finish(self) -> str:
        """Return what was held back: no more tokens will come."""
        if self.stop_reason is not None:
            return ""
        released = self._take(self._decoder.finish()) + self._held
        self._held = ""
        return self._release(released)

    def _release(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _take(self, piece: str) -> str:
        """Look for stop strings in new text; return what can no longer become part of one."""
        if not piece or not self._stops:
            return piece
        text, before = self._held + piece, len(self._held)
        for at, character in enumerate(piece, before + 1):
            found = [stop.text for stop in self._stops if stop.ends_with(character)]
            if found and self.token_count > self._min_tokens:
                return self._cut(text[:at], max(found, key=len))
        waiting = max(stop.matched for stop in self._stops)
        cut = len(text) - waiting
        self._held = text[cut:]
        return text[:cut]

    def _cut(self, text: str, stop: str) -> str:
        self.stop_reason, self._held = stop, ""
        # With min_tokens, the beginning of a stop string may have been released.
        return text if self._includes else text.removesuffix(stop)


class _Stop:
    """A stop string and how much of it the text ends with (Knuth, Morris, Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0] * len(text)  # text[:i + 1] ends with its own beginning text[:_shorter[i]]
        for i in range(1, len(text)):
            self._shorter[i] = self._longer(self._shorter[i - 1], text[i])

    def ends_with(self, character: str) -> bool:
        """Go on by one character; return whether the whole string was just completed."""
        self.matched = self._longer(self.matched, character)
        complete = self.matched == len(self.text)
        if complete:
            self.matched = self._shorter[-1]
        return complete

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
