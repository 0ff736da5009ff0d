"""One HTTP request in the engine: its prompts, and how their answers leave, as JSON or event by event."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.engine.async_llm import EngineStoppedError
from eightfold.engine.outputs import RequestOutput
from eightfold.errors import EightfoldError
from eightfold.server.answers import AnswerWriter, in_parts, to_json
from eightfold.server.fields import ApiError, draining, internal, refused
from eightfold.server.logs import GONE, Record

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from eightfold.engine.async_llm import AsyncLLM
    from eightfold.engine.sampling_params import SamplingParams
    from eightfold.server.metrics import Metrics
    from eightfold.tokenizer import Tokenizer

log = logging.getLogger("eightfold.server")

SIGN_SECONDS = 10.0  # a stream that has nothing to say for so long has a comment, so that nobody gives it up
_WAITING = b": waiting\n\n"

MANY_ENTRIES = 2_000  # log-probabilities that are written in a thread

_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class Encoded(NamedTuple):
    """What a request asks for, once its prompts are tokens.

    Attributes:
        prompts: the token ids of each.
        answer: what writes the answers.
        params: how tokens are chosen, where the text of the prompt has a say in it; None: as the request says.
    """

    prompts: list[list[int]]
    answer: AnswerWriter
    params: SamplingParams | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for."""

    prompts: int  # how many
    encode: Callable[[Tokenizer], Encoded]  # it takes time
    params: SamplingParams
    streams: bool
    cache_salt: str  # only requests with the same one share keys and values of prompts
    form_field: str | None = None  # of the request, in which the form of the answer stands
    echoes: bool = False  # the prompts, in front of every answer
    referred_bytes: int = 0  # of text that is part of the request, but was not in its body

    def entries(self, prompts: Sequence[Sequence[int]], most: int) -> int:
        """Return how many log-probabilities the answers to prompts may have, in a context of so many tokens.

        What a single sequence generates does not count: that takes its time.
        """
        params, found = self.params, 0
        if params.logprobs is not None and params.n * len(prompts) > 1:
            new = (min(params.max_tokens or most, most - len(prompt)) for prompt in prompts)
            found += params.n * sum(new) * (params.logprobs + 1)
        if params.prompt_logprobs is not None:
            times = params.n if self.echoes else 1
            found += times * sum(map(len, prompts)) * (params.prompt_logprobs + 1)
        return found


class Aborted(Exception):
    """The request ended before its answers were complete."""


_ENDS = (Aborted, EngineStoppedError, EightfoldError)  # how a request ends that gets no answer


class InFlight:
    """A request's prompts in the engine, from their submission to their end.

    Attributes:
        asked: what the request asks for.
        record: of the request; tokens are counted there as prompts finish.
    """

    def __init__(
        self, engine: AsyncLLM, metrics: Metrics, asked: Asked, prompts: Sequence[Sequence[int]], record: Record
    ) -> None:
        self.asked, self.record = asked, record
        self._engine, self._metrics, self._prompts = engine, metrics, prompts
        self._salt = record.cache_salt + asked.cache_salt
        record.tells_cached |= bool(asked.cache_salt)
        stem = uuid.uuid4().hex
        self._unfinished = {at: f"{stem}-{at}" for at in range(len(prompts))}
        self._is_aborted = False

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            self._metrics.aborted(len(self._unfinished) * self.asked.params.n)
        for request_id in self._unfinished.values():
            self._engine.abort(request_id)

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield which prompt moved, and its output.

        Raises:
            EightfoldError: the engine refuses a prompt, or an answer cannot be kept to its form.
            EngineStoppedError: there is no engine any more.
            Aborted: `abort` was called, or the engine gave up.
        """
        source = self._one(0) if len(self._prompts) == 1 else self._several()
        async with aclosing(source) as outputs:
            async for at, output in outputs:
                if output.finished:
                    self._note_end(at, output)
                if output.failure is not None:
                    self.abort()
                    raise output.failure
                yield at, output
        if self._unfinished:
            raise Aborted

    async def _one(self, at: int) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        asked, name = self.asked, self._unfinished[at]
        source = self._engine.generate(
            self._prompts[at], asked.params, name, streams=asked.streams, cache_salt=self._salt
        )
        async with aclosing(source) as outputs:
            async for output in outputs:
                gave_up = output.finished and any(answer.finish_reason == "abort" for answer in output.outputs)
                if self._is_aborted or gave_up:
                    raise Aborted
                if self.record.first_token is None:
                    self.record.first_token = output.times.first_token or time.monotonic()
                yield at, output

    async def _several(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        ready: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

        async def feed(at: int) -> None:
            try:
                async for item in self._one(at):
                    ready.put_nowait(item)
                ready.put_nowait(None)
            except Exception as error:
                ready.put_nowait(error)

        feeders = [asyncio.create_task(feed(at)) for at in range(len(self._prompts))]
        try:
            going = len(feeders)
            while going:
                item = await ready.get()
                if item is None:
                    going -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for feeder in feeders:
                feeder.cancel()

    def _note_end(self, at: int, output: RequestOutput) -> None:
        self._unfinished.pop(at)
        self.record.count(output)
        self._metrics.finished(output)


async def send_json(send: Send, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Send JSON."""
    await send_body(send, to_json(content), status, headers)


