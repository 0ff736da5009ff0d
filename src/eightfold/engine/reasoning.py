"""What a model thinks, told from what it answers: the text between `<think>` and `</think>`, and its like.

A thought stands at the beginning of an answer. Either the model opens it (Qwen3), or the prompt does (a chat template
that ends with `<think>`, or an answer that is continued), or nobody does and only its end is seen (DeepSeek-R1). A
prompt that ends with an empty thought asks for an answer without one. Line ends around a thought belong to neither
part. The names of the styles are those of vLLM's --reasoning-parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from eightfold.engine.sampling_params import SamplingParams
    from eightfold.messages import Message
    from eightfold.tokenizer import Tokenizer

_Place = Literal["before", "inside", "between", "behind"]  # between: behind a thought, before what is answered


class Style(NamedTuple):
    """How a family of models writes its thoughts.

    Attributes:
        begin, end: what stands around a thought.
        is_silent: whether a model may leave out `begin`: then an answer is a thought until `end`.
    """

    begin: str
    end: str
    is_silent: bool = False


STYLES = {
    "qwen3": Style("<think>", "</think>"),
    "deepseek_r1": Style("<think>", "</think>", is_silent=True),
    "mistral": Style("[THINK]", "[/THINK]"),
    "seed_oss": Style("<seed:think>", "</seed:think>"),
    "cohere_command3": Style("<|START_THINKING|>", "<|END_THINKING|>"),
}
NAMES = ("auto", "none", *STYLES)  # of --reasoning-parser


class Start(NamedTuple):
    """How an answer to a prompt begins.

    Attributes:
        style: of the thought that it may begin with; None where no thought can be told.
        begins_inside: whether the prompt has opened the thought.
        delays_form: whether a form that the answer must have begins behind a thought.
        tags: the tokens that begin and end a thought; None where either is not a token of its own.
        special: those of their tokens that texts leave out unless told otherwise.
    """

    style: Style | None = None
    begins_inside: bool = False
    delays_form: bool = False
    tags: tuple[int, int] | None = None
    special: tuple[int, ...] = ()

    def params(self, params: SamplingParams) -> SamplingParams:
        """Return parameters with which the text shows a thought, and a form begins behind it."""
        if self.style is None:
            return params
        if self.special:
            params = replace(params, kept_special_ids=(*params.kept_special_ids, *self.special))
        if params.structured is not None and self.delays_form:
            begin = "" if self.begins_inside or self.style.is_silent else self.style.begin
            form = replace(params.structured, begins_after=self.style.end, opened_by=begin)
            params = replace(params, structured=form)
        return params

    def parser(self) -> ReasoningParser:
        """Return what splits an answer."""
        return ReasoningParser(self.style, begins_inside=self.begins_inside)

    def tokens_of_thought(self, token_ids: Sequence[int]) -> int | None:
        """Return how many tokens of an answer are its thought, with what stands around it; None: nobody can tell."""
        if self.tags is None:
            return None
        begin, end = self.tags
        is_silent = self.style is not None and (self.begins_inside or self.style.is_silent)
        if self.style is None or not (is_silent or begin in token_ids):
            return 0
        return token_ids.index(end) + 1 if end in token_ids else len(token_ids)


class Thinking:
    """How a model thinks.

    Args:
        tokenizer: the model's.
        name: of a style; auto for what the chat template or the vocabulary says.

    Attributes:
        style: of its thoughts; None: it has none.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "auto") -> None:
        template = tokenizer.template_source() if tokenizer.has_chat_template else ""
        self.style = _find(tokenizer, template) if name == "auto" else STYLES.get(name)
        tags = self.style[:2] if self.style else ()
        ids = [tokenizer.encode(tag, special_tokens=False) for tag in tags]
        self._tags = (ids[0][0], ids[1][0]) if [len(each) for each in ids] == [1, 1] else None
        self._special = tuple(token for each in ids if tokenizer.decode(each) == "" for token in each)
        # Without tokens for it, a model that is only known by its template may as well be one that need not think.
        self._delays_forms = name != "auto" or (self._tags is not None and any(tag in template for tag in tags))

    def start(self, prompt: str, continued: Message | None = None) -> tuple[str, Start]:
        """Return the prompt as it should be, and how an answer to it begins.

        Args:
            prompt: the conversation, rendered.
            continued: its last message, which the answer continues; None where the answer is a new message.
        """
        style = self.style
        if style is None:
            return prompt, Start()
        said = "" if continued is None else continued["content"]
        if said.strip():  # it is a thought, or no thought can follow any more
            prompt = self._opened_once(prompt, said)
            begins_inside = said.lstrip().startswith(style.begin) and style.end not in said
            is_over = not begins_inside
        else:
            begins_inside = prompt.rstrip().endswith(style.begin)
            is_over = prompt.rstrip().endswith(style.end)
            if continued is not None and continued.get("reasoning_content"):
                begins_inside = not is_over
        if is_over:
            return prompt, Start(tags=self._tags)
        delays_form = begins_inside or self._delays_forms
        return prompt, Start(style, begins_inside, delays_form, self._tags, self._special)

    def _opened_once(self, prompt: str, said: str) -> str:
        """Return a prompt that ends with `said`, without the empty thought that templates put before it.

        They know only whole messages: in one that is continued behind "<think>", no thought seems to be there.
        """
        before = prompt.removesuffix(said)
        if self.style is None or len(before) == len(prompt) or not said.lstrip().startswith(self.style.begin):
            return prompt
        begin, end = map(re.escape, self.style[:2])
        return re.sub(rf"{begin}\s*{end}\s*$", "", before) + said


