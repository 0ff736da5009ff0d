"""A request's fields: read with their types, refused where they would mean something that is not done here.

What is neither read, nor refused, nor known is ignored; docs/serving.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eightfold.server.problems import ApiError, bad_request

_USE_TOOLS = "Use tools and tool_choice."
_NO_BEAMS = "There is no beam search."

# Field -> values that change nothing, and what to do instead. Anything else is a 400.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids": (([],), "Use logit_bias or a grammar."),
    "audio": ((), "Only text is generated."),
    "bad_words": (([],), "Use logit_bias."),
    "chat_template": ((), "The template is chosen when the server starts: --chat-template."),
    "continue_final_message": ((False,), "Use /v1/completions."),
    "documents": (([],), "Put them into a message."),
    "early_stopping": ((False,), _NO_BEAMS),
    "function_call": (("none",), _USE_TOOLS),
    "functions": (([],), _USE_TOOLS),
    "guided_whitespace_pattern": ((), "Put white space into the grammar."),
    "length_penalty": ((0, 1), _NO_BEAMS),
    "logits_processors": (([],), ""),
    "mm_processor_kwargs": (({},), "Only text is read."),
    "priority": ((0,), "Requests are served in the order in which they come."),
    "return_tokens_as_token_ids": ((False,), ""),
    "suffix": (("",), "Put what comes after into the prompt."),
    "truncate_prompt_tokens": ((), "Send a prompt that fits."),
    "typical_p": ((1,), ""),
    "use_beam_search": ((False,), _NO_BEAMS),
    "web_search_options": ((), "There is no web search."),
}

_KINDS: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    list: "a list",
    dict: "an object",
}


class Fields:
    """The fields of a request; null is the same as not given.

    Attributes:
        names: of the fields that are given.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._read: set[str] = set()

    def refuse_unsupported(self) -> None:
        """Refuse fields that would change the answer and are not supported.

        Raises:
            ApiError: 400.
        """
        for name in self._values.keys() & _REFUSED.keys():
            self._read.add(name)
            neutral, advice = _REFUSED[name]
            value = self._values[name]
            if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
                raise bad_request(f"{name} is not supported. {advice}", param=name, code="unsupported_parameter")

    @property
    def ignored(self) -> list[str]:
        """Names of fields that nobody has read."""
        return sorted(self._values.keys() - self._read)

    def any(self, name: str) -> Any:
        """Return a field of any type, or None."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """Return a text, or None."""
        value: str | None = self._typed(name, str)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value: bool | None = self._typed(name, bool)
        return default if value is None else value

    def whole(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number of a range, or None."""
        value: int | None = self._typed(name, int)
        if value is not None and not least <= value <= most:
            raise bad_request(f"{name}: got {shown(value)}, expected {least} to {most}", param=name)
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of so many items at most, or None."""
        value: list[Any] | None = self._typed(name, list)
        if value is not None and len(value) > most:
            raise bad_request(f"{name}: got {len(value)} items, expected at most {most}", param=name)
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """Return an object, or None."""
        value: dict[str, Any] | None = self._typed(name, dict)
        return value

    def _typed(self, name: str, kind: type) -> Any:
        value = self.any(name)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise wrong(name, value, _KINDS[kind])


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """Return the 400 for a field that is not what it should be."""
    return bad_request(f"{name}: got {shown(value)}, expected {expected}", param=name.partition("[")[0])


def shown(value: Any) -> str:
    """Render a value of any size for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**20 else str(value)