async def send_body(send: Send, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Send what is JSON already."""
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def _watched(prompts: InFlight, receive: Receive) -> AsyncIterator[None]:
    """Abort prompts when their client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        prompts.record.status = GONE
        prompts.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def answer_whole(prompts: InFlight, answer: AnswerWriter, receive: Receive, send: Send) -> None:
    """Wait for the end of prompts and send their answers; ApiError where there are none."""
    finished: dict[int, RequestOutput] = {}
    async with _watched(prompts, receive):
        try:
            async for at, output in prompts.outputs():
                if output.finished:
                    finished[at] = output
        except _ENDS as error:
            if prompts.record.status == GONE:
                return
            raise _problem(error, prompts.asked) from None
    outputs = [finished[at] for at in sorted(finished)]
    body = await _written(prompts, lambda: b"".join(in_parts(answer.whole(outputs, prompts.record))))
    await send_body(send, body)


async def _written(prompts: InFlight, write: Callable[[], bytes]) -> bytes:
    """Return what `write` does: in a thread where it may be long."""
    record, asked = prompts.record, prompts.asked
    entries = record.held_entries if asked.params.logprobs is None else record.held_entries + record.generated_tokens
    return await asyncio.to_thread(write) if entries > MANY_ENTRIES else write()


async def answer_stream(prompts: InFlight, answer: AnswerWriter, receive: Receive, send: Send) -> None:
    """Send what prompts produce as it comes; ApiError where there is nothing, and nothing was sent yet."""
    record = prompts.record
    async with _watched(prompts, receive), aclosing(prompts.outputs()) as outputs:
        try:
            at, output = await _first(outputs, record, send)
            await _begin(record, send)
            # With the first piece may come the log-probabilities of a whole prompt.
            await _event(send, await _written(prompts, partial(answer.pieces, at, output)))
            last = time.monotonic()
            async for at, output in outputs:
                piece = answer.pieces(at, output)
                now = time.monotonic()
                if piece or now - last > SIGN_SECONDS:  # a call is told when it is complete
                    await _event(send, piece or _WAITING)
                    last = now
            await _event(send, await _written(prompts, partial(answer.end, record)), more=False)
        except _ENDS as error:
            if record.status == 0:
                raise _problem(error, prompts.asked) from None
            if record.status != GONE:
                await _give_up(record, answer, send, _problem(error, prompts.asked))
        except Exception:
            if record.status == 0:
                raise
            log.exception("a stream broke off", extra={"request_id": record.id})
            await _give_up(record, answer, send, internal())


async def _first(
    outputs: AsyncIterator[tuple[int, RequestOutput]], record: Record, send: Send
) -> tuple[int, RequestOutput]:
    """Wait for the first output, with a sign of life now and then."""
    first = asyncio.ensure_future(anext(outputs))
    try:
        while not (await asyncio.wait({first}, timeout=SIGN_SECONDS))[0]:
            await _begin(record, send)
            await _event(send, _WAITING)
        return first.result()
    finally:
        if first.cancel():
            await asyncio.wait({first})


async def _begin(record: Record, send: Send) -> None:
    if record.status == 0:
        await send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})


async def _event(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _give_up(record: Record, answer: AnswerWriter, send: Send, problem: ApiError) -> None:
    """End a stream that has begun with an error."""
    record.error = problem.code
    await _event(send, answer.failure(problem), more=False)


# How errors begin about fields that only the engine can check, and the fields.
_CHECKED = (
    ("logit_bias", "logit_bias"),
    ("stop_token_ids", "stop_token_ids"),
    ("token id", "prompt"),
    ("prompt_logprobs", "prompt_logprobs"),
)


def _problem(error: Exception, asked: Asked) -> ApiError:
    if isinstance(error, EightfoldError):
        found = (
            field for begin, field in (("structured ", asked.form_field), *_CHECKED) if str(error).startswith(begin)
        )
        return refused(error, param=next(found, None))
    if isinstance(error, Aborted):
        return draining()
    return ApiError(503, "the engine has stopped: the server's log has the details", code="engine_stopped")
