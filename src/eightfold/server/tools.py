"""The tools that a request offers, and the form of an answer that has to be a call."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.server.fields import ApiError, Fields, bad_request, demand, wrong
from eightfold.server.forms import form_of
from eightfold.server.tool_parsers import FamilyName, ToolCall, ToolParser, ToolUse
from eightfold.server.tool_schemas import arguments_schema, beside_others
from eightfold.values import LIST, OBJECT, STRING, SWITCH, shown_as_json

__all__ = ["ToolCall", "ToolParser", "ToolUse", "answer_or_call", "read_tools"]

MAX_TOOLS = 128
MAX_PARAMETER_BYTES = 2**18  # of the tools of which one has to be called, descriptions included
MAX_CALLS = 8  # of an answer that has to be several: a model may not find an end

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EXPECTED = "none, auto, required, allowed_tools or an object with a function's name"

Functions = dict[str, dict[str, Any]]


class _Choice(NamedTuple):
    """What tool_choice says.

    Attributes:
        names: the functions that may be called.
        is_forced: whether one has to be.
        is_named: whether the client has said which.
    """

    names: frozenset[str]
    is_forced: bool = False
    is_named: bool = False


def read_tools(fields: Fields, family: FamilyName | None) -> ToolUse:
    """Return what a request says about tools.

    Args:
        fields: of the request.
        family: in whose form the model's calls are recognised; None: in none.

    Raises:
        ApiError: 400 for what is no tool, a choice of none that is offered, or parameters that cannot be a form.
    """
    parallel = fields.read("parallel_tool_calls", SWITCH)
    given = fields.any("tool_choice")
    tools = fields.items("tools", MAX_TOOLS)
    functions: Functions = {}
    for at, tool in enumerate(tools):
        name, function = _function(at, tool)
        if name in functions:  # a template would show both, and nobody could say which of them a call means
            raise wrong(f"tools[{at}].function.name", name, "a name that no tool before it has")
        functions[name] = function
    choice = _read_choice("auto" if given is None else given, functions)
    if not choice.names:
        return ToolUse()
    one_only = parallel is False
    if not choice.is_forced:
        return ToolUse(tools, choice.names, family, None, one_only)
    wanted = {name: function for name, function in functions.items() if name in choice.names}
    several = parallel is True and not choice.is_named
    return ToolUse(tools, choice.names, family, _forced(wanted, several=several), not several, choice.is_named)


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
    for key, kind in (("description", STRING), ("strict", SWITCH)):
        if function.get(key) is not None:
            demand(f"{where}.function.{key}", function[key], kind)
    return name, {**function, "where": f"{where}.function.parameters"}


def _read_choice(given: Any, functions: Functions) -> _Choice:
    """Return what tool_choice says, in the words of OpenAI or of Mistral ("any")."""
    if given == "none":
        return _Choice(frozenset())
    if given == "auto":
        return _Choice(frozenset(functions))
    if given in ("required", "any"):
        return _forced_choice(given, frozenset(functions))
    if not isinstance(given, dict):
        raise wrong("tool_choice", given, _EXPECTED)
    if given.get("type") == "allowed_tools":
        return _allowed(given, functions)
    return _Choice(frozenset((_named("tool_choice", given, functions),)), is_forced=True, is_named=True)


def _allowed(given: dict[str, Any], functions: Functions) -> _Choice:
    """Return the choice among some of the tools; in chats they stand in an object of their own, in responses not."""
    inner = Fields(given).read("allowed_tools", OBJECT, given)
    mode = inner.get("mode", "auto")
    allowed = Fields(inner).read("tools", LIST, [])
    where = "tool_choice.allowed_tools"
    if mode not in ("auto", "required"):
        raise bad_request(f"{where}.mode: got {shown_as_json(mode)}, expected auto or required", param="tool_choice")
    names = frozenset(_named(f"{where}.tools[{at}]", tool, functions) for at, tool in enumerate(allowed))
    return _forced_choice(mode, names) if mode == "required" else _Choice(names)


def _forced_choice(word: str, names: frozenset[str]) -> _Choice:
    if not names:
        raise bad_request(f"tool_choice: got {word}, expected tools to choose from", param="tool_choice")
    return _Choice(names, is_forced=True)


def _named(where: str, given: Any, functions: Functions) -> str:
    """Return the name in {"type": "function", "function": {"name"}}; responses have no inner object."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        expected = _EXPECTED if where == "tool_choice" else "an object with a function's name"
        raise bad_request(f"{where}: got {shown_as_json(given)}, expected {expected}", param="tool_choice")
    if name not in functions:
        raise bad_request(f"{where}: got {shown_as_json(name)}, expected one of tools", param="tool_choice")
    return name


def _forced(functions: Functions, *, several: bool) -> StructuredOutput:
    """Return the form of an answer that is a call, or a list of calls.

    What llguidance does not know in a schema (uniqueItems, a format) is left to the client, unless the tool is strict.
    """
    size = sum(len(json.dumps(function.get("parameters"))) for function in functions.values())
    if size > MAX_PARAMETER_BYTES:
        got, expected = f"{size} bytes of parameters", f"at most {MAX_PARAMETER_BYTES} where a call is forced"
        raise bad_request(f"tools: got {got}, expected {expected}. Send fewer.", param="tools")
    definitions = dict[str, Any]()
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": arguments_schema(function.get("parameters"), function["where"], definitions),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, function in functions.items()
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if several:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MAX_CALLS}
    if definitions:
        schema["$defs"] = definitions
    if not any(function.get("strict") is True for function in functions.values()):
        schema["x-guidance"] = {"lenient": True}
    try:
        return form_of({"json_schema": schema})
    except ApiError as error:
        raise bad_request(error.message, param="tools") from None


def answer_or_call(form: StructuredOutput, tools: ToolUse) -> StructuredOutput:
    """Return the form of an answer that has a form of its own, or calls one of the tools: the model chooses.

    Such a call is bare JSON, with arguments that no schema holds, as when there is no form at all.
    """
    answer = json.loads(form.json_schema or "null")
    if tools.family is None or not isinstance(answer, dict):
        return form
    definitions = dict[str, Any]()
    call = {
        "type": "object",
        "properties": {"name": {"enum": sorted(tools.names)}, "arguments": {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    try:
        schema = {"anyOf": [beside_others(answer, "response_format", definitions), call]}
    except ApiError as error:
        raise bad_request(error.message, param="response_format") from None
    return form_of({"json_schema": schema | ({"$defs": definitions} if definitions else {})})
