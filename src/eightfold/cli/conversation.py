"""A chat as token ids: each prompt begins with the tokens that the cache holds of the turns before it.

Rendered text is not tokenized twice: what the model was given and what it said stand as the tokens they were, and only
the text behind them is new. That needs the template to repeat both and to go on with a special token, where texts can
be cut without changing their tokens; elsewhere the whole text is tokenized anew, which costs time and nothing else.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from eightfold.errors import CapacityError
from eightfold.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        text: the conversation as the chat template renders it.
        token_ids: the same as tokens.
        forgotten: turns that had to be dropped for it.
    """

    text: str
    token_ids: list[int]
    forgotten: int = 0


class Conversation:
    """What was said so far.

    Attributes:
        system: what stands before all turns; None for nothing.
        turns: messages of the user and the model, in order.
    """

    def __init__(self, tokenizer: Tokenizer, room: int, system: str | None = None) -> None:
        """Begin a conversation; `room`: tokens that a prompt may have."""
        self._tokenizer, self._room, self.system = tokenizer, room, system
        self.turns: list[Message] = []
        self._known = Prompt("", [])  # the last prompt with its answer

    @property
    def messages(self) -> list[Message]:
        """All messages, the system's first."""
        return self._with_system(self.turns)

    def ask(self, text: str) -> Prompt:
        """Add what the user says and return the prompt; the oldest turns are dropped if it would be too long.

        Then so many are dropped that half of the room is free: the next turns find what is left in the cache.

        Raises:
            CapacityError: this message alone is too long. It is not added.
            InputError: the chat template refuses it. It is not added.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            prompt = self._prompt(self.turns)
            return prompt if len(prompt.token_ids) <= self._room else self._forget()
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Forget the user's last message, which got no answer."""
        self.turns.pop()

    def answer(self, prompt: Prompt, text: str, token_ids: Sequence[int]) -> None:
        """Add what the model said."""
        self.turns.append({"role": "assistant", "content": text})
        self._known = Prompt(prompt.text + text, [*prompt.token_ids, *token_ids])

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def _prompt(self, turns: list[Message]) -> Prompt:
        text = self._tokenizer.render_chat(self._with_system(turns), add_generation_prompt=True)
        return Prompt(text, self._encode(text))

    def _encode(self, text: str) -> list[int]:
        known = self._known
        if known.text and text.startswith(known.text):
            new = self._tokenizer.encode(text[len(known.text) :], special_tokens=False)
            if new and self._is_special(new[0]):
                return known.token_ids + new
        return self._tokenizer.encode(text, special_tokens=False)

    def _is_special(self, token: int) -> bool:
        return bool(self._tokenizer.decode([token], keep_special=True)) and not self._tokenizer.decode([token])

    def _forget(self) -> Prompt:
        """Drop the oldest turns until half of the room is free, or only the last message is left."""
        starts = [at for at, message in enumerate(self.turns) if message["role"] == "user"]
        fits = bisect.bisect_left(
            range(1, len(starts) - 1), True, key=lambda k: self._length(starts[k]) <= self._room // 2
        )
        dropped = min(fits + 1, len(starts) - 1)
        kept = self.turns[starts[dropped] :]
        prompt = self._prompt(kept)
        if len(prompt.token_ids) > self._room:
            raise CapacityError(
                "message",
                got=f"{len(prompt.token_ids)} tokens",
                expected=f"at most {self._room}, which leaves room for an answer",
                action="Shorten it, or raise --max-model-len.",
            )
        self.turns[:] = kept
        return Prompt(prompt.text, prompt.token_ids, dropped)

    def _length(self, first: int) -> int:
        return len(self._prompt(self.turns[first:]).token_ids)
