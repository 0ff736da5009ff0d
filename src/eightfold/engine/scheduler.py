"""Which tokens the next step computes.

Every running sequence that only lacks its next token gets it; what is left of the step's budget goes to prompts, the
oldest first, running ones before waiting ones. While sequences wait for their next token the budget is less, see
Pace. A prompt that is longer than the budget is cut, and short ones that fit whole into the half of the budget that
it leaves pass it; so it goes on at no less than half its speed, and they need not wait for its end.

A waiting sequence starts when there are blocks for all tokens it has, and some for the running ones to grow; those
behind it wait with it, so a large one is not passed forever. If another sequence is computing what its prompt begins
with, it waits for that, and those behind it may pass.

When a running sequence needs a block and there is none, the youngest gives all its blocks back and waits again, at
its old place in line: it computes its tokens anew, the answer's too, as long as their blocks are not still cached. The
oldest is never stopped for a younger one, so there is always one that comes to its end.

A step without prompts may check guesses (guesses.py).
"""

from __future__ import annotations

import bisect
import itertools
import time

import numpy as np

from eightfold.engine.block_manager import BlockManager
from eightfold.engine.guesses import Guesser
from eightfold.engine.outputs import EngineStats
from eightfold.engine.sequence import TokenSequence
from eightfold.engine.settings import EngineConfig
from eightfold.model.native.model import PAGE

# Positions that running sequences should be able to grow by after another one has started, or it is stopped at once.
GROWTH = 16

# Logits of so many positions at a time are held for the log-probabilities of a prompt.
PROMPT_LOGIT_ROWS = 64

# Sequences that wait for another's prefix and are passed over by those behind them.
MAX_PASSED = 32


# What prompts may add to a step in which other sequences get their next token: these seconds, or so many steps without
# prompts where those are slow; prompts then have two thirds of the machine.
DELAY_SECONDS, DELAY_STEPS = 0.2, 2.0

# Fewer tokens than these cost almost as much time as these do.
LEAST_TOKENS = 32

_WEIGHT = 0.25  # of the newest step in an average


