"""The engine for servers: one thread runs it, and an asyncio loop never waits for a step.

What goes in (requests, aborts) lies in a queue that the engine's thread empties between steps. What comes out of a step
goes to the event loop in one call, which hands every reader its output while the next step computes. What a slow reader
has not read becomes part of its next output, so nothing piles up. A reader that is cancelled, or that stops reading,
aborts its request.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import EngineStats, RequestOutput
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.sequence import Request
from eightfold.engine.settings import EngineConfig
from eightfold.errors import InputError
from eightfold.model import native as core

# To check and hash more tokens than these, all answers together, is left to a thread: the event loop goes on.
QUICK_TOKENS = 16_384

# Forms are compiled in threads of their own, so many at a time: slow ones delay nothing but other forms.
FORM_THREADS = 3

# Between two looks at whether all is answered, in a shutdown.
LOOK_SECONDS = 0.02

# Tokens that come within so short a time go to their readers together, all but the first. To wake the event loop and
# to write an event costs a twentieth of a step that takes 3 ms; nobody sees the difference, and steps of larger models
# take longer.
STREAM_SECONDS = 0.01


_MOST_RINGS = 4096  # that are heard at once


class EngineStoppedError(RuntimeError):
    """The engine answers no requests: it crashed, or it is shut down."""


class _Reader:
    """What one request's reader has not read yet."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None
        self._error: EngineStoppedError | None = None
        self._awaited: asyncio.Future[None] | None = None  # while the reader waits

    def put(self, output: RequestOutput) -> None:
        if self._output is not None:
            output.begin_with(self._output)
        self._output = output
        self._wake()

    def fail(self, error: EngineStoppedError) -> None:
        self._error = error
        self._wake()

    async def get(self) -> RequestOutput:
        if self._output is None and self._error is None:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
        return output

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)


