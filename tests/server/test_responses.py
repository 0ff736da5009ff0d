"""The Responses API: read as a chat, answered as items, whole and streamed, and kept for those who build on them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from eightfold.engine.outputs import CompletionOutput, Produced, RequestOutput, Times
from eightfold.engine.reasoning import STYLES, Start
from eightfold.engine.sampling_params import SamplingParams
from eightfold.server.logs import Record
from eightfold.server.requests import Said
from eightfold.server.response_answers import ResponseAnswer
from eightfold.server.response_store import KEPT_SECONDS, ResponseStore
from eightfold.server.tool_parsers import ToolUse
from tests.server.running import Running
from tests.server.test_tools import CALL, prompt_of

MESSAGES = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "{% if m.tool_call_id %} of {{ m.tool_call_id }}{% endif %}{{ '\\n' }}{% endfor %}"
)
TAGGED = "{% if tools %}Tools: {{ tools | tojson }} Answer <tool_call>{{ '\\n' }}{% endif %}" + MESSAGES
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock"}
CALLS = f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n So it is."

_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def ask(serve):
    """Serve an engine with an answer; return what asks it, and the server."""

    def start(answer: str = "Hello!", template: str = TAGGED, **settings: Any):
        running: Running = serve(template=template, answer=answer, max_model_len=2000, **settings)

        def whole(given: Any = "Hi", **fields: Any) -> dict[str, Any]:
            raw = running.post("/v1/responses", {"input": given, **fields})
            assert raw.status_code == 200, raw.text
            Response.model_validate(raw.json(), strict=True)
            return raw.json()

        return whole, running

    return start


def events_of(running: Running, given: Any = "Hi", **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, which are what OpenAI's client knows, in order, under their own names."""
    raw = running.post("/v1/responses", {"input": given, "stream": True, **fields})
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8", raw.text
    found = []
    for block in raw.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", len(found))
        if event["type"] != "error":
            _EVENT.validate_python(event)
        found.append(event)
    return found


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that the events of a stream add up to, as a client puts them together."""
    items = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(json.loads(json.dumps(event["item"])))
            continue
        if "output_index" not in event:
            continue
        item = items[event["output_index"]]
        assert event.get("item_id", item["id"]) == item["id"]
        parts = item.get("summary" if "summary" in kind else "content", [])
        if kind.endswith("part.added"):
            parts.append(event["part"])
        elif kind.endswith("text.delta"):
            parts[0]["text"] += event["delta"]
            if "logprobs" in parts[0]:
                parts[0]["logprobs"] += event["logprobs"]
        elif kind.endswith("text.done"):
            assert parts[0]["text"] == event["text"]
        elif kind.endswith("part.done"):
            assert parts[0] == event["part"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
    return items


def essence(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what differs each time."""
    copy = json.loads(json.dumps(response))
    for name in ("id", "created_at", "completed_at"):
        del copy[name]
    for item in copy["output"]:
        del item["id"]
        item.pop("call_id", None)
    return copy


def test_a_text_is_answered_with_a_message_and_what_was_asked(ask):
    whole, running = ask()
    found = whole(
        instructions="Be brief", metadata={"a": "b"}, temperature=0.5, top_p=0.9, max_output_tokens=50, user="u",
        safety_identifier="s", prompt_cache_key="k", truncation="auto", parallel_tool_calls=False, seed=3,
    )  # fmt: skip
    assert prompt_of(running) == "system: Be brief\nuser: Hi\n"
    assert running.engine.last[1].seed == 3
    assert found["id"].startswith("resp_")
    (message,) = found["output"]
    part = {"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}
    assert message == {
        "id": message["id"], "type": "message", "role": "assistant", "content": [part], "status": "completed",
    }  # fmt: skip
    assert found["usage"] == {
        "input_tokens": 26, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 32,
    }  # fmt: skip
    said = {
        "object": "response", "status": "completed", "incomplete_details": None, "error": None, "model": "tiny",
        "instructions": "Be brief", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 50,
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "truncation": "auto", "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": False, "store": True, "previous_response_id": None,
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None}, "background": False,
        "top_logprobs": 0,
    }  # fmt: skip
    assert {name: found[name] for name in said} == said