def _find(tokenizer: Tokenizer, template: str) -> Style | None:
    """Return the style that a chat template shows, or else the vocabulary.

    A template that knows only the end of thoughts takes them out of earlier turns. If the vocabulary has tokens for
    them, this is a model such as DeepSeek-R1, which always thinks; else one that may think.
    """
    tokens = {style for style in STYLES.values() if _are_tokens(tokenizer, style)}
    for style in STYLES.values():
        if style.begin in template:
            return style
        if style.end in template:
            return style._replace(is_silent=style in tokens)
    return next((style for style in STYLES.values() if style in tokens), None)


def _are_tokens(tokenizer: Tokenizer, style: Style) -> bool:
    """Return whether both tags are tokens, and no special ones: those may serve anything."""
    ids = [tokenizer.encode(tag, special_tokens=False) for tag in style[:2]]
    return all(len(each) == 1 and tokenizer.decode(each) for each in ids)


class ReasoningParser:
    """Splits one answer into reasoning and content, as it comes. How it is cut into pieces makes no difference.

    Args:
        style: how thoughts are written; None: there are none, and all is content.
        begins_inside: whether a thought was opened before the answer.
    """

    def __init__(self, style: Style | None, *, begins_inside: bool) -> None:
        self._begin, self._end, is_silent = style or Style("", "")
        self._place: _Place = "behind" if style is None else "before"
        self._may_answer = not (begins_inside or is_silent)
        self._held = ""
        self._has_reasoning = False

    def push(self, text: str) -> tuple[str, str]:
        """Take more of the answer; return the reasoning and the content that are certain now."""
        if self._place == "behind":
            return "", text
        self._held += text
        if self._place == "before":
            self._open()
        reasoning = self._think() if self._place == "inside" else ""
        if self._place == "between" and (content := self._held.lstrip("\n")):
            self._place, self._held = "behind", content
        return reasoning, self._take() if self._place == "behind" else ""

    def finish(self) -> tuple[str, str]:
        """Return the rest of both: the answer is complete, or cut short."""
        held = self._take()
        if self._place in ("between", "behind"):
            return "", ""
        if self._place == "before" and self._may_answer:
            return "", held
        return self._without_line_ends(held), ""

    def _open(self) -> None:
        """Look whether the answer begins with a thought, as soon as that is certain."""
        begun = self._held.lstrip()
        if begun.startswith(self._begin):
            self._place, self._held = "inside", begun[len(self._begin) :]
        elif not self._begin.startswith(begun):
            self._place = "behind" if self._may_answer else "inside"

    def _think(self) -> str:
        """Return what is certain to belong to the thought."""
        thought, end, after = self._held.partition(self._end)
        if end:
            self._place, self._held = "between", after
            return self._without_line_ends(thought)
        certain = thought[: len(thought) - _begun(thought, self._end)].rstrip("\n")
        self._held = thought[len(certain) :]
        return self._from_first(certain)

    def _without_line_ends(self, thought: str) -> str:
        return self._from_first(thought.rstrip("\n"))

    def _from_first(self, thought: str) -> str:
        """Return more of a thought, which does not begin with a line end."""
        if not self._has_reasoning:
            thought = thought.lstrip("\n")
            self._has_reasoning = bool(thought)
        return thought

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held


def _begun(text: str, tag: str) -> int:
    """Return how many of the last characters of a text are the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
