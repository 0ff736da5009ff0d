"""Processes that make one output end together.

Between rank 0 and each other rank there is a connection that stays silent while both live. A process that ends by
itself says why; of one that dies, the system closes it. Rank 0 then raises an error, which ends its work as any error
would: the output stays as it is, or as it was. The others just end, at once: nothing is theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from eightfold import errors
from eightfold.errors import EightfoldError, PeerError

EXIT_LOST = 2

OVER = {"over": True}  # last words of a process that has done its part

# For rank 0 to come by, within a step, and learn that another one has ended.
_NOTICE_SECONDS = 6.0
# For the watch to hear of a death that a signal or a broken connection has told before.
_HEAR_SECONDS = 1.0


class Watch:
    """A thread that notices when another process has ended."""

    def __init__(self, rank: int, peers: dict[socket.socket, str]) -> None:
        """Begin to watch.

        Args:
            rank: of this process.
            peers: rank 0, or for rank 0 all others, with their names.
        """
        self._rank, self._peers = rank, peers
        self._is_over = False
        self._reason: EightfoldError | None = None
        self._noticed = threading.Event()
        self._take_signals()
        threading.Thread(target=self._run, name="eightfold-watch", daemon=True).start()

    def _take_signals(self) -> None:
        """Let rank 0 decide when to end; to it, SIGTERM may be the launcher's answer to the death of another one."""
        if self._rank:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        elif callable(before := signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, lambda number, frame: self._terminated(before, number, frame))

    def _terminated(self, before: Any, number: int, frame: Any) -> None:
        self._hear()
        self._raise_reason()
        if not self._noticed.is_set():
            before(number, frame)

    def _hear(self) -> None:
        ends = time.monotonic() + _HEAR_SECONDS
        while self._reason is None and not self._is_over and time.monotonic() < ends:
            time.sleep(0.01)

    def _raise_reason(self) -> None:
        if self._reason is not None and not self._noticed.is_set():
            self._noticed.set()
            raise self._reason from None

    @contextlib.contextmanager
    def explains(self) -> Iterator[None]:
        """Talk to others; if one is gone, raise in rank 0 what the watch knows of it, and end another rank."""
        self._raise_reason()
        try:
            yield
        except (OSError, EOFError) as error:
            if self._rank:
                time.sleep(_NOTICE_SECONDS)  # the watch ends this process before
                os._exit(EXIT_LOST)
            self._hear()
            self._raise_reason()
            raise PeerError("connection between the ranks", got=str(error) or "its end") from None

    def end(self, words: dict[str, Any]) -> None:
        """Leave, with last words."""
        if self._is_over:
            return
        self._is_over = True
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps(words).encode() + b"\n")
                peer.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        waiting = dict(self._peers)
        while waiting:
            ready, _, _ = select.select(waiting, [], [])
            for peer in ready:
                words, name = _last_words(peer), waiting.pop(peer)
                if self._is_over or words == OVER:
                    continue
                if self._rank:
                    os._exit(EXIT_LOST)  # rank 0 tells the user, or if it was killed the launcher
                self._lost(name, words)
                return

    def _lost(self, name: str, words: dict[str, Any] | None) -> None:
        """End the others, and this process by an error; at once, if it takes too long to notice."""
        self._reason = _reason(name, words)
        self.end({"kind": "PeerError", "text": str(self._reason)})
        if not self._noticed.wait(_NOTICE_SECONDS):
            with contextlib.suppress(OSError):
                os.write(2, f"eightfold: {self._reason}\n".encode())
            os._exit(EXIT_LOST)


def _reason(who: str, words: dict[str, Any] | None) -> EightfoldError:
    if words is None:
        return PeerError(who, got="no sign of life: it has died or cannot be reached")
    kind = getattr(errors, str(words.get("kind")), PeerError)
    is_ours = isinstance(kind, type) and issubclass(kind, EightfoldError)
    error: EightfoldError = (kind if is_ours else PeerError)(f"{who}: {words.get('text')}")
    return error


def _last_words(sock: socket.socket) -> dict[str, Any] | None:
    """Return the JSON object that a process has left with; None when it has left without."""
    data = b""
    try:
        while not data.endswith(b"\n") and (more := sock.recv(4096)):
            data += more
        words = json.loads(data)
    except (OSError, ValueError):
        return None
    return words if isinstance(words, dict) else None
