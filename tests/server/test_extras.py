"""What requests may ask to have beside answers: token ids, usage so far, timings, a fingerprint, offsets, echoes."""

from __future__ import annotations

import json
import shutil

import pytest

from eightfold.server.fingerprint import fingerprint

HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def encode(real):
    tokenizer = real.engine.engine.tokenizer
    return lambda text: tokenizer.encode(text, special_tokens=False)


# ---- Token ids.


def test_a_chat_has_the_ids_of_prompt_and_answer(serve):
    running = serve(answer="H\u00e9llo")
    asked = {"messages": HI, "return_token_ids": True}
    whole = running.post(CHAT, {**asked, "n": 2}).json()
    prompt, ids = running.engine.last[0], running.engine.tokenizer.encode("H\u00e9llo", special_tokens=False)
    assert whole["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in whole["choices"]] == [ids, ids]
    first, *rest = running.events(CHAT, {**asked, "stream_options": {"include_usage": True}})
    assert first["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in event for event in rest)
    streamed = [
        token for event in [first, *rest] for choice in event["choices"] for token in choice.get("token_ids", [])
    ]
    assert (streamed, rest[-1]["choices"]) == (ids, [])


def test_choices_of_completions_have_the_ids_of_their_prompts(real):
    asked = {"prompt": [[72, 73], [74]], "max_tokens": 5, "n": 2, "temperature": 0, "return_token_ids": True}
    whole = real.post(COMPLETION, asked).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in whole] == [[72, 73], [72, 73], [74], [74]]
    found = {choice["index"]: ([], []) for choice in whole}
    for event in real.events(COMPLETION, asked):
        for choice in event["choices"]:
            ids, prompts = found[choice["index"]]
            ids += choice.get("token_ids", [])
            prompts += choice.get("prompt_token_ids", [])
    assert found == {each["index"]: (each["token_ids"], each["prompt_token_ids"]) for each in whole}
    assert all(1 <= len(choice["token_ids"]) <= 5 for choice in whole)


def test_ids_of_tokens_without_text_come_with_the_next_text(real):
    """Of a character of several tokens only the last one brings text."""
    tokenizer = real.engine.engine.tokenizer
    asked = {"prompt": "x", "max_tokens": 12, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    ids = tokenizer.encode("\u00e9\U0001f600", special_tokens=False)
    asked["logit_bias"] = {str(token): 100 for token in ids}
    events = real.events(COMPLETION, asked)
    streamed = [token for event in events for token in event["choices"][0].get("token_ids", [])]
    whole = real.post(COMPLETION, asked).json()["choices"][0]
    assert streamed == whole["token_ids"] and len(streamed) == 12
    assert len(events) < 12  # the first token brought none either
    assert events[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


def test_without_being_asked_for_there_are_none(serve):
    running = serve()
    for path, asked in ((CHAT, {"messages": HI}), (COMPLETION, {"prompt": "x"})):
        raw = running.post(path, asked).text + running.post(path, {**asked, "stream": True}).text
        assert not any(
            name in raw for name in ("token_ids", "timings", '"usage":{"prompt_tokens":1,"completion_tokens":1')
        )


def test_of_a_prompt_alone_there_are_no_generated_ids(real):
    asked = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 0, "return_token_ids": True}
    choice = real.post(COMPLETION, asked).json()["choices"][0]
    assert (choice["token_ids"], len(choice["prompt_token_ids"])) == ([], 3)


# ---- Usage in every event, timings, the fingerprint.


@pytest.mark.parametrize("ends_with_usage", [False, True])
def test_every_event_may_have_the_usage_so_far(serve, ends_with_usage):
    running = serve()
    options = {"continuous_usage_stats": True, "include_usage": ends_with_usage}
    events = running.events(CHAT, {"messages": HI, "stream_options": options})
    size = len(running.engine.last[0])
    for event in events:
        usage = event["usage"]
        assert usage["prompt_tokens"] == size
        assert usage["total_tokens"] == size + usage["completion_tokens"]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and {1, 2, 3, 4, 5, 6} == set(counts)
    assert (events[-1]["choices"] == []) == ends_with_usage


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": HI}), (COMPLETION, {"prompt": ["x", "yz"], "n": 2})])
def test_timings_are_those_of_llama_cpp(real, path, asked):
    asked = {**asked, "max_tokens": 4, "timings_per_token": True, "ignore_eos": True}
    whole = real.post(path, asked).json()
    timings, usage = whole["timings"], whole["usage"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    for part in ("prompt", "predicted"):
        count, taken = timings[f"{part}_n"], timings[f"{part}_ms"]
        assert taken > 0
        assert timings[f"{part}_per_token_ms"] == pytest.approx(taken / count, abs=0.01)
        assert timings[f"{part}_per_second"] == pytest.approx(1000 * count / taken, rel=0.05)
    events = real.events(path, asked)
    assert all({"prompt_n", "predicted_ms"} <= event["timings"].keys() for event in events)
    assert max(event["timings"]["predicted_n"] for event in events) == 4


def test_answers_carry_the_fingerprint_of_what_answers(serve):
    running = serve()
    raws = [running.chat().json(), running.post(COMPLETION, {"prompt": "x"}).json()]
    raws += running.events(CHAT, {"messages": HI}) + running.events(COMPLETION, {"prompt": "x"})
    (found,) = {raw["system_fingerprint"] for raw in raws}
    service = running.server.service
    assert found == fingerprint(service.tokenizer.directory, service.template, "cache", "asymmetric")
    with running.openai() as client:
        assert client.chat.completions.create(model="tiny", messages=HI).system_fingerprint == found  # type: ignore


def test_the_fingerprint_changes_with_the_model_and_not_with_its_place(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    before = fingerprint(model, "t")
    assert before == fingerprint(copy, "t") and before.startswith("fp_")
    (copy / "eightfold_report.json").write_text("{}")
    assert fingerprint(copy, "t") == before
    assert len({before, fingerprint(copy, "u"), fingerprint(copy, "t", "mindie")}) == 3
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert fingerprint(copy, "t") != before


def test_the_fingerprint_looks_into_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(10**6))
    names = {fingerprint(tmp_path, None)}
    for at in (0, 500_000, 999_999):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x" * 100_000 if at == 500_000 else b"x")
        names.add(fingerprint(tmp_path, None))
    assert len(names) == 4


# ---- Offsets.


def offsets_of(choice):
    """Return an answer's text, and what stands in it where each of its tokens begins."""
    found = choice["logprobs"]
    return choice["text"], list(zip(found["tokens"], found["text_offset"], strict=True))


def test_offsets_count_characters_also_within_and_behind_those_of_several_tokens(real):
    asked = {"prompt": "h\u00e9\U0001f600!", "echo": True, "logprobs": 0, "max_tokens": 0}
    text, found = offsets_of(real.post(COMPLETION, asked).json()["choices"][0])
    assert text == "h\u00e9\U0001f600!"
    assert [offset for _, offset in found] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert found[0][0] == "h" and found[1][0] == "bytes:\\xc3" and found[-1][0] == "!"


def test_offsets_of_an_answer_go_on_behind_the_prompt_whole_and_streamed(real):
    tokenizer = real.engine.engine.tokenizer
    asked = {"prompt": "\u00e9a", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    asked["logit_bias"] = {str(token): 100 for token in tokenizer.encode("\u00e9z", special_tokens=False)}
    for echo, begin in ((False, 0), (True, 2)):
        choice = real.post(COMPLETION, {**asked, "echo": echo}).json()["choices"][0]
        text, found = offsets_of(choice)
        assert len(found) == 20 + (3 if echo else 0)
        assert found[3][1] == 2 if echo else found[0][1] == 0
        for token, offset in found:
            assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
        assert [offset for _, offset in found] == sorted(offset for _, offset in found)
        streamed = [event["choices"][0]["logprobs"] for event in real.events(COMPLETION, {**asked, "echo": echo})]
        assert [at for each in streamed if each for at in each["text_offset"]] == [offset for _, offset in found]
        assert begin <= found[-1][1] < len(text)


def test_tokens_before_a_text_take_no_room_in_it():
    from eightfold.server.token_texts import TokenTexts

    class Tokenizer:
        def decode(self, ids, *, keep_special=False):
            return "".join("<s>" if each == 1 and keep_special else "" if each == 1 else chr(each) for each in ids)

    texts = TokenTexts(Tokenizer())  # type: ignore[arg-type]
    assert texts.offsets_of_prompt([1, 97, 98], before=1) == [0, 0, 1]
    assert texts.offsets_of_prompt([1, 97, 98], before=0) == [0, 3, 4]
    shown, hidden = texts.offsets(keep_special=True), texts.offsets(keep_special=False)
    assert [shown.take(token) for token in (97, 1, 98)] == [0, 1, 4]
    assert [hidden.take(token) for token in (97, 1, 98)] == [0, 1, 1]


# ---- Echo in chats.


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"role": "assistant", "content": "Well, "}, "Well, Hello!"),
        ({"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}, "Well, Hello!"),
        ({"role": "user", "content": "Well, "}, "Hello!"),
    ],
)
def test_a_chat_may_repeat_its_last_message(serve, last, expected):
    running = serve()
    asked = {"messages": [*HI, last], "echo": True, "add_generation_prompt": False}
    assert running.post(CHAT, asked).json()["choices"][0]["message"]["content"] == expected
    deltas = [event["choices"][0]["delta"] for event in running.events(CHAT, asked)]
    assert "".join(delta.get("content") or "" for delta in deltas) == expected
    assert running.post(CHAT, {**asked, "echo": False}).json()["choices"][0]["message"]["content"] == "Hello!"


# ---- Errors of forms that only the engine finds.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"ebnf": "start: nothing"}, "ebnf"),
        ({"response_format": {"type": "json_object", "schema": {"type": "no such type"}}}, "response_format.schema"),
        ({"structured_outputs": {"json": {"type": "no such type"}}}, "structured_outputs.json"),
    ],
)
def test_a_form_that_the_engine_refuses_is_named_by_its_field(real, fields, param):
    pytest.importorskip("llguidance")
    for path, asked in ((CHAT, {"messages": HI}), (COMPLETION, {"prompt": "x"})):
        for stream in (False, True):
            raw = real.post(path, {**asked, "max_tokens": 4, "stream": stream, **fields})
            assert (raw.status_code, raw.json()["error"]["param"]) == (400, param), raw.text
