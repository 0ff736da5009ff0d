"""A conversation, and the prompt that the model's chat template makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eightfold.engine.reasoning import Start, Thinking
from eightfold.messages import Message, read_messages, words
from eightfold.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """A conversation as the model gets it: token ids, and how the answer to it begins."""

    token_ids: list[int]
    start: Start
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation as the chat template gets it.

    Attributes:
        messages: checked, see read_messages.
        tools: as the template is shown them; None: no tools.
        opens_answer: whether the assistant's turn is opened at the end.
        continues: whether the last message is left open instead, for the answer to continue it.
        variables: further ones of this template.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    opens_answer: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, tokenizer: Tokenizer, thinking: Thinking) -> Prompt:
        """Return the prompt. It takes time.

        Raises:
            CheckpointError: the model has no chat template, or one that takes too long or too much memory.
            InputError: the template refuses the messages.
        """
        source = tokenizer.template_source(with_tools=bool(self.tools))
        text = tokenizer.render_chat(
            read_messages(self.messages, source),
            add_generation_prompt=self.opens_answer,
            continue_final_message=self.continues,
            tools=self.tools,
            variables=self.variables,
        )
        last = self.messages[-1]
        text, start = thinking.start(text, {**last, "content": words(last)} if self.continues else None)
        return Prompt(tokenizer.encode(text, special_tokens=False), start, text)