@pytest.mark.parametrize(
    ("answer", "template", "fields"),
    [
        ("Hello!", TAGGED, {}),
        (" \n", TAGGED, {}),
        ("Hello!", TAGGED, {"max_output_tokens": 3}),
        ("Hello!", TAGGED, {"top_logprobs": 2}),
        (CALLS, TAGGED, {"tools": [WEATHER]}),
        (CALLS, TAGGED, {"tools": [WEATHER], "parallel_tool_calls": False}),
        (CALLS, TAGGED, {"tools": [WEATHER], "max_output_tokens": 40}),
        ("<think>\nHm.\n</think>\n\nYes.", MESSAGES, {}),
        ("<think>\nHm.\n</think>\n\nYes.", MESSAGES, {"max_output_tokens": 10}),
        ("<think>Hm.</think>", MESSAGES, {}),
        (f"<think>\n{CALL}</think>{CALLS}", f"<think>{TAGGED}", {"tools": [WEATHER]}),
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(ask, answer, template, fields):
    whole, running = ask(answer, template)
    expected = whole(**fields)
    events = events_of(running, **fields)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == f"response.{expected['status']}"
    assert [(e["response"]["status"], e["response"]["output"]) for e in events[:2]] == [("in_progress", [])] * 2
    last = events[-1]["response"]
    assert essence(last) == essence(expected)
    assert added_up(events) == last["output"]


FENCED = f"Sure:\n```json\n{CALL}\n```\nOk"


@pytest.mark.parametrize(
    ("family", "text", "kinds"),
    [
        ("hermes", f"Hi <b>\n<tool_call>{CALL}</tool_call> and [x]\n<tool_call>{CALL}</tool_call>\n\n", "mcmc"),
        ("hermes", f"<think>{CALL}</think>\n<tool_call>{CALL}", "rc"),
        ("qwen2.5-coder", FENCED, "mcm"),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "cc"),
        ("pythonic", '[weather(city="Oslo"), weather(city="B)")]', "cc"),
    ],
)
def test_how_an_answer_is_cut_makes_no_difference(family, text, kinds):
    function = {"name": "weather", "parameters": WEATHER["parameters"]}
    use = ToolUse([{"type": "function", "function": function}], frozenset({"weather"}), family)
    start, found = Start(STYLES["qwen3"]), []
    for size in (1, 2, 3, 5, 8, 13, 1000):
        begin = {"id": "resp_1", "created_at": 1, "status": "in_progress", "output": []}
        said = Said(use, start, SamplingParams(), True)
        answer = ResponseAnswer(begin, None, said, shows_logprobs=False, keep=None)
        produced = Produced()
        for at in range(0, len(text), size):
            produced.token_ids.append(at)
            produced.pieces.append(text[at : at + size])
            shown, is_last = len(produced.pieces) - 1, at + size >= len(text)
            output = CompletionOutput(0, produced, (shown, shown), "stop" if is_last else None)
            answer.pieces(0, RequestOutput("a", (1,), [output], is_last, Times(0)))
        last = answer.end(Record("id", "POST", "/")).decode().rpartition("data: ")[2]
        found.append(essence(json.loads(last)["response"])["output"])
    assert "".join(item["type"].removeprefix("function_")[0] for item in found[0]) == kinds
    assert all(each == found[0] for each in found)


def test_calls_are_items_in_the_order_in_which_they_come(ask):
    whole, _ = ask(CALLS)
    found = whole(tools=[WEATHER])["output"]
    assert [item["type"] for item in found] == ["message", "function_call", "function_call", "message"]
    assert [item["content"][0]["text"] for item in found if item["type"] == "message"] == [
        "Let me see.",
        "\n So it is.",
    ]
    for call in found[1:3]:
        assert call["call_id"].startswith("call_")
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
        assert call["status"] == "completed"


def test_an_answer_that_is_cut_short_is_incomplete(ask):
    whole, _ = ask()
    found = whole(max_output_tokens=3)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (found["output"][0]["status"], found["output"][0]["content"][0]["text"]) == ("incomplete", "Hel")
    assert found["completed_at"] is None


def test_thoughts_are_an_item_of_their_own(ask):
    whole, running = ask("<think>\nHm.\n</think>\n\nYes.", MESSAGES)
    first = whole(reasoning={"summary": "auto", "effort": "low"})
    thought, message = first["output"]
    assert thought == {
        "id": thought["id"], "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}],
        "status": "completed",
    }  # fmt: skip
    assert message["content"][0]["text"] == "Yes."
    assert first["reasoning"] == {"effort": "low", "summary": "auto"}
    assert [item["type"] for item in whole(include_reasoning=False)["output"]] == ["message"]
    expected = "user: Hi\nassistant: <think>Hm.</think>Yes.\nuser: Sure?\n"
    whole("Sure?", previous_response_id=first["id"])
    assert prompt_of(running) == expected
    whole([{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "Sure?"}])
    assert prompt_of(running) == expected


def test_logprobs_are_those_of_the_text(ask):
    whole, _ = ask("Hello!")
    found = whole(include=["message.output_text.logprobs"], top_logprobs=1)
    logprobs = found["output"][0]["content"][0]["logprobs"]
    assert "".join(each["token"] for each in logprobs) == "Hello!"
    assert logprobs[0] == {
        "token": "H", "logprob": -0.5, "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]},
                         {"token": "I", "logprob": -9999.0, "bytes": [73]}],
    }  # fmt: skip


