"""An engine that answers what it is told to, when it is told to; of the shape that the server needs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from eightfold.engine.outputs import CompletionOutput, EngineStats, Produced, RequestOutput, Times
from eightfold.engine.sampler import Sampled
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.tokenizer import Tokenizer


@dataclass
class FakeEngine:
    """Answers every prompt with the same text, a token a step.

    Attributes:
        tokenizer: of the model that it plays.
        answer: the text.
        seconds: between two tokens.
        stuck: answers nothing as long as it is set.
        fails_after: raises an error of its own behind so many tokens.
        refusal: raises it instead of beginning.
        last: prompt and parameters of the youngest request.
        salts: of the prefix cache, one for each prompt.
        open: requests that go on.
        ended: how requests ended: "finished", "aborted" (by `abort`) or "closed" (by their reader).
    """

    tokenizer: Tokenizer
    answer: str = "Hello!"
    seconds: float = 0.0
    max_model_len: int = 256
    stuck: bool = False
    fails_after: int | None = None
    refusal: Exception | None = None
    is_healthy: bool = True
    last: tuple[list[int], SamplingParams] | None = None
    salts: list[str] = field(default_factory=list)
    open: dict[str, asyncio.Event] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    config: EngineConfig = field(default_factory=EngineConfig)

    @property
    def engine(self) -> FakeEngine:
        return self

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.open), blocks_total=10, blocks_used=len(self.open), preemptions=self.preemptions
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        streams: bool = True,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        self.last = (list(prompt_ids), params)
        self.salts.append(cache_salt)
        if self.refusal is not None:
            raise self.refusal
        assert request_id is not None and request_id not in self.open
        return self._answer(prompt_ids, params, request_id, streams)

    async def _answer(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, streams: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        aborted = self.open[request_id] = asyncio.Event()
        times = Times(time.monotonic(), time.monotonic())
        answers = [_Answer(index, params) for index in range(params.n)]
        ids = self.tokenizer.encode(self.answer, special_tokens=False)[: params.max_tokens]
        how = "closed"
        try:
            for at, token in enumerate(ids):
                if self.fails_after == at:
                    raise RuntimeError("a fault of the engine, with the secret prompt")
                await self._wait(aborted)
                times.first_token = times.first_token or time.monotonic()
                done = at + 1 == len(ids)
                if done:
                    times.finished, how = time.monotonic(), "finished"
                reason: Any = "abort" if aborted.is_set() else None
                if done and not reason:
                    reason = "length" if len(ids) == params.max_tokens else "stop"
                finished = reason is not None
                for each in answers:
                    each.add(token, self.tokenizer.decode([token], keep_special=params.keeps_special))
                if not (streams or finished):
                    continue
                outputs = [each.output(reason) for each in answers]
                yield RequestOutput(request_id, tuple(prompt_ids), outputs, finished, times, cached_tokens=3)
                if finished:
                    return
        finally:
            self.ended["aborted" if aborted.is_set() else how] += 1
            del self.open[request_id]

    async def _wait(self, aborted: asyncio.Event) -> None:
        await asyncio.sleep(self.seconds)
        while self.stuck and not aborted.is_set():
            await asyncio.sleep(0.002)

    def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.open[request_id].set()

    async def shutdown(self, drain: float = 0.0) -> None:
        self.is_healthy = False


class _Answer:
    def __init__(self, index: int, params: SamplingParams) -> None:
        self.index, self.shown = index, (0, 0)
        self.produced = Produced(logprobs=None if params.logprobs is None else [])

    def add(self, token: int, text: str) -> None:
        produced = self.produced
        produced.token_ids.append(token)
        produced.pieces.append(text)
        if produced.logprobs is not None:
            produced.logprobs.append(Sampled(token, -0.5, ((token, -0.5), (token + 1, float("-inf")))))

    def output(self, reason: Any) -> CompletionOutput:
        produced = self.produced
        found = CompletionOutput(self.index, produced, self.shown, reason)
        self.shown = (len(produced.token_ids), len(produced.pieces))
        return found


Make = Callable[..., FakeEngine]
