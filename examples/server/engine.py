"""What computes a batch: the native core, or the reference backend where the core was not built.

Numbers are those of MindIE on an NPU: dynamic activations are quantized symmetrically, and the tokens of a prompt
attend in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.server.generate import Batcher, Request

from eightfold.engine import loading
from eightfold.engine.block_manager import BlockManager
from eightfold.errors import CapacityError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native import core
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.parallel.world import World

# Tokens of prompts that run at once: enough for the matrix products, little enough for memory.
PREFILL_TOKENS = 512

# A piece of a prompt: the request, and which of its tokens.
Piece = tuple[Request, int, int]


class Engine:
    """A loaded model and its cache.

    Attributes:
        context: positions that the model has, for a prompt and its answer together.
        batcher: what computes.
    """

    def __init__(self, checkpoint: Checkpoint, pages: int) -> None:
        """Load a model, with a cache of so many pages for all requests together.

        Raises:
            CapacityError: the cache does not fit the memory.
        """
        self.config = checkpoint.config
        self.context = checkpoint.config.max_position_embeddings
        self.batcher: Batcher = _native(checkpoint, pages) if core.is_built() else _reference(checkpoint)

    def require_room(self, prompt_ids: Sequence[int], max_new_tokens: int, request: str) -> None:
        """Check a prompt, and that it and its answer fit.

        Raises:
            CapacityError: the prompt is empty, or both together are longer than the context.
            InputError: a token is outside the vocabulary.
        """
        if not prompt_ids:
            raise CapacityError(request, got="no tokens", expected="at least one")
        if len(prompt_ids) + max_new_tokens > self.context:
            raise CapacityError(
                request,
                got=f"{len(prompt_ids)} tokens and {max_new_tokens} new ones",
                expected=f"at most {self.context} together",
                action="Shorten it, or lower --max_output_length.",
            )
        self.config.require_ids(prompt_ids)


class NativeBatcher:
    """Requests on the native core: all that run share each step, over pages of one cache.

    Attributes:
        blocks: the pages.
    """

    def __init__(self, model: NativeModel, pages: int) -> None:
        self._model, self.blocks = model, BlockManager(pages)
        self._pages: dict[int, list[int]] = {}  # of each running request

    def prefill(self, requests: Sequence[Request]) -> list[int]:
        """Run prompts; return the first token of each answer. A prompt that has to run whole does."""
        tokens: dict[int, int] = {}
        for step in steps(requests, PREFILL_TOKENS, whole=self._model.float_prompts):
            ended = [request for request, _, end in step if end == len(request.input_ids)]
            chosen = self._run([self._chunk(request, begin, end) for request, begin, end in step])
            tokens |= zip([request.req_id for request in ended], chosen, strict=True)
        return [tokens[request.req_id] for request in requests]

    def decode(self, requests: Sequence[Request]) -> list[int]:
        """Run the last token of each request; return the next ones."""
        lengths = [len(request.input_ids) + len(request.out_tokens) for request in requests]
        pairs = zip(requests, lengths, strict=True)
        return self._run([self._chunk(request, length - 1, length) for request, length in pairs])

    def release(self, request: Request) -> None:
        """Give a request's pages back."""
        self.blocks.release(self._pages.pop(request.req_id, []))

    def _chunk(self, request: Request, begin: int, end: int) -> Chunk:
        pages = self._pages.setdefault(request.req_id, [])
        while len(pages) * PAGE < end:
            pages.append(self.blocks.take())
        prompt_len = len(request.input_ids)
        token_ids = request.input_ids[begin:end] if begin < prompt_len else request.out_tokens[-1:]
        return Chunk(token_ids, begin, pages, prompt_len, wants=end >= prompt_len, logits=False)

    def _run(self, chunks: list[Chunk]) -> list[int]:
        _, best = self._model.forward(chunks)
        return [int(token) for token in best]


def steps(requests: Sequence[Request], budget: int, *, whole: bool) -> Iterator[list[Piece]]:
    """Distribute prompts, in order, over steps of at most `budget` tokens.

    Args:
        requests: whose prompts they are.
        budget: tokens of a step.
        whole: prompts are not cut; one that is longer than the budget has a step of its own.
    """
    step, left = list[Piece](), budget
    for request in requests:
        begin, length = 0, len(request.input_ids)
        while begin < length:
            wanted = length if whole else min(length - begin, left)
            if step and (wanted > left or not wanted):
                yield step
                step, left = [], budget
                continue
            step.append((request, begin, begin + wanted))
            begin, left = begin + wanted, left - wanted
    yield step


def pages_for(num_blocks: int, block_size: int, sequences: int) -> int:
    """Return the core's pages of so many blocks; where a block is no whole number of pages, requests waste some."""
    whole, rest = divmod(block_size, PAGE)
    return num_blocks * whole if not rest else -(-num_blocks * block_size // PAGE) + sequences


# How the core computes as an NPU does.
OPTIONS: dict[str, Any] = {"dynamic": "symmetric", "attention": "mindie"}


def leave_to_first(model_path: Path) -> None:
    """Go on in one of several processes; the others compute what it asks for, and end when it ends.

    Raises:
        UnsupportedError: there are several, and no compiled core.
    """
    if core.is_built():
        loading.leave_to_first(model_path, **OPTIONS)
    elif (size := World.of_environment().size) > 1:
        raise UnsupportedError("run_pa without the compiled extension", got=f"{size} processes", expected="one")


def _native(checkpoint: Checkpoint, pages: int) -> Batcher:
    model = loading.load_model(checkpoint, **OPTIONS)
    model.allocate_cache(pages * PAGE, "Lower --max_batch_size, --max_input_length or --max_output_length.")
    return NativeBatcher(model, pages)


def _reference(checkpoint: Checkpoint) -> Batcher:
    from eightfold.cli import console

    console.require_torch("run_pa without the compiled extension")
    from examples.server.loaded import LoadedDecoder, ReferenceBatcher

    return ReferenceBatcher(LoadedDecoder.of(checkpoint))