def test_items_are_the_messages_of_a_chat(ask):
    whole, running = ask()
    whole([
        {"role": "developer", "content": "Be kind"},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "in Oslo?"},
        ]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "Let me see.", "annotations": []},
        ]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "12 degrees"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Noon"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}], "encrypted_content": "x"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Thanks"},
    ], instructions="Be brief")  # fmt: skip
    assert prompt_of(running).splitlines() == [
        "system: Be brief",
        "Be kind",
        "user: Weather",
        "in Oslo?",
        'assistant: <think>Hm.</think>Let me see.<weather {"city": "Oslo"}><clock {}>',
        "tool: 12 degrees of c1",
        "tool: Noon of c2",
        "assistant: <think>So.</think>Fine.",
        "user: Thanks",
    ]


def test_the_last_message_can_be_continued(ask):
    whole, running = ask("llo")
    whole([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}], continue_final_message=True)
    assert prompt_of(running) == "user: Hi\nassistant: He"


def test_what_codex_sends(ask):
    whole, running = ask()
    texts = {role: [{"type": "input_text", "text": role}] for role in ("developer", "user")}
    found = whole(
        [{"type": "message", "role": role, "content": content} for role, content in texts.items()],
        instructions="You are a coding agent", tools=[{**CLOCK, "strict": False}], tool_choice="auto", store=False,
        parallel_tool_calls=False, reasoning={"effort": "medium", "summary": "auto"}, prompt_cache_key="a",
        include=["reasoning.encrypted_content"], text={"verbosity": "medium"}, service_tier="auto",
    )  # fmt: skip
    assert prompt_of(running).endswith("system: You are a coding agent\ndeveloper\nuser: user\n")
    assert found["store"] is False


def test_a_real_engine_streams_what_it_answers_whole(real):
    asked = {"input": "Hi", "max_output_tokens": 12, "temperature": 0, "top_logprobs": 2, "ignore_eos": True}
    expected = real.post("/v1/responses", asked).json()
    Response.model_validate(expected, strict=True)
    events = events_of(real, "Hi", **{name: value for name, value in asked.items() if name != "input"})
    assert essence(events[-1]["response"]) == essence(expected)
    assert added_up(events) == events[-1]["response"]["output"]
    (message,) = expected["output"]
    assert len(message["content"][0]["logprobs"]) == 12


