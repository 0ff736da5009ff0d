"""Messages of a conversation, as OpenAI's API has them: read in one way, and put into the form of a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eightfold.dialects import CallForm, call_form, content_form, part, shows
from eightfold.errors import InputError
from eightfold.values import LIST, OBJECT, STRING, Kind, shown_as_json

Message = dict[str, Any]  # {"role": ..., "content": ...}

_SEQUENCE = LIST._replace(types=(list, tuple))
_MARK = "[[the-answer-goes-on-here]] "  # of an open message; the space tells whether a template trims
_JSON_OBJECT = OBJECT._replace(name="a JSON object")
_REASONING = ("reasoning_content", "reasoning")  # two names of the same
_ROLES = ("system", "developer", "user", "assistant", "tool")

# Parts of a content, by their type: where their text stands. The Responses API has names of its own.
_TEXTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


class MessageError(InputError):
    """A message cannot be used.

    Attributes:
        is_media: whether it has an image, a sound, a video or a file where only text is read.
    """

    def __init__(self, what: str, *, is_media: bool = False, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.is_media = is_media


def read_messages(given: Any, template: str | None, where: str = "messages") -> list[Message]:
    """Return the messages of a conversation, checked, in the form that a chat template wants.

    Of a message these are read: role, content, tool_calls, name, tool_call_id, reasoning_content or reasoning, and
    DeepSeek's prefix.

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
    _name_results(messages)
    if template is None:
        return messages
    for at, message in enumerate(messages):
        role = message["role"]
        if role not in _ROLES and not shows(template, role):  # else it would get lost
            raise _wrong(f"{where}[{at}].role", role, "one that the chat template shows")
    return _fitted(messages, template)


def is_continued(messages: Sequence[Message]) -> bool:
    """Return whether messages that were read say themselves, in DeepSeek's way, that an answer continues the last."""
    return messages[-1].get("prefix") is True


def as_text(message: Message) -> str:
    """Return what a message that was read says, and below it its calls, as objects with name and arguments."""
    calls = (call["function"] for call in message.get("tool_calls", ()))
    objects = ({**each, "arguments": _arguments("arguments", each["arguments"])} for each in calls)
    return "\n".join(filter(None, (words(message), *(json.dumps(each, ensure_ascii=False) for each in objects))))


def words(message: Message) -> str:
    """Return what a message that was read says, parts one below the other."""
    content = message["content"]
    return "\n".join(each["text"] for each in content) if isinstance(content, list) else content or ""


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
    for name in ("name", "tool_call_id", *_REASONING):
        if given.get(name) is not None:
            message[name] = _demand(f"{where}.{name}", given[name], STRING)
    if given.get("prefix") is True:
        message["prefix"] = True
    said = next((message[name] for name in _REASONING if name in message), None)
    return message if said is None else {**message, **dict.fromkeys(_REASONING, said)}


def _content(where: str, content: Any) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise _wrong(where, content, "a text or a list of parts")
    return [part(_part_text(f"{where}[{at}]", each)) for at, each in enumerate(content)]


def _part_text(where: str, given: Any) -> str:
    kind = _demand(where, given, OBJECT).get("type")
    if not isinstance(kind, str) or kind not in _TEXTS:
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
            raise MessageError(f"{where}: this model reads text only, not {kind}", is_media=True)
        raise _wrong(f"{where}.type", kind, "text")
    name = _TEXTS[kind]
    text = given.get(name)
    if not isinstance(text, str):
        raise _wrong(f"{where}.{name}", text, "a text")
    return text


