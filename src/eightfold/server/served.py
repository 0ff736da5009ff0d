"""A model under the names by which clients call it: what reading a request and writing its answer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from eightfold.engine.reasoning import Thinking
from eightfold.server.fields import ApiError, Fields, bad_request
from eightfold.server.fingerprint import fingerprint
from eightfold.server.token_texts import TokenTexts
from eightfold.server.tool_parsers import AUTO, FamilyName, family_name
from eightfold.tokenizer import Tokenizer
from eightfold.values import STRING, shown_as_json


class Served:
    """A model for requests, wherever they come from.

    Args:
        tokenizer: the model's.
        max_model_len: positions of a sequence, prompt and answer together.
        names: what clients may call the model; answers carry the first.
        reasoning_parser: how thoughts are told from answers, see engine/reasoning.py.
        tool_call_parser: the family in whose form calls are recognised, see tool_parsers.py.

    Attributes:
        template: the chat template's text; None: there is none.
        thinking: how the model thinks.
        texts: of single tokens.
        arithmetic: options of the engine that change the numbers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        names: Sequence[str],
        reasoning_parser: str = "auto",
        tool_call_parser: str = AUTO,
    ) -> None:
        self.tokenizer, self.max_model_len, self.names = tokenizer, max_model_len, names
        self.template = tokenizer.template_source() if tokenizer.has_chat_template else None
        self.thinking = Thinking(tokenizer, reasoning_parser)
        self.texts = TokenTexts(tokenizer)
        self.arithmetic: tuple[str, ...] = ()
        self._tool_call_parser = tool_call_parser

    @cached_property
    def fingerprint(self) -> str:
        """A name for what answers."""
        return fingerprint(self.tokenizer.directory, self.template, *self.arithmetic)

    @property
    def tool_family(self) -> FamilyName | None:
        """The family in whose form the model's calls are recognised."""
        known = self.tokenizer.template_source(with_tools=True) if self.tokenizer.has_chat_template else ""
        return family_name(self._tool_call_parser, known)

    def fields(self, values: Mapping[str, Any], path: str) -> Fields:
        """Return the fields of a body, at an endpoint as the table of fields calls it.

        Raises:
            ApiError: 404 or 400 where they ask for another model or what is not done.
        """
        fields = Fields(values, path)
        name = fields.read("model", STRING)
        if name is not None and name not in self.names:
            raise self.unknown_model(name)
        fields.refuse_unsupported()
        return fields

    def unknown_model(self, name: str) -> ApiError:
        message = f"model: got {shown_as_json(name)}, expected {shown_as_json(self.names[0])}"
        return ApiError(404, message, param="model", code="model_not_found")

    def require_fit(self, prompts: Sequence[Sequence[int]], field: str = "prompt") -> None:
        """Refuse prompts that are empty or do not leave room for an answer; `field` of the request is to blame."""
        most = self.max_model_len
        for prompt in prompts:
            size = len(prompt)
            if not size:
                raise bad_request(f"{field}: got no tokens, expected at least one", param=field)
            # In OpenAI's words, old and new: litellm, Pydantic AI and LangChain know this error by one or the other.
            if size >= most:
                message = (
                    f"This model's maximum context length is {most} tokens. However, you requested {size + 1} tokens "
                    f"({size} in the {field}, 1 in the completion): the prompt is too long. "
                    f"Please reduce the length of the {field}."
                )
                raise bad_request(message, param=field, code="context_length_exceeded")