def test_tools_are_shown_as_a_chat_shows_them(ask):
    whole, running = ask()
    whole(tools=[{**WEATHER, "strict": None}, CLOCK])
    shown = prompt_of(running)
    functions = [{"type": "function", "function": {n: v for n, v in tool.items() if n != "type"}}
                 for tool in (WEATHER, CLOCK)]  # fmt: skip
    running.chat("Hi", tools=functions)
    assert prompt_of(running) == shown
    assert f"Tools: {json.dumps(functions)}" in shown


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "clock"]),
        ({"type": "function", "name": "clock"}, ["clock"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}, ["clock"]),
    ],
)
def test_a_call_can_be_forced(ask, choice, names):
    whole, running = ask('{"name": "clock", "arguments": {}}')
    found = whole(tools=[WEATHER, CLOCK], tool_choice=choice)
    assert [item["name"] for item in found["output"]] == ["clock"]
    assert found["tool_choice"] == choice
    schema = running.engine.last[1].structured.json_schema
    assert [name for name in ("weather", "clock") if f'"{name}"' in schema] == names


def test_only_allowed_tools_are_recognised(ask):
    whole, _ = ask(f"<tool_call>{CALL}</tool_call>")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    found = whole(tools=[WEATHER, CLOCK], tool_choice=allowed)
    assert [item["type"] for item in found["output"]] == ["message"]
    assert [tool["name"] for tool in found["tools"]] == ["weather", "clock"]
    allowed["tools"] = [{"type": "function", "name": "weather"}]
    assert [item["type"] for item in whole(tools=[WEATHER, CLOCK], tool_choice=allowed)["output"]] == ["function_call"]


def test_a_form_is_that_of_a_chat(ask):
    whole, running = ask()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert whole(text={"format": form, "verbosity": "low"})["text"] == {"format": form, "verbosity": "low"}
    asked = running.engine.last[1].structured
    running.chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert running.engine.last[1].structured == asked
    whole(text={"format": {"type": "json_object"}})
    assert running.engine.last[1].structured.json_object


def test_a_form_that_no_text_has_is_refused_by_its_name_here(real):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    for streams in (False, True):
        asked = {"input": "Hi", "stream": streams, "text": {"format": {"type": "json_schema", "schema": schema}}}
        raw = real.post("/v1/responses", asked)
        assert (raw.status_code, raw.json()["error"]["param"]) == (400, "text.format")
    raw = real.post("/v1/responses", {"input": "Hi", "regex": "("})
    assert (raw.status_code, raw.json()["error"]["param"]) == (400, "regex")


def test_a_response_goes_on_from_an_earlier_one(ask):
    whole, running = ask()
    first = whole("One", instructions="Be brief")
    second = whole("Two", previous_response_id=first["id"])
    assert prompt_of(running) == "user: One\nassistant: Hello!\nuser: Two\n"  # instructions are not inherited
    assert second["previous_response_id"] == first["id"]
    whole([{"role": "user", "content": "Three"}], previous_response_id=second["id"])
    assert prompt_of(running).count("Hello!") == 2
    whole("Other", previous_response_id=first["id"])
    assert prompt_of(running) == "user: One\nassistant: Hello!\nuser: Other\n"


def test_the_result_of_a_call_that_the_server_has(ask):
    whole, running = ask(f"<tool_call>{CALL}</tool_call>")
    first = whole("Weather?", tools=[WEATHER])
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "12"}
    expected = f'user: Weather?\nassistant: <weather {{"city": "Oslo"}}>\ntool: 12 of {result["call_id"]}\n'
    whole([result], tools=[WEATHER], previous_response_id=first["id"])
    assert prompt_of(running).endswith(expected)
    references = [{"type": "item_reference", "id": first["output"][0]["id"]}, result]
    whole([{"role": "user", "content": "Weather?"}, *references], tools=[WEATHER])
    assert prompt_of(running).endswith(expected)
    whole([{"role": "user", "content": "Weather?"}, {"id": first["output"][0]["id"]}, result])