def _calls(where: str, given: Any) -> list[dict[str, Any]]:
    calls: Sequence[Any] = [] if given is None else _demand(where, given, _SEQUENCE)
    return [_call(f"{where}[{at}]", call) for at, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    """Return a call with what OpenAI's API says of one, in its order: templates write whole calls out."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(where, call, "an object with a function that has a name and arguments")
    arguments = function.get("arguments")
    _arguments(f"{where}.function.arguments", arguments)
    # Where a template wants text, it gets the text that the model wrote.
    called = _demand(f"{where}.function.name", function["name"], STRING)
    function = {"name": called, "arguments": {} if arguments is None else arguments}
    name = call.get("id")
    known = {} if name is None else {"id": _demand(f"{where}.id", name, STRING)}
    return {**known, "type": "function", "function": function}


def _arguments(where: str, arguments: Any) -> dict[str, Any]:
    """Return a call's arguments, an object or its JSON text, as an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}", parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise MessageError(where, got="text that is not JSON", expected="a JSON object") from None
    checked: dict[str, Any] = _demand(where, {} if arguments is None else arguments, _JSON_OBJECT)
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # of a program: JSON itself has no such values
        raise MessageError(where, got="an object that JSON cannot hold", expected="a JSON object") from None
    return checked


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _name_results(messages: Sequence[Message]) -> None:
    """Say of every result which call it belongs to, and of which function; those without an id come in order."""
    names, waiting = dict[str, str](), list[str]()
    for at, message in enumerate(messages):
        for number, call in enumerate(calls := message.get("tool_calls", ())):
            call.setdefault("id", f"call_{at}_{number}")
            names[call["id"]] = call["function"]["name"]
        waiting = [call["id"] for call in calls] or waiting
        if message["role"] != "tool":
            continue
        if "tool_call_id" not in message and waiting:
            message["tool_call_id"] = waiting[0]
        name = message.get("tool_call_id")
        if name in waiting:
            waiting.remove(name)
        if name in names:
            message.setdefault("name", names[name])


def _fitted(messages: Sequence[Message], template: str) -> list[Message]:
    """Return messages in the form that a template wants."""
    uses_tools = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    form = call_form(template) if uses_tools else None
    if uses_tools and form is None:
        messages = _without_tools(messages, template)
    found = list[Message]()
    for message in messages:
        message = {**message, "role": _role(message["role"], template)}
        if form is not None and "tool_call_id" in message:
            message["tool_call_id"] = _fitting_id(message["tool_call_id"], form)
        if form is not None and "tool_calls" in message:
            found += _fitted_calls(message, template, form)
        else:
            found.append({**message, "content": _fitted_content(message, template)})
    return found


def _without_tools(messages: Sequence[Message], template: str) -> list[Message]:
    """Return messages for a template that knows no calls: these become text, and their results what the user says."""
    keeps_results, found = shows(template, "tool"), list[Message]()
    for message in messages:
        if "tool_calls" in message:
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            found.append({**rest, "content": as_text(message)})
        elif message["role"] != "tool" or keeps_results:
            found.append(message)
        elif found and "result" in found[-1]:
            found[-1]["content"] += "\n" + as_text(message)
        else:
            found.append({"role": "user", "content": as_text(message), "result": True})
    return [{name: value for name, value in message.items() if name != "result"} for message in found]


def _role(role: str, template: str) -> str:
    """Return a role; the developer, the younger name of the same, is the system where a template knows no other."""
    is_known = "'developer'" in template or '"developer"' in template
    return "system" if role == "developer" and not is_known else role


def _fitted_content(message: Message, template: str) -> Any:
    content, form = message["content"], content_form(template, message["role"])
    if isinstance(content, list) and form.parts:
        return content
    return words(message) if form.text else [part(words(message))]


def _fitted_calls(message: Message, template: str, form: CallForm) -> list[Message]:
    calls = [_fitted_call(call, form) for call in message["tool_calls"]]
    if not words(message):
        return [{**message, "content": form.blank, "tool_calls": calls}]
    content = _fitted_content(message, template)
    if not form.splits:
        return [{**message, "content": content, "tool_calls": calls}]
    before = {name: value for name, value in message.items() if name != "tool_calls"}
    after = {name: value for name, value in message.items() if name not in _REASONING}
    return [{**before, "content": content}, {**after, "content": form.blank, "tool_calls": calls}]


def _fitted_call(call: dict[str, Any], form: CallForm) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not form.as_text or not arguments:
        arguments = _arguments("arguments", arguments)
    if form.as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": _fitting_id(call["id"], form), "type": "function", "function": {**function, "arguments": arguments}}


def _fitting_id(name: str, form: CallForm) -> str:
    return name if form.takes(name) else _nine_of(name)


def _nine_of(name: str) -> str:
    """Return nine letters and digits that stand for an identifier, always the same ones."""
    import hashlib  # loads OpenSSL, which takes 3 ms that most programs need not spend

    return hashlib.blake2b(name.encode("utf-8", "surrogatepass")).hexdigest()[:9]


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
        if last.get("tool_calls"):  # they stand behind the words, where they would be cut off
            raise _wrong("messages[-1].tool_calls", last["tool_calls"], "none in a message that is to be continued")
        name = "content" if last.get("content") or not last.get("reasoning_content") else "reasoning_content"
        said: Any = last.get(name) or ""
        before = said[:-1] if isinstance(said, list) else None
        self._said: str = said if before is None else said[-1]["text"]
        marked = self._said + _MARK
        names = ("content",) if name == "content" else _REASONING
        content = marked if before is None else [*before, part(marked)]
        self.messages = [*given[:-1], {**last, **dict.fromkeys(names, content)}]

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