class _Bell:
    """Wakes an event loop from another thread, as its `call_soon_threadsafe` does, but keeps the interpreter there.

    A socket's `send` lets go of the interpreter. The loop that it wakes would take it, and the ringing thread, which is
    about to compute, would wait until the loop has written its answers.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heard, self._rung = os.pipe()
        for descriptor in (self._heard, self._rung):
            os.set_blocking(descriptor, False)

    def hang(self, loop: asyncio.AbstractEventLoop, hear: Callable[[], None]) -> None:
        """Let the running loop call `hear` after each ring, or after several."""
        self._leave()
        self._loop = loop

        def called() -> None:
            os.read(self._heard, _MOST_RINGS)
            hear()

        loop.add_reader(self._heard, called)

    def ring(self) -> None:
        core.extension.wake(self._rung)

    def close(self) -> None:
        """Let go of the loop; nobody rings any more."""
        if self._rung >= 0:
            self._leave()
            os.close(self._heard)
            os.close(self._rung)
            self._heard = self._rung = -1

    def _leave(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._heard)


class AsyncLLM:
    """An engine in a thread of its own. Its methods are called from one event loop.

    Attributes:
        engine: what runs; from outside only its `prepare`, its tokenizer and its limits are to be used.
        failure: what it crashed of; None if it did not.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[str, _Reader] = {}  # of the event loop
        self._orders: deque[Callable[[], object]] = deque()  # to the engine's thread
        self._ordered = threading.Condition()
        self._news: deque[Callable[[], None]] = deque()  # from it, to the event loop
        self._bell = _Bell()
        self._rung_at = 0.0  # in seconds of time.monotonic
        self._refuses = self._stops = False
        self._forms = ThreadPoolExecutor(FORM_THREADS, "eightfold-form")
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="eightfold-engine", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # a thread inside the core must not outlive the interpreter

    @classmethod
    def load(cls, directory: Path, config: EngineConfig) -> AsyncLLM:
        """Load a model directory; see Engine.load."""
        return cls(Engine.load(directory, config))

    @property
    def stats(self) -> EngineStats:
        """Counts as they are now."""
        return self.engine.stats

    @property
    def is_healthy(self) -> bool:
        """Whether new requests are answered."""
        return self.failure is None and not self._refuses

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        streams: bool = True,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a prompt; every item is an output with what is new, the last one is `finished`.

        The request begins when the first item is asked for. It ends early when the reader is cancelled, closes the
        iterator or forgets it.

        Args:
            prompt_ids: at least one token.
            params: what is asked for.
            request_id: an id that no unfinished request has; None for a fresh one.
            streams: whether there is an item as soon as there is something new, and not only the last; without, an
                answer costs less.
            cache_salt: only requests with the same one share keys and values of prompts.

        Raises:
            CapacityError, InputError, UnsupportedError: see Engine.prepare; at once, or with the first item where it
                takes a while to find out.
            EngineStoppedError: the engine is shut down or crashed, or does so before the answer is complete.
        """
        self._require_running()
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        prepare = partial(self.engine.prepare, request_id, prompt_ids, params, streams=streams, cache_salt=cache_salt)
        takes_long = params.structured is not None or len(prompt_ids) * params.n > QUICK_TOKENS
        executor = None if params.structured is None else self._forms
        return self._stream(request_id, None if takes_long else prepare(), prepare, executor)

    async def _stream(
        self, request_id: str, request: Request | None, prepare: Callable[[], Request], executor: Executor | None
    ) -> AsyncGenerator[RequestOutput, None]:
        if request is None:
            request = await asyncio.get_running_loop().run_in_executor(executor, prepare)
        reader = self._open(request_id)
        finished = False
        try:
            self._order(partial(self.engine.submit, request))
            while not finished:
                output = await reader.get()
                finished = output.finished
                yield output
        finally:
            del self._readers[request_id]
            if not finished:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """End a request where it stands; its reader gets a last output. An unknown id is nothing."""
        self._order(partial(self._abort, request_id))

    async def shutdown(self, drain: float = 0.0) -> None:
        """Take no more requests, let the others go on for `drain` seconds, end the rest and stop the thread."""
        self._refuses = True
        ends = asyncio.get_running_loop().time() + drain
        while self._readers and self._thread.is_alive() and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.to_thread(self._end)
        self._hear()
        self._bell.close()

    def _end(self) -> None:
        """End what is going on, and the thread."""
        self._refuses = True
        self._order(self._stop)
        self._forms.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        atexit.unregister(self._end)

    def _open(self, request_id: str) -> _Reader:
        """Make a reader of the running event loop."""
        self._require_running()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._readers:
                raise RuntimeError("AsyncLLM: another event loop than that of the requests that are being answered")
            self._bell.hang(loop, self._hear)
            self._loop = loop
        if request_id in self._readers:
            raise InputError("request id", got=request_id, expected="one that no unfinished request has")
        reader = self._readers[request_id] = _Reader()
        return reader

    def _require_running(self) -> None:
        if self.failure is not None:
            raise self._crashed()
        if self._refuses:
            raise EngineStoppedError("the engine is shutting down")

    def _crashed(self) -> EngineStoppedError:
        error = EngineStoppedError(f"the engine crashed: {type(self.failure).__name__}: {self.failure}")
        error.__cause__ = self.failure
        return error

    # What follows runs in the engine's thread, `_order` and `_hand_out` apart.

    def _order(self, order: Callable[[], object]) -> None:
        with self._ordered:
            self._orders.append(order)
            self._ordered.notify()

    def _run(self) -> None:
        try:
            while not self._stops:
                if not self._orders and not self.engine.has_unfinished:
                    for _ in self.engine.populate_cache():
                        if self._orders:
                            break
                    with self._ordered:
                        self._ordered.wait_for(lambda: self._orders)
                while self._orders:
                    self._orders.popleft()()
                if self.engine.has_unfinished:
                    self._deliver(self.engine.step())
        except BaseException as error:
            self.failure = error
            self._call(self._fail_readers)

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _stop(self) -> None:
        self._stops = True
        for request_id in self.engine.request_ids:
            self._abort(request_id)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if outputs and not self._call(partial(self._hand_out, outputs), rings=self._is_due(outputs)):
            for output in outputs:  # nobody is there to read
                self.engine.abort(output.request_id)

    def _is_due(self, outputs: list[RequestOutput]) -> bool:
        """Return whether outputs may not wait for those of the next step, which is going to be as short as the last."""
        now = time.monotonic()
        is_due = (
            now - self._rung_at >= STREAM_SECONDS
            or bool(self._orders or self.engine.scheduler.waiting)
            or any(each.finished or len(answer.token_ids) < 2 for each in outputs for answer in each.outputs)
        )
        self._rung_at = now if is_due else self._rung_at
        return is_due

    def _call(self, function: Callable[[], None], *, rings: bool = True) -> bool:
        """Let the event loop call a function, or do so with the next that rings; return whether there is one."""
        if self._loop is None or self._loop.is_closed():
            return self._loop is None
        self._news.append(function)
        if rings:
            self._bell.ring()
        return True

    def _hear(self) -> None:
        while self._news:
            self._news.popleft()()

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            reader = self._readers.get(output.request_id)
            if reader is not None:
                reader.put(output)

    def _fail_readers(self) -> None:
        for reader in self._readers.values():
            reader.fail(self._crashed())