def test_a_kept_response_can_be_had_again_until_it_is_deleted(ask):
    whole, running = ask()
    running.http.headers["authorization"] = "Bearer none"  # as the official client sends it
    kept = whole([{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}])
    path = f"/v1/responses/{kept['id']}"
    assert running.http.get(path).json() == kept
    last = events_of(running, "Hi")[-1]["response"]
    assert running.http.get(f"/v1/responses/{last['id']}").json() == last
    with running.openai() as client:
        listed = client.responses.input_items.list(kept["id"], order="asc")
        assert [(item.role, item.content[0].text) for item in listed] == [("user", "One"), ("assistant", "Two")]
        client.responses.retrieve(kept["id"])
        client.responses.delete(kept["id"])
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(kept["id"])
    for gone in (running.http.get(path), running.http.delete(path), running.http.get(f"{path}/input_items"),
                 running.post("/v1/responses", {"input": "a", "previous_response_id": kept["id"]})):  # fmt: skip
        assert gone.status_code == 404
        assert kept["id"] in gone.json()["error"]["message"]
    del running.http.headers["authorization"]


def test_input_items_come_in_pages(ask):
    whole, running = ask()
    first = whole([{"role": "user", "content": text, "id": f"msg_{text}"} for text in "abcd"])
    path = f"/v1/responses/{first['id']}/input_items"

    def page(**params: Any):
        found = running.http.get(path, params=params).json()
        return [item["id"] for item in found["data"]], found["has_more"]

    assert page() == (["msg_d", "msg_c", "msg_b", "msg_a"], False)
    assert page(order="asc", limit=2) == (["msg_a", "msg_b"], True)
    assert page(order="asc", limit=2, after="msg_b") == (["msg_c", "msg_d"], False)
    for wrong in ({"order": "up"}, {"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"after": "msg_x"}):
        answer = running.http.get(path, params=wrong)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(wrong))


def test_nobody_sees_the_responses_of_others(ask):
    whole, running = ask()
    mine = {"authorization": "Bearer mine"}
    found = running.post("/v1/responses", {"input": "Hi"}, headers=mine).json()
    path, reference = f"/v1/responses/{found['id']}", [{"type": "item_reference", "id": found["output"][0]["id"]}]
    others = {"input": "a", "previous_response_id": found["id"]}, {"input": reference}
    for headers in ({}, {"authorization": "Bearer other"}):
        assert running.http.get(path, headers=headers).status_code == 404
        assert running.http.delete(path, headers=headers).status_code == 404
        for asked in others:
            assert running.post("/v1/responses", asked, headers=headers).status_code == 404
    for asked in others:
        assert running.post("/v1/responses", asked, headers=mine).status_code == 200
        assert running.post("/v1/responses", {**asked, "cache_salt": "s"}, headers=mine).status_code == 404
    salted = whole(cache_salt="s")["id"]
    assert running.http.get(f"/v1/responses/{salted}").status_code == 404
    assert running.http.get(f"/v1/responses/{salted}?cache_salt=s").status_code == 200


def test_what_shall_not_be_kept_is_not(ask):
    whole, running = ask()
    assert whole(store=False)["store"] is False
    assert running.http.get(f"/v1/responses/{whole(store=False)['id']}").status_code == 404
    whole, running = ask(settings={"responses_kept": 0})
    found = whole()
    assert found["store"] is False
    gone = running.post("/v1/responses", {"input": "a", "previous_response_id": found["id"]})
    assert gone.status_code == 404


def test_old_turns_are_left_out_of_a_conversation_that_is_too_long(serve):
    running = serve(template=MESSAGES, max_model_len=100)
    turns = [
        {"role": role, "content": f"{role[0]}{at} {'x' * 10}"} for at in range(3) for role in ("user", "assistant")
    ]
    asked = {"input": [*turns, {"role": "user", "content": "last"}], "instructions": "Be brief"}
    raw = running.post("/v1/responses", asked)
    assert (raw.status_code, raw.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert running.post("/v1/responses", {**asked, "truncation": "auto"}).status_code == 200
    assert prompt_of(running) == ("system: Be brief\nuser: u2 xxxxxxxxxx\nassistant: a2 xxxxxxxxxx\nuser: last\n")
    raw = running.post("/v1/responses", {"input": "x" * 200, "truncation": "auto"})
    assert raw.json()["error"]["code"] == "context_length_exceeded"


def test_a_stream_that_fails_says_so_in_the_words_of_this_api(ask):
    _, running = ask(fails_after=2)
    events = events_of(running)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    message = "internal error: the server's log has the details"
    assert {name: events[-2][name] for name in ("code", "message", "param")} == {
        "code": "internal_error", "message": message, "param": None,
    }  # fmt: skip
    response = events[-1]["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": message})
    with running.openai() as client, pytest.raises(openai.APIError, match="internal error"):
        list(client.responses.create(model="tiny", input="Hi", stream=True))


def test_the_official_client_streams_and_parses(ask):
    class Place(pydantic.BaseModel):
        city: str

    _, running = ask('{"city": "Oslo"}')
    with running.openai() as client:
        assert client.responses.create(model="tiny", input="Hi").output_text == '{"city": "Oslo"}'
        assert client.responses.parse(model="tiny", input="Hi", text_format=Place).output_parsed == Place(city="Oslo")
        with client.responses.stream(model="tiny", input="Hi", text_format=Place) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert stream.get_final_response().output_parsed == Place(city="Oslo")
        assert text == '{"city": "Oslo"}'


PART = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "input: got null, expected a text or a list of items"),
        ({"input": 5}, "input", "input: got 5, expected a text or a list of items"),
        ({"input": []}, "input", "input: expected at least one"),
        ({"input": ["a"]}, "input", "input[0]: got 'a', expected an object"),
        ({"input": [USER, {"role": "tool", "content": "a"}]}, "input", "input[1].role: got 'tool', expected user"),
        ({"input": [{"role": "user"}]}, "input", "input[0].content: got null, expected a text"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input[0].content: got 5, expected a text or a list"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input",
         "input[0].content[0].text: got null, expected a text"),
        ({"input": [USER, {"role": "developer", "content": [{"type": "input_text", "text": 5}]}]}, "input",
         "input[1].content[0].text: got 5, expected a text"),
        ({"input": [{"role": "system", "content": [{"type": "input_text", "text": 5}]}], "instructions": "a"}, "input",
         "input[0].content[0].text: got 5, expected a text"),
        ({"input": PART}, "input", "input[0].content[0]: this model reads text only, not input_image"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input", "input[0].type: got 'web_search_call', "),
        ({"input": [{"type": 5}]}, "input", "input[0].type: got 5, expected message"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "input[0].call_id: got null"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": 5, "arguments": "{}"}]}, "input",
         "input[0].name: got 5, expected a text"),
        ({"input": [USER, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "nope"}]}, "input",
         "input[1].arguments: got text that is not JSON, expected a JSON object"),
        ({"input": [USER, {"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input",
         "input[1].call_id: got 'a', expected the call_id of a function_call before it"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "a"}]}, "input", "input[1].output: got null, expected"),
        ({"input": [{"type": "reasoning", "summary": "a"}]}, "input", "input[0].summary: got 'a', expected a list"),
        ({"input": [{"type": "reasoning", "content": [{"type": "text", "text": "a"}]}]}, "input",
         "input[0].content[0].type: got 'text', expected reasoning_text"),
        ({"input": [{"type": "item_reference"}]}, "input", "input[0].id: got null, expected a text"),
        ({"input": [{**USER, "id": 5}]}, "input", "input[0].id: got 5, expected a text"),
        ({"input": [{**USER, "status": "late"}]}, "input", "input[0].status: got 'late', expected in_progress,"),
        ({"input": [USER] * 4097}, "input", "input: got 4097 items, expected at most 4096"),
        ({"instructions": 5}, "instructions", "instructions: got 5, expected a text"),
        ({"tools": {}}, "tools", "tools: got an object, expected a list"),
        ({"tools": ["a"]}, "tools", "tools[0]: got 'a', expected an object"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type: got 'web_search', expected function"),
        ({"tools": [CLOCK, {"type": "function", "function": {"name": "f"}}]}, "tools", "tools[1].name: got null"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "tools[1].name: got 'clock', expected a name that no tool before it has"),
        ({"tools": [{**CLOCK, "parameters": 5}]}, "tools", "tools[0].parameters: got 5, expected a JSON schema"),
        ({"tool_choice": "sometimes", "tools": [CLOCK]}, "tool_choice", "tool_choice: got 'sometimes', expected none"),
        ({"tool_choice": 5, "tools": [CLOCK]}, "tool_choice", "tool_choice: got 5, expected none, auto, required"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: got required, expected tools to choose from"),
        ({"tool_choice": {"type": "mcp"}, "tools": [CLOCK]}, "tool_choice", "tool_choice: got an object"),
        ({"tool_choice": {"type": "function", "name": "f"}, "tools": [CLOCK]}, "tool_choice", "tool_choice: got 'f'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "some", "tools": []}, "tools": [CLOCK]}, "tool_choice",
         "tool_choice.mode: got 'some', expected"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}, "tools": [CLOCK]},
         "tool_choice", "tool_choice.tools[0]: got 'f', expected one of tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": {}}]}, "tools": [CLOCK]},
         "tool_choice", "tool_choice.tools[0]: got an object, expected an object with a function's name"),
        ({"tools": [{"type": "function", "name": {}}]}, "tools", "tools[0].name: got an object, expected 1 to 64"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "parallel_tool_calls: got 'no', expected true or false"),
        ({"text": "a"}, "text", "text: got 'a', expected an object"),
        ({"text": {"verbosity": 5}}, "text.verbosity", "text.verbosity: got 5, expected a text"),
        ({"text": {"format": "json"}}, "text.format", "text.format: got 'json', expected an object"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format: got 'xml', expected type text,"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "text.format: expected"),
        ({"reasoning": "low"}, "reasoning", "reasoning: got 'low', expected an object"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort", "reasoning.effort: got 5, expected a text"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary", "reasoning.summary: got 'long', expected auto,"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens: got 0, expected"),
        ({"max_output_tokens": "a"}, "max_output_tokens", "max_output_tokens: got 'a', expected a whole number"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot', expected"),
        ({"top_p": 2}, "top_p", "top_p: got 2, expected"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs: got 21, expected a whole number from 0"),
        ({"include": "all"}, "include", "include: got 'all', expected a list"),
        ({"include": ["all"]}, "include", "include[0]: got 'all', expected"),
        ({"stream": "yes"}, "stream", "stream: got 'yes', expected true or false"),
        ({"store": "yes"}, "store", "store: got 'yes', expected true or false"),
        ({"metadata": []}, "metadata", "metadata: got a list, expected an object"),
        ({"metadata": {"a": 5}}, "metadata.a", "metadata.a: got 5, expected a text"),
        ({"truncation": "some"}, "truncation", "truncation: got 'some', expected auto or disabled"),
        ({"user": 5}, "user", "user: got 5, expected a text"),
        ({"safety_identifier": 5}, "safety_identifier", "safety_identifier: got 5, expected a text"),
        ({"prompt_cache_key": 5}, "prompt_cache_key", "prompt_cache_key: got 5, expected a text"),
        ({"previous_response_id": 5}, "previous_response_id", "previous_response_id: got 5, expected a text"),
        ({"background": True}, "background", "background is not supported. Use stream."),
        ({"conversation": "conv_1"}, "conversation", "conversation is not supported. Use previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt is a field of /v1/completions."),
        ({"messages": []}, "messages", "messages is a field of /v1/chat/completions."),
        ({"n": 2}, "n", "n is a field of /v1/chat/completions and /v1/completions."),
        ({"n_cmpl": 2}, "n_cmpl", "n_cmpl is a field of"),
        ({"best_of": 2}, "best_of", "best_of is a field of"),
        ({"logprobs": True}, "logprobs", "logprobs is a field of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs is a field of"),
        ({"return_token_ids": True}, "return_token_ids", "return_token_ids is a field of"),
        ({"typical_p": 0.5}, "typical_p", "typical_p is not supported."),
        ({"max_tokens": 5, "max_output_tokens": 6}, "max_output_tokens", "max_tokens and max_output_tokens: got"),
        ({"text": {"format": {"type": "json_object"}}, "response_format": {"type": "text"}}, "text.format",
         "text.format: got it beside response_format. Give one."),
        ({"json_schema": 5}, "json_schema", "json_schema: got 5, expected a JSON schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_as_the_request_has_it(ask, fields, param, message):
    _, running = ask()
    raw = running.post("/v1/responses", {"input": "Hi", **fields})
    assert raw.status_code == 400, raw.text
    error = raw.json()["error"]
    assert error["message"].startswith(message), error["message"]
    assert error["param"] == param
    assert running.engine.last is None


def test_hints_and_what_changes_nothing_are_accepted(ask):
    whole, running = ask()
    whole(
        background=False, stream_options={"include_obfuscation": False}, service_tier="auto", max_tool_calls=3,
        include=["reasoning.encrypted_content"], tool_choice="none", n=1, prompt_cache_retention="24h",
        text={"verbosity": "low", "format": None}, context_management=[], instructions="",
        reasoning={"effort": None, "summary": None}, tools=None, metadata=None,
    )  # fmt: skip
    assert prompt_of(running) == "user: Hi\n"


def test_the_tokens_of_a_request_can_be_counted(ask):
    _, running = ask()
    asked = {"input": "Hi", "instructions": "Be brief", "tools": [WEATHER]}
    counted = running.post("/v1/responses/input_tokens", asked).json()
    assert running.engine.last is None
    found = running.post("/v1/responses", asked).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": found["usage"]["input_tokens"]}
    assert running.post("/responses/input_tokens", {"input": 5}).json()["error"]["param"] == "input"


def test_a_response_that_is_complete_cannot_be_cancelled_or_streamed(ask):
    whole, running = ask()
    path = f"/v1/responses/{whole()['id']}"
    assert running.post(f"{path}/cancel").status_code == 400
    assert running.http.get(f"{path}?stream=true").json()["error"]["param"] == "stream"


def response_of(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "output": [{"id": f"out_{name}", "text": text}]}


def test_the_store_forgets_what_was_used_least():
    store = ResponseStore(2)
    for name in "abc":
        store.put("me", response_of(name), [{"id": "shared"}])
        assert store.get("me", "a") is not None or name == "c"
    assert [store.get("me", name) is not None for name in "abc"] == [True, False, True]
    assert store.holder("me", "out_b") is None
    assert store.holder("me", "out_a").items == [{"id": "shared"}, {"id": "out_a", "text": ""}]
    assert store.delete("me", "c")
    assert not store.delete("me", "c")
    assert store.holder("me", "shared").names == ["shared", "out_a"]  # the other response still has it
    assert store.holder("you", "shared") is None
    assert store.delete("me", "a")
    assert (store.size, len(store), store.holder("me", "shared")) == (0, 0, None)


def test_the_store_has_limits_of_bytes_and_of_time():
    now = [0.0]
    store = ResponseStore(10, most_bytes=3000, clock=lambda: now[0])
    store.put("me", response_of("large", "x" * 2000), [])
    assert len(store) == 0
    for name in "ab":
        store.put("me", response_of(name, "x" * 1000), [])
    assert [store.get("me", name) is not None for name in "ab"] == [False, True]
    assert 1000 < store.size < 3000
    now[0] += KEPT_SECONDS
    assert store.get("me", "b") is not None
    now[0] += KEPT_SECONDS + 1
    assert store.get("me", "b") is None
