"""The tools that a request offers, and the form of an answer that has to be a call."""

from __future__ import annotations

import re
from typing import Any

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.server.fields import Fields, bad_request, wrong
from eightfold.server.forms import form_of
from eightfold.server.tool_parsers import BEGIN, Form, ToolCall, ToolParser, ToolUse
from eightfold.values import SWITCH, shown_as_json

__all__ = ["ToolCall", "ToolParser", "ToolUse", "read_tools"]

MAX_TOOLS = 128

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


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
        raise bad_request(f"tool_choice: got {shown_as_json(name)}, expected one of tools", param="tool_choice")
    return name


def _form(template: str) -> Form | None:
    if BEGIN in template:
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
