"""A request, its sequences, one for each of its n answers, and a step over sequences as arrays for the native model.

Letters: T tokens of a step, S sequences, R rows after which the choice is wanted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.engine.block_manager import hash_block, salted
from eightfold.engine.outputs import CompletionOutput, FinishReason, Produced, RequestOutput, Times
from eightfold.model.native.model import PAGE, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.engine.outputs import Detokenizer
    from eightfold.engine.sampler import Sampled, Sampler
    from eightfold.engine.sampling_params import SamplingParams
    from eightfold.engine.speculate import Lookup
    from eightfold.tokenizer import Tokenizer


@dataclass(slots=True)
class Drafter:
    """What a draft model (draft.py) knows of a sequence.

    Attributes:
        computed: tokens whose keys and values are in the draft model's cache.
        odds: how likely a guess is right if those before it are; below zero: not known yet.
        silent: steps since the last guess.
        patience: steps without guesses after which one is tried.
        made: the classes of the guesses that the step to come checks; none where they are prompt lookup's.
        right: how many of those were right.
        named: full blocks of which the draft model knows that they hold what they should.
        is_usable: whether the draft model knows all of the sequence's tokens.
    """

    computed: int = 0
    odds: float = -1.0
    silent: int = 0
    patience: int = 0
    made: list[int] = field(default_factory=list)
    right: int = 0
    named: int = 0
    is_usable: bool = True

    def forget(self) -> None:
        """The sequence has no blocks any more."""
        self.computed = self.named = 0


class TokenSequence:
    """The tokens of a prompt and one answer to it, and where the engine is with them.

    Attributes:
        request: it belongs to.
        index: the answer's place among the request's n.
        order: rank by arrival; the lower, the older.
        token_ids: prompt and answer.
        prompt_len: how many of them are the prompt's.
        max_len: tokens at which it ends for its length.
        computed: tokens whose keys and values are in the cache.
        scheduled: tokens of `token_ids` that the step to come computes.
        draft: guesses that the step to come computes behind them.
        drafter: what a draft model knows of it.
        blocks: blocks of the cache, in order; none while it waits.
        hashes: the hashes of its full blocks, as far as they are known.
        named: how many of `blocks` the block manager knows by these.
        row: in the step that runs, the first row after which a token is chosen for it.
        lookup: what drafts its tokens; None where nothing does.
        slot: row of the scheduler's tables while it runs.
        finish_reason: None while it goes on.
    """

    __slots__ = (
        "blocks", "computed", "detokenizer", "draft", "drafter", "finish_reason", "hashes", "index", "lookup",
        "max_len", "named", "order", "produced", "prompt_len", "request", "row", "sampler", "scheduled", "shown",
        "slot", "stop_reason", "token_ids",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, max_len: int, sampler: Sampler, detokenizer: Detokenizer) -> None:
        self.request, self.index, self.max_len = request, index, max_len
        self.sampler, self.detokenizer = sampler, detokenizer
        self.lookup: Lookup | None = None
        self.token_ids = list(request.prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.order = self.computed = self.scheduled = self.named = self.row = 0
        self.draft: list[int] = []
        self.drafter = Drafter()
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.slot = -1
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.produced = Produced(logprobs=None if request.params.logprobs is None else [])
        self.shown = (0, 0)

    @property
    def remaining(self) -> int:
        """Tokens that have to be computed before the next one can be chosen."""
        return len(self.token_ids) - self.computed

    @property
    def lacking_in_draft(self) -> int:
        """Tokens that a draft model has to compute before it can guess the next one."""
        return len(self.token_ids) - self.drafter.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the request still lacks log-probabilities of its prompt, and this sequence brings them."""
        found = self.request.prompt_logprobs
        return found is not None and self.index == 0 and len(found) < self.prompt_len

    @property
    def first_prompt_logits(self) -> int:
        """The first position of the prompt whose logits are still wanted."""
        return max(len(self.request.prompt_logprobs or ()) - 1, 0)

    def hash_blocks(self, until: int, tells_prompt: bool) -> None:
        """Extend `hashes` over the full blocks of the first `until` tokens.

        Args:
            until: tokens.
            tells_prompt: whether keys and values depend on which tokens are the prompt's.
        """
        for begin in range(len(self.hashes) * PAGE, until - PAGE + 1, PAGE):
            parent = self.hashes[-1] if self.hashes else salted(self.request.cache_salt)
            prompt_tokens = min(max(self.prompt_len - begin, 0), PAGE) if tells_prompt else 0
            self.hashes.append(hash_block(parent, self.token_ids[begin : begin + PAGE], prompt_tokens))

    def append(self, sampled: Sampled) -> None:
        """Add a chosen token, and end the sequence if it was the last."""
        produced, request = self.produced, self.request
        self.token_ids.append(sampled.token_id)
        if self.lookup is not None:
            self.lookup.follow()
        produced.token_ids.append(sampled.token_id)
        if produced.logprobs is not None:
            produced.logprobs.append(sampled)
        if request.reads_text:
            piece = self.detokenizer.push((sampled.token_id,))
            if piece:
                produced.pieces.append(piece)
            if self.detokenizer.stop_reason is not None:
                self.finish("stop", self.detokenizer.stop_reason)
                return
        if self.sampler.is_finished:
            self.finish("stop")
        elif len(self.token_ids) == self.max_len:
            self.finish("length")

    def has_failed(self) -> bool:
        """End the sequence if it cannot go on in its form; the token that was just chosen is none of it."""
        failure = self.sampler.failure
        if failure is not None:
            self.finish("error", failure)
        return failure is not None

    def ends_with(self, token: int) -> bool:
        """End the sequence if this is a stop token, which does not become part of it.

        Before `min_tokens` the sampler lets none pass, unless nothing else can follow.
        """
        request = self.request
        if token not in request.end_ids:
            return False
        self.finish("stop", None if token in request.eos_ids else token)
        return True

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End the sequence and complete its text."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.draft = []
        request = self.request
        if request.reads_text:
            rest = self.detokenizer.finish()
        else:
            rest = request.tokenizer.decode(self.produced.token_ids, keep_special=request.params.keeps_special)
        if rest:
            self.produced.pieces.append(rest)

    def output(self) -> CompletionOutput:
        """Return what there is; the next output's deltas begin here."""
        produced = self.produced
        found = CompletionOutput(self.index, produced, self.shown, self.finish_reason, self.stop_reason)
        self.shown = (len(produced.token_ids), len(produced.pieces))
        return found


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what was asked for, and its sequences.

    Attributes:
        request_id: the caller's id.
        prompt_ids: the prompt's tokens.
        params: what was asked for.
        eos_ids: the model's own tokens that end an answer; none if they are to be ignored and there is no form.
        streams: whether every step gives an output, and not only the last.
        tokenizer: the model's tokenizer.
        cache_salt: only requests with the same one share keys and values of prompts.
        end_ids: all tokens that end an answer.
        reads_text: whether text is made as tokens come, and not from all of them at the end.
        sequences: the sequences, one for each answer.
        times: when it arrived, began, got its first token and ended.
        cached_tokens: how many of the prompt's tokens the first sequence found in the cache.
        prompt_logprobs: the prompt's log-probabilities so far; None where they were not asked for.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int]
    streams: bool
    tokenizer: Tokenizer
    cache_salt: str = ""
    end_ids: frozenset[int] = field(init=False)
    reads_text: bool = field(init=False)
    sequences: list[TokenSequence] = field(default_factory=list)
    times: Times = field(default_factory=lambda: Times(time.monotonic()))
    cached_tokens: int = 0
    prompt_logprobs: list[Sampled | None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.end_ids = self.eos_ids | set(self.params.stop_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.reads_text = self.streams or bool(self.params.stops) or self.params.structured is not None

    @property
    def is_finished(self) -> bool:
        """Whether all answers are complete."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output(self, moved: list[TokenSequence]) -> RequestOutput:
        """Return the state of the request, with the answers of the sequences that moved, or all at its end."""
        finished = self.is_finished
        shown = self.sequences if finished else moved
        found = self.prompt_logprobs
        if found is not None and len(found) < len(self.prompt_ids):
            found = None
        return RequestOutput(
            self.request_id, self.prompt_ids, [sequence.output() for sequence in shown], finished, self.times,
            self.cached_tokens, found,
        )  # fmt: skip


class Layout:
    """The arrays of the last step, which are those of the next one but for two where all sequences just go on.

    Those two are written through memoryviews: after a step the model's weights have pushed everything else out of the
    caches, and numpy's machinery for the same takes fifty microseconds to come back.

    Args:
        tables: (slots, blocks) int32, the blocks of each sequence.
    """

    def __init__(self, tables: NDArray[Any]) -> None:
        self._tables = tables
        self._step: Step | None = None  # the last one, if the next one can be like it
        self._like = (list[TokenSequence](), list[bool](), -1)  # its plan, who needed logits, and the version
        self._token_ids = self._positions = memoryview(b"")

    def of(self, plan: list[TokenSequence], version: int) -> Step:
        """Return the arrays of a step, which overwrites those before. See `lay_out`.

        Args:
            plan: sequences in order, with what is scheduled of each and the guesses behind it.
            version: differs when any sequence's blocks do.
        """
        for sequence in plan:
            if sequence.computed != len(sequence.token_ids) - 1 or sequence.draft:
                self._step = None
                return lay_out(plan, self._tables)
        like = (plan, [sequence.sampler.needs_logits for sequence in plan], version)
        if self._step is not None and like == self._like:
            token_ids, positions = self._token_ids, self._positions
            for at, sequence in enumerate(plan):
                token_ids[at] = sequence.token_ids[-1]
                positions[at] += 1
            return self._step
        step = lay_out(plan, self._tables)
        self._step, self._like = (step if step.generated.all() else None), like
        self._token_ids, self._positions = step.token_ids.data, step.positions.data
        return step


def lay_out(plan: list[TokenSequence], tables: NDArray[Any]) -> Step:
    """Return the arrays of a step. Of each sequence that gets a token, `row` becomes the first to choose from.

    Args:
        plan: sequences in order, with what is scheduled of each and the guesses behind it.
        tables: (slots, blocks) int32, the blocks of each.
    """
    token_ids, positions, generated, starts = list[int](), list[int](), list[bool](), [0]
    shown, others = list[int](), list[int]()  # rows with logits, and those whose likeliest token is enough
    for sequence in plan:
        begin = len(token_ids)
        first, count = sequence.computed, sequence.scheduled
        end = first + count
        if count == 1:
            token_ids.append(sequence.token_ids[first])
            positions.append(first)
            generated.append(first >= sequence.prompt_len)
        else:
            token_ids += sequence.token_ids[first:end]
            positions += range(first, end)
            generated += [position >= sequence.prompt_len for position in range(first, end)]
        if sequence.draft:
            token_ids += sequence.draft
            positions += range(end, end + len(sequence.draft))
            generated += [True] * len(sequence.draft)
        starts.append(len(token_ids))
        if sequence.wants_prompt_logits:
            sequence.row = len(shown) + count - 1
            shown += range(begin, len(token_ids))
        elif end == len(sequence.token_ids):
            rows = shown if sequence.sampler.needs_logits else others
            sequence.row = len(rows) if rows is shown else ~len(rows)
            rows += range(begin + count - 1, len(token_ids))
    for sequence in plan:
        if sequence.row < 0:
            sequence.row = len(shown) + ~sequence.row
    width = max([len(sequence.blocks) for sequence in plan])
    return Step(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        generated=np.array(generated, np.uint8),
        starts=np.array(starts, np.int32),
        tables=tables[[sequence.slot for sequence in plan], :width],
        rows=np.array(shown + others, np.int32),
        shown=len(shown),
    )
