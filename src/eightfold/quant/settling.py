"""Files reach the disk while work goes on: one thread waits for it, and a step asks what came of it before it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Settling:
    """A thread that does, one thing after the other, what keeps the disk busy."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eightfold-settling")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> Settling:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let nothing go on afterwards; what fails now has been asked for by nobody."""
        self._thread.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Begin to do something; `require` tells whether it has failed."""
        self._begun.append(self._thread.submit(work))

    def sync(self, file: int) -> None:
        """Begin to bring an open file to the disk, and close it."""
        self.do(lambda: _sync_and_close(file))

    def require(self) -> None:
        """Return when all that was begun is done.

        Raises:
            OSError: some of it has failed.
        """
        while self._begun:
            self._begun.pop(0).result()


def _sync_and_close(file: int) -> None:
    try:
        os.fdatasync(file)
    finally:
        with contextlib.suppress(OSError):
            os.close(file)
