"""Which guesses a step checks: those of prompt lookup (speculate.py), or of a draft model (draft.py).

They cost time: a step of r rows takes about a + b r, where `row_cost` = b / a is measured when the engine starts. A
guess of prompt lookup that is right with probability p is worth it while p (a + b r) / n > b, where n are the tokens
that the step is expected to give. A draft model takes its own time besides, and has a longer guess to offer for it.
"""

from __future__ import annotations

from eightfold.engine.draft import DraftModel, Found
from eightfold.engine.outputs import EngineStats
from eightfold.engine.sequence import TokenSequence
from eightfold.model.native.model import PAGE

_NOTHING = Found()


class Guesser:
    """Gives guesses to the sequences of steps without prompts.

    Args:
        most: guesses of prompt lookup for a sequence; 0: it makes none.
        row_cost: b / a, see above.
        counts: what the engine counts.
        draft: the draft model; None: there is none.
    """

    def __init__(self, most: int, row_cost: float, counts: EngineStats, draft: DraftModel | None = None) -> None:
        self.row_cost, self.draft = row_cost, draft
        self._most, self._counts = most, counts

    def guess(self, plan: list[TokenSequence], room: int, budget: int) -> None:
        """Set the `draft` of those sequences of a step, which all get one token, whose guesses are worth their time.

        Args:
            plan: the step's sequences.
            room: rows that may be added.
            budget: tokens that a draft model may compute of what it lacks of the sequences.
        """
        found = self._look_up(plan, room)
        if self.draft is not None:
            self.draft.guess(plan, found, room, budget)
        for sequence, each in zip(plan, found, strict=True):
            if each.count and not sequence.draft and sequence.lookup is not None:
                sequence.draft = sequence.lookup.guesses(each.count)
                self._counts.drafted += each.count

    def _look_up(self, plan: list[TokenSequence], room: int) -> list[Found]:
        """Return how many guesses of prompt lookup are worth their time."""
        cost = self.row_cost
        expected, time_units = float(len(plan)), 1 + cost * len(plan)
        found = []
        for sequence in plan:
            lookup = sequence.lookup
            if lookup is None:
                found.append(_NOTHING)
                continue
            known = len(sequence.token_ids)
            most = min(self._most, sequence.max_len - known - 1, len(sequence.blocks) * PAGE - known, room)
            count, chance, before = 0, 1.0, expected
            while count < most:
                chance *= lookup.odds(count)
                if chance * time_units <= cost * expected:
                    break
                count += 1
                expected += chance
                time_units += cost
            room -= count
            found.append(Found(count, expected - before))
        return found