class Pace:
    """How many tokens of prompts a step takes while other sequences wait for its end. No answer depends on it.

    Attributes:
        step_seconds: average of steps without prompts; 0 as long as there was none.
        token_seconds: what one token of a prompt adds to a step, on average; 0 as long as it is not known.
    """

    def __init__(self) -> None:
        self.step_seconds = self.token_seconds = 0.0

    def note(self, going_on: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of `seconds`: `going_on` sequences got their next token."""
        if not prompt_tokens:
            self.step_seconds = _average(self.step_seconds, seconds)
        elif prompt_tokens >= LEAST_TOKENS:
            own = max(seconds - (self.step_seconds if going_on else 0.0), seconds / 10)
            self.token_seconds = _average(self.token_seconds, own / prompt_tokens)

    def prompt_tokens(self) -> int | None:
        """Return how many tokens of prompts a step may take in which sequences go on; None: as many as it can."""
        if not self.token_seconds:
            return None
        delay = max(DELAY_SECONDS, DELAY_STEPS * self.step_seconds)
        return max(LEAST_TOKENS, int(delay / self.token_seconds))


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new


def _order(sequence: TokenSequence) -> int:
    return sequence.order


class Scheduler:
    """Sequences that wait and run, both from the oldest to the youngest.

    Args:
        config: the engine's limits.
        blocks: the cache's blocks.
        blocks_per_sequence: the most that one can hold.
        whole_prompts: whether prompts run in one piece, whatever the budget.

    Attributes:
        guesser: gives guesses to sequences; None: nobody does.
        counts: what it and the engine did so far.
        pace: how much of prompts a step takes.
        tables: (sequences, blocks) int32, the blocks of each running sequence in the row of its slot.
        version: differs when any of them does.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        blocks_per_sequence: int,
        *,
        whole_prompts: bool = False,
    ) -> None:
        self.blocks = blocks
        self._step_tokens = config.max_batched_tokens
        self.guesser: Guesser | None = None
        self._whole_prompts = whole_prompts
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.pace, self.counts = Pace(), EngineStats()
        self.tables = np.zeros((config.max_num_seqs, blocks_per_sequence), np.int32)
        self.version = 0
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._orders = itertools.count()

    def add(self, sequence: TokenSequence) -> None:
        """Put a new sequence at the end of the line."""
        sequence.order = next(self._orders)
        self.waiting.append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Take a sequence out, whether it waits or runs."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[TokenSequence]:
        """Return the sequences of the next step: those that go on, then prompts. Sets their `scheduled` and `draft`."""
        plan, prompts = self._going_on()
        budget = self._step_tokens - len(plan)
        if plan and (most := self.pace.prompt_tokens()) is not None:
            budget = min(budget, most)
        if prompts or (self.waiting and self._slots):
            plan += self._prompts(prompts, budget)
        if self.guesser is not None and plan and all(sequence.remaining == 1 for sequence in plan):
            most = None if len(plan) == 1 else self.pace.prompt_tokens()
            self.guesser.guess(plan, self._step_tokens - len(plan), min(self._step_tokens, most or self._step_tokens))
        return plan

    def _going_on(self) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """Return the running sequences that only lack their next token, with a block for it, and the other ones."""
        plan, prompts = list[TokenSequence](), list[TokenSequence]()
        at = 0
        while at < len(self.running):  # which loses its youngest
            sequence = self.running[at]
            at += 1
            if sequence.computed < len(sequence.token_ids) - 1:
                prompts.append(sequence)
                continue
            if sequence.computed < len(sequence.blocks) * PAGE or self._grow(sequence):
                sequence.scheduled = 1
                plan.append(sequence)
        return plan, prompts

    def _grow(self, sequence: TokenSequence) -> bool:
        """Give a running sequence one more block, other sequences' or not; return whether it still runs."""
        while not self.blocks.available:
            youngest = self.running.pop()
            self._give_back(youngest)
            youngest.computed = 0
            bisect.insort(self.waiting, youngest, key=_order)
            self.counts.preemptions += 1
            if youngest is sequence:
                return False
        self._append(sequence, [self.blocks.take()])
        return True

    def _prompts(self, running: list[TokenSequence], budget: int) -> list[TokenSequence]:
        plan = _PromptPlan(budget, self._whole_prompts)
        for sequence in running:
            plan.put(sequence, _piece(sequence, sequence.remaining))
        coming = {each for sequence in running for each in sequence.hashes[sequence.computed // PAGE :]}
        at = 0
        while plan.budget > 0 and self._slots and at < min(len(self.waiting), MAX_PASSED):
            sequence = self.waiting[at]
            found = self._find(sequence)
            wanted = _piece(sequence, len(sequence.token_ids) - len(found) * PAGE)
            if not plan.takes(wanted) or self._is_coming(sequence, found, coming):
                at += 1
                continue
            if not self._start(sequence, found):
                break
            del self.waiting[at]
            coming.update(sequence.hashes[len(found) :])
            plan.put(sequence, wanted)
        return plan.sequences()

    def _find(self, sequence: TokenSequence) -> list[int]:
        """Return the blocks that hold what a sequence begins with; its last token is always computed."""
        most = (len(sequence.token_ids) - 1) // PAGE
        if sequence.wants_prompt_logits:
            most = min(most, sequence.first_prompt_logits // PAGE)
        return self.blocks.find(sequence.hashes[:most])

    def _is_coming(self, sequence: TokenSequence, found: list[int], coming: set[bytes]) -> bool:
        """Whether another sequence is computing the next block that a sequence needs."""
        at = len(found)
        return (
            at < (len(sequence.token_ids) - 1) // PAGE and at < len(sequence.hashes) and sequence.hashes[at] in coming
        )

    def _start(self, sequence: TokenSequence, found: list[int]) -> bool:
        """Give a waiting sequence blocks and a slot, if there are enough."""
        fresh = (len(sequence.token_ids) - 1) // PAGE + 1 - len(found)
        spare = self.blocks.available - fresh - self.blocks.unheld(found)
        if spare < 0 or (self.running and spare <= len(self.running) and spare < self._growth(sequence)):
            return False
        self.blocks.hold(found)
        sequence.slot = self._slots.pop()
        sequence.computed = len(found) * PAGE
        sequence.named = len(found)
        self._append(sequence, found + [self.blocks.take() for _ in range(fresh)])
        bisect.insort(self.running, sequence, key=_order)
        self._note_start(sequence)
        return True

    def _growth(self, sequence: TokenSequence) -> int:
        """Return how many sequences will soon need a block, if one more starts."""
        return sum(-len(each.token_ids) % PAGE < GROWTH for each in (*self.running, sequence))

    def _note_start(self, sequence: TokenSequence) -> None:
        request = sequence.request
        if not sequence.produced.token_ids:
            self.counts.prefix_query_tokens += sequence.prompt_len
            self.counts.prefix_hit_tokens += sequence.computed
        if request.times.scheduled is None:
            request.times.scheduled = time.monotonic()
            request.cached_tokens = sequence.computed

    def check_integrity(self) -> None:
        """Prove the state of every sequence.

        Raises:
            AssertionError: something is not as it must be.
        """
        self.blocks.check_integrity([sequence.blocks for sequence in self.running])
        for line in (self.waiting, self.running):
            orders = [sequence.order for sequence in line]
            assert orders == sorted(set(orders)), "out of order"
        slots = sorted([*self._slots, *(sequence.slot for sequence in self.running)])
        assert slots == list(range(len(self.tables))), "a row of the tables is lost or used twice"
        for sequence in self.waiting:
            assert (sequence.slot, sequence.blocks, sequence.computed) == (-1, [], 0), (
                "a waiting sequence holds something"
            )
        for sequence in self.running:
            blocks = sequence.blocks
            assert 0 <= sequence.computed < len(sequence.token_ids), "nothing is left to compute"
            assert len(blocks) * PAGE >= sequence.computed, "computed tokens without a block"
            assert self.tables[sequence.slot, : len(blocks)].tolist() == blocks, "another row than blocks"
            assert sequence.named <= sequence.computed // PAGE, "a name for a block that is not full"

    def _append(self, sequence: TokenSequence, blocks: list[int]) -> None:
        self.version += 1
        at = len(sequence.blocks)
        self.tables[sequence.slot, at : at + len(blocks)] = blocks
        sequence.blocks += blocks

    def _give_back(self, sequence: TokenSequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.drafter.forget()
        self._slots.append(sequence.slot)
        sequence.slot = -1


def _piece(sequence: TokenSequence, remaining: int) -> int:
    """Return how many of a sequence's remaining tokens could run at once."""
    return min(remaining, PROMPT_LOGIT_ROWS) if sequence.wants_prompt_logits else remaining


class _PromptPlan:
    """Prompts of a step, offered from the oldest to the youngest."""

    def __init__(self, budget: int, whole_prompts: bool) -> None:
        self.budget, self._whole = budget, whole_prompts
        self._fitting = list[TokenSequence]()
        self._long: TokenSequence | None = None  # the oldest that does not fit
        self._long_wanted = self._kept = 0

    def takes(self, wanted: int) -> bool:
        """Whether a prompt of so many tokens would get some."""
        return self._whole or wanted <= self.budget or self._long is None

    def put(self, sequence: TokenSequence, wanted: int) -> None:
        """Schedule a prompt, if it fits or is the first that does not."""
        if not self.takes(wanted) or self.budget <= 0:
            return
        if self._whole or wanted <= self.budget:
            sequence.scheduled = wanted
            self._fitting.append(sequence)
            self.budget -= wanted
        else:
            self._long, self._long_wanted = sequence, wanted
            self._kept = (self.budget + 1) // 2
            self.budget -= self._kept

    def sequences(self) -> list[TokenSequence]:
        """Return those that got tokens; what nobody took is the long prompt's."""
        if self._long is None:
            return self._fitting
        self._long.scheduled = min(self._long_wanted, self._kept + max(self.budget, 0))
        return [*self._fitting, self._long]
