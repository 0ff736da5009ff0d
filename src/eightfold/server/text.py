"""The tokenizer for many requests: in threads of its own, so that the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from eightfold.server.settings import LARGE_BODY_BYTES

T = TypeVar("T")


class TextWorker:
    """Runs what is done to texts. Large ones have one thread, behind which small ones do not wait."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(2, "text")
        self._large = ThreadPoolExecutor(1, "large-text")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Return what work returns.

        Args:
            size: bytes of the request that it is for.
            work: is called in another thread.
        """
        pool = self._large if size > LARGE_BODY_BYTES else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        """Let the threads end."""
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)
