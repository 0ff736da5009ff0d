"""Pieces of streams, from outputs as an engine gives them."""

from __future__ import annotations

import json

import pytest

from eightfold.engine.outputs import CompletionOutput, Produced, RequestOutput, Times
from eightfold.server.answers import ChatAnswer, CompletionAnswer, in_parts, to_json
from eightfold.server.extras import Extras
from eightfold.server.logs import Record
from eightfold.server.token_texts import TokenTexts
from eightfold.server.tools import ToolUse
from eightfold.tokenizer import Tokenizer


def outputs():
    """Two answers: the first ends a step before the second, and is there again when all is finished."""
    short, long = Produced([1], ["a"]), Produced([2], ["b"])
    yield output([CompletionOutput(0, short, (0, 0), "stop", "x"), CompletionOutput(1, long, (0, 0))])
    long.token_ids.append(3)
    long.pieces.append("c")
    again, rest = CompletionOutput(0, short, (1, 1), "stop", "x"), CompletionOutput(1, long, (1, 1), "length")
    yield output([again, rest], finished=True)


def output(answers, finished=False):
    return RequestOutput("r", (9,), answers, finished, Times(0.0))


def choices_of(answer):
    raw = b"".join(answer.pieces(0, each) for each in outputs()).decode()
    assert raw.endswith("\n\n")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in raw[:-2].split("\n\n")]


@pytest.fixture
def texts(model):
    return TokenTexts(Tokenizer(model))


def test_every_answer_of_a_chat_ends_once(texts):
    choices = choices_of(ChatAnswer("m", texts, ToolUse(), streams=True, extras=Extras()))
    found = [(c["index"], c["delta"].get("content"), c["finish_reason"], c.get("stop_reason")) for c in choices]
    assert found == [
        (0, "", None, None), (0, "a", None, None), (0, None, "stop", "x"), (1, "", None, None), (1, "b", None, None),
        (1, "c", None, None), (1, None, "length", None),
    ]  # fmt: skip


def test_every_answer_of_a_completion_ends_once(texts):
    answer = CompletionAnswer("m", texts, n=2, logprobs=None, echo=None, only_prompts=False, extras=Extras())
    found = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices_of(answer)]
    assert found == [(0, "a", "stop"), (1, "b", None), (1, "c", "length")]


def test_the_usage_is_an_event_of_its_own(texts):
    answer = ChatAnswer("m\n", texts, ToolUse(), streams=True, extras=Extras(usage=True))
    record = Record("id", "POST", "/", prompt_tokens=5, cached_tokens=3, generated_tokens=2, tells_cached=True)
    last, done = answer.end(record).decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    event = json.loads(last.removeprefix("data: "))
    assert (event["choices"], event["model"], event["object"]) == ([], "m\n", "chat.completion.chunk")
    assert event["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"a": []},
        {"a": {"b": [{"c": {"d": [1, {"e": [2, 3]}, "\u00e9\ud800"]}}, None], "f": ""}},
        [[[[[[[1]]]]]], 2],
        {"a": list(range(10_000)), "b": ["x"] * 4097, "c": [1] * 4096},
    ],
)
def test_in_parts_json_is_the_same(content):
    assert b"".join(in_parts(content)) == to_json(content)
