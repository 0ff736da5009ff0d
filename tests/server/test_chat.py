"""Chats, with the official client, on a real engine: what comes back is what the engine says."""

from __future__ import annotations

import asyncio

import pytest

from tests.conversations import CONVERSATIONS, TEMPLATE
from tests.engine.test_structured import DEAD_END
from tests.server.running import Running, eventually
from tests.test_dialects import DEEPSEEK_3, LLAMA, MISTRAL, PARTS_ONLY, TALK, rendered

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is deep learning?"}]


@pytest.fixture
def client(real: Running):
    with real.openai() as found:
        yield found


def prompt_of(real: Running, messages=ASKED):
    return real.engine.engine.tokenizer.encode_chat(messages, add_generation_prompt=True)


def greedy(real: Running, prompt, count):
    """Return the engine's own greedy answer."""
    from eightfold import SamplingParams

    async def last():
        found = None
        async for output in real.engine.generate(prompt, SamplingParams(temperature=0, max_tokens=count)):
            found = output
        return found

    # The engine belongs to the server's event loop.
    loop = real.server.servers[0].get_loop()
    return asyncio.run_coroutine_threadsafe(last(), loop).result(30).outputs[0]


def test_a_greedy_answer_is_the_engines(real, client):
    answer = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=20, temperature=0)
    expected = greedy(real, prompt_of(real), 20)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "tiny", "assistant")
    assert answer.usage.prompt_tokens == len(prompt_of(real))
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_text_in_pieces(real, client):
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *pieces, usage = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces][-2:] == [None, whole.choices[0].finish_reason]
    assert (usage.choices, usage.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert all(piece.usage is None for piece in pieces)
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_it(client):
    chunks = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, stream=True)
    assert all("usage" not in chunk.model_dump(exclude_unset=True) for chunk in chunks)


def test_a_prefix_that_was_there_before_is_counted(client):
    asked = [{"role": "user", "content": "the same beginning " * 10}]

    def cached(salt: str) -> int | None:
        body = {"cache_salt": salt} if salt else {}
        usage = client.chat.completions.create(model="tiny", messages=asked, max_tokens=1, extra_body=body).usage
        assert usage.prompt_tokens > 128
        return usage.prompt_tokens_details.cached_tokens

    assert [cached(salt) for salt in ("a", "a", "b", "b", "", "")] == [0, 128, 0, 128, None, None]


def test_n_answers_differ_and_a_seed_repeats_them(client):
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "n": 3, "seed": 7}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_logprobs(real, client):
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    assert len(whole.logprobs.content) == 5
    for token in whole.logprobs.content:
        assert token.token == token.top_logprobs[0].token  # greedy: the likeliest was taken
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
        assert token.token in (bytes(token.bytes).decode("utf-8", "replace"), _shown(token.bytes))
    streamed = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        for each in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == whole.logprobs.content


def test_logit_bias_with_text_keys_decides(real, client):
    wanted = real.engine.engine.tokenizer.encode("Z", special_tokens=False)[0]
    answer = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=3, logit_bias={str(wanted): 100})
    assert answer.choices[0].message.content == "ZZZ"


