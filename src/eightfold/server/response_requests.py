"""A request for a response, read as one for a chat: its fields and items become those of a chat.

What both APIs have is read by the chat's readers. What they find wrong is named here as the request has it.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from eightfold.server.field_table import CHAT
from eightfold.server.fields import ApiError, Fields, bad_request, demand, wrong
from eightfold.server.generation import Asked, Encoded
from eightfold.server.requests import Said, read_chat
from eightfold.server.response_answers import ResponseAnswer
from eightfold.server.response_items import Placed, Transcript, new_id
from eightfold.server.tools import MAX_TOOLS
from eightfold.values import OBJECT, STRING, choice, shorten

if TYPE_CHECKING:
    from eightfold.messages import Message
    from eightfold.server.answers import AnswerWriter
    from eightfold.server.served import Served
    from eightfold.tokenizer import Tokenizer

_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = choice(
    _LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
_SUMMARY = choice("auto", "concise", "detailed")
_SHOWN = ("name", "description", "parameters", "strict")  # of a tool, to the model

# What the chat's readers call it, at the beginning of an error -> what it is called here.
_NAMES = {
    r"(tools\[\d+\])\.function\b": r"\1",
    r"tool_choice\.allowed_tools\b": "tool_choice",
    r"messages\b": "input",
}

T = TypeVar("T")


def read_response(
    fields: Fields, served: Served, items: Sequence[Placed], keep: Callable[[dict[str, Any]], None] | None
) -> Asked:
    """Return what a request for a response asks for.

    Args:
        fields: of the request.
        served: the model that answers it.
        items: of the input, behind those of earlier responses.
        keep: is given the complete response; None: nobody keeps it.

    Raises:
        ApiError: something in the request is wrong.
    """
    reader = _Reader(fields, served, items, keep)
    asked = reader.named(lambda: reader.asked(reader.transcript.messages))
    return replace(
        asked,
        encode=lambda tokenizer: reader.named(lambda: reader.encode(asked, tokenizer)),
        form_field=asked.form_field and reader.renamed(asked.form_field),
    )


class _Reader:
    """Reads one request.

    Attributes:
        transcript: instructions and items as messages.
    """

    def __init__(
        self,
        fields: Fields,
        served: Served,
        items: Sequence[Placed],
        keep: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._fields, self._served, self._keep = fields, served, keep
        instructions, top = fields.read("instructions"), fields.read("top_logprobs")
        self.transcript = Transcript(instructions, items)
        self._truncates = fields.read("truncation") == "auto"
        self._shows_logprobs = _reads_logprobs(fields) or top > 0
        self._reasoning, text = _reasoning(fields), fields.read("text")
        self._changed = {
            "tools": [_tool(f"tools[{at}]", tool) for at, tool in enumerate(fields.items("tools", MAX_TOOLS))],
            "logprobs": self._shows_logprobs,
            "stream_options": None,  # what this endpoint knows changes nothing here
            **_form(fields),
        }
        self._names = _NAMES | ({r"response_format(\.json_schema)?\b": "text.format"} if text.get("format") else {})
        self._says = _said(fields) | {
            "instructions": instructions,
            "model": served.names[0],
            "reasoning": self._reasoning,
            "store": keep is not None,
            "text": {**text, "format": text.get("format") or {"type": "text"}},
            "top_logprobs": top,
            "truncation": "auto" if self._truncates else "disabled",
        }

    def asked(self, messages: Sequence[Message]) -> Asked:
        """Return what a chat of these messages asks for."""
        fields = self._fields.translated(CHAT, {**self._changed, "messages": list(messages)})
        return read_chat(fields, self._served, self._writer)

    def _writer(self, said: Said) -> AnswerWriter:
        params = said.params
        response = self._says | {
            "max_output_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        return ResponseAnswer(
            response,
            self._served.texts,
            said,
            shows_logprobs=self._shows_logprobs,
            keep=self._keep,
        )

    def encode(self, asked: Asked, tokenizer: Tokenizer) -> Encoded:
        """Return the prompt; with "truncation": "auto" without as many of the oldest turns as do not fit."""
        encoded, context = asked.encode(tokenizer), self._served.max_model_len
        most = context - min(asked.params.max_tokens or context, context // 4)
        turns = self.transcript.turns()
        if not (self._truncates and turns) or len(encoded.prompts[0]) <= most:
            return encoded

        def encode_from(turn: int) -> Encoded:
            return self.asked(self.transcript.from_turn(turn)).encode(tokenizer)

        at = bisect_left(turns, True, key=lambda turn: len(encode_from(turn).prompts[0]) <= most)
        return encode_from(turns[min(at, len(turns) - 1)])

    def named(self, read: Callable[[], T]) -> T:
        """Return what reading something does, with errors that name what the request has."""
        try:
            return read()
        except ApiError as error:
            message = self.renamed(self.transcript.placed(error.message))
            param = error.param and self.renamed(error.param)
            if error.param == "messages":  # which come from several fields
                param = re.split(r"[\[:. ]", message, maxsplit=1)[0]
            raise ApiError(error.status, message, code=error.code, param=param, headers=error.headers) from None

    def renamed(self, text: str) -> str:
        """Return a text that begins with the name of a chat's field with the name that the request has for it."""
        for pattern, name in self._names.items():
            text = re.sub(rf"\A{pattern}", name, text)
        return text


