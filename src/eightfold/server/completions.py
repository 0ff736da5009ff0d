"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import EightfoldError
from eightfold.server.answers import CompletionAnswer
from eightfold.server.fields import Fields, shown
from eightfold.server.problems import bad_request, refused
from eightfold.server.record import Record
from eightfold.server.respond import answer_stream, answer_whole
from eightfold.server.sampling import read_max_tokens, read_stream, sampling_params, structured_output
from eightfold.server.service import Service
from eightfold.server.settings import MAX_TOP_LOGPROBS
from eightfold.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | list[int]


def read_prompts(fields: Fields) -> list[Prompt]:
    """Return the prompts of a request: a text, token ids, or a list of either.

    Raises:
        ApiError: 400.
    """
    given = fields.any("prompt")
    several = isinstance(given, list) and bool(given) and not all(_is_id(item) for item in given)
    prompts: list[Any] = given if several else [given]
    for at, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt)))):
            where = f"prompt[{at}]" if several else "prompt"
            got = "an empty list" if prompt == [] else shown(prompt)
            raise bad_request(f"{where}: got {got}, expected a text or a list of token ids", param="prompt")
    if len({type(prompt) for prompt in prompts}) > 1:
        raise bad_request("prompt: got texts and token ids, expected one kind", param="prompt")
    return prompts


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


@dataclass(frozen=True)
class Texts:
    """Prompts as they came.

    Attributes:
        prompts: of the request.
        special: whether texts get the tokens that the model puts around one.
        echo: whether their texts are wanted again.
    """

    prompts: Sequence[Prompt]
    special: bool
    echo: bool

    def encode(self, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str] | None]:
        """Return token ids, and texts where they are wanted."""
        ids = [self._ids(tokenizer, prompt) for prompt in self.prompts]
        return ids, [self._text(tokenizer, prompt) for prompt in self.prompts] if self.echo else None

    def _ids(self, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
        return tokenizer.encode(prompt, special_tokens=self.special) if isinstance(prompt, str) else prompt

    def _text(self, tokenizer: Tokenizer, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        try:
            return tokenizer.decode(prompt, keep_special=True)
        except (OverflowError, TypeError):  # ids that are none; the engine refuses them by name
            return ""


@dataclass(frozen=True)
class _Asked:
    """What a request asks for; `max_tokens` may be 0, which `params` cannot say."""

    texts: Texts
    params: SamplingParams
    logprobs: int | None
    max_tokens: int
    streams: bool
    shows_usage: bool


class Completions:
    """Continues texts."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request, service = Request(scope, receive), self._service
        record: Record = request.state.record
        asked = await self._read(request, record)
        params, texts = asked.params, asked.texts
        with service.admitted(params.n * len(texts.prompts)):
            prompts, echo = await service.in_thread(record, lambda: _encode(texts, service.tokenizer))
            service.require_fit(prompts)
            answer = CompletionAnswer(
                service.settings.model_names[0],
                service.texts,
                n=params.n,
                logprobs=asked.logprobs,
                echo=echo,
                max_tokens=asked.max_tokens,
                shows_usage=asked.shows_usage,
            )
            with service.run(prompts, params, record, streams=asked.streams) as run:
                if asked.streams:
                    await answer_stream(run, answer, record, receive, send, shows_usage=asked.shows_usage)
                else:
                    await answer_whole(run, answer, record, receive, send)

    async def _read(self, request: Request, record: Record) -> _Asked:
        fields = await self._service.read(request)
        logprobs, max_tokens = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS), _max_tokens(fields)
        texts = Texts(read_prompts(fields), fields.flag("add_special_tokens", True), fields.flag("echo"))
        if max_tokens == 0 and not texts.echo:
            raise bad_request("max_tokens: got 0, expected at least 1, or echo", param="max_tokens")
        given: dict[str, Any] = {"prompt_logprobs": logprobs} if texts.echo and logprobs is not None else {}
        params = sampling_params(
            fields, max_tokens=max_tokens or 1, logprobs=logprobs, structured=structured_output(fields), **given
        )
        streams, shows_usage = read_stream(fields)
        record.ignored = fields.ignored
        return _Asked(texts, params, logprobs, max_tokens, streams, shows_usage)


def _encode(texts: Texts, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str] | None]:
    try:
        return texts.encode(tokenizer)
    except EightfoldError as error:
        raise refused(error, param="prompt") from None


def _max_tokens(fields: Fields) -> int:
    found = read_max_tokens(fields, DEFAULT_MAX_TOKENS, least=0)
    return DEFAULT_MAX_TOKENS if found is None else found
