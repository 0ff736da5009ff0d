"""The calls in an answer, as the families of models write them.

An answer is text, between whose pieces there are calls behind markers, or it is calls and nothing else: in JSON, in a
block of code or as a list in Python. The markers are the family's own. What is unmistakable is a call for every family:
an answer that names a function that was offered, with an object of arguments, and says nothing else.

What only looks like a call, or calls what was not offered, stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NewType

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.server import tool_markup as markup
from eightfold.server.tool_markup import Calls, Found, Reader
from eightfold.server.tool_source import Reading, Source

if TYPE_CHECKING:
    from eightfold.tokenizer import Tokenizer

FamilyName = NewType("FamilyName", str)

_FENCE = "```"

_STEP = 4096  # characters that are looked at together: what is left of a text is copied again and again
_MOST_OPEN = 10  # markers of calls without an end that are tried at the end of an answer, each as far as the text goes


@dataclass(frozen=True)
class Family:
    """How the models of a family write calls.

    Attributes:
        readers: marker that begins calls -> what reads them from there on.
        answers_in_json: whether an answer that is JSON is how they call, and need not look like a call any more.
        other_markers: further ones, which are no text either.
        short_ids: whether their templates only take the ids of calls that have nine letters and digits.
    """

    readers: Mapping[str, Reader]
    answers_in_json: bool = False
    other_markers: tuple[str, ...] = ()
    short_ids: bool = False

    @cached_property
    def begins(self) -> re.Pattern[str]:
        """Finds the next marker."""
        return re.compile("|".join(map(re.escape, sorted(self.readers, key=len, reverse=True))))

    @cached_property
    def _beginnings(self) -> tuple[frozenset[str], int, frozenset[str]]:
        """What markers begin with, the length of the longest, and with which characters they end."""
        found = frozenset(marker[:size] for marker in self.readers for size in range(1, len(marker)))
        return found, max(map(len, found)), frozenset(each[-1] for each in found)

    def end_of_text(self, text: str) -> int:
        """Return how much of a text is neither white space at its end nor the beginning of a marker."""
        beginnings, longest, ends = self._beginnings
        if text[-1] in ends:
            for size in range(min(longest, len(text)), 0, -1):
                if text[-size:] in beginnings:
                    text = text[:-size]
                    break
        return len(text.rstrip())

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers, which may be special tokens."""
        return (*self.readers, *self.other_markers)


_TAG = {"<tool_call>": markup.between("<tool_call>", "</tool_call>"), "</tool_call>": markup.nothing}
_OTHER_TAGS = {tag: markup.between(tag, tag.replace("<", "</"), plain=True) for tag in markup.OTHER_TAGS}
_FUNCTION = {"<function=": markup.function}
_HERMES = Family(
    {**_TAG, **_OTHER_TAGS, **_FUNCTION, '<function name="': markup.function_name},
    other_markers=("</tools>",),
)
_QWEN3_CODER = Family({**_TAG, **_FUNCTION}, other_markers=("</function>",))
_LLAMA = Family(
    {"<|python_tag|>": markup.python_tag, **_FUNCTION}, answers_in_json=True, other_markers=("</function>",)
)
_PYTHONIC = Family(
    {"<|python_start|>": markup.python_list, "<|python_tag|>": markup.python_tag}, other_markers=("<|python_end|>",)
)
_NEMOTRON = Family({"<TOOLCALL>": markup.between("<TOOLCALL>", "</TOOLCALL>")}, other_markers=("</TOOLCALL>",))
_DEEPSEEK = Family(
    {
        **dict.fromkeys(markup.DEEPSEEK_BEGINS, markup.deepseek),
        markup.DEEPSEEK[2]: markup.deepseek_call,
        markup.DEEPSEEK[1]: markup.nothing,
    },
    other_markers=markup.DEEPSEEK,
)

# The names are vLLM's where it has the parser.
FAMILIES: dict[str, Family] = {
    "hermes": _HERMES,
    "qwen2.5-coder": Family({**_HERMES.readers, _FENCE: markup.fenced}, other_markers=_HERMES.other_markers),
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "mistral": Family({"[TOOL_CALLS]": markup.mistral}, True, other_markers=("[ARGS]", "[CALL_ID]"), short_ids=True),
    "llama3_json": _LLAMA,
    "llama4_json": _LLAMA,
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "nemotron_json": _NEMOTRON,
    "xlam": Family({**_TAG, "[TOOL_CALLS]": markup.mistral}, True),
}
AUTO, NONE = "auto", "none"
NAMES = (AUTO, *FAMILIES, NONE)

