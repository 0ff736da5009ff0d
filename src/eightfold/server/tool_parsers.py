"""The calls in an answer.

Calls are recognised in the two forms that chat templates of this field teach:

    tagged    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, between pieces of text; Qwen and Hermes
    json      {"name": ..., "parameters": {...}}, and nothing else in the answer; Llama 3

What only looks like a call, or calls what was not offered, stays text.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from eightfold.engine.sampling_params import StructuredOutput

Form = Literal["tagged", "json"]

BEGIN, END = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools."""

    shown: list[Any] | None = None  # what the template is given; None: nothing
    names: frozenset[str] = frozenset()  # functions whose calls are recognised
    form: Form | None = None  # in which calls are recognised; None: not at all
    forced: StructuredOutput | None = None  # the form that the answer must have, which is a call
    one_only: bool = False  # only the first call of an answer counts


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes; arguments are JSON text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolParser:
    """Splits one answer into text and calls, as it comes."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._form = use.form
        self._held = ""
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more of the answer; return the text and the calls that are certain now."""
        if self._form is None:
            return text, []
        self._held += text
        return self._tagged() if self._form == "tagged" else self._json()

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the rest of the text and of the calls: the answer is complete."""
        held, self._held = self._held, ""
        if self._form == "tagged" and BEGIN in held:
            before, _, inner = held.partition(BEGIN)
            calls = self._accept(inner)
            return (before.rstrip(), calls) if calls else (held, [])
        calls = self._accept(held) if self._form == "json" else []
        return ("", calls) if calls else (held, [])

    def _json(self) -> tuple[str, list[ToolCall]]:
        begin = self._held.lstrip()
        if not begin or begin[0] in "{[" or _PYTHON_TAG.startswith(begin[: len(_PYTHON_TAG)]):
            return "", []  # it may become a call
        text, self._held, self._form = self._held, "", None
        return text, []

    def _tagged(self) -> tuple[str, list[ToolCall]]:
        text, found = "", list[ToolCall]()
        while END in self._held and BEGIN in self._held:
            whole, end, after = self._held.partition(END)
            before, _, inner = whole.partition(BEGIN)
            calls = self._accept(inner)
            text += before.rstrip() if calls else whole + end
            found += calls
            self._held = after
        if BEGIN not in self._held:
            cut = _certain(self._held)
            text, self._held = text + self._held[:cut], self._held[cut:]
        return text, found

    def _accept(self, text: str) -> list[ToolCall]:
        """Return the calls that a text is, if it is nothing else."""
        found = _objects(text.strip().removeprefix(_PYTHON_TAG))
        calls = [_call(each) for each in found]
        if any(call is None or call.name not in self._use.names for call in calls):
            return []
        real = [call for call in calls if call is not None]
        if self._use.one_only:
            real = real[: max(1 - self.calls, 0)]
        self.calls += len(real)
        return real


def _certain(text: str) -> int:
    """Return how much of a text is neither white space at its end nor the beginning of a tag."""
    for size in range(min(len(BEGIN) - 1, len(text)), 0, -1):
        if BEGIN.startswith(text[-size:]):
            text = text[:-size]
            break
    return len(text.rstrip())


def _objects(text: str) -> list[Any]:
    """Return the JSON values that a text is, semicolons or white space between them; none if it is anything else."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    found, at = list[Any](), 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            while at < len(text) and text[at] in "; \t\r\n":
                at += 1
    except (ValueError, RecursionError):
        return []
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", value["name"], json.dumps(arguments, ensure_ascii=False))
