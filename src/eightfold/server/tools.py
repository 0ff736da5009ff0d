"""The forms that answers must have, the tools that a request offers, and the calls in an answer.

Calls are recognised in the two forms that chat templates of this field teach:

    tagged    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, between pieces of text; Qwen and Hermes
    json      {"name": ..., "parameters": {...}}, and nothing else in the answer; Llama 3

What only looks like a call, or calls what was not offered, stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from eightfold.engine.sampling_params import StructuredOutput, schema_text
from eightfold.errors import EightfoldError
from eightfold.server.fields import OBJECT, Fields, bad_request, refused, shown, wrong
from eightfold.values import SWITCH

Form = Literal["tagged", "json"]

MAX_SCHEMA_BYTES = 64 * 2**10  # of a JSON schema, regex or grammar, as text
MAX_TOOLS = 128

_BEGIN, _END = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


_GUIDED = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choices"}


def structured_output(fields: Fields) -> StructuredOutput | None:
    """Return the form that answers must have, from response_format, guided_* or structured_outputs."""
    asked = {ours: fields.any(f"guided_{theirs}") for theirs, ours in _GUIDED.items()}
    forms = [{name: value} for name, value in asked.items() if value is not None]
    forms += [form for form in (_response_format(fields), _structured_outputs(fields)) if form]
    if len(forms) > 1 or any(len(form) > 1 for form in forms):
        raise bad_request("structured output: got more than one form, expected one of response_format and guided_*")
    return form_of(forms[0]) if forms else None


def form_of(form: dict[str, Any]) -> StructuredOutput:
    """Return one form; a schema may be an object or its text."""
    values = {name: schema_text(value) if name == "json_schema" else value for name, value in form.items()}
    if len(json.dumps(values)) > MAX_SCHEMA_BYTES:
        raise bad_request(f"structured output: got a form of more than {MAX_SCHEMA_BYTES} bytes. Send a smaller one.")
    try:
        return StructuredOutput(**values)
    except EightfoldError as error:
        raise refused(error) from None


def _response_format(fields: Fields) -> dict[str, Any] | None:
    given = fields.read("response_format", OBJECT, {"type": "text"})
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise wrong("response_format", kind, "type text, json_object or json_schema")
    inner = given.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise bad_request("response_format: expected json_schema with an object as schema", param="response_format")
    return {"json_schema": inner["schema"]}


def _structured_outputs(fields: Fields) -> dict[str, Any] | None:
    given = fields.read("structured_outputs", OBJECT)
    if given is None:
        return None
    form = {ours: given[theirs] for theirs, ours in _GUIDED.items() if given.get(theirs) is not None}
    if given.get("json_object"):
        form["json_object"] = True
    if not form:
        raise wrong("structured_outputs", given, "json, regex, choice, grammar or json_object")
    return form


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools."""

    shown: list[Any] | None = None  # what the template is given; None: nothing
    names: frozenset[str] = frozenset()  # functions whose calls are recognised
    form: Form | None = None  # in which calls are recognised; None: not at all
    forced: StructuredOutput | None = None  # the form that the answer must have, which is a call
    one_only: bool = False  # only the first call of an answer counts


def read_tools(fields: Fields, template: str) -> ToolUse:
    """Return what a request says about tools, to a model with this chat template."""
    one_only = not fields.read("parallel_tool_calls", SWITCH, True)
    choice = fields.any("tool_choice")
    tools = fields.items("tools", MAX_TOOLS)
    functions = dict(_function(at, tool) for at, tool in enumerate(tools))
    if choice in (None, "auto") and functions:
        return ToolUse(tools, frozenset(functions), _form(template), None, one_only)
    if choice in (None, "auto", "none"):
        return ToolUse()
    wanted = functions if choice == "required" else {name: functions[name] for name in [_named(choice, functions)]}
    if not wanted:
        raise bad_request("tool_choice: got required, expected tools to choose from", param="tool_choice")
    return ToolUse(tools, frozenset(wanted), "json", _forced(wanted), one_only=True)


def _function(at: int, tool: Any) -> tuple[str, dict[str, Any]]:
    where = f"tools[{at}]"
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise wrong(where, tool, 'an object with "type": "function" and a function')
    function: dict[str, Any] = tool["function"]
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(f"{where}.function.name", name, "1 to 64 letters, digits, dots, dashes and underscores")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{where}.function.parameters", parameters, "a JSON schema")
    return name, function


def _named(choice: Any, functions: dict[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong("tool_choice", choice, "none, auto, required or an object with a function's name")
    if name not in functions:
        raise bad_request(f"tool_choice: got {shown(name)}, expected one of tools", param="tool_choice")
    return name


def _form(template: str) -> Form | None:
    if _BEGIN in template:
        return "tagged"
    return "json" if "tools" in template and '"parameters"' in template else None


def _forced(functions: dict[str, dict[str, Any]]) -> StructuredOutput:
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": function.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, function in functions.items()
    ]
    return form_of({"json_schema": calls[0] if len(calls) == 1 else {"anyOf": calls}})


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

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[ToolCall]]:
        """Take more of the answer; return the text and the calls that are certain now: at the last, all."""
        if self._form is None:
            return text, []
        self._held += text
        text, calls = self._tagged() if self._form == "tagged" else self._json()
        if is_last:
            rest, last = self._rest()
            text, calls = text + rest, calls + last
        return text, calls

    def _rest(self) -> tuple[str, list[ToolCall]]:
        held, self._held = self._held, ""
        if self._form == "tagged" and _BEGIN in held:
            before, _, inner = held.partition(_BEGIN)
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
        while _END in self._held and _BEGIN in self._held:
            whole, end, after = self._held.partition(_END)
            before, _, inner = whole.partition(_BEGIN)
            calls = self._accept(inner)
            text += before.rstrip() if calls else whole + end
            found += calls
            self._held = after
        if _BEGIN not in self._held:
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
    for size in range(min(len(_BEGIN) - 1, len(text)), 0, -1):
        if _BEGIN.startswith(text[-size:]):
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
