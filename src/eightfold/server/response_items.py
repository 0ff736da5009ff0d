"""Items of the Responses API: read from a request, and as the messages of a chat that they stand for.

What an item's text may be is for the one reader of messages to say. So `Transcript` remembers which item each part
of a message comes from, and names it where that reader finds something wrong.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, NamedTuple

from eightfold.messages import Message
from eightfold.server.fields import ApiError, bad_request, demand, wrong
from eightfold.values import LIST, OBJECT, STRING, WORDS, choice, shown_as_json

Item = dict[str, Any]

MAX_ITEMS = 4096

_SYSTEM = ("system", "developer")
_ROLES = ("user", "system", "developer", "assistant")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # and their names in chats
_STATUS = choice("in_progress", "completed", "incomplete")
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_KINDS = (*_PREFIXES, "item_reference")


class Placed(NamedTuple):
    """An item, and where it stands in a request."""

    where: str
    item: Item


def new_id(kind: str) -> str:
    """Return an id for an item, or for a response."""
    return f"{_PREFIXES.get(kind, 'resp')}_{uuid.uuid4().hex}"


def read_items(given: Any, find: Callable[[str], Item | None]) -> list[Placed]:
    """Return the items of a request's input, each with an id, references as what they refer to.

    Args:
        given: a text, or a list of items.
        find: returns the item with an id that an earlier response had; None: it is not kept.

    Raises:
        ApiError: 400 for what is no item, 404 for a reference to one that is not kept.
    """
    if isinstance(given, str):
        return [Placed("input", _message("input", {"role": "user", "content": given}))]
    if not isinstance(given, list):
        raise wrong("input", given, "a text or a list of items")
    if len(given) > MAX_ITEMS:
        raise bad_request(f"input: got {len(given)} items, expected at most {MAX_ITEMS}", param="input")
    return [_read(f"input[{at}]", item, find) for at, item in enumerate(given)]


def _read(where: str, given: Any, find: Callable[[str], Item | None]) -> Placed:
    kind = _kind(where, demand(where, given, OBJECT))
    if kind == "item_reference":
        name = demand(f"{where}.id", given.get("id"), WORDS)
        item = find(name)
        if item is None:
            raise unknown(f"{where}.id", name)
        return Placed(where, item)
    return Placed(where, _READERS[kind](where, given))


def _kind(where: str, given: Item) -> str:
    kind = given.get("type")
    if kind is None:
        kind = "message" if "role" in given or "content" in given else "item_reference"
    if kind not in _KINDS:
        raise wrong(f"{where}.type", kind, ", ".join(_KINDS))
    return str(kind)


def unknown(where: str, name: str) -> ApiError:
    """Return the 404 for the id of something that is not kept."""
    expected = "the id of something that this server keeps for this client. It forgets what was not used for long"
    message = f"{where}: got {shown_as_json(name)}, expected {expected}."
    return ApiError(404, message, param=re.split(r"[\[.]", where)[0], code="not_found")


def _named(where: str, kind: str, given: Item) -> Item:
    """Return the beginning of an item: its id, its type and that it is complete."""
    name = given.get("id")
    name = new_id(kind) if name is None else demand(f"{where}.id", name, WORDS)
    status = given.get("status")
    status = "completed" if status is None else demand(f"{where}.status", status, _STATUS)
    return {"id": name, "type": kind, "status": status}


def _message(where: str, given: Item) -> Item:
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        raise wrong(f"{where}.role", role, ", ".join(_ROLES))
    if isinstance(content, str):
        part: Item = {"type": "input_text", "text": content}
        if role == "assistant":
            part = {"type": "output_text", "text": content, "annotations": []}
        content = [part]
    return {**_named(where, "message", given), "role": role, "content": content}


def _function_call(where: str, given: Item) -> Item:
    texts = {name: demand(f"{where}.{name}", given.get(name), STRING) for name in ("call_id", "name", "arguments")}
    return {**_named(where, "function_call", given), **texts}


def _function_call_output(where: str, given: Item) -> Item:
    call_id = demand(f"{where}.call_id", given.get("call_id"), STRING)
    return {**_named(where, "function_call_output", given), "call_id": call_id, "output": given.get("output")}


def _reasoning(where: str, given: Item) -> Item:
    parts = dict[str, list[Any]]()
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts[name] = [] if given.get(name) is None else demand(f"{where}.{name}", given[name], LIST)
        for at, part in enumerate(parts[name]):
            place = f"{where}.{name}[{at}]"
            if demand(place, part, OBJECT).get("type") != kind:
                raise wrong(f"{place}.type", part.get("type"), kind)
            demand(f"{place}.text", part.get("text"), STRING)
    return {**_named(where, "reasoning", given), **parts}


_READERS: dict[str, Callable[[str, Item], Item]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
}


class Transcript:
    """The messages of a chat that instructions and items stand for.

    What an assistant thought, said and called in one turn is one message, and so are instructions and the system's
    messages right behind them: many templates know only one.

    Attributes:
        messages: for `read_messages`.
    """

    def __init__(self, instructions: str | None, items: Iterable[Placed]) -> None:
        self.messages = list[Message]()
        self._places = dict[str, str]()  # of a message in errors -> of the item
        self._calls = set[str]()
        self._takes_system = False
        if instructions:
            self._open("instructions", {"role": "system", "content": instructions}, content="instructions")
            self._takes_system = True
        for where, item in items:
            self._add(where, item)

    def _add(self, where: str, item: Item) -> None:
        kind = item["type"]
        if kind == "message":
            self._say(where, item)
        elif kind == "reasoning":
            self._think(where, item)
        elif kind == "function_call":
            self._call(where, item)
        else:
            if item["call_id"] not in self._calls:
                raise wrong(f"{where}.call_id", item["call_id"], "the call_id of a function_call before it")
            content = _in_chat(item["output"])
            message = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
            self._open(where, message, content=f"{where}.output")
        self._takes_system = self._takes_system and kind == "message" and item["role"] in _SYSTEM

    def _open(self, where: str, message: Message, content: str | None = None) -> Message:
        name = f"messages[{len(self.messages)}]"
        self._places[name] = where
        if content is not None:
            self._places[f"{name}.content"] = content
        self.messages.append(message)
        return message

    def _say(self, where: str, item: Item) -> None:
        role, content = item["role"], _in_chat(item["content"])
        place = "input" if where == "input" else f"{where}.content"
        if self._takes_system and role in _SYSTEM and isinstance(content, list):
            first = self.messages[0]
            before = first["content"] if isinstance(first["content"], list) else [_text(first["content"])]
            first["content"] = [*before, *content]
            for at in range(len(content)):
                self._places[f"messages[0].content[{len(before) + at}]"] = f"{place}[{at}]"
        elif role == "assistant":
            message = self._assistant(where, "content", "tool_calls")
            message["content"] = content
            self._places[f"messages[{len(self.messages) - 1}].content"] = place
        else:
            self._open(where, {"role": role, "content": content}, content=place)

    def _think(self, where: str, item: Item) -> None:
        text = "\n".join(part["text"] for part in item.get("content") or item["summary"])
        if text:
            message = self._assistant(where, "content", "tool_calls", "reasoning_content")
            message["reasoning_content"] = text

    def _call(self, where: str, item: Item) -> None:
        message = self._assistant(where)
        calls: list[Any] = message.setdefault("tool_calls", [])
        name = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self._places |= {name: where, f"{name}.function": where}
        self._calls.add(item["call_id"])
        function = {"name": item["name"], "arguments": item["arguments"]}
        calls.append({"id": item["call_id"], "type": "function", "function": function})

    def _assistant(self, where: str, *without: str) -> Message:
        """Return the assistant's message that goes on, if it has none of these yet, or a new one."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant" and not any(last.get(name) for name in without):
            return last
        return self._open(where, {"role": "assistant", "content": None})

    def turns(self) -> list[int]:
        """Return at which messages the user's turns begin, but for the first."""
        return [at for at, message in enumerate(self.messages) if message["role"] == "user"][1:]

    def from_turn(self, turn: int) -> list[Message]:
        """Return the messages from a turn on, behind the system's at the beginning."""
        kept = takewhile(lambda message: message["role"] in _SYSTEM, self.messages)
        return [*kept, *self.messages[turn:]]

    def placed(self, text: str) -> str:
        """Return an error's text that begins with a place in the messages so that it names the item."""
        found = max((name for name in self._places if text.startswith(name)), key=len, default=None)
        return text if found is None else self._places[found] + text[len(found) :]


def _in_chat(content: Any) -> Any:
    """Return an item's content with the names that parts have in a chat. What is none, the reader refuses."""
    return [_part(part) for part in content] if isinstance(content, list) else content


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    return {**part, "type": _PARTS[kind]} if isinstance(kind, str) and kind in _PARTS else part


def _text(text: str) -> Item:
    return {"type": "text", "text": text}
