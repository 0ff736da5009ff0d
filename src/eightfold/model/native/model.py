"""The native model: one call for each step, over a paged cache of keys and values.

Letters: T tokens of a step, S sequences, R tokens after which the choice is wanted, R' of them with logits, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError
from eightfold.machine import available_bytes
from eightfold.values import mib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.model.native._core import Model

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


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes, as the core takes it: contiguous arrays, int32 where nothing else is said.

    Attributes:
        token_ids: (T,) of all sequences, one after the other.
        positions: (T,) rising by one inside a sequence.
        generated: (T,) uint8, whether a token is not part of its prompt.
        starts: (S + 1,) where each sequence's tokens begin; T at the end.
        tables: (S, pages) of each sequence, in order; what a sequence does not need is not read.
        rows: (R,) the tokens after which the choice is wanted; those whose logits are wanted first.
        shown: R', how many those are.
    """

    token_ids: NDArray[Any]
    positions: NDArray[Any]
    generated: NDArray[Any]
    starts: NDArray[Any]
    tables: NDArray[Any]
    rows: NDArray[Any]
    shown: int


class NativeModel:
    """A model in the compiled core.

    Attributes:
        config: of the checkpoint.
        isa: the instruction set of its kernels.
        float_prompts: prompts attend over fresh keys and values and have to run whole, in one chunk.
        neighbours: processes of this host that have a share of the same model, this one included.
        pages: of the cache.
        world_size: processes that have a share of the model.
        resident_weights: bytes by which loading has made each of them larger; empty where that is not known.
    """

    def __init__(
        self, core_model: Model, config: ModelConfig, isa: str, float_prompts: bool = False, neighbours: int = 1
    ) -> None:
        self._model, self.config, self.isa, self.float_prompts = core_model, config, isa, float_prompts
        self.neighbours, self.world_size = neighbours, 1
        self.resident_weights: tuple[int, ...] = ()
        self.pages = 0
        self._logits: NDArray[Any] = np.empty((0, config.vocab_size), np.float32)

    @property
    def threads(self) -> int:
        return self._model.threads

    @property
    def page_bytes(self) -> int:
        """Memory of one page of the cache, all layers together."""
        return self._model.page_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads, whatever its batch; of experts, that steps may read."""
        return self._model.weight_bytes

    @property
    def all_weight_bytes(self) -> int:
        return self.weight_bytes

    @property
    def resident_weights_mib(self) -> list[float]:
        """What loading took in each process, in MiB."""
        return [round(size / 2**20, 1) for size in self.resident_weights]

    def room(self) -> int | None:
        """Return the memory that is free beside the weights, for each process; None if the system does not say."""
        free = available_bytes()
        return None if free is None else max(free // self.neighbours - self.weight_bytes, 0)

    def share_memory(self, rank: int, files: Sequence[int]) -> None:
        """Let this share of a model meet the others of this host, through files in memory: counters first."""
        self._model.share_memory(rank, files[0], list(files[1:]))

    def share_by_call(self, rank: int, meet: Callable[[NDArray[Any], NDArray[Any]], None]) -> None:
        """Let this share of a model meet the others through a function that fills in all ranks' parts (ranks, n)."""
        self._model.share_by_call(rank, meet)

    def allocate_cache(self, positions: int, action: str = "Lower `max_new_tokens` or shorten the prompt.") -> None:
        """Make a cache for so many positions; what the old one held is lost.

        Args:
            positions: of all sequences.
            action: what a user can do when they do not fit.

        Raises:
            CapacityError: there is not enough memory for it.
        """
        pages = -(-positions // PAGE)
        needed, free = pages * self.page_bytes, available_bytes()
        free = None if free is None else free // self.neighbours
        if free is not None and needed > free:
            raise CapacityError(
                "key/value cache",
                got=f"{mib(needed)} for {positions} positions",
                expected=f"at most {mib(free)}, which are free",
                action=action,
            )
        self._model.allocate_cache(pages)
        self.pages = pages

    def populate_cache(self, page: int) -> Iterator[None]:
        """Take the memory of a page of the cache from the system, a bit with each step of the iterator.

        Memory that is written for the first time is slow, above all on a virtual machine, whose host has to find it.
        """
        for layer in range(self.config.num_layers):
            if not self._model.populate_cache(layer, page):
                return
            yield

    def forward(self, chunks: Sequence[Chunk]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run one step.

        Returns:
            Logits (R', V) float32 after the tokens of the chunks that want them, in order, and the likeliest token
            after every token that is wanted, (R,) int32. The logits are overwritten by the next step.
        """
        batch, is_shown = _lay_out(chunks)
        logits, found = self.run(batch)
        if all(is_shown) or not any(is_shown):
            return logits, found
        best, mask = np.empty_like(found), np.array(is_shown)
        best[mask], best[~mask] = found[: batch.shown], found[batch.shown :]
        return logits, best

    def likeliest(self, chunks: Sequence[Chunk]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run one step of a whole model for chunks that want no logits.

        Returns:
            The likeliest token after every token that is wanted, (R,) int32, and by how much its logit exceeds the next
            lower one's, (R,) float32: at most 2, where that is all that is known of it.
        """
        batch, _ = _lay_out(chunks)
        margins = np.empty(len(batch.rows), np.float32)
        return self._run(batch, margins)[1], margins

    def run(self, step: Step) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run one step that is laid out already.

        Returns:
            Logits (R', V) float32 and the likeliest tokens (R,) int32, for the rows in their order. The logits are
            overwritten by the next step.
        """
        return self._run(step)

    def _run(self, step: Step, margins: NDArray[Any] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        shown = step.shown
        if len(self._logits) < shown:
            self._logits = np.empty((shown, self.config.vocab_size), np.float32)
        logits = self._logits[:shown]
        best = np.empty(len(step.rows), np.int32)
        self._model.forward(
            token_ids=step.token_ids,
            positions=step.positions,
            generated=step.generated,
            starts=step.starts,
            tables=step.tables,
            logit_tokens=step.rows[:shown],
            logits=logits,
            best=best[:shown],
            choice_tokens=step.rows[shown:],
            choices=best[shown:],
            margins=margins,
            float_prompts=self.float_prompts,
        )
        return logits, best


def _lay_out(chunks: Sequence[Chunk]) -> tuple[Step, list[bool]]:
    """Return a step over chunks, and of each row that is wanted, in their order, whether with logits."""
    starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum([len(chunk.token_ids) for chunk in chunks], out=starts[1:])
    tables = np.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), np.int32)
    token_ids, positions, generated = list[int](), list[int](), np.zeros(starts[-1], np.uint8)
    shown, others, is_shown = list[int](), list[int](), list[bool]()
    for i, (chunk, begin, end) in enumerate(zip(chunks, starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        tables[i, : len(chunk.pages)] = chunk.pages
        token_ids += chunk.token_ids
        positions += range(chunk.first_position, chunk.first_position + end - begin)
        generated[max(begin, begin + chunk.prompt_len - chunk.first_position) : end] = 1
        rows = range(begin, end) if chunk.wants_all else [end - 1] if chunk.wants else []
        if chunk.logits:
            shown += rows
        else:
            others += rows
        is_shown += [chunk.logits] * len(rows)
    step = Step(_ints(token_ids), _ints(positions), generated, starts, tables, _ints(shown + others), len(shown))
    return step, is_shown


def _ints(values: list[int]) -> NDArray[Any]:
    return np.array(values, np.int32)
