"""What a chat template wants of messages, found by rendering small conversations with it.

OpenAI's API has one form of messages, chat templates have many: the arguments of a call as an object or as its JSON
text, identifiers of nine characters, a content that is null or empty beside calls, contents as lists of parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from eightfold.template import TemplateError, render_template

IdForm = Literal["any", "nine or more", "nine"]

_NINE = re.compile(r"[A-Za-z0-9]{9}")
_LONG_ID, _NINE_ID, _SHORT_ID = "call_0123456789abcdef01234567", "abcDEF123", "1"

_NAME, _KEY, _VALUE, _WORDS, _MORE = "probe_name", "probe_key", "probe_value", "probe words", "more to probe"
_QUESTION = "a question"
_TOOL = {
    "type": "function",
    "function": {"name": "another", "description": "", "parameters": {"type": "object", "properties": {}}},
}

# What templates of this field read beside messages; a token's text is no matter here.
_GIVEN = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), ""),
    "documents": None,
    "add_generation_prompt": False,
}


def part(text: str) -> dict[str, str]:
    """Return a text as a part of a content."""
    return {"type": "text", "text": text}


@dataclass(frozen=True)
class CallForm:
    """How a template wants a message of the assistant with calls.

    Attributes:
        as_text: arguments are JSON text; else an object.
        blank: the content where nothing is said beside the calls.
        splits: words and calls are shown only as two messages.
        ids: how long the identifiers of calls are.
    """

    as_text: bool
    blank: str | None
    splits: bool
    ids: IdForm

    def takes(self, name: str) -> bool:
        """Return whether the template accepts an identifier."""
        if self.ids == "nine":
            return _NINE.fullmatch(name) is not None
        return self.ids == "any" or len(name) >= 9


@dataclass(frozen=True)
class ContentForm:
    """Which contents a template shows.

    Attributes:
        text: a text; else it has to be a part in a list.
        parts: several parts in a list.
    """

    text: bool
    parts: bool


@lru_cache(maxsize=32)
def call_form(template: str) -> CallForm | None:
    """Return how a template wants calls; None where it shows them in no way."""
    try:
        for as_text in (False, True):
            for ids in (_SHORT_ID, _NINE_ID):
                shown = {blank: _render_call(template, as_text, ids, blank) for blank in ("", None)}
                if any(map(_has_call, shown.values())):
                    return _call_form(template, as_text, ids, shown)
    except TemplateError:  # no template, or one without an end: who renders it says so
        pass
    return None


def _call_form(template: str, as_text: bool, name: str, shown: dict[str | None, str]) -> CallForm:
    """Return the rest of a form, of which the arguments and an identifier that are accepted are known."""
    ids: IdForm = "any"
    if name != _SHORT_ID:
        ids = "nine or more" if any(_render_call(template, as_text, _LONG_ID, blank) for blank in shown) else "nine"
    empty, null = shown[""], shown[None]
    # A null that makes a difference means that nothing was said, unless Python's None is written out.
    says_none = null.count("None") > empty.count("None")
    blank = None if _has_call(null) and not (says_none and _has_call(empty)) and null != empty else ""
    splits = False
    if not _has_call(_render_call(template, as_text, name, _WORDS)):
        apart = _render(template, [_user(template), *_apart(as_text, name, blank)])
        splits = _has_call(apart) and _WORDS in apart
    return CallForm(as_text, blank, splits, ids)


def _apart(as_text: bool, name: str, blank: str | None) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": _WORDS}, _calling(as_text, name, blank)]


def _calling(as_text: bool, name: str, content: str | None) -> dict[str, Any]:
    arguments: Any = f'{{"{_KEY}": "{_VALUE}"}}' if as_text else {_KEY: _VALUE}
    call = {"id": name, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _user(template: str) -> dict[str, Any]:
    return {"role": "user", "content": _QUESTION if content_form(template, "user").text else [part(_QUESTION)]}


def _render_call(template: str, as_text: bool, name: str, content: str | None) -> str:
    return _render(template, [_user(template), _calling(as_text, name, content)])


def _has_call(rendered: str) -> bool:
    """Return whether a call is shown, and its arguments neither as Python writes them nor as a text within a text."""
    is_there = all(each in rendered for each in (_NAME, _KEY, _VALUE))
    return is_there and f"'{_KEY}'" not in rendered and f'\\"{_KEY}' not in rendered


@lru_cache(maxsize=128)
def content_form(template: str, role: str) -> ContentForm:
    """Return which contents of a role a template shows."""
    if "text" not in template:  # by which name a part would have to be read
        return ContentForm(text=True, parts=False)
    try:
        text = _WORDS in _render(template, _talk(template, role, _WORDS))
        parts = _render(template, _talk(template, role, [part(_WORDS), part(_MORE)]))
    except TemplateError:
        return ContentForm(text=True, parts=False)
    is_written_out = re.search(rf"""text['"]: ['"]{_WORDS}""", parts) is not None
    has_one = _WORDS in parts and not is_written_out
    return ContentForm(text=text or not has_one, parts=has_one and _MORE in parts)


@lru_cache(maxsize=128)
def shows(template: str, role: str) -> bool:
    """Return whether a template shows what a role says."""
    try:
        return any(_WORDS in _render(template, _talk(template, role, said)) for said in (_WORDS, [part(_WORDS)]))
    except TemplateError:
        return True


def _talk(template: str, role: str, content: Any) -> list[dict[str, Any]]:
    """Return a conversation with a message of a role, whose other contents have the same form."""
    other = _QUESTION if isinstance(content, str) else [part(_QUESTION)]
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "user":
        return [message]
    user = {"role": "user", "content": other}
    if role == "tool":
        form = call_form(template)
        calling = _calling(form is not None and form.as_text, _NINE_ID, "" if form is None else form.blank)
        return [user, calling, {**message, "name": _NAME, "tool_call_id": _NINE_ID}]
    if role in ("system", "developer"):
        return [message, user]
    return [user, message if role == "assistant" else {**message, "name": _NAME, "tool_call_id": _NINE_ID}]


def _render(template: str, messages: Sequence[Any]) -> str:
    """Return what a template makes of messages; nothing where it refuses them."""
    try:
        return render_template(template, {**_GIVEN, "messages": list(messages), "tools": [_TOOL]})
    except TemplateError as error:
        if error.fault == "refusal":
            return ""
        raise
