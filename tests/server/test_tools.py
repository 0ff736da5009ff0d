"""Tools: to the template as they are, and out of answers as calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eightfold.server.tools import ToolParser, ToolUse

TAGGED = (
    "{% if tools %}Tools: {{ tools | tojson }} Answer <tool_call>{{ '{\"name\": 1}' }}</tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}({{ c.function.arguments | tojson }})>{% endfor %}\n"
    "{% endfor %}"
)
JSON = (
    '{% if tools %}Answer {"name": name, "parameters": object} of tools {{ tools | tojson }}{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
ASK = [{"role": "user", "content": "Weather?"}]


@pytest.fixture
def talk(serve):
    """Serve an engine with a template and an answer; return the server and its official client."""
    clients = []

    def start(template, answer):
        running = serve(template=template, answer=answer, max_model_len=2000)
        clients.append(running.openai())
        return running, clients[-1]

    yield start
    for client in clients:
        client.close()


def prompt_of(running):
    return running.engine.tokenizer.decode(running.engine.last[0], keep_special=True)


def streamed(client, **asked):
    """Return content, calls and the last finish reason of a stream."""
    content, calls, reason = "", {}, None
    for chunk in client.chat.completions.create(model="tiny", messages=ASK, stream=True, **asked):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.index not in calls and call.id.startswith("call_")
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
        reason = choice.finish_reason or reason
    return content, list(calls.values()), reason


def whole(client, **asked):
    choice = client.chat.completions.create(model="tiny", messages=ASK, **asked).choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (TAGGED, f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", ("Let me see.", [("weather", {"city": "Oslo"})])),
        (TAGGED, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
         ("", [("weather", {"city": "Oslo"})] * 2)),
        (TAGGED, f"<tool_call>{CALL}", ("", [("weather", {"city": "Oslo"})])),
        (TAGGED, "a < b and <tool> is no call", ("a < b and <tool> is no call", [])),
        (TAGGED, "<tool_call>nonsense</tool_call> so", ("<tool_call>nonsense</tool_call> so", [])),
        (TAGGED, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
         ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', [])),
        (TAGGED, CALL, (CALL, [])),
        (JSON, '{"name": "weather", "parameters": {"city": "Oslo"}}', ("", [("weather", {"city": "Oslo"})])),
        (JSON, f"<|python_tag|>{CALL}; {CALL}", ("", [("weather", {"city": "Oslo"})] * 2)),
        (JSON, f"[{CALL}]", ("", [("weather", {"city": "Oslo"})])),
        (JSON, '{"name": "clock", "parameters": {"at": NaN}}', ('{"name": "clock", "parameters": {"at": NaN}}', [])),
        (JSON, '{"a": 1} is JSON', ('{"a": 1} is JSON', [])),
        (JSON, f"I say {CALL}", (f"I say {CALL}", [])),
        ("{{ messages[0].content }}", CALL, (CALL, [])),
        ('"parameters" {{ messages[0].content }}', CALL, (CALL, [])),
    ],
)  # fmt: skip
def test_calls_are_found_in_the_templates_form(talk, ask, template, answer, expected):
    _, client = talk(template, answer)
    found = ask(client, tools=[WEATHER, CLOCK])
    assert found == (*expected, "tool_calls" if expected[1] else "stop")


@pytest.mark.parametrize("ask", [whole, streamed])
def test_only_one_call_if_asked_so(talk, ask):
    _, client = talk(TAGGED, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>")
    assert len(ask(client, tools=[WEATHER], parallel_tool_calls=False)[1]) == 1


def test_without_tools_nothing_is_a_call(talk):
    running, client = talk(TAGGED, f"<tool_call>{CALL}</tool_call>")
    assert whole(client) == (f"<tool_call>{CALL}</tool_call>", [], "stop")
    assert whole(client, tools=[WEATHER], tool_choice="none")[1:] == ([], "stop")
    assert "Tools" not in prompt_of(running)


def test_the_template_sees_tools_calls_and_results(talk):
    running, client = talk(TAGGED, "Sunny.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    client.chat.completions.create(
        model="tiny",
        tools=[WEATHER],
        messages=[
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
        ],
    )
    prompt = prompt_of(running)
    assert f"Tools: {json.dumps([WEATHER])}" in prompt
    assert 'assistant: <weather({"city": "Oslo"})>tool: 12 degrees' in prompt


def test_an_answer_can_be_passed_back_as_the_client_has_it(talk):
    running, client = talk(TAGGED, f"<tool_call>{CALL}</tool_call>")
    message = client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER]).choices[0].message
    client.chat.completions.create(model="tiny", messages=[*ASK, message], tools=[WEATHER])
    assert 'assistant: <weather({"city": "Oslo"})>' in prompt_of(running)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_is_a_form_of_the_answer(talk, choice):
    running, client = talk("{{ messages[0].content }}", CALL)
    assert whole(client, tools=[WEATHER, CLOCK], tool_choice=choice)[1] == [("weather", {"city": "Oslo"})]
    schema = json.loads(running.engine.last[1].structured.json_schema)
    calls = schema.get("anyOf", [schema])
    assert [each["properties"]["name"]["const"] for each in calls] == (
        ["weather", "clock"] if choice == "required" else ["weather"]
    )
    assert calls[0]["properties"]["arguments"] == WEATHER["function"]["parameters"]


def test_a_forced_call_by_a_real_engine(real):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {**schema, "additionalProperties": False}}}
    with real.openai() as client:
        choice = client.chat.completions.create(
            model="tiny", messages=ASK, tools=[tool], tool_choice="required", max_tokens=150, seed=1
        ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["on"] in (True, False)


def test_template_variables_reach_the_template_and_cannot_replace_messages(talk):
    running, client = talk("{{ messages[0].content }} {{ enable_thinking }}", "x")
    variables = {"enable_thinking": False, "messages": [{"content": "other"}]}
    whole(client, extra_body={"chat_template_kwargs": variables})
    assert prompt_of(running) == "Weather? False"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same(size):
    text = f"Well,  \n <tool_call>{CALL}</tool_call> and <tool_call> {CALL} </tool_call>  then < tool_call>"
    parser = ToolParser(ToolUse([WEATHER], frozenset({"weather"}), "tagged"))
    content, calls = "", []
    for at in range(0, len(text), size):
        more, found = parser.push(text[at : at + size])
        content, calls = content + more, calls + found
    more, found = parser.finish()
    content, calls = content + more, calls + found
    assert (content, len(calls)) == ("Well, and  then < tool_call>", 2)
