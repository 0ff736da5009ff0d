"""A chat's messages as OpenAI writes them, and as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

from eightfold.server.fields import Fields, wrong
from eightfold.server.problems import bad_request
from eightfold.tokenizer import Message

MAX_MESSAGES = 4096
_PARAM = "messages"


def read_messages(fields: Fields, template: str) -> list[Message]:
    """Return the messages of a request.

    Args:
        fields: of the request.
        template: the chat template's text.

    Raises:
        ApiError: 400: there are none, or one is not a message.
    """
    given = fields.items(_PARAM, MAX_MESSAGES)
    if not given:
        raise bad_request("messages: expected at least one", param=_PARAM)
    messages = [_message(f"messages[{at}]", message) for at, message in enumerate(given)]
    if "developer" not in template:  # the younger name of the same
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    return messages


def _message(where: str, given: Any) -> Message:
    if not isinstance(given, dict):
        raise wrong(where, given, "an object")
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise wrong(f"{where}.role", role, "system, user, assistant or tool")
    if given.get("function_call") is not None:
        raise bad_request(f"{where}.function_call is not supported. Use tool_calls.", param=_PARAM)
    calls = _calls(f"{where}.tool_calls", given.get("tool_calls"))
    content = given.get("content")
    if content is None and not calls and role != "assistant":
        raise wrong(f"{where}.content", None, "a text")
    message: Message = {"role": role, "content": _content(f"{where}.content", content)}
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = given.get(name)
        if value is not None:
            message[name] = _text(f"{where}.{name}", value)
    return message


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(where, value, "a text")
    return value


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, content, "a text or a list of parts")
    return "\n".join(_part(f"{where}[{at}]", part) for at, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise wrong(where, part, "an object")
    kind = part.get("type")
    if kind in ("text", "refusal"):
        return _text(f"{where}.{kind}", part.get(kind))
    if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
        raise bad_request(f"{where}: this model reads text only, not {kind}", param=_PARAM, code="unsupported_content")
    raise wrong(f"{where}.type", kind, "text")


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise wrong(where, calls, "a list")
    return [_call(f"{where}[{at}]", call) for at, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, call, "an object with a function that has a name and arguments")
    arguments = _arguments(f"{where}.function.arguments", function.get("arguments"))
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _arguments(where: str, arguments: Any) -> dict[str, Any]:
    """Return a call's arguments as an object, which templates render in their own way."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise bad_request(f"{where}: got text that is not JSON, expected a JSON object", param=_PARAM) from None
    if not isinstance(arguments, dict):
        raise wrong(where, arguments, "a JSON object")
    return arguments
