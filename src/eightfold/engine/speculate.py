"""Prompt lookup: guess the next tokens from where the last ones stood before, and check the guesses in one step.

Guesses of a small model (draft.py) are checked in the same way; guesses.py says which and how many.

A sequence that quotes its prompt, edits code or repeats itself goes on as it did after the same tokens earlier (Saxena,
Prompt Lookup Decoding, 2023). A step with k guesses behind the last token computes k + 1 choices; each is made as if
there were no guesses, and they count up to the first that differs from its guess. So the answer is the same, only the
number of steps is not.

How likely a guess is right, a sequence learns by comparing what it would have guessed with what came, at every token
and also when it guesses nothing; that is why it goes silent on prose and wakes up at a quotation by itself. How many
guesses a step checks is the scheduler's choice.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Sequence
from copy import copy

from eightfold.model.native.model import Chunk, NativeModel

_BITS = 21  # of a token id in a key

# How a match is classed by the tokens that have agreed so far, and how likely the next one agrees at first.
_CLASSES = (0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4)
_FIRST_ODDS = (0.2, 0.4, 0.6, 0.8, 0.9)
_LEARNING = 1 / 8

_FOLLOWING, _SLOWEST = 1 / 32, 2.0  # of StepTimes: how much a step counts, and how much of a slow one


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


class StepTimes:
    """What a step of a model takes, by its rows: measured once, and followed from then on.

    Args:
        model: its cache may hold anything, and does so afterwards.
        rows: the sizes that are measured, rising; between them and beyond, time grows evenly.
    """

    def __init__(self, model: NativeModel, rows: Sequence[int]) -> None:
        _seconds(model, _chunk(rows[-1]))  # the first is slower
        self._rows = list(rows)
        self._measured = [min(_seconds(model, _chunk(count)) for _ in range(2)) for count in rows]
        self._factor = 1.0  # of what steps take now: contexts grow, machines slow down

    def __call__(self, rows: float) -> float:
        """Return the seconds of a step."""
        at = min(max(bisect.bisect_left(self._rows, rows), 1), len(self._rows) - 1)
        (few, many), (less, more) = self._rows[at - 1 : at + 1], self._measured[at - 1 : at + 1]
        return max(less + (more - less) * (rows - few) / (many - few), self._measured[0]) * self._factor

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        self._factor *= 1 + (min(seconds / self(rows), _SLOWEST) - 1) * _FOLLOWING


def measure_row_cost(model: NativeModel) -> float:
    """Return the time that one more row adds to a step, as a share of what a step takes without rows."""
    few, many = 1, 8
    times = {count: min(_seconds(model, _chunk(count)) for _ in range(3)) for count in (few, many)}
    row = max((times[many] - times[few]) / (many - few), 0.0)
    return min(max(row / max(times[few] - row, 1e-9), 0.01), 1.0)


def _chunk(count: int) -> Chunk:
    return Chunk([0] * count, 0, [0], 0, wants_all=True, logits=False)


def _seconds(model: NativeModel, chunk: Chunk) -> float:
    started = time.perf_counter()
    model.forward([chunk])
    return time.perf_counter() - started
