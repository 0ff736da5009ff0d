"""The conversation that a request sends, and the prompt that the model's chat template makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eightfold.engine import conversation
from eightfold.engine.conversation import Prompt
from eightfold.engine.reasoning import Thinking
from eightfold.errors import EightfoldError
from eightfold.messages import Message, MessageError, is_continued, read_messages
from eightfold.server.fields import Fields, bad_request, refused
from eightfold.server.template_variables import template_variables
from eightfold.tokenizer import Tokenizer
from eightfold.values import SWITCH

MAX_MESSAGES = 4096
_SAME_AS_OTHERS = {"prefix", "reasoning", "reasoning_content"}  # which messages that were read have by another name


class Conversation(conversation.Conversation):
    """A conversation that a request sends."""

    def prompt(self, tokenizer: Tokenizer, thinking: Thinking) -> Prompt:
        """Return the prompt; ApiError 400 where the template refuses the messages. It takes time."""
        try:
            return super().prompt(tokenizer, thinking)
        except EightfoldError as error:
            raise refused(error, param="messages") from None


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
    _note_ignored(fields, given, messages)
    continues = fields.read("continue_final_message", SWITCH, False) or is_continued(messages)
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


def _note_ignored(fields: Fields, given: Sequence[Any], messages: Sequence[Message]) -> None:
    """Take note of what messages have that nobody has read: each name once, where it is first."""
    found: dict[str, int] = {}
    for at, (message, read) in enumerate(zip(given, messages, strict=True)):
        for name in message.keys() - read.keys() - _SAME_AS_OTHERS:
            if message[name]:
                found.setdefault(name, at)
    for name, at in found.items():
        fields.note_ignored(f"messages[{at}].{name}")
