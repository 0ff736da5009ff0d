"""Prompt lookup: guess the next tokens from where the last ones stood before, and check the guesses in one step.

A sequence that quotes its prompt, edits code or repeats itself goes on as it did after the same tokens earlier (Saxena,
Prompt Lookup Decoding, 2023). A step with k guesses behind the last token computes k + 1 choices; each is made as if
there were no guesses, and they count up to the first that differs from its guess. So the answer is the same, only the
number of steps is not.

Guesses cost time: a step of r rows takes about a + b r, where `row_cost` = b / a is measured when the engine starts. A
guess that is right with probability p is worth it while p (a + b r) / n > b, where n are the tokens that the step is
expected to give. What p is, a sequence learns by comparing what it would have guessed with what came, at every token
and also when it guesses nothing; that is why it goes silent on prose and wakes up at a quotation by itself.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from eightfold.model.native.model import PAGE, Chunk, NativeModel

if TYPE_CHECKING:
    from eightfold.engine.sequence import TokenSequence

_BITS = 21  # of a token id in a key

# How a match is classed by the tokens that have agreed so far, and how likely the next one agrees at first.
_CLASSES = (0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4)
_FIRST_ODDS = (0.2, 0.4, 0.6, 0.8, 0.9)
_LEARNING = 1 / 8


class Lookup:
    """Where the last tokens of a sequence stood before.

    Args:
        token_ids: the sequence's own list; `follow` is told when it has grown by one.
    """

    __slots__ = ("_at", "_length", "_odds", "_pairs", "_token_ids", "_triples")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._at = -1  # the position of the token that would come next; -1: nothing like it was seen
        self._length = 0  # tokens that agree before it
        self._odds = list(_FIRST_ODDS)
        # The last two and three tokens -> the position behind them.
        in_twos = itertools.pairwise(token_ids)
        self._pairs = {a << _BITS | b: i for i, (a, b) in enumerate(in_twos, 2)}
        in_threes = zip(token_ids, token_ids[1:], token_ids[2:], strict=False)
        self._triples = {(a << _BITS | b) << _BITS | c: i for i, (a, b, c) in enumerate(in_threes, 3)}

    def copy_for(self, token_ids: Sequence[int]) -> Lookup:
        """Return a lookup of a sequence that has the same tokens so far."""
        found = copy(self)
        found._token_ids, found._odds = token_ids, list(self._odds)
        found._pairs, found._triples = dict(self._pairs), dict(self._triples)
        return found

    def follow(self) -> None:
        """Take in the token that was appended."""
        token_ids, at = self._token_ids, self._at
        end = len(token_ids)
        token = token_ids[-1]
        agrees = at >= 0 and token_ids[at] == token
        if at >= 0:
            which = _CLASSES[min(self._length, 16)]
            self._odds[which] += (agrees - self._odds[which]) * _LEARNING
        if end < 3:
            return
        pair = token_ids[-2] << _BITS | token
        triple = token_ids[-3] << 2 * _BITS | pair
        if agrees:
            self._at, self._length = at + 1, self._length + 1
        else:
            self._at, self._length = self._triples.get(triple, -1), 3
            if self._at < 0:
                self._at, self._length = self._pairs.get(pair, -1), 2
        self._pairs[pair] = self._triples[triple] = end

    def odds(self, ahead: int) -> float:
        """Return how likely a guess agrees if all guesses before it did; 0 if there is none.

        Args:
            ahead: how many guesses are before it.
        """
        return self._odds[_CLASSES[min(self._length + ahead, 16)]] if self._at >= 0 else 0.0

    def guesses(self, count: int) -> list[int]:
        """Return the next tokens as they came before; what lies in the future repeats what is guessed."""
        found = list(self._token_ids[self._at : self._at + count])
        period = len(self._token_ids) - self._at
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


class Speculation:
    """Decides how many guesses a step checks.

    Args:
        most: guesses for a sequence and step.
        row_cost: b / a.
    """

    def __init__(self, most: int, row_cost: float) -> None:
        self._most, self._row_cost = most, row_cost

    def draft(self, plan: Sequence[TokenSequence], step_tokens: int) -> int:
        """Set the `draft` of sequences that all get one token; return how many guesses there are."""
        cost = self._row_cost
        expected, time_units = float(len(plan)), 1 + cost * len(plan)
        room = step_tokens - len(plan)
        total = 0
        for sequence in plan:
            lookup = sequence.lookup
            if lookup is None:
                continue
            known = len(sequence.token_ids)
            most = min(self._most, sequence.max_len - known - 1, len(sequence.blocks) * PAGE - known, room - total)
            count, chance = 0, 1.0
            while count < most:
                chance *= lookup.odds(count)
                if chance * time_units <= cost * expected:
                    break
                count += 1
                expected += chance
                time_units += cost
            if count:
                sequence.draft = lookup.guesses(count)
                total += count
        return total


def measure_row_cost(model: NativeModel) -> float:
    """Return the time that one more row adds to a step, as a share of what a step takes without rows."""
    few, many = 1, 8
    times = {}
    for count in (few, many):
        chunk = Chunk([0] * count, 0, [0], 0, wants_all=True, logits=False)
        times[count] = min(_seconds(model, chunk) for _ in range(3))
    row = max((times[many] - times[few]) / (many - few), 0.0)
    return min(max(row / max(times[few] - row, 1e-9), 0.01), 1.0)


def _seconds(model: NativeModel, chunk: Chunk) -> float:
    started = time.perf_counter()
    model.forward([chunk])
    return time.perf_counter() - started
