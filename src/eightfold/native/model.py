"""The native model: one call for each step, over a paged cache of keys and values.

Letters: T tokens of a step, S sequences, R tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError
from eightfold.memory import available_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE = 128  # positions of a page of the cache


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    Attributes:
        token_ids: at least one.
        first_position: how many tokens of the sequence are in the cache already.
        pages: of the sequence, in order; as many as its positions need, these tokens included.
        prompt_len: how many of the sequence's tokens, from its first on, are the prompt's.
        wants: whether the choice after its last token is wanted.
        wants_all: after each of its tokens.
        logits: whether the choice comes with all logits, and not only as the likeliest token, which costs less.
    """

    token_ids: Sequence[int]
    first_position: int
    pages: Sequence[int]
    prompt_len: int
    wants: bool = True
    wants_all: bool = False
    logits: bool = True


class NativeModel:
    """A model in the compiled core.

    Attributes:
        config: of the checkpoint.
        isa: the instruction set of its kernels.
        float_prompts: prompts attend over fresh keys and values and have to run whole, in one chunk.
        pages: of the cache.
    """

    def __init__(self, core_model: Any, config: ModelConfig, isa: str, float_prompts: bool = False) -> None:
        self._model, self.config, self.isa, self.float_prompts = core_model, config, isa, float_prompts
        self.pages = 0
        self._logits: NDArray[Any] = np.empty((0, config.vocab_size), np.float32)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return int(self._model.threads)

    @property
    def page_bytes(self) -> int:
        """Memory of one page of the cache, all layers together."""
        return int(self._model.page_bytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads, whatever its batch."""
        return int(self._model.weight_bytes)

    def allocate_cache(self, positions: int, action: str = "Lower --max-new-tokens or shorten the prompt.") -> None:
        """Make a cache for so many positions; what the old one held is lost.

        Args:
            positions: of all sequences.
            action: what a user can do when they do not fit.

        Raises:
            CapacityError: there is not enough memory for it.
        """
        pages = -(-positions // PAGE)
        needed, free = pages * self.page_bytes, available_bytes()
        if free is not None and needed > free:
            raise CapacityError(
                "key/value cache",
                got=f"{needed / 2**20:.0f} MiB for {positions} positions",
                expected=f"at most {free / 2**20:.0f} MiB, which are free",
                action=action,
            )
        self._model.allocate_cache(pages)
        self.pages = pages

    def forward(self, chunks: Sequence[Chunk]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run one step.

        Returns:
            Logits (R', V) float32 after the tokens of the chunks that want them, in order, and the likeliest token
            after every token that is wanted, (R,) int32. The logits are overwritten by the next step.
        """
        lengths = [len(chunk.token_ids) for chunk in chunks]
        starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        tables = np.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), np.int32)
        positions = np.empty(starts[-1], np.int32)
        generated = np.zeros(starts[-1], np.uint8)
        shown, chosen, is_shown = list[int](), list[int](), list[bool]()
        for i, (chunk, begin, end) in enumerate(zip(chunks, starts[:-1], starts[1:], strict=True)):
            tables[i, : len(chunk.pages)] = chunk.pages
            positions[begin:end] = np.arange(chunk.first_position, chunk.first_position + end - begin)
            generated[begin:end] = positions[begin:end] >= chunk.prompt_len
            rows = range(begin, end) if chunk.wants_all else [end - 1] if chunk.wants else []
            (shown if chunk.logits else chosen).extend(rows)
            is_shown += [chunk.logits] * len(rows)
        logits = self._rows(len(shown))
        best, choices = np.empty(len(shown), np.int32), np.empty(len(chosen), np.int32)
        self._model.forward(
            token_ids=np.fromiter((t for chunk in chunks for t in chunk.token_ids), np.int32, starts[-1]),
            positions=positions,
            generated=generated,
            starts=starts,
            tables=tables,
            logit_tokens=np.array(shown, np.int32),
            logits=logits,
            best=best,
            choice_tokens=np.array(chosen, np.int32),
            choices=choices,
            float_prompts=self.float_prompts,
        )
        if len(shown) and len(chosen):
            both = np.empty(len(is_shown), np.int32)
            both[is_shown], both[np.logical_not(is_shown)] = best, choices
            best = both
        return logits, best if len(shown) else choices

    def _rows(self, count: int) -> NDArray[Any]:
        if len(self._logits) < count:
            self._logits = np.empty((count, self.config.vocab_size), np.float32)
        return self._logits[:count]
