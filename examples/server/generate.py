"""Continuous batching in the order of MindIE's run_pa: which requests are admitted, and which steps they share.

A turn admits waiting requests, in order, while the batch has room, and prefills them together; unless one of them is
finished by that already, every running request then takes one decode step.

The engine runs one sequence at a time. A request is therefore answered as a whole when it is admitted, and
its steps are then taken one by one as the batch would: a step of the batch lasts as long as those of its members
together. The sum is the time that was really spent.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOG = logging.getLogger("run_pa")


class Timed(Protocol):
    """A token and how long it took."""

    @property
    def token(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102


@dataclass
class Request:
    """One prompt and what has been generated for it."""

    req_id: int
    input_ids: list[int]
    out_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """How much is admitted at a time."""

    max_batch_size: int
    max_prefill_batch_size: int
    max_prefill_tokens: int
    max_new_tokens: int
    num_blocks: int
    block_size: int

    def blocks_for(self, prompt_len: int) -> int:
        """Return the cache blocks of a prompt and its whole answer."""
        return math.ceil((prompt_len + self.max_new_tokens) / self.block_size)


@dataclass
class Timing:
    """Seconds of each prefill and of each decode step, over all requests."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class AdmissionError(ValueError):
    """A request that can never be admitted."""


@dataclass
class _Running:
    request: Request
    blocks: int
    steps: deque[Timed]

    def advance(self) -> float:
        """Take the next token; return its seconds."""
        step = self.steps.popleft()
        self.request.out_tokens.append(step.token)
        return step.seconds


def generate_requests(
    requests: Sequence[Request], answer: Callable[[Sequence[int]], Sequence[Timed]], limits: Limits
) -> Timing:
    """Answer all requests; fills their `out_tokens`.

    Args:
        requests: in the order of admission.
        answer: prompt -> all tokens of its answer, at least one.
        limits: of the batch and of the cache.

    Raises:
        AdmissionError: a request needs more cache blocks than are free, or is longer than a prefill may be.
    """
    LOG.info("------total req num: %d, infer start--------", len(requests))
    waiting, running, timing = deque(requests), list[_Running](), Timing()
    while waiting or running:
        free = limits.num_blocks - sum(member.blocks for member in running)
        admitted = [
            _Running(request, limits.blocks_for(len(request.input_ids)), deque(answer(request.input_ids)))
            for request in _admit(waiting, limits, len(running), free)
        ]
        if admitted:
            timing.prefill.append(sum(member.advance() for member in admitted))
            unfinished = [member for member in admitted if member.steps]
            running += unfinished
            if len(unfinished) < len(admitted):
                continue
        timing.decode.append(sum(member.advance() for member in running))
        running = [member for member in running if member.steps]
    return timing


def _admit(waiting: deque[Request], limits: Limits, running: int, free_blocks: int) -> list[Request]:
    """Take the next requests that fit from the queue."""
    admitted: list[Request] = []
    tokens = 0
    room = min(limits.max_prefill_batch_size, limits.max_batch_size - running)
    while waiting and len(admitted) < room:
        length, index = len(waiting[0].input_ids), waiting[0].req_id
        needed = limits.blocks_for(length)
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
