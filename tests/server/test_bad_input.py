"""Bad input gets a 4xx that says what is wrong, and the engine never hears of it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from eightfold.server.fields import MAX_BODY_BYTES, MAX_JSON_DEPTH
from tests.server.running import Running, eventually

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def untouched(real: Running):
    """Serves a real engine, which has answered nothing when the tests are over."""
    before = real.engine.stats
    yield real
    after = real.engine.stats
    assert (after.generated_tokens, after.prompt_tokens, after.blocks_used) == (
        before.generated_tokens, before.prompt_tokens, 0,
    )  # fmt: skip


def refused(raw, status=400):
    """Return the message of an error of the right form."""
    assert raw.status_code == status, raw.text
    assert raw.headers["content-type"] == "application/json"
    error = raw.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "body is not JSON: Expecting value at character 0"),
        (b"{", "body is not JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"[1]", "body: expected a JSON object"),
        (b'{"a": "\xff"}', "body: got byte 7 that is not UTF-8, expected JSON in UTF-8"),
        (b'{"a": "\\ud800"}', "body: got half a surrogate pair in a text, expected Unicode"),
        (b'{"\\udc00": 1}', "body: got half a surrogate pair in a text, expected Unicode"),
        (b'{"a": NaN}', "body is not JSON: NaN is no number of JSON"),
        (b'{"a": [-Infinity]}', "body is not JSON: -Infinity is no number of JSON"),
        (b'{"a": 1e999}', "body: got a number too large, expected a finite one"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels"),
        (b"[" * 200_000, f"body: got JSON nested deeper than {MAX_JSON_DEPTH} levels"),
        (b"[" * 1_000_000, "body: got more than 262144 brackets"),
        (b'{"a":' + b"1" * 5000 + b"}", "body is not JSON that can be used: Exceeds the limit (4300 digits)"),
    ],
)
def test_bodies_that_are_no_json_of_ours(untouched, raw, message):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert refused(untouched.post(path, raw)).startswith(message)


def test_json_of_the_deepest_level_passes(untouched):
    raw = b'{"prompt": "a", "x":' + b"[" * 62 + b"]" * 62 + b"}"
    assert untouched.post("/tokenize", raw).status_code == 200


def test_a_body_that_is_too_large(untouched):
    assert refused(untouched.post("/v1/completions", b" " * (MAX_BODY_BYTES + 1)), 413).startswith("body: got more")
    parts = (b" " * 2**20 for _ in range(5))  # of a length that is not said before
    raw = untouched.http.post("/tokenize", content=parts, headers={"content-type": "application/json"})
    assert refused(raw, 413) == f"body: got more than {MAX_BODY_BYTES} bytes. Send less text."
    assert eventually(lambda: untouched.server.service.limiter.held_bytes == 0)


def test_who_asks_before_sending_too_large_a_body_need_not_send_it(untouched):
    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", int(untouched.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_the_largest_body_passes(untouched):
    content = json.dumps({"prompt": "a"}).encode()
    raw = untouched.post("/tokenize", content + b" " * (MAX_BODY_BYTES - len(content)))
    assert raw.json()["tokens"] == untouched.engine.engine.tokenizer.encode("a")


def test_other_content_is_refused(untouched):
    raw = untouched.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert refused(raw, 415) == "Content-Type: got text/plain, expected application/json"
    assert refused(untouched.http.post("/tokenize", content=b"{}"), 415).startswith("Content-Type: got none")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages: expected at least one"),
        ([], "messages: expected at least one"),
        ("Hi", "messages: got 'Hi', expected a list"),
        (["Hi"], "messages[0]: got 'Hi', expected an object"),
        ([{"content": "Hi"}], "messages[0].role: got null, expected system, user, assistant or tool"),
        ([{"role": 5, "content": "Hi"}], "messages[0].role: got 5, expected system, user, assistant or tool"),
        ([{"role": "user"}], "messages[0].content: got null, expected a text"),
        ([{"role": "user", "content": 5}], "messages[0].content: got 5, expected a text or a list of parts"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]: got 'a', expected an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: got null, expected a text"),
        ([{"role": "user", "content": [{"type": "poem"}]}], "messages[0].content[0].type: got 'poem', expected text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
         "messages[0].content[0]: this model reads text only, not image_url"),
        ([{"role": "assistant", "content": "a", "function_call": {"name": "f"}}],
         "messages[0].function_call is not supported. Use tool_calls."),
        ([{"role": "user", "content": "a", "name": 5}], "messages[0].name: got 5, expected a text"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls: got an object, expected a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}],
         "messages[0].tool_calls[0]: got an object, expected an object with a function that has a name and arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "nope"}}]}],
         "messages[0].tool_calls[0].function.arguments: got text that is not JSON, expected a JSON object"),
        ([{"role": "user", "content": "a"}] * 4097, "messages: got 4097 items, expected at most 4096"),
    ],
)  # fmt: skip
def test_what_are_no_messages(untouched, messages, message):
    raw = untouched.post("/v1/chat/completions", {**ASKED, "messages": messages})
    assert refused(raw) == message
    assert raw.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "n: got 0, expected a whole number from 1 to 128"),
        ("n", 10**9, "n: got 1000000000, expected a whole number from 1 to 128"),
        ("n", 10**400, "n: got 1000000"),
        ("n", "2", "n: got '2', expected a whole number from 1 to 128"),
        ("n", True, "n: got True, expected a whole number from 1 to 128"),
        ("n", 1.0, "n: got 1.0, expected a whole number from 1 to 128"),
        ("temperature", -1, "temperature: got -1, expected a number of at least 0"),
        ("temperature", "hot", "temperature: got 'hot', expected a number of at least 0"),
        ("top_p", 0, "top_p: got 0, expected a number above 0 and up to 1"),
        ("top_k", -2, "top_k: got -2, expected a whole number of at least -1"),
        ("min_p", 2, "min_p: got 2, expected a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty: got 0, expected a number above 0"),
        ("presence_penalty", 3, "presence_penalty: got 3, expected a number from -2 to 2"),
        ("seed", "x", "seed: got 'x', expected a whole number from"),
        ("stop", [""], "stop: got '', expected a text that is not empty"),
        ("stop", ["a"] * 64 + ["b"] * 1 + [str(i) for i in range(70)], "stop: got 135 texts, expected at most 64"),
        ("stop", "x" * 1025, "stop: got 1025 characters, expected at most 1024"),
        ("stop", 5, "stop: got 5, expected a list of texts"),
        ("stop_token_ids", [-1], "stop_token_ids: got -1, expected a whole number of at least 0"),
        ("max_tokens", 0, "max_tokens: got 0, expected 1 to 2147483648"),
        ("max_tokens", 10**100, "max_tokens: got a huge number, expected 1 to 2147483648"),
        ("max_tokens", "ten", "max_tokens: got 'ten', expected a whole number"),
        ("max_completion_tokens", 5, "max_tokens and max_completion_tokens: got different values. Give one."),
        ("min_tokens", 5, "min_tokens: got 5, expected a whole number from 0 to 4"),
        ("logit_bias", {"a": 1}, "logit_bias: expected token ids, as texts, and what is added to them"),
        ("logit_bias", {"5": 101}, "logit_bias: got 101, expected a number from -100 to 100"),
        ("logit_bias", {"99999": 1}, "logit_bias token id: got 99999, expected 0 to 319"),
        ("logit_bias", [1], "logit_bias: expected token ids"),
        ("logprobs", 1, "logprobs: got 1, expected true or false"),
        ("top_logprobs", 2, 'top_logprobs: expected "logprobs": true beside it'),
        ("prompt_logprobs", 99, "prompt_logprobs: got 99, expected a whole number from 0 to 20"),
        ("stream", "yes", "stream: got 'yes', expected true or false"),
        ("stream_options", {"include_usage": True}, "stream_options: only with stream"),
        ("model", 5, "model: got 5, expected a text"),
        ("response_format", {"type": "xml"}, "response_format: got 'xml', expected type text, json_object, "),
        ("response_format", {"type": "json_schema"}, "response_format: expected json_schema with an object as schema"),
        ("guided_json", "{", "structured json_schema: got Expecting property name"),
        ("guided_json", [1], "guided_json: got a list, expected a JSON schema"),
        ("guided_choice", [], "structured output: got nothing, expected exactly one of"),
        ("guided_choice", "yes", "guided_choice: got 'yes', expected a list of texts"),
        ("guided_regex", "x" * 70_000, "structured output: got a form of more than 65536 bytes. Send a smaller one."),
        ("structured_outputs", {}, "structured_outputs: expected one of json, regex, grammar, choice or json_object"),
        ("tools", "f", "tools: got 'f', expected a list"),
        ("tools", [{"type": "retrieval"}], 'tools[0]: got an object, expected an object with "type": "function"'),
        ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name: got 'a b', expected"),
        ("tools", [{"type": "function", "function": {"name": "f", "strict": "x"}}],
         "tools[0].function.strict: got 'x', expected true or false"),
        ("tools", [{"type": "function", "function": {"name": "f", "description": 5}}],
         "tools[0].function.description: got 5, expected a text"),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 2,
         "tools[1].function.name: got 'f', expected a name that no tool before it has"),
        ("tool_choice", "required", "tool_choice: got required, expected tools to choose from"),
        ("tool_choice", {"type": "function", "function": {"name": "g"}}, "tool_choice: got 'g', expected one of tools"),
        ("chat_template", "{{ messages }}", "chat_template is not supported."),
        ("functions", [{"name": "f"}], "functions is not supported. Use tools and tool_choice."),
        ("priority", False, "priority is not supported. Requests are served in the order in which they come."),
        ("add_generation_prompt", 1, "add_generation_prompt: got 1, expected true or false"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense(untouched, field, value, message):
    raw = untouched.post("/v1/chat/completions", {**ASKED, field: value})
    assert refused(raw).startswith(message)
    assert raw.json()["error"]["param"].partition(".")[0] == field


@pytest.mark.parametrize(
    "form",
    [
        {"guided_regex": "("},
        {"guided_grammar": "start: nothing"},
        {"guided_json": {"type": "no such type"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://elsewhere/x"}}}},
        {"guided_regex": "a[^\\s\\S]"},
        {"guided_json": False},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": False}}},
        {"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}},
    ],
)
def test_forms_that_make_no_sense(untouched, form):
    pytest.importorskip("llguidance")
    assert refused(untouched.post("/v1/chat/completions", {**ASKED, **form})).startswith("structured ")


def test_only_one_form_at_a_time(untouched):
    form = {"guided_regex": "a", "response_format": {"type": "json_object"}}
    raw = untouched.post("/v1/chat/completions", {**ASKED, **form})
    assert refused(raw).startswith("structured output: got more than one form")


def test_a_prompt_longer_than_the_context(untouched):
    raw = untouched.chat("x" * 400)
    assert raw.json()["error"]["code"] == "context_length_exceeded"
    assert refused(raw) == (
        "This model's maximum context length is 384 tokens. However, you requested 404 tokens (403 in the messages, "
        "1 in the completion): the prompt is too long. Please reduce the length of the messages."
    )
    assert raw.json()["error"]["param"] == "messages"
    many = untouched.post("/v1/completions", {"prompt": [[1], [1] * 384]})
    assert refused(many).startswith("This model's maximum context length is 384 tokens. However, you requested 385")
    assert (many.json()["error"]["param"], many.json()["error"]["code"]) == ("prompt", "context_length_exceeded")


def test_a_huge_prompt_is_refused_while_others_are_answered(untouched):
    import threading

    found: list[object] = []
    prompt = "hello " * (MAX_BODY_BYTES // 64)  # a good part of a second of tokenizing
    thread = threading.Thread(target=lambda: found.append(untouched.post("/v1/completions", {"prompt": prompt})))
    thread.start()
    others = 0
    while not found and thread.is_alive():
        others += untouched.http.get("/health").status_code == 200
    thread.join()
    assert refused(found[0]).startswith("This model's maximum context length is 384 tokens.")
    assert others > 3  # a loop that tokenized would have answered them behind it


LONG = "long " * 50_000


@pytest.mark.parametrize(
    "fields",
    [
        {"model": LONG},
        {"messages": [{"role": LONG, "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image" + LONG}]}]},
        {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
        {"response_format": {"type": LONG}},
        {"tools": [{"type": "function", "function": {"name": LONG}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"function": {"name": LONG}}},
        {"guided_regex": "(" + "a" * 60_000},
        {"guided_grammar": "x" * 60_000},
        {"guided_json": {"type": "y" * 60_000}},
        {"stop": LONG},
        {"logit_bias": {LONG: 1}},
        {"seed": LONG},
        {"temperature": 10**4000},
        {"n": -(10**4000)},
    ],
)
def test_errors_do_not_repeat_long_values(untouched, fields):
    raw = untouched.post("/v1/chat/completions", {**ASKED, **fields})
    assert len(refused(raw, raw.status_code)) <= 500 and raw.status_code in (400, 404)


def test_a_template_that_repeats_its_messages_is_cut_short(serve):
    running = serve(template="{{ raise_exception('no ' + messages[0].content) }}")
    assert len(refused(running.chat("a" * 100_000))) <= 500


def test_more_logprobs_than_a_request_may_have(serve, monkeypatch):
    running = serve(max_model_len=500)
    monkeypatch.setattr("eightfold.server.service.MAX_ENTRIES", 5 * 10 * 3)
    asked = {"prompt": "abc", "max_tokens": 10, "n": 5, "logprobs": 2}
    assert running.post("/v1/completions", asked).status_code == 200
    message = (
        "logprobs: got up to 165 in all answers, expected at most 150. Ask for fewer answers, tokens or alternatives."
    )
    assert refused(running.post("/v1/completions", {**asked, "max_tokens": 11})) == message
    # The prompt's come once, or in front of every answer.
    count = len(running.post("/tokenize", {"prompt": "abc"}).json()["tokens"])
    monkeypatch.setattr("eightfold.server.service.MAX_ENTRIES", count * 3)
    single = {**asked, "n": 1}
    assert running.post("/v1/completions", {**single, "echo": True}).status_code == 200
    twice = running.post("/v1/completions", {"prompt": "abc", "n": 2, "logprobs": 2, "echo": True, "max_tokens": 0})
    assert refused(twice).startswith(f"logprobs: got up to {2 * count * 3 + 2 * 3} in all answers")
    # What one sequence generates takes its time, and is not limited.
    assert running.post("/v1/completions", {**single, "max_tokens": 400}).status_code == 200


def test_more_logprobs_than_all_requests_may_have_have_to_wait(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.service.MAX_HELD_ENTRIES", 100)
    running = serve()
    asked = {"prompt": "abc", "max_tokens": 10, "n": 5, "logprobs": 2}
    assert refused(running.post("/v1/completions", asked), 429).startswith("too many log-probabilities")
    assert running.post("/v1/completions", {**asked, "n": 2}).status_code == 200
    assert eventually(lambda: running.server.service.limiter.held_entries == 0)


def test_values_of_a_body_count_as_the_memory_that_they_take(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.service.MAX_HELD_BYTES", 4 * 2**20)
    running = serve()
    many = b'{"prompt": "a", "x": [' + b"[]," * 100_000 + b"1]}"
    assert refused(running.post("/tokenize", many), 429).startswith("too many texts are being read")
    assert running.post("/tokenize", {"prompt": "a", "x": "a" * len(many)}).status_code == 200
    assert eventually(lambda: running.server.service.limiter.held_bytes == 0)


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "hello " * (MAX_BODY_BYTES // 16), "return_token_strs": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_BODY_BYTES // 40)}]},
        {"prompt": "a", "x": [[]] * 250_000},
        {"prompt": "a", "x": list(range(500_000))},
    ],
)
def test_long_work_for_one_client_does_not_hold_up_others(untouched, content):
    import threading
    import time

    raw, found, slowest = json.dumps(content).encode(), list[Any](), 0.0
    thread = threading.Thread(target=lambda: found.append(untouched.post("/tokenize", raw)))
    thread.start()
    while thread.is_alive():
        begin = time.monotonic()
        assert untouched.http.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - begin)
    assert found[0].status_code in (200, 429)
    assert slowest < 2  # also while others use these cores


def test_a_message_that_the_template_refuses(serve):
    running = serve(template="{{ raise_exception('Only users here') }}")
    raw = running.chat()
    expected = "messages: got Only users here, expected roles and contents that the chat template accepts"
    assert refused(raw) == expected
    assert running.engine.last is None


def test_a_model_without_a_template_does_not_chat(serve):
    running = serve()
    running.server.service.template = None
    assert refused(running.chat()).startswith("messages: this model has no chat template. Use /v1/completions")


def test_another_model_is_unknown(untouched):
    raw = untouched.post("/v1/chat/completions", {**ASKED, "model": "gpt-5"})
    assert refused(raw, 404) == "model: got 'gpt-5', expected 'tiny'"
    assert raw.json()["error"]["code"] == "model_not_found"


def test_paths_and_methods(untouched):
    assert refused(untouched.http.get("/v1/nothing"), 404).startswith(
        "GET '/v1/nothing' is not served here. Served are"
    )
    raw = untouched.http.get("/v1/chat/completions")
    assert refused(raw, 405) == "GET '/v1/chat/completions' is not allowed"
    assert raw.headers["allow"] == "POST"
    assert untouched.http.post("/v1/completions/", content=b"{}").status_code == 404


def test_unknown_fields_are_ignored_and_named_in_the_log(serve, caplog):
    running = serve()
    with caplog.at_level("INFO", "eightfold.server"):
        assert running.chat(user="me", temprature=3, metadata={"a": "b"}).status_code == 200
        assert eventually(lambda: caplog.records)
    assert caplog.records[-1].record.ignored == ["metadata", "temprature", "user"]