def test_a_stop_string_ends_it_and_is_named(real, client):
    wanted = real.engine.engine.tokenizer.encode("Z", special_tokens=False)[0]
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 9, "logit_bias": {str(wanted): 100}, "stop": ["ZZ"]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.model_extra["stop_reason"]) == ("", "stop", "ZZ")
    kept = client.chat.completions.create(**asked, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.message.content == "ZZ"
    longer = client.chat.completions.create(**asked, extra_body={"min_tokens": 4}).choices[0]
    assert longer.message.content.startswith("ZZ")


# As Pydantic writes a union of models with a discriminator, one of which holds such a union.
EITHER = {
    "discriminator": {"mapping": {"a": "#/$defs/A", "n": "#/$defs/N"}, "propertyName": "k"},
    "oneOf": [{"$ref": "#/$defs/N"}, {"$ref": "#/$defs/A"}],
}
UNION = {
    "$defs": {
        "A": {
            "type": "object",
            "properties": {"k": {"const": "a"}, "of": EITHER},
            "required": ["k", "of"],
            "title": "A",
        },
        "N": {"type": "object", "properties": {"k": {"const": "n"}}, "required": ["k"], "title": "N"},
    },
    **EITHER,
}


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_grammar": 'start: "x" "y"+ "z"'}, "xy+z"),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"guided_json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                          "additionalProperties": False}}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
        ({"guided_json": UNION}, r"\{.*\}"),
    ],
)  # fmt: skip
def test_answers_of_a_given_form(real, client, extra, pattern):
    pytest.importorskip("llguidance")
    import re

    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 60, "seed": 1, "extra_body": extra}
    answer = client.chat.completions.create(**asked).choices[0]
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.message.content, re.DOTALL), answer.message.content
    else:  # y+ may go on
        assert answer.message.content.startswith(("xy", "{"))


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_cannot_be_kept_to_its_form_is_an_error(real, n):
    """A text that nothing can follow was allowed to begin; it never looks complete."""
    pytest.importorskip("llguidance")
    import json

    asked = {"model": "tiny", "messages": ASKED, "guided_grammar": DEAD_END, "n": n, "max_tokens": 9}
    whole = real.post("/v1/chat/completions", asked)
    error = whole.json()["error"]
    assert (whole.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == (
        "structured grammar: got a form in which no token can come next, expected one that can be kept to until it ends"
    )
    stream = real.post("/v1/chat/completions", {**asked, "stream": True})
    *pieces, last = map(json.loads, stream.text.strip().removeprefix("data: ").split("\n\ndata: "))
    assert all(choice["finish_reason"] is None for piece in pieces for choice in piece["choices"])
    assert last == {"error": error}
    assert eventually(lambda: real.engine.stats.blocks_used == 0)


def test_a_json_schema_in_openais_words(client):
    pytest.importorskip("llguidance")
    import json

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=100, seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    ).choices[0]  # fmt: skip
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content)["ok"] in (True, False)


def test_content_in_parts_is_joined_by_line_ends(real):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    found = real.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json()["tokens"]
    assert found == prompt_of(real, [{"role": "user", "content": "one\ntwo"}])


def test_a_developer_is_a_system_to_templates_that_know_none(real):
    found = real.post("/tokenize", {"messages": [{"role": "developer", "content": "a"}]}).json()["tokens"]
    assert found == prompt_of(real, [{"role": "system", "content": "a"}])


def test_more_tokens_than_fit_is_what_fits(real, client):
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=100_000, extra_body={"ignore_eos": True}, temperature=0
    )
    assert answer.usage.total_tokens == 384
    assert answer.choices[0].finish_reason == "length"


def test_prompt_logprobs(real, client):
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    found = answer.model_extra["prompt_logprobs"]
    prompt = prompt_of(real)
    assert (len(found), found[0]) == (len(prompt), None)
    assert all(str(token) in likely for token, likely in zip(prompt[1:], found[1:], strict=True))


def _shown(raw):
    """Return what stands for bytes that are no text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_messages_are_read_as_llm_and_the_input_file_read_them(serve, name):
    messages, expected = CONVERSATIONS[name]
    running = serve(template=TEMPLATE)
    tokens = running.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert running.engine.tokenizer.decode(tokens, keep_special=True) == expected


@pytest.mark.parametrize("template", [DEEPSEEK_3, LLAMA, MISTRAL, PARTS_ONLY])
def test_calls_and_results_reach_the_template_in_its_form(serve, template):
    running = serve(template=template)
    tokens = running.post("/tokenize", {"messages": TALK, "add_generation_prompt": False}).json()["tokens"]
    assert running.engine.tokenizer.decode(tokens, keep_special=True) == rendered(template, TALK)


def test_what_a_template_refuses_is_a_400_in_its_words(serve):
    running = serve(template=MISTRAL)
    answer = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert answer.json()["error"]["message"].startswith("messages: got roles must alternate, expected roles and")
