"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import EightfoldError
from eightfold.server.answers import ChatAnswer
from eightfold.server.fields import Fields
from eightfold.server.messages import read_messages
from eightfold.server.problems import bad_request, refused
from eightfold.server.record import Record
from eightfold.server.respond import answer_stream, answer_whole
from eightfold.server.sampling import read_max_tokens, read_stream, sampling_params, structured_output
from eightfold.server.service import Service
from eightfold.server.settings import MAX_TOP_LOGPROBS
from eightfold.server.tools import ToolUse, read_tools
from eightfold.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Conversation:
    """What the chat template is given."""

    messages: list[Message]
    tools: list[Any] | None
    opens_answer: bool
    variables: dict[str, Any]

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            ApiError: 400: the template refuses it.
        """
        try:
            return tokenizer.encode_chat(
                self.messages, add_generation_prompt=self.opens_answer, tools=self.tools, variables=self.variables
            )
        except EightfoldError as error:
            raise refused(error, param="messages") from None


def read_conversation(fields: Fields, template: str | None, tools: list[Any] | None) -> Conversation:
    """Return what the chat template is given.

    Raises:
        ApiError: 400.
    """
    if template is None:
        raise bad_request(
            "messages: this model has no chat template. Use /v1/completions, or start the server with --chat-template.",
            param="messages",
        )
    return Conversation(
        read_messages(fields, template),
        tools,
        fields.flag("add_generation_prompt", True),
        fields.object("chat_template_kwargs") or {},
    )


@dataclass(frozen=True)
class _Asked:
    """What a request asks for."""

    conversation: Conversation
    params: SamplingParams
    tools: ToolUse
    streams: bool
    shows_usage: bool


class ChatCompletions:
    """Answers chats."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request, service = Request(scope, receive), self._service
        record: Record = request.state.record
        asked = await self._read(request, record)
        with service.admitted(asked.params.n):
            prompt = await service.in_thread(record, partial(asked.conversation.encode, service.tokenizer))
            service.require_fit([prompt])
            answer = ChatAnswer(
                service.settings.model_names[0],
                service.texts,
                asked.tools,
                streams=asked.streams,
                shows_usage=asked.shows_usage,
            )
            with service.run([prompt], asked.params, record, streams=asked.streams) as run:
                if asked.streams:
                    await answer_stream(run, answer, record, receive, send, shows_usage=asked.shows_usage)
                else:
                    await answer_whole(run, answer, record, receive, send)

    async def _read(self, request: Request, record: Record) -> _Asked:
        fields = await self._service.read(request)
        template = self._service.template
        params, tools = _params(fields, template or "")
        conversation = read_conversation(fields, template, tools.shown)
        streams, shows_usage = read_stream(fields)
        record.ignored = fields.ignored
        return _Asked(conversation, params, tools, streams, shows_usage)


def _params(fields: Fields, template: str) -> tuple[SamplingParams, ToolUse]:
    tools, form = read_tools(fields, template), structured_output(fields)
    if tools.forced is not None and form is not None:
        raise bad_request("tool_choice: got one that asks for a call beside response_format", param="tool_choice")
    params = sampling_params(
        fields,
        max_tokens=read_max_tokens(fields, None),
        logprobs=_logprobs(fields),
        structured=form or tools.forced,
    )
    return params, tools


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise bad_request('top_logprobs: expected "logprobs": true beside it', param="top_logprobs")
    return (top or 0) if wanted else None
