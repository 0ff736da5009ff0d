"""What a request gives to the chat template beside the conversation: whether and how much the model may think."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from eightfold.server.fields import Fields, bad_request

_SWITCHES = ("enable_thinking", "thinking")  # by which templates turn thinking on and off

_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def template_variables(fields: Fields, template: str) -> dict[str, Any]:
    """Return the variables that a request has for the chat template, in the dialects of this field.

    Raises:
        ApiError: the model is to think, and the template has no switch for it; or two fields contradict each other.
    """
    known = names_in(template)
    variables: dict[str, Any] = dict(fields.read("chat_template_kwargs"))
    for name in variables.keys() - known:
        fields.note_ignored(f"chat_template_kwargs.{name}")
    given, effort = _given(fields)
    switch = next((name for name in _SWITCHES if name in known), None)
    if effort is not None and "reasoning_effort" in known:
        _set(variables, "reasoning_effort", effort[1], effort[0])
    elif effort is not None and switch is None:
        fields.note_ignored(effort[0])
    if effort is not None and switch is not None and not given:  # as vLLM does
        given = {effort[0]: effort[1] != "none"}
    for field, wanted in given.items():
        if switch is not None:
            _set(variables, switch, wanted, field)
        elif wanted:
            message = f"{field}: this model's chat template has no variable for it"
            raise bad_request(message, param=field, code="unsupported_parameter")
    return variables


def _given(fields: Fields) -> tuple[dict[str, bool], tuple[str, str] | None]:
    """Return what each field says of whether to think, and the field and text that say how much."""
    found: dict[str, bool | None] = {fields.spelled("enable_thinking"): fields.read("enable_thinking")}
    efforts = {"reasoning_effort": fields.read("reasoning_effort")}
    thinking, reasoning = fields.inside("thinking"), fields.inside("reasoning")
    if thinking is not None and (kind := thinking.read("type")) is not None:
        found["thinking.type"] = kind == "enabled"
    if reasoning is not None:
        found["reasoning.enabled"] = reasoning.read("enabled")
        efforts["reasoning.effort"] = reasoning.read("effort")
    effort = [(name, text) for name, text in efforts.items() if text is not None]
    if len({text for _, text in effort}) > 1:
        message = "reasoning_effort and reasoning.effort: got different values. Give one."
        raise bad_request(message, param="reasoning.effort")
    return {name: value for name, value in found.items() if value is not None}, effort[0] if effort else None


def _set(variables: dict[str, Any], name: str, value: Any, field: str) -> None:
    if variables.setdefault(name, value) != value:
        message = f"{field} and chat_template_kwargs.{name}: got different values. Give one."
        raise bad_request(message, param=field)


@lru_cache(4)
def names_in(template: str) -> frozenset[str]:
    """Return the names that the code of a jinja2 template has, outside of texts."""
    code = (_TEXT.sub(" ", part) for part in _CODE.findall(template))
    return frozenset(name for part in code for name in re.findall(r"[A-Za-z_]\w*", part))
