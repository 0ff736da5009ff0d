"""One HTTP request in the engine: a prompt or several, and what becomes of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from eightfold.engine.outputs import EngineStats, RequestOutput
from eightfold.server.metrics import Metrics
from eightfold.server.record import Record
from eightfold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eightfold.engine.sampling_params import SamplingParams


class EngineFacts(Protocol):
    """What the server reads of what runs inside."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""

    @property
    def max_model_len(self) -> int:
        """Positions of a sequence, prompt and answer together."""


class ServedEngine(Protocol):
    """What the server needs of an engine: AsyncLLM is one."""

    @property
    def engine(self) -> EngineFacts:
        """What runs inside."""

    @property
    def stats(self) -> EngineStats:
        """Counts as they are now."""

    @property
    def is_healthy(self) -> bool:
        """Whether new requests are answered."""

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a prompt, in one output or many; an EightfoldError says what of it cannot be done."""

    def abort(self, request_id: str) -> None:
        """End a request where it stands, if there is one."""

    async def shutdown(self, drain: float = 0.0) -> None:
        """End after so many seconds at most."""


class Aborted(Exception):
    """The request ended before its answers were complete."""


@dataclass(slots=True)
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Run:
    """A request's prompts in the engine, from their submission to their end.

    Attributes:
        usage: of the prompts that are finished.
    """

    def __init__(
        self,
        engine: ServedEngine,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        record: Record,
        metrics: Metrics,
        *,
        streams: bool,
    ) -> None:
        self.usage = Usage()
        self._engine, self._prompts, self._params, self._streams = engine, prompts, params, streams
        self._record, self._metrics = record, metrics
        stem = uuid.uuid4().hex
        self._unfinished = {at: f"{stem}-{at}" for at in range(len(prompts))}
        self._is_aborted = False

    def abort(self) -> None:
        """End it where it stands."""
        if not self._is_aborted:
            self._is_aborted = True
            self._metrics.aborted(len(self._unfinished) * self._params.n)
        for request_id in self._unfinished.values():
            self._engine.abort(request_id)

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield which prompt moved, and its output.

        Raises:
            EightfoldError: the engine refuses a prompt.
        EngineStoppedError: there is no engine any more.
            Aborted: `abort` was called, or the engine gave up.
        """
        source = self._one(0) if len(self._prompts) == 1 else self._several()
        async with aclosing(source) as outputs:
            async for at, output in outputs:
                if output.finished:
                    self._note_end(at, output)
                yield at, output
        if self._unfinished:
            raise Aborted

    async def _one(self, at: int) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        source = self._engine.generate(self._prompts[at], self._params, self._unfinished[at], streams=self._streams)
        async with aclosing(source) as outputs:
            async for output in outputs:
                if self._is_aborted or _is_aborted(output):
                    raise Aborted
                if self._record.first_token is None:
                    self._record.first_token = output.times.first_token or time.monotonic()
                yield at, output

    async def _several(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        ready: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()

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
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for feeder in feeders:
                feeder.cancel()

    def _note_end(self, at: int, output: RequestOutput) -> None:
        self._unfinished.pop(at)
        usage, record = self.usage, self._record
        usage.prompt += len(output.prompt_ids)
        usage.cached += output.cached_tokens
        usage.generated += sum(len(answer.token_ids) for answer in output.outputs)
        record.prompt_tokens, record.cached_tokens, record.generated_tokens = (
            usage.prompt,
            usage.cached,
            usage.generated,
        )
        record.finish_reasons += [answer.finish_reason or "abort" for answer in output.outputs]
        self._metrics.finished(output)


def _is_aborted(output: RequestOutput) -> bool:
    return output.finished and any(answer.finish_reason == "abort" for answer in output.outputs)
