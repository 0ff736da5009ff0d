"""Continuous batching in the order of MindIE's run_pa: which requests are admitted, and which steps they share.

A turn admits waiting requests, in order, while the batch has room, and prefills them together; unless one of them is
finished by that already, every running request then takes one decode step.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOG = logging.getLogger("run_pa")


@dataclass
class Request:
    """One prompt and what has been generated for it, a stop token at its end included."""

    req_id: int
    input_ids: list[int]
    out_tokens: list[int] = field(default_factory=list)


class Batcher(Protocol):
    """A model that computes several requests in one step, and keeps their keys and values."""

    def prefill(self, requests: Sequence[Request]) -> list[int]:
        """Return the first token of each request."""

    def decode(self, requests: Sequence[Request]) -> list[int]:
        """Return the next token of each request that has been prefilled."""

    def release(self, request: Request) -> None:
        """Forget a request's keys and values."""


@dataclass(frozen=True)
class Limits:
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

    def is_finished(self, request: Request) -> bool:
        """Whether an answer has come to its end."""
        return len(request.out_tokens) >= self.max_new_tokens or request.out_tokens[-1] in self.stop_ids


@dataclass
class Timing:
    """Seconds of each prefill and of each decode step, over all requests."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class AdmissionError(ValueError):
    """A request that can never be admitted."""


def generate_requests(requests: Sequence[Request], batcher: Batcher, limits: Limits) -> Timing:
    """Answer all requests; fills their `out_tokens`.

    Args:
        requests: in the order of admission.
        batcher: what computes.
        limits: of the batch, of the cache and of answers.

    Raises:
        AdmissionError: a request needs more cache blocks than are free, or is longer than a prefill may be.
    """
    LOG.info("------total req num: %d, infer start--------", len(requests))
    waiting, running, timing = deque(requests), list[Request](), Timing()
    try:
        while waiting or running:
            admitted = _admit(waiting, limits, running)
            running += admitted
            if admitted:
                timing.prefill.append(_step(batcher.prefill, admitted))
                if _retire(running, batcher, limits):
                    continue
            timing.decode.append(_step(batcher.decode, running))
            _retire(running, batcher, limits)
    finally:
        for request in running:  # after an error or an interrupt
            batcher.release(request)
    return timing


def _step(compute: Callable[[Sequence[Request]], list[int]], requests: Sequence[Request]) -> float:
    """Give each request its next token; return the seconds that took."""
    started = time.perf_counter()
    tokens = compute(requests)
    seconds = time.perf_counter() - started
    for request, token in zip(requests, tokens, strict=True):
        request.out_tokens.append(token)
    return seconds


def _retire(running: list[Request], batcher: Batcher, limits: Limits) -> bool:
    """Let finished requests leave; return whether there were any."""
    finished = [request for request in running if limits.is_finished(request)]
    for request in finished:
        running.remove(request)
        batcher.release(request)
    return bool(finished)


def _admit(waiting: deque[Request], limits: Limits, running: Sequence[Request]) -> list[Request]:
    """Take the next requests that fit from the queue."""
    admitted: list[Request] = []
    tokens = 0
    free_blocks = limits.num_blocks - sum(limits.blocks_for(request) for request in running)
    room = min(limits.max_prefill_batch_size, limits.max_batch_size - len(running))
    while waiting and len(admitted) < room:
        length, index = len(waiting[0].input_ids), waiting[0].req_id
        needed = limits.blocks_for(waiting[0])
        if length > limits.max_prefill_tokens:
            raise AdmissionError(
                f"req {index}'s  input length is {length}, "
                f"which is longer than max_prefill_tokens {limits.max_prefill_tokens}"
            )
        if tokens + length > limits.max_prefill_tokens:
            break
        if needed > free_blocks:
            raise AdmissionError(
                f"req: {index} out of memory, need block: {needed} is more than free block {free_blocks}"
            )
        tokens += length
        free_blocks -= needed
        admitted.append(waiting.popleft())
    return admitted