def _reads_logprobs(fields: Fields) -> bool:
    given: list[Any] = fields.read("include")
    for at, name in enumerate(given):
        demand(f"include[{at}]", name, _INCLUDED)
    return _LOGPROBS in given


def _reasoning(fields: Fields) -> dict[str, Any]:
    given = fields.inside("reasoning")
    if given is None:
        return {"effort": None, "summary": None}
    summary = given.read("summary", _SUMMARY) or given.read("generate_summary", _SUMMARY)  # its older name
    return {"effort": given.read("effort"), "summary": summary}


def _said(fields: Fields) -> dict[str, Any]:
    """Return what a response says of its request, and the beginning of what it says of itself."""
    return {
        "id": new_id("response"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "max_tool_calls": fields.read("max_tool_calls"),
        "metadata": _metadata(fields),
        "output": [],
        "parallel_tool_calls": fields.read("parallel_tool_calls"),
        "previous_response_id": fields.any("previous_response_id"),
        "prompt_cache_key": fields.read("prompt_cache_key"),
        "safety_identifier": fields.read("safety_identifier"),
        "service_tier": "default",
        "tool_choice": fields.any("tool_choice") or "auto",
        "tools": [{"parameters": None, "strict": None, **tool} for tool in fields.items("tools", MAX_TOOLS)],
        "usage": None,
        "user": fields.read("user"),
    }


def _metadata(fields: Fields) -> dict[str, str]:
    given: dict[str, Any] = fields.read("metadata")
    for name, value in given.items():
        demand(f"metadata.{shorten(name)}", value, STRING)
    return given


def _form(fields: Fields) -> dict[str, Any]:
    """Return the form that `text` asks for, as a chat has it, if it asks for one."""
    text = fields.inside("text")
    form = None if text is None else text.read("format")
    if text is not None:
        text.read("verbosity")  # only a hint
    if form is None:
        return {}
    if fields.any("response_format") is not None:
        raise bad_request("text.format: got it beside response_format. Give one.", param="text.format")
    if form.get("type") != "json_schema":
        return {"response_format": form}
    inner = {name: value for name, value in form.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def _tool(where: str, given: Any) -> dict[str, Any]:
    kind = demand(where, given, OBJECT).get("type")
    if kind != "function":
        raise wrong(f"{where}.type", kind, "function: this server runs no tools of its own")
    return {"type": "function", "function": {name: given[name] for name in _SHOWN if given.get(name) is not None}}
