"""What an engine hands out: the state of a request after a step, and the engine's own counts.

An output holds no copies. What a sequence produced lies in lists that only grow, and an output knows how much of them
it stands for; so its whole text and tokens are put together when somebody asks, in any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eightfold.engine.sampler import Sampled

FinishReason = Literal["stop", "length", "abort"]


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
        stop_reason: the stop string or stop token that ended it; None for the model's own end token.
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
    """

    request_id: str
    prompt_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    times: Times
    cached_tokens: int = 0
    prompt_logprobs: list[Sampled | None] | None = None

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
