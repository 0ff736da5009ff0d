"""What an engine hands out: text as it becomes certain, the state of a request after a step, the engine's counts.

An output holds no copies. What a sequence produced lies in lists that only grow, and an output knows how much of them
it stands for; so its whole text and tokens are put together when somebody asks, in any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eightfold.engine.sampler import Sampled
from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import InputError
from eightfold.tokenizer import StreamDecoder, Tokenizer

# "error": the answer could not be kept to its form any further.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Produced:
    """What a sequence has produced so far; all lists only grow.

    Attributes:
        token_ids: the tokens, without a stop token.
        pieces: the text, in the pieces in which it became certain.
        logprobs: the log-probabilities of each token; None where they were not asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Sampled] | None = None


class CompletionOutput:
    """One answer to a request, up to a step.

    Attributes:
        index: the answer's place among the request's n.
        finish_reason: None while it goes on.
        stop_reason: the stop string or stop token that ended it, or what the error was; None for the model's own end
            token.
    """

    __slots__ = ("_ids", "_pieces", "_produced", "finish_reason", "index", "stop_reason")

    def __init__(
        self,
        index: int,
        produced: Produced,
        shown: tuple[int, int],
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> None:
        """Stand for what there is now; `shown` says how many tokens and pieces the output before this one had."""
        self.index, self._produced = index, produced
        self._ids = (shown[0], len(produced.token_ids))
        self._pieces = (shown[1], len(produced.pieces))
        self.finish_reason, self.stop_reason = finish_reason, stop_reason

    @property
    def token_ids(self) -> list[int]:
        """All tokens, without a stop token."""
        return self._produced.token_ids[: self._ids[1]]

    @property
    def delta_token_ids(self) -> list[int]:
        """Tokens since the output before."""
        return self._produced.token_ids[slice(*self._ids)]

    @property
    def text(self) -> str:
        """All text."""
        return "".join(self._produced.pieces[: self._pieces[1]])

    @property
    def delta_text(self) -> str:
        """Text since the output before."""
        return "".join(self._produced.pieces[slice(*self._pieces)])

    @property
    def logprobs(self) -> list[Sampled] | None:
        """Log probabilities of all tokens; None where they were not asked for."""
        found = self._produced.logprobs
        return None if found is None else found[: self._ids[1]]

    @property
    def cumulative_logprob(self) -> float | None:
        """The log probability of all tokens together; None where none were asked for."""
        logprobs = self.logprobs
        return None if logprobs is None else sum(each.logprob or 0.0 for each in logprobs)

    @property
    def delta_logprobs(self) -> list[Sampled] | None:
        """Log probabilities of the tokens since the output before."""
        found = self._produced.logprobs
        return None if found is None else found[slice(*self._ids)]

    def begin_with(self, earlier: CompletionOutput) -> None:
        """Let the deltas begin where those of an earlier output do that nobody has read."""
        self._ids = (earlier._ids[0], self._ids[1])
        self._pieces = (earlier._pieces[0], self._pieces[1])

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, token_ids={self.token_ids}, "
            f"finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r})"
        )


@dataclass(slots=True)
class Times:
    """Seconds of time.monotonic at which something happened to a request; None: not yet."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request after a step that moved it.

    Attributes:
        request_id: the id it was added by.
        prompt_ids: the prompt's tokens.
        outputs: the answers that moved in this step; all of them once the request is finished.
        finished: whether all answers are complete.
        times: shared with the engine, which fills it in.
        cached_tokens: how many of the prompt's tokens were found in the cache.
        prompt_logprobs: log-probabilities of the prompt's tokens, None in the place of the first; None where they were
            not asked for or are not complete yet.
        prompt: the prompt's text; None where it was given as tokens.
    """

    request_id: str
    prompt_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    times: Times
    cached_tokens: int = 0
    prompt_logprobs: list[Sampled | None] | None = None
    prompt: str | None = None

    @property
    def prompt_token_ids(self) -> list[int]:
        """`prompt_ids` by vLLM's name."""
        return list(self.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """`cached_tokens` by vLLM's name."""
        return self.cached_tokens

    @property
    def failure(self) -> InputError | None:
        """Why an answer could not be kept to its form; None where all could."""
        reasons = [str(answer.stop_reason) for answer in self.outputs if answer.finish_reason == "error"]
        return InputError(reasons[0]) if reasons else None

    def begin_with(self, earlier: RequestOutput) -> None:
        """Merge the output before this one, which nobody has read, into this one."""
        unread = {answer.index: answer for answer in earlier.outputs}
        for answer in self.outputs:
            if answer.index in unread:
                answer.begin_with(unread.pop(answer.index))
        self.outputs = sorted([*unread.values(), *self.outputs], key=lambda answer: answer.index)


@dataclass(slots=True)
class EngineStats:
    """Counts of an engine: the first four as they are now, the others since it began.

    Attributes:
        waiting: sequences in line.
        running: sequences that have started.
        blocks_total: blocks of the cache.
        blocks_used: blocks that sequences hold.
        preemptions: sequences that had to give their blocks back and begin again.
        prefix_hit_tokens: prompt tokens found in the cache.
        prefix_query_tokens: prompt tokens looked up in it.
        prompt_tokens: prompt tokens computed, without those found.
        generated_tokens: answer tokens.
        drafted: tokens that prompt lookup guessed.
        accepted: guesses that were right.
        model_drafted: tokens that a draft model guessed.
        model_accepted: of those, the right ones.
        passes: steps that gave a sequence tokens, counted for each sequence.
    """

    waiting: int = 0
    running: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    model_drafted: int = 0
    model_accepted: int = 0
    passes: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Answer tokens that a step gave a sequence, on average."""
        return self.generated_tokens / max(self.passes, 1)


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
        form = params.structured
        is_exact = form is not None and not form.begins_after  # a space that it begins with belongs to it
        self._decoder = StreamDecoder(tokenizer, keep_special=params.keeps_special, inside=is_exact)
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
