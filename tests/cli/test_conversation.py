"""A chat's prompts: tokens that were there stay, and what does not fit is forgotten."""

from __future__ import annotations

import pytest

from eightfold.cli.chatting import Conversation
from eightfold.errors import CapacityError, InputError
from eightfold.tokenizer import Tokenizer

# Tokens around a message in the test's chat template: a role and </s>; and the role that opens an answer.
AROUND, OPENING = 2, 1


@pytest.fixture
def tokenizer(small) -> Tokenizer:
    return Tokenizer(small.directory)


def spoken(tokenizer: Tokenizer, count: int, room: int, length: int = 10) -> Conversation:
    """Return a conversation of turns in which both sides say `length` tokens."""
    conversation = Conversation(tokenizer, room)
    for i in range(count):
        prompt = conversation.ask(f"{i:0{length}}")
        conversation.answer(prompt, "x" * length, tokenizer.encode("x" * length))
    return conversation


def test_a_prompt_is_the_rendered_conversation(tokenizer):
    conversation = Conversation(tokenizer, 1000, "be brief")
    conversation.answer(conversation.ask("hi"), "ho", tokenizer.encode("ho"))
    prompt = conversation.ask("and?")
    assert conversation.messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ]
    assert prompt.token_ids == tokenizer.encode_chat(conversation.messages(), add_generation_prompt=True)
    assert prompt.forgotten == 0


def test_what_the_model_said_stays_the_tokens_it_said(tokenizer):
    conversation = Conversation(tokenizer, 1000)
    first = conversation.ask("hi")
    half = [tokenizer.encode("é")[0]]  # half a character, which as text is another one
    conversation.answer(first, tokenizer.decode(half), half)
    second = conversation.ask("more")
    known = [*first.token_ids, *half]
    assert second.token_ids[: len(known)] == known
    assert tokenizer.decode(second.token_ids[len(known) :], keep_special=True) == "</s><|user|>more</s><|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        # The answer's text is changed, so its tokens are no longer those.
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}<|assistant|>",
        # Behind the answer there is ordinary text, which might be one token with it.
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}END{% endfor %}<|assistant|>",
    ],
)
def test_a_template_that_changes_or_joins_texts_is_tokenized_anew(small, template):
    tokenizer = Tokenizer(small.directory, template)
    conversation = Conversation(tokenizer, 1000)
    conversation.answer(conversation.ask("hi"), " ho", [1, 2, 3])
    prompt = conversation.ask("more")
    assert prompt.token_ids == tokenizer.encode_chat(conversation.messages(), add_generation_prompt=True)


PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"


def test_a_template_that_reads_lists_of_parts_gets_them(small):
    tokenizer = Tokenizer(small.directory, PARTS)
    conversation = Conversation(tokenizer, 1000, "kind")
    conversation.answer(conversation.ask("hi"), "ho", [1])
    assert conversation.ask("more").text == "kind;hi;ho;more;"
    assert conversation.tokens() == len("kind;hi;ho;more;")


def test_the_oldest_turns_are_forgotten_until_half_of_the_room_is_free(tokenizer):
    turn = 2 * (10 + AROUND)
    conversation = spoken(tokenizer, 5, room=5 * turn + OPENING)
    prompt = conversation.ask("?" * 10)
    # 5 turns and 13 tokens do not fit; half of the room is 60 tokens, which 1 turn and 13 tokens are below.
    assert prompt.forgotten == 4
    assert len(prompt.token_ids) == turn + 10 + AROUND + OPENING
    assert [message["content"] for message in conversation.turns] == [f"{4:010}", "x" * 10, "?" * 10]


def test_no_more_is_forgotten_than_that(tokenizer):
    turn = 2 * (10 + AROUND)
    conversation = spoken(tokenizer, 8, room=8 * turn + OPENING)
    # Half of the room is 96 tokens: 3 turns and 13 tokens are 85, 4 turns would be 109.
    assert conversation.ask("?" * 10).forgotten == 5
    conversation.take_back()
    assert conversation.ask("?" * 10).forgotten == 0


def test_only_the_last_message_is_left_if_it_is_long(tokenizer):
    conversation = spoken(tokenizer, 4, room=100)
    prompt = conversation.ask("?" * 80)
    assert prompt.forgotten == 4
    assert conversation.turns == [{"role": "user", "content": "?" * 80}]


def test_a_message_that_is_too_long_alone_is_refused_and_nothing_forgotten(tokenizer):
    conversation = spoken(tokenizer, 2, room=60)
    before = list(conversation.turns)
    with pytest.raises(CapacityError, match=r"^message: got 63 tokens, expected at most 60, which leaves room for an"):
        conversation.ask("?" * 60)
    assert conversation.turns == before
    with pytest.raises(CapacityError, match=r"^message: got 63 tokens"):
        Conversation(tokenizer, 60).ask("?" * 60)


def test_the_system_prompt_is_never_forgotten(tokenizer):
    conversation = spoken(tokenizer, 4, room=120)
    conversation.system = "s" * 20
    prompt = conversation.ask("now")
    assert prompt.forgotten > 0
    assert prompt.text.startswith(f"<|system|>{'s' * 20}</s>")


def test_a_template_that_refuses_leaves_the_conversation_as_it_was(small):
    tokenizer = Tokenizer(small.directory, "{{ raise_exception('no') if messages | length > 1 }}x")
    conversation = Conversation(tokenizer, 100)
    conversation.answer(conversation.ask("a"), "b", [1])
    with pytest.raises(InputError, match="got no, expected roles"):
        conversation.ask("c")
    assert len(conversation.turns) == 2


def test_after_a_reset_only_the_system_prompt_is_left(tokenizer):
    conversation = spoken(tokenizer, 2, room=1000)
    conversation.system = "s"
    conversation.turns.clear()
    assert conversation.messages() == [{"role": "system", "content": "s"}]
    assert conversation.ask("a").text == "<|system|>s</s><|user|>a</s><|assistant|>"