_SHORT_NAMES = {"tagged": "hermes", "json": "llama3_json"}

# What a chat template that teaches a family's calls, or shows them again, has in it; the first that fits counts.
_SIGNS = {
    "[TOOL_CALLS]": "mistral",
    markup.DEEPSEEK[2]: "deepseek_v3",
    "<parameter=": "qwen3_coder",
    "<tool_call>": "hermes",
    "<TOOLCALL>": "nemotron_json",
    "<|python_start|>": "pythonic",
    "[func_name1(": "pythonic",
    "<|python_tag|>": "llama3_json",
}


def family_name(parser: str, template: str) -> FamilyName | None:
    """Return the family in whose form a model's calls are recognised.

    Args:
        parser: its name, `auto` for the one whose calls the template teaches, or `none`.
        template: the chat template for conversations with tools.
    """
    if parser != AUTO:
        return None if parser == NONE else FamilyName(parser)
    for sign, name in _SIGNS.items():
        if sign in template:
            return FamilyName(name)
    is_json = "tools" in template and ('"parameters"' in template or '"arguments"' in template)
    return FamilyName("llama3_json") if is_json else None


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools."""

    shown: list[Any] | None = None  # what the template is given; None: nothing
    names: frozenset[str] = frozenset()  # functions whose calls are recognised
    form: str | None = None  # the family in whose form calls are recognised; None: not at all
    forced: StructuredOutput | None = None  # the form that the answer must have, which is a call
    one_only: bool = False  # only the first call of an answer counts
    is_named: bool = False  # whether it is known which function a forced call calls

    @property
    def family(self) -> Family | None:
        """The family in whose form calls are recognised."""
        return None if self.form is None else FAMILIES[_SHORT_NAMES.get(self.form, self.form)]

    @property
    def schemas(self) -> markup.Schemas:
        """The schemas of the functions' parameters, by name."""
        functions = [tool["function"] for tool in self.shown or ()]
        return {function["name"]: function.get("parameters") for function in functions}

    def marker_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the special tokens by which calls are recognised, which have to stay in the text."""
        if self.family is None or self.forced is not None:
            return ()
        known = tokenizer.special_tokens
        return tuple(known[marker] for marker in self.family.markers if marker in known)

    def offers(self, calls: Calls) -> bool:
        """Return whether all of these call what was offered, and none just repeats the schema of its parameters."""
        schemas = self.schemas
        return all(
            call.name in self.names
            and not ((schema := schemas.get(call.name)) and json.loads(call.arguments) == schema)
            for call in calls
        )

    def ends(self, reason: str | None, calls: int) -> str | None:
        """Return the finish reason of an answer with so many calls, as OpenAI and vLLM have it.

        A client that named the function is told "stop", and one whose forced call was cut short "length".
        """
        if not calls or self.is_named or (self.forced is not None and reason != "stop"):
            return reason
        return "tool_calls"


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes; arguments are JSON text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Parts = list[str | ToolCall]  # of an answer, in the order in which they stand there


class ToolParser:
    """Splits one answer into text and calls, as it comes.

    The pieces in which it comes make no difference. White space around calls is dropped.

    Attributes:
        calls: how many there were so far.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use, self._family = use, use.family
        self._source = Source()
        self._reading: Reading[Calls | None] | None = None  # of what may be calls
        self._marker = 0  # where the text begins that is left if they are none
        self._is_fresh = True  # there was nothing but white space
        self._has_text = False
        self._is_behind_call = False  # there was nothing but white space since
        self._open = 0  # markers behind which the text ended
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more of the answer; return the text and the calls that are certain now."""
        return text_and_calls(self.push_in_order(text))

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the rest of the text and of the calls: the answer is complete."""
        return text_and_calls(self.finish_in_order())

    def push_in_order(self, text: str) -> Parts:
        """Take more of the answer; return what is certain now."""
        if self._family is None and self._use.forced is None:
            return [text]
        certain: Parts = []
        for at in range(0, len(text), _STEP):
            self._source.text += text[at : at + _STEP]
            self._go_on(certain)
        return certain

    def finish_in_order(self) -> Parts:
        """Return the rest: the answer is complete."""
        self._source.has_ended = True
        certain: Parts = []
        self._go_on(certain)
        return certain

    def _go_on(self, certain: Parts) -> None:
        if self._use.forced is not None:
            if self._source.has_ended:
                self._read_forced(certain)
        elif self._family is not None:
            while self._step(self._family, certain):
                pass

    def _read_forced(self, certain: Parts) -> None:
        """Take an answer that is a call: what is not complete is nothing at all."""
        found = _outcome(markup.json_calls(self._source))
        if isinstance(found, list) and self._use.offers(found):
            certain += self._accept(found)

    def _step(self, family: Family, certain: Parts) -> bool:
        """Take the next piece of text, or go on reading calls; return whether there is more to do."""
        if self._reading is not None:
            return self._read_on(certain)
        source = self._source
        if not source.text:
            return False
        if self._is_fresh:
            lead = len(source.text) - len(source.text.lstrip())
            rest = source.text[lead:]
            if not source.has_ended and any(each.startswith(rest) for each in (*family.readers, _FENCE)):
                return False  # it may become a marker, or is white space
            self._is_fresh = False
            if not family.begins.match(rest) and rest.startswith(("{", "[", _FENCE)):
                self._begin(lead, lead, markup.whole(source, self._use.schemas, plain=not family.answers_in_json))
                return True
        match = family.begins.search(source.text)
        if match is not None and self._open < _MOST_OPEN:
            text = source.text[: match.start()].rstrip()
            self._say(text, certain)
            source.text, size = source.text[len(text) :], match.end() - len(text)
            reader = markup.repeated(match[0], family.readers[match[0]])
            self._begin(size, size, reader(source, self._use.schemas))
            return True
        cut = len(source.text) if source.has_ended else family.end_of_text(source.text)
        text = source.text[:cut]
        if source.has_ended and self.calls:
            text = text.rstrip()
        self._say(text, certain)
        source.text = source.text[cut:]
        return False

    def _begin(self, at: int, marker: int, reading: Reading[Calls | None]) -> None:
        self._source.at, self._marker, self._reading = at, marker, reading

    def _read_on(self, certain: Parts) -> bool:
        source = self._source
        assert self._reading is not None
        found = _outcome(self._reading)
        if found is _UNKNOWN:
            return False
        self._reading = None
        self._open += found is None and source.has_ended
        if isinstance(found, list) and self._use.offers(found) and (found or self._is_behind_call):
            certain += self._accept(found)
        else:
            # What is no call is text, and so is all of one that calls what was not offered. What stands behind a
            # marker may hold calls.
            source.at = source.at if isinstance(found, list) else self._marker
            self._say(source.text[: source.at], certain)
        source.text, source.at = source.text[source.at :], 0
        return True

    def _accept(self, found: Calls) -> list[ToolCall]:
        self._is_behind_call = True
        if self._use.one_only:
            found = found[: max(1 - self.calls, 0)]
        self.calls += len(found)
        return [self._call(each) for each in found]

    def _call(self, found: Found) -> ToolCall:
        name = uuid.uuid4().hex
        short = self._family is not None and self._family.short_ids
        return ToolCall(name[:9] if short else f"call_{name[:24]}", found.name, found.arguments)

    def _say(self, text: str, certain: Parts) -> None:
        if self.calls and not self._has_text:
            text = text.lstrip()
        if text:
            self._has_text, self._is_behind_call = True, False
            certain.append(text)


def text_and_calls(parts: Parts) -> tuple[str, list[ToolCall]]:
    """Return the text of parts, and their calls."""
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [part for part in parts if not isinstance(part, str)]


_UNKNOWN: Literal["unknown"] = "unknown"


def _outcome(reading: Reading[Calls | None]) -> Calls | Literal["unknown"] | None:
    """Return what a reader returns, or that it waits for more."""
    try:
        next(reading)
    except StopIteration as end:
        calls: Calls | None = end.value
        return calls
    return _UNKNOWN
