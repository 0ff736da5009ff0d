"""A step's plan as the arrays that the native model takes.

Letters: T tokens of a step, S sequences, R rows after which the choice is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.engine.sequence import TokenSequence
from eightfold.model.native.model import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
