"""How many requests may be inside, and how much text: what exceeds it is told when to come back."""

from __future__ import annotations

import asyncio
import math
import time

from eightfold.server.problems import ApiError, bad_request, draining
from eightfold.server.settings import MAX_HELD_BYTES, ServerSettings


class Admission:
    """Counts sequences from their admission to their end, and bytes from their arrival until they are tokens.

    Attributes:
        inside: sequences that were admitted and have not ended.
        held_bytes: of bodies.
        is_draining: whether the server is stopping.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._running = settings.max_num_seqs
        self._most = settings.max_num_seqs + settings.max_waiting
        self.inside = 0
        self.held_bytes = 0
        self.is_draining = False
        self._mean_seconds = 1.0  # of the last requests
        self._emptied = asyncio.Event()
        self._emptied.set()

    def enter(self, sequences: int) -> float:
        """Admit a request; its `leave` has to follow.

        Returns:
            When that was, for `leave`.

        Raises:
            ApiError: 400 for one that can never be admitted, 429 when too many are inside, 503 while draining.
        """
        if self.is_draining:
            raise draining()
        if sequences > self._most:
            raise bad_request(f"prompts x n: got {sequences}, expected at most {self._most}", param="n")
        if self.inside + sequences > self._most:
            raise self._busy("requests are waiting")
        self.inside += sequences
        self._emptied.clear()
        return time.monotonic()

    def leave(self, sequences: int, entered: float) -> None:
        """Take note that a request has ended."""
        self.inside -= sequences
        if not self.inside:
            self._emptied.set()
        self._mean_seconds += 0.1 * (time.monotonic() - entered - self._mean_seconds)

    def hold(self, size: int) -> None:
        """Take note of bytes of a body.

        Raises:
            ApiError: 429 when there are too many already.
        """
        if self.held_bytes + size > MAX_HELD_BYTES:
            raise self._busy("texts are being read")
        self.held_bytes += size

    def let_go(self, size: int) -> None:
        """Take note that bytes of a body are no longer held."""
        self.held_bytes -= size

    async def wait_until_empty(self) -> None:
        """Return when nothing is inside."""
        await self._emptied.wait()

    def _busy(self, what: str) -> ApiError:
        turns = max(self.inside - self._running, 0) / self._running
        seconds = min(max(math.ceil(turns * self._mean_seconds), 1), 60)
        message = f"too many {what}. Try again in {seconds} s."
        return ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(seconds)})
