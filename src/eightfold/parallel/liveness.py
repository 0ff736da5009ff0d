"""Processes that share a model end together.

Between rank 0 and each other rank there is a connection that stays silent while both live. A process that ends by
itself says why; of one that dies, the system closes the connection. Either ends the others within moments, whatever
they are doing: the main thread may be inside a step then, waiting for what will never come.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from eightfold.parallel.link import Peer
from eightfold.parallel.world import World

EXIT_LOST = 2

# From the end of one process to that of another, at most.
_END_SECONDS = 8.0

_OVER, _TOLD = "over", "told"  # last words of rank 0: all is done; the user knows what has happened
_MAX_WORDS = 1 << 16


class Liveness:
    """A thread that ends this process when another one has ended."""

    def __init__(self, world: World, peers: Sequence[Peer]) -> None:
        """Begin to watch `peers`: rank 0, or in rank 0 all others."""
        self._world, self._peers = world, peers
        self._ends = False
        threading.Thread(target=self._run, name="eightfold-liveness", daemon=True).start()

    def end(self) -> None:
        """Let the others end too: all is done."""
        self._end(_OVER)

    def fail(self, reason: str) -> None:
        """Let the others end too. Rank 0 has told the user, or is about to; of another rank it tells the reason."""
        self._end(_TOLD if self._world.is_first else reason)

    def _end(self, words: str) -> None:
        if self._ends:
            return
        self._ends = True
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it has ended already
                peer.watch.sendall(words.encode())
                peer.watch.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        watched = {peer.watch: peer for peer in self._peers}
        ready, _, _ = select.select(watched, [], [])
        peer = watched[ready[0]]
        words = _last_words(peer.watch)
        if self._ends:
            return
        if self._world.is_first or (self._world.rank == 1 and words not in (_OVER, _TOLD)):
            reason = words or "it has died or cannot be reached, so all others end"
            with contextlib.suppress(OSError):
                print(f"eightfold: {peer}: {reason}. Start the command again.", file=sys.stderr, flush=True)
            self.fail(words)
        sys.stdout.flush()
        os._exit(0 if words == _OVER else EXIT_LOST)


@contextlib.contextmanager
def ended_by_liveness(*more: type[Exception]) -> Iterator[None]:
    """When another process is not there to talk to, wait to be ended by the liveness thread, which knows why.

    Args:
        more: what says so, besides the errors of connections.
    """
    gone: tuple[type[Exception], ...] = (EOFError, ConnectionError, *more)
    try:
        yield
    except gone:
        time.sleep(_END_SECONDS)
        os._exit(EXIT_LOST)


def _last_words(sock: socket.socket) -> str:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < _MAX_WORDS and (more := sock.recv(4096)):
            data += more
    return " ".join(data.decode(errors="replace").split()).rstrip(".")
