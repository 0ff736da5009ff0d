"""Continuous batching in the order of MindIE's run_pa: which requests are admitted, and which steps they share.

A turn admits waiting requests, in order, while the batch has room, and prefills them together; a turn that admits none
is one decode step of all running requests. eightfold's engine computes: a request that is running already goes on in
the steps that prefill others. Without the compiled core the reference backend answers one request after the other.

Numbers are those of MindIE on an NPU: dynamic activations are quantized symmetrically, and the tokens of a prompt
attend in float.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eightfold.engine import settings
from eightfold.engine.engine import Engine
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.errors import UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.model import PAGE
from eightfold.parallel.world import World
from eightfold.tokenizer import Tokenizer

LOG = logging.getLogger("run_pa")

# How the core computes as an NPU does.
AS_NPU = EngineConfig(dynamic="symmetric", attention_mode="mindie")


@dataclass
class Request:
    """One prompt and what has been generated for it, a stop token at its end included."""

    req_id: int
    input_ids: list[int]
    out_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """How much is admitted at a time, and where answers end.

    Attributes:
        max_batch_size: requests that run together.
        max_prefill_batch_size: requests that are prefilled together.
        max_prefill_tokens: tokens that are prefilled together.
        max_new_tokens: of an answer.
        num_blocks: of the cache.
        block_size: positions of a block.
        stop_ids: tokens that end an answer.
    """

    max_batch_size: int
    max_prefill_batch_size: int
    max_prefill_tokens: int
    max_new_tokens: int
    num_blocks: int
    block_size: int
    stop_ids: frozenset[int] = frozenset()

    def blocks_for(self, request: Request) -> int:
        """Return the cache blocks of a prompt and its whole answer."""
        return math.ceil((len(request.input_ids) + self.max_new_tokens) / self.block_size)


@dataclass
class Timing:
    """Seconds of each prefill and of each decode step, over all requests."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class AdmissionError(ValueError):
    """A request that can never be admitted."""


# Answers all requests, in the order of admission: fills their `out_tokens`. Raises AdmissionError where one needs more
# cache blocks than are free, or is longer than a prefill may be.
Generate = Callable[[Sequence[Request], Sizes], Timing]


def load(checkpoint: Checkpoint, tokenizer: Tokenizer | None, pages: int, max_batch_size: int) -> Generate:
    """Load a model, with a cache of so many pages for all requests together; return what answers with it.

    Raises:
        CapacityError: the cache does not fit the memory.
    """
    if core.is_built():
        return Batches(checkpoint, tokenizer or NoText(), pages, max_batch_size).generate
    from eightfold.cli import console

    console.require_torch("run_pa without the compiled extension")
    from eightfold.model.reference.load import Decoder

    decoder = Decoder(checkpoint, dynamic="symmetric", attention="mindie")

    def generate(requests: Sequence[Request], sizes: Sizes) -> Timing:
        timing, waiting = Timing(), deque(requests)
        while waiting:
            for request in admit(waiting, sizes, []):
                started = time.perf_counter()
                for token in decoder.generate(request.input_ids, sizes.max_new_tokens):
                    seconds = timing.decode if request.out_tokens else timing.prefill
                    seconds.append(time.perf_counter() - started)
                    request.out_tokens.append(token)
                    if token in sizes.stop_ids:
                        break
                    started = time.perf_counter()
        return timing

    return generate


class NoText(Tokenizer):
    """In place of a tokenizer, where prompts and answers are token ids."""

    def __init__(self) -> None:
        self.notes = list[str]()

    def decode(self, token_ids: Sequence[int], *, keep_special: bool | Collection[int] = False) -> str:
        """Return nothing."""
        return ""


class Batches:
    """Requests on eightfold's engine."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, pages: int, max_batch_size: int) -> None:
        model = settings.load_model(checkpoint, AS_NPU)
        # Refused here, where it does not fit, by the names of run_pa's flags.
        model.allocate_cache(pages * PAGE, "Lower --max_batch_size, --max_input_length or --max_output_length.")
        config = EngineConfig(
            max_num_seqs=max_batch_size,
            max_batched_tokens=max(EngineConfig.max_batched_tokens, 2 * max_batch_size),
            kv_memory=pages * model.page_bytes,
            prefix_caching=False,
        )
        self.engine = Engine(model, tokenizer, config)
        self._running: dict[str, Request] = {}

    def generate(self, requests: Sequence[Request], sizes: Sizes) -> Timing:
        """Answer all requests."""
        params = SamplingParams(
            temperature=0.0, max_tokens=sizes.max_new_tokens, stop_token_ids=tuple(sizes.stop_ids), ignore_eos=True
        )
        waiting, timing = deque(requests), Timing()
        try:
            while waiting or self._running:
                admitted = admit(waiting, sizes, list(self._running.values()))
                for request in admitted:
                    self.engine.add_request(str(request.req_id), request.input_ids, params)
                    self._running[str(request.req_id)] = request
                started = time.perf_counter()
                self._step()
                while not all(request.out_tokens for request in admitted):  # long prompts take several steps
                    self._step()
                (timing.prefill if admitted else timing.decode).append(time.perf_counter() - started)
        finally:
            for request_id in self._running:  # after an error or an interrupt
                self.engine.abort(request_id)
            self._running.clear()
        return timing

    def _step(self) -> None:
        for output in self.engine.step():
            self._take(output)

    def _take(self, output: RequestOutput) -> None:
        (answer,) = output.outputs
        ended = [answer.stop_reason] if isinstance(answer.stop_reason, int) else []
        self._running[output.request_id].out_tokens = answer.token_ids + ended
        if output.finished:
            del self._running[output.request_id]


def admit(waiting: deque[Request], sizes: Sizes, running: Sequence[Request]) -> list[Request]:
    """Take the next requests that fit from the queue.

    Raises:
        AdmissionError: one needs more cache blocks than are free, or is longer than a prefill may be.
    """
    admitted: list[Request] = []
    tokens = 0
    free_blocks = sizes.num_blocks - sum(sizes.blocks_for(request) for request in running)
    room = min(sizes.max_prefill_batch_size, sizes.max_batch_size - len(running))
    while waiting and len(admitted) < room:
        length, index = len(waiting[0].input_ids), waiting[0].req_id
        needed = sizes.blocks_for(waiting[0])
        if length > sizes.max_prefill_tokens:
            raise AdmissionError(
                f"req {index}'s  input length is {length}, "
                f"which is longer than max_prefill_tokens {sizes.max_prefill_tokens}"
            )
        if tokens + length > sizes.max_prefill_tokens:
            break
        if needed > free_blocks:
            raise AdmissionError(
                f"req: {index} out of memory, need block: {needed} is more than free block {free_blocks}"
            )
        tokens += length
        free_blocks -= needed
        admitted.append(waiting.popleft())
    return admitted


def pages_for(num_blocks: int, block_size: int, sequences: int) -> int:
    """Return the core's pages of so many blocks; where a block is no whole number of pages, requests waste some."""
    whole, rest = divmod(block_size, PAGE)
    return num_blocks * whole if not rest else -(-num_blocks * block_size // PAGE) + sequences


def leave_to_first(model_path: Path) -> None:
    """Go on in one of several processes; the others compute what it asks for, and end when it ends.

    Raises:
        UnsupportedError: there are several, and no compiled core.
    """
    if core.is_built():
        settings.leave_to_first(model_path, AS_NPU)
    elif (size := World.of_environment().size) > 1:
        raise UnsupportedError("run_pa without the compiled extension", got=f"{size} processes", expected="one")
