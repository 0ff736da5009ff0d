"""Conversations as OpenAI's clients send them, and what each is in the template TEMPLATE."""

from __future__ import annotations

from typing import Any

TEMPLATE = "{% for m in messages %}[{{ m.role }}|{{ m.content }}{% for c in m.tool_calls or [] %}|{{ c.function.name }}\
 {{ c.function.arguments | tojson }}{% endfor %}]{% endfor %}"

USER = {"role": "user", "content": "w"}


def part(text: str, kind: str = "text", name: str = "") -> dict[str, Any]:
    """Return a part of a content, whose text stands by its kind or by a name."""
    return {"type": kind, name or kind: text}


def called(arguments: Any = '{"a": 1}', name: str = "c1", **more: Any) -> dict[str, Any]:
    """Return what the assistant says when it calls f."""
    call = {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def result(content: Any = "r", name: str = "c1", **more: Any) -> dict[str, Any]:
    """Return what the tool answers."""
    return {"role": "tool", "tool_call_id": name, "content": content, **more}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "user": ([USER], "[user|w]"),
    "developer": ([{"role": "developer", "content": "d"}, USER], "[system|d][user|w]"),
    "parts": ([{"role": "user", "content": [part("a"), part("b")]}], "[user|a\nb]"),
    "call": ([USER, called(), result()], '[user|w][assistant||f {"a": 1}][tool|r]'),
    "call with an object": ([USER, called({"a": 1}), result()], '[user|w][assistant||f {"a": 1}][tool|r]'),
    "call without content": ([USER, called(content=""), result()], '[user|w][assistant||f {"a": 1}][tool|r]'),
    "call with words": ([USER, called(content="I look."), result()], '[user|w][assistant|I look.|f {"a": 1}][tool|r]'),
    "parts of a response": ([{"role": "user", "content": [part("a", "input_text", "text")]}], "[user|a]"),
    "refusal": ([USER, {"role": "assistant", "content": [part("no", "refusal")]}], "[user|w][assistant|no]"),
    "continued": ([USER, {"role": "assistant", "content": "a", "prefix": True}], "[user|w][assistant|a"),
    "reasoning": ([USER, {"role": "assistant", "content": "a", "reasoning": "Hm."}], "[user|w][assistant|a]"),
    "no content": ([USER, {"role": "assistant"}], "[user|w][assistant|]"),
}  # fmt: skip
