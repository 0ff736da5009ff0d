"""Messages of a conversation, as OpenAI's API has them: read from JSON in one way, wherever they come from.

What is read here a chat template can render: contents are texts, the arguments of calls are objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eightfold.errors import InputError
from eightfold.values import LIST, OBJECT, STRING, Kind, shown_as_json

Message = dict[str, Any]  # {"role": ..., "content": ...}

_SEQUENCE = LIST._replace(types=(list, tuple))
_MARK = "[[the-answer-goes-on-here]] "  # of an open message; the space tells whether a template trims
_PASSED_ON = ("name", "tool_call_id", "reasoning_content")


class MessageError(InputError):
    """A message cannot be used.

    Attributes:
        is_media: whether it has an image, a sound, a video or a file where only text is read.
    """

    def __init__(self, what: str, *, is_media: bool = False, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.is_media = is_media


def read_messages(given: Any, template: str | None, where: str = "messages") -> list[Message]:
    """Return the messages of a conversation, checked, in the form that a chat template renders.

    Args:
        given: a list of objects, as JSON has them. What this returned can be given again.
        template: the source of the chat template that will render them; None where it is not known yet.
        where: what the list is called in errors.

    Raises:
        MessageError: one cannot be used. The place is named, such as `messages[0].content`.
    """
    if not _demand(where, given, _SEQUENCE):
        raise MessageError(where, expected="at least one")
    messages = [_message(f"{where}[{at}]", message) for at, message in enumerate(given)]
    if template is not None and "developer" not in template:  # the younger name of the same
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    return messages


def _message(where: str, given: Any) -> Message:
    role = _demand(where, given, OBJECT).get("role")
    if not isinstance(role, str) or not role:
        raise _wrong(f"{where}.role", role, "system, user, assistant or tool")
    if given.get("function_call") is not None:
        raise MessageError(f"{where}.function_call is not supported", action="Use tool_calls.")
    calls = _calls(f"{where}.tool_calls", given.get("tool_calls"))
    content = given.get("content")
    if content is None and not calls and role != "assistant":
        raise _wrong(f"{where}.content", None, "a text")
    message: Message = {"role": role, "content": _content(f"{where}.content", content)}
    if calls:
        message["tool_calls"] = calls
    for name in _PASSED_ON:
        if given.get(name) is not None:
            message[name] = _demand(f"{where}.{name}", given[name], STRING)
    if isinstance(reasoning := given.get("reasoning"), str):  # vLLM's name of it
        message.setdefault("reasoning_content", reasoning)
    return message


def _content(where: str, content: Any) -> str:
    """Return a content as text: None as none, and parts of text one below the other."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise _wrong(where, content, "a text or a list of parts")
    return "\n".join(_part_text(f"{where}[{at}]", part) for at, part in enumerate(content))


def _part_text(where: str, part: Any) -> str:
    kind = _demand(where, part, OBJECT).get("type")
    if kind not in ("text", "refusal"):
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
            raise MessageError(f"{where}: this model reads text only, not {kind}", is_media=True)
        raise _wrong(f"{where}.type", kind, "text")
    text = part.get(kind)
    if not isinstance(text, str):
        raise _wrong(f"{where}.{kind}", text, "a text")
    return text


def _calls(where: str, given: Any) -> list[dict[str, Any]]:
    calls: Sequence[Any] = [] if given is None else _demand(where, given, _SEQUENCE)
    return [_call(f"{where}[{at}]", call) for at, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(where, call, "an object with a function that has a name and arguments")
    arguments = _arguments(f"{where}.function.arguments", function.get("arguments"))
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _arguments(where: str, arguments: Any) -> dict[str, Any]:
    """Return a call's arguments as an object, which templates render in their own way."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise MessageError(where, got="text that is not JSON", expected="a JSON object") from None
    checked: dict[str, Any] = _demand(where, arguments, OBJECT._replace(name="a JSON object"))
    return checked


def _demand(where: str, value: Any, kind: Kind) -> Any:
    misfit = kind.misfit(value)
    if misfit is not None:
        raise _wrong(where, *misfit)
    return value


def _wrong(where: str, value: Any, expected: str) -> MessageError:
    return MessageError(where, got=shown_as_json(value), expected=expected)


class Opening:
    """A last message that is left open, for an answer to continue it.

    Templates know only whole messages. So a mark is put behind what the last one says, and the text is cut there.

    Args:
        given: the conversation; its last message is the assistant's.

    Attributes:
        messages: the conversation with the mark, to be rendered.

    Raises:
        MessageError: the last message is not the assistant's.
    """

    def __init__(self, given: Sequence[Message]) -> None:
        last = given[-1] if given else {}
        if last.get("role") != "assistant":
            raise _wrong("messages[-1].role", last.get("role"), "assistant, whose message is to be continued")
        name = "content" if last.get("content") or not last.get("reasoning_content") else "reasoning_content"
        self._said = last.get(name) or ""
        self.messages = [*given[:-1], {**last, name: self._said + _MARK}]

    def cut(self, rendered: str) -> str:
        """Return a rendered conversation up to the end of what its last message says.

        Raises:
            MessageError: the template leaves out that message, or part of it.
        """
        text, mark, after = rendered.rpartition(_MARK.strip())
        if not mark or "".join(self._said.split()) not in "".join(text.split()):
            raise MessageError(
                "messages[-1]",
                got="a message that the chat template does not render as it is",
                expected="one that can be continued",
            )
        return text if after.startswith(" ") else text.rstrip()
