"""The conversation that a request sends, and the prompt that the model's chat template makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eightfold.engine.reasoning import Start, Thinking
from eightfold.errors import EightfoldError
from eightfold.messages import Message, MessageError, read_messages, words
from eightfold.server.fields import Fields, bad_request, refused
from eightfold.server.template_variables import template_variables
from eightfold.tokenizer import Tokenizer
from eightfold.values import SWITCH

MAX_MESSAGES = 4096


class Prompt(NamedTuple):
    """A conversation as the model gets it: token ids, and how the answer to it begins."""

    token_ids: list[int]
    start: Start


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
        """Return the prompt; ApiError 400 where the template refuses the messages. It takes time."""
        try:
            source = tokenizer.template_source(with_tools=bool(self.tools))
            text = tokenizer.render_chat(
                read_messages(self.messages, source),
                add_generation_prompt=self.opens_answer,
                continue_final_message=self.continues,
                tools=self.tools,
                variables=self.variables,
            )
        except EightfoldError as error:
            raise refused(error, param="messages") from None
        last = self.messages[-1]
        text, start = thinking.start(text, {**last, "content": words(last)} if self.continues else None)
        return Prompt(tokenizer.encode(text, special_tokens=False), start)


def read_conversation(fields: Fields, template: str | None, tools: Sequence[Any] | None) -> Conversation:
    """Return the conversation that a request sends to a model with this chat template.

    Args:
        fields: of the request.
        template: the chat template's text; None: there is none.
        tools: as the template is shown them.
    """
    if template is None:
        raise bad_request(
            "messages: this model has no chat template. Use /v1/completions, or start the server with --chat-template.",
            param="messages",
        )
    given = fields.items("messages", MAX_MESSAGES)
    try:
        messages = read_messages(given, None)
    except MessageError as error:
        raise refused(error, param="messages") from None
    # DeepSeek's API says the same in the message itself.
    continues = fields.read("continue_final_message", SWITCH, False) or given[-1].get("prefix") is True
    opens_answer = fields.read("add_generation_prompt", SWITCH, not continues)
    if continues and opens_answer:
        message = "continue_final_message: got true beside add_generation_prompt, expected only one of them"
        raise bad_request(message, param="continue_final_message")
    return Conversation(
        messages=messages,
        tools=tools,
        opens_answer=opens_answer,
        continues=continues,
        variables=template_variables(fields, template),
    )
