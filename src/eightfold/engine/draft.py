"""A small model guesses what a large one is going to say.

Only the guessing of speculative decoding is here (Leviathan, Kalman, Matias, Fast Inference from Transformers via
Speculative Decoding, 2023). The small model proposes its likeliest token, and that one's likeliest successor, and so
on; the large model's choices are made position after position as if there were no guesses, see speculate.py. A proposal
x that is certain is accepted with the probability p(x) that the large model gives it, which is what rejection sampling
demands of a point mass; and as each choice takes the random number that it would take without guesses, the tokens are
the same, and not only their distribution.

The small model's keys and values of block i lie in page i of its own cache. So a sequence has one table of blocks for
both models, and whoever gets or loses a block gets or loses both. The small model runs behind the large one: it
computes what it lacks when it is going to guess, and keeps of each full block the hash of what it has written there, so
that prompts which begin alike are computed once by it too.

How many guesses pay is a matter of time: guesses of K tokens each for m sequences take K steps of the small model, and
make the large model's step longer. Both are measured (StepTimes); how likely a guess is right, each sequence learns
from those before. Sequences are guessed if a K is found that gives more tokens a second than none. Then each guess says
itself how sure it is, by how much its logit exceeds the next one's, and a sequence goes on as long as the guess to come
is worth its time. (That drafts should end where the small model is unsure is an old observation; the thresholds of
others are fixed, here they follow from the times.)

Letters: K guesses of a sequence, m sequences that are guessed.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eightfold.engine.settings import EngineConfig
from eightfold.engine.speculate import StepTimes
from eightfold.errors import ConfigError, InputError
from eightfold.families import all_linears
from eightfold.files import has_file
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.tokenizer import Tokenizer
from eightfold.values import shorten

if TYPE_CHECKING:
    from eightfold.engine.outputs import EngineStats
    from eightfold.engine.sequence import Drafter, TokenSequence

MOST = 8  # guesses of a sequence, where their number is chosen here

# Rows of the steps that are measured.
_LARGE_ROWS, _SMALL_ROWS = (1, 2, 4, 6, 9), (1, 2, 4, 8, 64)

_FIRST_ODDS = 0.7
_LEARNING, _COMMON_LEARNING = 1 / 16, 1 / 64

# Guesses are classed by the margin of their logits; how likely one of each class is right at first, as measured with
# Qwen2.5-Coder-0.5B beside 1.5B.
_MARGINS = (0.25, 0.5, 1.0, 1.5, 2.0)
_FIRST_SURE = (0.36, 0.46, 0.5, 0.68, 0.78, 0.97)

# A sequence that lacks more tokens than these has to be worth it: it is expected to go on for as long as it did, and
# for so many tokens at least.
_FEW, _HORIZON = 8, 128

# Steps without a guess after which one is tried; each time it fails, twice as many, up to the last.
_PATIENCE, _MOST_PATIENCE = 16, 512


@dataclass(frozen=True, slots=True)
class Found:
    """What prompt lookup has for a sequence: how many guesses, and how many of them are expected to be right."""

    count: int = 0
    expected: float = 0.0


class DraftModel:
    """The small model beside an engine's large one.

    Args:
        model: the small one; its cache has as many pages as the large one's.
        large: the large model, which is measured here too.
        config: the engine's limits.
        counts: what the engine counts.

    Attributes:
        model: the small one.
        large_times: what steps of the large model take; whoever runs them notes it.
    """

    def __init__(self, model: NativeModel, large: NativeModel, config: EngineConfig, counts: EngineStats) -> None:
        self.model, self._counts = model, counts
        self._fixed, self._vocab = config.draft_tokens, large.config.vocab_size
        self._most = config.draft_tokens or MOST
        self.large_times, self._times = StepTimes(large, _LARGE_ROWS), StepTimes(model, _SMALL_ROWS)
        self._odds = _FIRST_ODDS  # of all sequences
        self._sure = list(_FIRST_SURE)
        self._rate = 0.0  # tokens a second that the step is expected to give
        self._contents: dict[int, bytes] = {}  # block -> the hash of what the small model has written into all of it

    def guess(self, plan: Sequence[TokenSequence], found: Sequence[Found], room: int, budget: int) -> None:
        """Guess for some sequences: sets their `draft`.

        Args:
            plan: sequences that all get one token.
            found: what prompt lookup has for each.
            room: rows that may be added to the step.
            budget: tokens that may be computed of what sequences lack.
        """
        able = [(sequence, at, most) for at, sequence in enumerate(plan) if (most := self._reach(sequence)) > 0]
        if not able:
            return
        room -= sum(each.count for each in found)
        wanted = self._all(able, found, room) if self._fixed else self._best(able, found, room, len(plan))
        mosts = {id(sequence): most for sequence, _, most in able}
        chosen = []
        for sequence, count in wanted:
            if not self._fixed:  # which guess is the last, they say themselves
                count = min(max(count, room // len(wanted)), mosts[id(sequence)])
            lacking = sequence.lacking_in_draft
            if lacking > 2:  # more than what the last step gave
                piece = min(lacking, budget)
                budget -= piece
                if piece < lacking:
                    self._catch_up(sequence, piece)
                    continue
            chosen.append((sequence, count))
        if chosen:
            self._run(chosen)

    def settle(self, sequence: TokenSequence) -> None:
        """Forget what was computed of wrong guesses, and learn from how many were right."""
        drafter = sequence.drafter
        drafter.computed = min(drafter.computed, sequence.computed)
        if drafter.made:
            self._learn(drafter)

    def _learn(self, drafter: Drafter) -> None:
        odds = self._odds if drafter.odds < 0 else drafter.odds
        checked = [True] * drafter.right + [False] * (drafter.right < len(drafter.made))
        for agrees, which in zip(checked, drafter.made, strict=False):
            odds += (agrees - odds) * _LEARNING
            self._odds += (agrees - self._odds) * _COMMON_LEARNING
            self._sure[which] += (agrees - self._sure[which]) * _COMMON_LEARNING
        drafter.odds, drafter.right = odds, 0
        drafter.made.clear()

    # --- how many

    def _reach(self, sequence: TokenSequence) -> int:
        """Return how many tokens can be guessed for a sequence, after a look at what the cache holds of it."""
        drafter, known = sequence.drafter, len(sequence.token_ids)
        self._look_into_cache(sequence)
        if self.model.config.vocab_size < self._vocab and drafter.is_usable:
            unread = sequence.token_ids[drafter.computed :]
            drafter.is_usable = max(unread) < self.model.config.vocab_size
        if not drafter.is_usable:
            return 0
        end = min(sequence.max_len - 1, len(sequence.blocks) * PAGE, self.model.config.reach)
        return min(self._most, end - known)

    def _look_into_cache(self, sequence: TokenSequence) -> None:
        """Find the blocks that hold what a new sequence begins with, and note which full ones hold it from now on."""
        drafter, blocks, hashes = sequence.drafter, sequence.blocks, sequence.hashes
        if not drafter.computed:
            most, at = min(len(hashes), (len(sequence.token_ids) - 1) // PAGE), 0
            while at < most and self._contents.get(blocks[at]) == hashes[at]:
                at += 1
            drafter.computed, drafter.named = at * PAGE, at
        for at in range(drafter.named, min(drafter.computed // PAGE, len(hashes))):
            self._contents[blocks[at]] = hashes[at]
            drafter.named = at + 1

    def _all(
        self, able: Sequence[tuple[TokenSequence, int, int]], found: Sequence[Found], room: int
    ) -> list[tuple[TokenSequence, int]]:
        """Return what is wanted where the number of guesses is fixed: all but those for whom lookup has more."""
        wanted = []
        for sequence, at, most in able:
            count = min(most, room + found[at].count)
            if count > 0 and _expected(self._odds_of(sequence), count) > found[at].expected:
                wanted.append((sequence, count))
                room -= count - found[at].count
        return wanted

    def _best(
        self, able: Sequence[tuple[TokenSequence, int, int]], found: Sequence[Found], room: int, total: int
    ) -> list[tuple[TokenSequence, int]]:
        """Return the sequences that are worth guessing, with the number of guesses that would be best for all."""
        rows, tokens = total + sum(each.count for each in found), total + sum(each.expected for each in found)
        without = best_rate = tokens / self.large_times(rows)
        best: list[tuple[TokenSequence, int]] = []
        behind = {id(sequence) for sequence, *_ in able if self._is_not_worth_it(sequence, without / total)}
        for count in range(1, self._most + 1):
            gains = sorted(
                (
                    (_expected(self._odds_of(sequence), min(count, most)) - found[at].expected, at, most, sequence)
                    for sequence, at, most in able
                    if id(sequence) not in behind
                ),
                key=lambda gain: -gain[0],
            )
            step_rows, step_tokens = rows, tokens
            taken: list[tuple[TokenSequence, int]] = []
            for gain, at, most, sequence in gains:
                step_rows += min(count, most) - found[at].count
                if gain <= 0 or step_rows > rows + room:
                    break
                step_tokens += gain
                taken.append((sequence, min(count, most)))
                rate = step_tokens / (self.large_times(step_rows) + self._seconds(len(taken), count))
                if rate > best_rate:
                    best_rate, best = rate, list(taken)
        self._rate = best_rate
        return best or self._tried(able, found, total, without)

    def _seconds(self, sequences: int, count: int) -> float:
        """Return what `count` guesses for each of some sequences take; the first step has a token or two of each."""
        return self._times(1.5 * sequences) + (count - 1) * self._times(sequences)

    def _is_not_worth_it(self, sequence: TokenSequence, rate: float) -> bool:
        """Whether a sequence lacks more tokens than its guesses can make up for; `rate`: tokens a second without."""
        lacking = sequence.lacking_in_draft
        if lacking <= _FEW:
            return False
        odds = self._odds_of(sequence)
        rates = [
            (1 + _expected(odds, count)) / (self.large_times(1 + count) + self._seconds(1, count))
            for count in range(1, self._most + 1)
        ]
        left = min(sequence.max_len - len(sequence.token_ids), max(len(sequence.produced.token_ids), _HORIZON))
        return left * (1 / rate - 1 / max(rates)) < lacking * self._times(64) / 64

    def _tried(
        self, able: Sequence[tuple[TokenSequence, int, int]], found: Sequence[Found], total: int, without: float
    ) -> list[tuple[TokenSequence, int]]:
        """Return a sequence for which a guess is tried although it does not seem to pay: texts change."""
        for sequence, at, _ in able:
            drafter = sequence.drafter
            drafter.silent += 1
            drafter.patience = drafter.patience or _PATIENCE
            pays = (total + 1) / (self.large_times(total + 1) + self._seconds(1, 1)) > without
            if pays and drafter.silent >= drafter.patience and not found[at].count:
                drafter.patience = min(2 * drafter.patience, _MOST_PATIENCE)
                return [(sequence, 1)]
        return []

    def _odds_of(self, sequence: TokenSequence) -> float:
        odds = sequence.drafter.odds
        return self._odds if odds < 0 else odds

    # --- computing

    def _catch_up(self, sequence: TokenSequence, count: int) -> None:
        """Compute the first `count` of the tokens that a sequence lacks."""
        if not count:
            return
        drafter = sequence.drafter
        begin, end = drafter.computed, drafter.computed + count
        self._forward([(sequence, sequence.token_ids[begin:end])], wants=False)

    def _run(self, chosen: list[tuple[TokenSequence, int]]) -> None:
        """Guess so many tokens for each sequence."""
        unread = [sequence.token_ids[sequence.drafter.computed :] for sequence, _ in chosen]
        going = [sequence for sequence, _ in chosen]
        counts = {id(sequence): count for sequence, count in chosen}
        chances = dict.fromkeys(counts, 1.0)  # that all guesses so far are right
        while going:
            tokens, margins = self._forward(list(zip(going, unread, strict=True)))
            for sequence, token, margin in zip(going, tokens, margins, strict=True):
                if token < self._vocab:
                    which = bisect.bisect_right(_MARGINS, margin)
                    sequence.draft.append(token)
                    sequence.drafter.made.append(which)
                    chances[id(sequence)] *= self._sure[which]
                else:  # the large model has no such token
                    counts[id(sequence)] = 0
            least = 0.0 if self._fixed else self._rate * self._cost(len(going))
            going = [
                sequence
                for sequence in going
                if len(sequence.draft) < counts[id(sequence)]
                and chances[id(sequence)] * self._odds_of(sequence) >= least
            ]
            unread = [sequence.draft[-1:] for sequence in going]
        for sequence, _ in chosen:
            sequence.drafter.silent = 0
            self._counts.model_drafted += len(sequence.draft)

    def _cost(self, sequences: int) -> float:
        """Return the seconds of one more guess for each of some sequences, shared among them."""
        checked = self.large_times(2 * sequences) - self.large_times(sequences)
        return (self._times(sequences) + checked) / sequences

    def _forward(
        self, new: Sequence[tuple[TokenSequence, list[int]]], *, wants: bool = True
    ) -> tuple[list[int], list[float]]:
        """Compute new tokens of sequences; return the likeliest next one of each, and the margins of their logits."""
        started = time.perf_counter()
        chunks = []
        for sequence, token_ids in new:
            drafter = sequence.drafter
            begin, end = drafter.computed, drafter.computed + len(token_ids)
            for block in sequence.blocks[begin // PAGE : -(-end // PAGE)]:
                self._contents.pop(block, None)
            pages = sequence.blocks[: -(-end // PAGE)]
            chunks.append(Chunk(token_ids, begin, pages, sequence.prompt_len, wants=wants, logits=False))
            drafter.computed = end
        best, margins = self.model.likeliest(chunks)
        self._times.note(sum(len(token_ids) for _, token_ids in new), time.perf_counter() - started)
        return best.tolist(), margins.tolist()


def _expected(odds: float, count: int) -> float:
    """Return how many of so many guesses are right on average: of each as likely as the others if those before are."""
    return float(count) if odds >= 1 else odds * (1 - odds**count) / (1 - odds)


# --- which models


def open_draft(
    large: Checkpoint, tokenizer: Tokenizer, config: EngineConfig
) -> tuple[Callable[[], NativeModel], list[str]]:
    """Check an engine's draft model before anything is loaded; return what loads it, and what a user should know.

    Args:
        large: the checkpoint of the large model.
        tokenizer: its tokenizer.
        config: names the draft model.

    Raises:
        ConfigError: the draft model is larger than the large one.
        InputError: it has another vocabulary.
        EightfoldError: it is no model directory; and when it is loaded, as native.load.load_model.
    """
    assert config.draft_model is not None
    checkpoint = Checkpoint.open(config.draft_model)
    own, limit = _weights(checkpoint), _weights(large)
    if own > limit:
        raise ConfigError(
            "draft_model",
            got=f"a model of {own / 1e6:,.0f} million weights",
            expected=f"at most {limit / 1e6:,.0f} million, as many as the model has",
            action="Guesses have to be quicker than answers.",
        )
    _require_vocabulary(config.draft_model, tokenizer)
    notes = []
    if checkpoint.description is None:
        notes.append("The draft model is a float one: a quantized one guesses faster.")
    if own == limit:
        notes.append("The draft model is as large as the model: its guesses save little time, or none.")

    def load() -> NativeModel:
        from eightfold.model.native.load import load_model

        return load_model(checkpoint, **{**config.computing, "attention": "cache", "longest": None})

    return load, [*checkpoint.notes, *notes]


def _weights(checkpoint: Checkpoint) -> int:
    return sum(linear.n * linear.k for linear in all_linears(checkpoint.config).values())


def _require_vocabulary(directory: Path, tokenizer: Tokenizer) -> None:
    """Compare which tokens have which ids; a token that is added to one of them only does no harm.

    Raises:
        InputError: an id means different tokens.
    """
    path = directory / "tokenizer.json"
    if has_file(path) and path.read_bytes() == tokenizer.content:
        return
    other = Tokenizer(directory)
    ours, theirs = tokenizer.vocabulary, other.vocabulary
    added = {*tokenizer.special_tokens, *other.special_tokens}
    different = {token for token, _ in ours.items() ^ theirs.items()}
    used = [set(ours.values()), set(theirs.values())]
    clashing = [
        token
        for token in different
        if token not in added or (token in ours and token in theirs)
        or ours.get(token, -1) in used[1] or theirs.get(token, -1) in used[0]
    ]  # fmt: skip
    if clashing:
        first = min(clashing, key=lambda token: (ours.get(token, 1 << 31), token))
        raise InputError(
            "draft_model",
            where=directory,
            got=f"another vocabulary: token {shorten(repr(first))} has {_id(theirs.get(first))}",
            expected=f"{_id(ours.get(first))}, as in the model ({len(clashing)} tokens differ)",
            action="Choose a model of the same family.",
        )


def _id(number: int | None) -> str:
    return "no id" if number is None else f"id {number}"
