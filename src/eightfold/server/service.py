"""What the endpoints share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

from eightfold.engine.sampling_params import SamplingParams
from eightfold.server.admission import Admission
from eightfold.server.body import read_json
from eightfold.server.fields import Fields, shown
from eightfold.server.generation import Run, ServedEngine
from eightfold.server.logprobs import TokenTexts
from eightfold.server.metrics import Metrics
from eightfold.server.problems import ApiError, bad_request, draining
from eightfold.server.record import Record
from eightfold.server.settings import ServerSettings
from eightfold.server.text import TextWorker

T = TypeVar("T")


class Service:
    """An engine and everything around it.

    Attributes:
        tokenizer: of the model.
        max_model_len: positions of a sequence, prompt and answer together.
        created: when it began, in seconds since 1970.
        template: the chat template's text; None: there is none.
    """

    def __init__(self, engine: ServedEngine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.engine.tokenizer
        self.max_model_len = engine.engine.max_model_len
        self.template = self.tokenizer.template_source() if self.tokenizer.has_chat_template else None
        self.admission = Admission(settings)
        self.metrics = Metrics(settings.model_names[0], lambda: engine.stats)
        self.texts = TokenTexts(self.tokenizer)
        self.created = int(time.time())
        self._worker = TextWorker()
        self._runs: set[Run] = set()

    async def read(self, request: Request) -> Fields:
        """Return the fields of a request for the model.

        Raises:
            ApiError: 4xx, or 503 while the server is stopping.
        """
        if self.admission.is_draining:
            raise draining()
        record: Record = request.state.record
        fields = Fields(await read_json(request, lambda size: self._hold(record, size)))
        self._require_model(fields.text("model"))
        fields.refuse_unsupported()
        return fields

    def _hold(self, record: Record, size: int) -> None:
        self.admission.hold(size)
        record.held_bytes += size

    def _require_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.model_names:
            raise self.unknown_model(name)

    def unknown_model(self, name: str) -> ApiError:
        """Return the 404 for another model's name."""
        message = f"model: got {shown(name)}, expected {shown(self.settings.model_names[0])}"
        return ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, record: Record, work: Callable[[], T]) -> T:
        """Return what work on a request's texts returns; its body is let go afterwards."""
        try:
            return await self._worker.run(record.held_bytes, work)
        finally:
            self.let_go(record)

    def let_go(self, record: Record) -> None:
        """Take note that a request's body is no longer held."""
        self.admission.let_go(record.held_bytes)
        record.held_bytes = 0

    @contextmanager
    def admitted(self, sequences: int) -> Iterator[None]:
        """Let a request in as long as the context lasts.

        Raises:
            ApiError: 400, 429 or 503.
        """
        entered = self.admission.enter(sequences)
        try:
            yield
        finally:
            self.admission.leave(sequences, entered)

    def require_fit(self, prompts: Sequence[Sequence[int]]) -> None:
        """Check the lengths of prompts.

        Raises:
            ApiError: 400: one is empty or does not leave room for an answer.
        """
        most = self.max_model_len - 1
        for prompt in prompts:
            if not prompt:
                raise bad_request("prompt: got no tokens, expected at least one", param="prompt")
            if len(prompt) > most:
                raise bad_request(
                    f"prompt: got {len(prompt)} tokens, expected at most {most}. Shorten it.",
                    code="context_length_exceeded",
                )

    @contextmanager
    def run(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, record: Record, *, streams: bool
    ) -> Iterator[Run]:
        """Make a run that `abort_all` knows as long as the context lasts."""
        run = Run(self.engine, prompts, params, record, self.metrics, streams=streams)
        self._runs.add(run)
        try:
            yield run
        finally:
            self._runs.discard(run)

    def abort_all(self) -> None:
        """End everything that runs."""
        for run in tuple(self._runs):
            run.abort()

    def close(self) -> None:
        """Let the threads end."""
        self._worker.close()
