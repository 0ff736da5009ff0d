"""Connections: how many there may be, how long each may be silent, and how long it may leave its answer unread.

A request's head has to arrive within HEAD_SECONDS. When there are too many connections, a new one takes the place of
one that waits for a request; so sockets that say nothing keep nobody out, however many they are.

A client may close its sending side when its request is complete and read the answer all the same (`nc -N` does). What
arrives then is what a client sends that has left, and only what we send tells the two apart: the system of one that has
left answers with a reset. So an answer that has not begun is preceded by 100 Continue, which every client of HTTP/1.1
skips. HTTP/1.0 has nothing of the kind: there an answer has to begin within a time.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from eightfold.server.answers import to_json
from eightfold.server.fields import ApiError, bad_request

log = logging.getLogger("eightfold.server")

HEAD_SECONDS = 10.0
# A connection whose answers wait has to take so many bytes in that time.
STALL_SECONDS, STALL_BYTES = 30.0, 4096
# After the end of what a client sends: the time until it is asked whether it is there, between two such questions, and
# until its system has said no; and the time in which an answer of HTTP/1.0 has to begin.
PROBE_SECONDS, PROBE_AGAIN_SECONDS, REPLY_SECONDS, SILENT_SECONDS = 3.0, 10.0, 0.25, 10.0
LOG_SECONDS = 10.0  # between two lines about connections that were closed
MOST_CONNECTIONS = 4096
_DESCRIPTORS = 4 * MOST_CONNECTIONS


def descriptor_limit() -> int:
    """Raise the soft limit of file descriptors as far as connections may need it; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Connections:
    """All connections of a server.

    Attributes:
        most: how many there may be: half of what the limit of descriptors allows, because accepting runs ahead.
        backlog: how many the system may accept before we look at them.
    """

    def __init__(self) -> None:
        limit = descriptor_limit()
        self.most, self.backlog = min(MOST_CONNECTIONS, limit // 2), max(limit // 16, 8)
        self._open: dict[Connection, None] = {}  # the oldest first
        self._closed: Counter[str] = Counter()  # since the last line of the log, by reason

    def protocol(self, **given: Any) -> Connection:
        """Return what uvicorn asks for at a new connection."""
        return Connection(self, **given)

    def admit(self, new: Connection) -> None:
        """Count a new connection; when there are too many, close the one that is missed least."""
        self._open[new] = None
        if len(self._open) > self.most:
            silent = (each for each in self._open if each.cycle is None)
            waiting = (each for each in self._open if not each.answers)
            least = next(silent, None) or next(waiting, None) or new
            self.leave(least)
            self.note("too many")
            least.transport.abort()

    def leave(self, each: Connection) -> None:
        self._open.pop(each, None)

    def look(self) -> None:
        """Close the connections whose time is over."""
        now = time.monotonic()
        for each in tuple(self._open):
            each.look(now)

    def note(self, why: str) -> None:
        """Count a connection that was closed; the log gets one line for many."""
        if not self._closed:
            asyncio.get_running_loop().call_later(LOG_SECONDS, self.tell)
        self._closed[why] += 1

    def tell(self) -> None:
        if self._closed:
            reasons = ", ".join(f"{count} x {why}" for why, count in self._closed.most_common())
            log.warning("closed connections: %s", reasons)
            self._closed.clear()

    def on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take note of what asyncio complains of; out of descriptors it complains a thousand times a second."""
        error = context.get("exception")
        if isinstance(error, OSError) and "accept" in context["message"]:
            self.note(f"not accepted ({error.strerror})")
        else:
            log.error("event loop: %s", context["message"], exc_info=error)


class Connection(H11Protocol):
    """uvicorn's connection with limits of time."""

    def __init__(self, crowd: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._crowd = crowd
        self._waits_since: float | None = None  # for the rest of a head
        self._unread, self._unread_since = 0, 0.0  # bytes that wait for the client, and since when
        self._was_resumed = False
        self._has_ended = False  # its client has closed its sending side

    @property
    def is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def answers(self) -> bool:
        """Whether a request that has arrived whole is being answered."""
        return not self.is_idle and not self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since = time.monotonic()
        self._crowd.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = time.monotonic()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Go on with answers to requests that have arrived; else let the connection be closed."""
        if self.answers and not self._has_ended:
            self._has_ended = True
            speaks_1_1 = self.scope["http_version"] == "1.1"
            self.loop.call_later(PROBE_SECONDS if speaks_1_1 else SILENT_SECONDS, self._probe, speaks_1_1)
        return self.answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_idle and self._has_ended:
            self.transport.close()
        elif self.is_idle and self.conn.trailing_data[0]:  # the next head has begun
            self._waits_since = time.monotonic()

    def resume_writing(self) -> None:
        self._was_resumed = True
        super().resume_writing()

    def look(self, now: float) -> None:
        """Close it if its client takes too long to send a head or to read an answer, or has left."""
        if self._has_ended:
            self._leave_if_reset()
        if self._waits_since is not None and now - self._waits_since > HEAD_SECONDS:
            self._waits_since = None
            self._crowd.note("no request in time")
            self._refuse(ApiError(408, f"request: not there after {HEAD_SECONDS:.0f} s"))
        unread = self.transport.get_write_buffer_size()
        # Only while nothing more is written does the size tell what the client takes.
        may_grow = not (self.flow.write_paused or self.is_idle)
        if not unread or may_grow or self._was_resumed or unread <= self._unread - STALL_BYTES:
            self._unread, self._unread_since, self._was_resumed = unread, now, False
        elif now - self._unread_since > STALL_SECONDS:
            self._crowd.note("answer not read")
            self.transport.abort()
        self._unread = max(self._unread, unread)

    def _probe(self, speaks_1_1: bool) -> None:
        """Ask a client that sends nothing more whether it is still there, if nothing else is sent that would tell."""
        if self.transport.is_closing() or not self.answers:
            return
        if not speaks_1_1:
            if not self.cycle.response_started:
                self.transport.abort()
            return
        if not self.cycle.response_started:
            goes_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(goes_on) or b"")
            self.loop.call_later(REPLY_SECONDS, self._leave_if_reset)
        self.loop.call_later(PROBE_AGAIN_SECONDS, self._probe, speaks_1_1)

    def _leave_if_reset(self) -> None:
        """Close it if the system of its client has said that nobody is there."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(
            bad_request("request: got something that is not HTTP/1.1, or too large a head", code="invalid_request")
        )

    def _refuse(self, problem: ApiError) -> None:
        """Send an error, unless an answer has begun, and close the connection."""
        if not self.is_idle and self.cycle.response_started:
            self.transport.abort()
            return
        body = to_json(problem.body())
        reason = {400: "Bad Request", 408: "Request Timeout"}[problem.status]
        head = f"HTTP/1.1 {problem.status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
