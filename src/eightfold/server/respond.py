"""How answers leave: as JSON, or event by event; and how it is noticed that nobody waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from starlette.types import Receive, Send

from eightfold.engine.async_llm import EngineStoppedError
from eightfold.engine.outputs import RequestOutput
from eightfold.errors import EightfoldError
from eightfold.server.answers import DONE, event, to_json
from eightfold.server.generation import Aborted, Run, Usage
from eightfold.server.problems import ApiError, draining, engine_stopped, internal, refused
from eightfold.server.record import GONE, Record

log = logging.getLogger("eightfold.server")

FIRST_SIGN_SECONDS = 10.0  # a stream that has to wait longer begins with comments, so that nobody gives it up

_ENDS = (Aborted, EngineStoppedError, EightfoldError)  # what a run ends with when it gives no answer
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class Answer(Protocol):
    """How one endpoint writes its answers."""

    def pieces(self, at: int, output: RequestOutput) -> bytes:
        """Return what a step adds to a stream."""

    def usage(self, usage: Usage) -> bytes:
        """Return the piece of a stream that says how many tokens there were."""

    def whole(self, outputs: list[RequestOutput], usage: Usage) -> dict[str, Any]:
        """Return all of it."""


async def send_json(send: Send, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Send JSON."""
    body = to_json(content)
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_problem(send: Send, problem: ApiError) -> None:
    """Send an error."""
    await send_json(send, problem.body(), problem.status, problem.headers)


@asynccontextmanager
async def _watched(receive: Receive, run: Run, record: Record) -> AsyncIterator[None]:
    """Abort a run when its client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        record.status = GONE
        run.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def answer_whole(run: Run, answer: Answer, record: Record, receive: Receive, send: Send) -> None:
    """Wait for the end of a run and send its answer.

    Raises:
        ApiError: the engine refuses the request, or the server ended it.
    """
    finished: dict[int, RequestOutput] = {}
    async with _watched(receive, run, record):
        try:
            async for at, output in run.outputs():
                if output.finished:
                    finished[at] = output
        except _ENDS as error:
            if record.status == GONE:
                return
            raise _problem(error) from None
    await send_json(send, answer.whole([finished[at] for at in sorted(finished)], run.usage))


async def answer_stream(
    run: Run, answer: Answer, record: Record, receive: Receive, send: Send, *, shows_usage: bool
) -> None:
    """Send what a run produces as it comes.

    Raises:
        ApiError: the engine refuses the request, and nothing was sent yet.
    """
    async with _watched(receive, run, record), aclosing(run.outputs()) as outputs:
        try:
            at, output = await _first(outputs, record, send)
            await _begin(record, send)
            await _event(send, answer.pieces(at, output))
            async for at, output in outputs:
                piece = answer.pieces(at, output)
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await _end(send, (answer.usage(run.usage) if shows_usage else b"") + DONE)
        except _ENDS as error:
            if record.status == 0:
                raise _problem(error) from None
            if record.status != GONE:
                await _give_up(record, send, _problem(error))
        except Exception:
            if record.status == 0:
                raise
            log.exception("a stream broke off", extra={"request_id": record.id})
            await _give_up(record, send, internal())


async def _first(
    outputs: AsyncIterator[tuple[int, RequestOutput]], record: Record, send: Send
) -> tuple[int, RequestOutput]:
    """Wait for the first output, with a sign of life now and then."""
    first = asyncio.ensure_future(anext(outputs))
    try:
        while not (await asyncio.wait({first}, timeout=FIRST_SIGN_SECONDS))[0]:
            await _begin(record, send)
            await _event(send, b": waiting\n\n")
        return first.result()
    finally:
        if first.cancel():
            await asyncio.wait({first})


async def _begin(record: Record, send: Send) -> None:
    if record.status == 0:
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})


async def _event(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _end(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _give_up(record: Record, send: Send, problem: ApiError) -> None:
    """End a stream that has begun with an error, which is not followed by [DONE]."""
    record.error = problem.code
    await _end(send, event(problem.body()))


def _problem(error: Exception) -> ApiError:
    if isinstance(error, EightfoldError):
        return refused(error)
    return draining() if isinstance(error, Aborted) else engine_stopped()
