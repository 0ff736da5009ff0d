"""Completions, with the official client, on a real engine."""

from __future__ import annotations

import pytest

from tests.server.running import Running


@pytest.fixture
def complete(real: Running):
    with real.openai() as client:
        yield lambda prompt, **fields: client.completions.create(model="tiny", prompt=prompt, **fields)


def texts(answer):
    return [choice.text for choice in answer.choices]


def test_a_prompt_can_be_text_or_ids_one_or_many(real, complete):
    ids = [real.engine.engine.tokenizer.encode(text) for text in ("one", "two two")]
    greedy = {"temperature": 0, "max_tokens": 8}
    one, two = complete("one", **greedy), complete("two two", **greedy)
    assert texts(complete(ids[0], **greedy)) == texts(one)
    both = texts(one) + texts(two)
    assert texts(complete(["one", "two two"], **greedy)) == both
    assert texts(complete(ids, **greedy)) == both
    assert texts(one) != texts(two)


def test_several_prompts_stream_with_an_index_each(complete):
    asked = {"temperature": 0, "max_tokens": 8, "n": 2, "seed": 1}
    whole = complete(["one", "two"], **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    streamed = dict.fromkeys(range(4), "")
    reasons = dict.fromkeys(range(4))
    *pieces, usage = complete(["one", "two"], **asked, stream=True, stream_options={"include_usage": True})
    for piece in pieces:
        choice = piece.choices[0]
        streamed[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert list(streamed.values()) == texts(whole)
    assert list(reasons.values()) == [choice.finish_reason for choice in whole.choices]
    assert usage.usage.model_dump() == whole.usage.model_dump()


def test_sixteen_tokens_are_the_default(complete):
    assert complete("x", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_echo_and_logprobs_of_prompt_and_answer(real, complete):
    answer = complete("abc", echo=True, logprobs=2, max_tokens=3, temperature=0)
    choice = answer.choices[0]
    plain = complete("abc", max_tokens=3, temperature=0)
    assert choice.text == "abc" + plain.choices[0].text
    found = choice.logprobs
    assert found.tokens[:3] == ["a", "b", "c"] and len(found.tokens) == 6
    assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])
    assert found.top_logprobs[0] is None and all(2 <= len(likely) <= 3 for likely in found.top_logprobs[1:])
    assert found.text_offset[:4] == [0, 1, 2, 3]
    streamed = list(complete("abc", echo=True, logprobs=2, max_tokens=3, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in streamed) == choice.text
    logprobs = [piece.choices[0].logprobs for piece in streamed]
    assert [value for each in logprobs if each for value in each.token_logprobs] == found.token_logprobs
    assert [offset for each in logprobs if each for offset in each.text_offset] == found.text_offset


def test_logprobs_of_a_prompt_alone(complete):
    answer = complete("abc", echo=True, logprobs=0, max_tokens=0)
    assert (texts(answer), answer.choices[0].logprobs.tokens) == (["abc"], ["a", "b", "c"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    (piece,) = complete("abc", echo=True, logprobs=0, max_tokens=0, stream=True)
    assert (piece.choices[0].text, piece.choices[0].logprobs.tokens) == ("abc", ["a", "b", "c"])


def test_echo_of_ids_is_their_text(real, complete):
    ids = real.engine.engine.tokenizer.encode("one")
    assert texts(complete(ids, echo=True, max_tokens=1, temperature=0))[0].startswith("one")


@pytest.mark.parametrize(
    "prompt", [None, [], "", 5, True, {"a": 1}, ["a", 5], [["a"]], ["a", [1]], [[]], [True], [1.5], [[1], [True]]]
)
def test_what_is_no_prompt_is_refused(real, prompt):
    raw = real.post("/v1/completions", {"model": "tiny", "prompt": prompt})
    assert (raw.status_code, raw.json()["error"]["param"]) == (400, "prompt"), raw.text


@pytest.mark.parametrize("ids", [[-1], [320], [10**30], [0, 1, 99999]])
def test_ids_outside_the_vocabulary_are_refused(real, ids):
    raw = real.post("/v1/completions", {"prompt": ids, "echo": True})
    assert raw.status_code == 400
    assert raw.json()["error"]["message"].startswith("token id: got ")
    assert raw.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suffix": "tail"}, "suffix is not supported. Put what comes after into the prompt."),
        ({"best_of": 3}, "best_of: expected the same as n. Ask for n answers and choose."),
        ({"use_beam_search": True}, "use_beam_search is not supported. There is no beam search."),
        ({"logprobs": 21}, "logprobs: got 21, expected a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs: got true, expected a whole number from 0 to 20"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected at least 1, or echo"),
        ({"max_tokens": -2}, "max_tokens: got -2, expected 0 to 2147483648"),
        ({"echo": "yes"}, "echo: got 'yes', expected true or false"),
    ],
)
def test_what_is_refused_says_why(real, fields, message):
    raw = real.post("/v1/completions", {"prompt": "x", **fields})
    assert (raw.status_code, raw.json()["error"]["message"]) == (400, message)


def test_neutral_values_of_refused_fields_pass(real):
    fields = {"suffix": "", "best_of": 2, "n": 2, "use_beam_search": False, "length_penalty": 1.0, "logprobs": None}
    assert real.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **fields}).status_code == 200
