"""Tools: to the template as they are, and out of answers as calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers

from eightfold.tokenizer import Tokenizer
from tests.conftest import write_model
from tests.server.fake_engine import FakeEngine
from tests.server.running import running

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
            assert call.index not in calls and call.id and call.type == "function"
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
        (TAGGED, CALL, ("", [("weather", {"city": "Oslo"})])),
        (TAGGED, f"{CALL} is what I would call", (f"{CALL} is what I would call", [])),
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
    closed = {"additionalProperties": False}
    assert calls[0]["properties"]["arguments"] == {**WEATHER["function"]["parameters"], **closed}
    if choice == "required":
        assert calls[1]["properties"]["arguments"] == {"type": "object", "properties": {}, **closed}


NODE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["name", "next"],
}
NODE_FORMAT = {"type": "json_schema", "json_schema": {"name": "node", "schema": NODE}}


def test_a_model_may_call_a_tool_where_its_answer_has_a_form(talk):
    llguidance = pytest.importorskip("llguidance")
    running, client = talk(TAGGED, CALL)
    assert whole(client, tools=[WEATHER, CLOCK], response_format=NODE_FORMAT)[1] == [("weather", {"city": "Oslo"})]
    grammar = llguidance.LLMatcher.grammar_from_json_schema(running.engine.last[1].structured.json_schema)

    def fits(answer):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.consume_tokens(list(answer.encode())) and matcher.is_accepting()

    assert fits(CALL) and fits('{"name": "clock", "arguments": {}}')
    assert fits('{"name": "a", "next": {"name": "weather", "next": null}}')
    assert not fits('{"name": "weather"}') and not fits('{"name": "other", "arguments": {}}') and not fits("Hello")


@pytest.mark.parametrize(("template", "choice"), [(TAGGED, "none"), ("{{ messages[0].content }}", "auto")])
def test_an_answer_keeps_its_form_alone_where_nothing_is_a_call(talk, template, choice):
    running, client = talk(template, '{"name": "a", "next": null}')
    whole(client, tools=[WEATHER], tool_choice=choice, response_format=NODE_FORMAT)
    assert json.loads(running.engine.last[1].structured.json_schema) == NODE


def test_a_forced_call_has_no_content_that_could_have_a_form(talk):
    running, client = talk(TAGGED, CALL)
    assert whole(client, tools=[WEATHER], tool_choice="required", response_format=NODE_FORMAT)[1]
    assert forced_names(running) == (["weather"], False)
    raw = running.chat(tools=[WEATHER], tool_choice="required", guided_json=NODE)
    assert raw.json()["error"]["message"] == "tool_choice: got one that asks for a call beside guided_json"


def test_a_reference_of_an_answers_form_that_leads_nowhere_is_refused(talk):
    running, _ = talk(TAGGED, CALL)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/x"}}}
    raw = running.chat(tools=[WEATHER], response_format=form)
    assert (raw.status_code, raw.json()["error"]["param"]) == (400, "response_format")


def forced_names(running):
    """Return the functions that the last answer could call, and whether it could call several."""
    schema = json.loads(running.engine.last[1].structured.json_schema)
    several = schema.get("type") == "array"
    inner = schema["items"] if several else schema
    return [call["properties"]["name"]["const"] for call in inner.get("anyOf", [inner])], several


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "clock"]),
        ("any", ["weather", "clock"]),
        ({"type": "function", "function": {"name": "clock"}}, ["clock"]),
        ({"type": "function", "name": "clock"}, ["clock"]),
        (allowed("required", "clock", "weather"), ["weather", "clock"]),
        (allowed("required", "clock"), ["clock"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}, ["clock"]),
    ],
)
def test_a_choice_may_be_written_in_several_ways(talk, choice, names):
    running, _ = talk(TAGGED, CALL)
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": choice}
    assert running.chat(**asked).status_code == 200
    assert forced_names(running) == (names, False)
    assert "clock" in prompt_of(running) and "weather" in prompt_of(running)
    running.chat(**asked, parallel_tool_calls=True)
    is_named = isinstance(choice, dict) and choice["type"] == "function"
    assert forced_names(running) == (names, not is_named)


def test_calls_of_tools_that_are_not_among_the_allowed_stay_text(talk):
    running, client = talk(TAGGED, f"<tool_call>{CALL}</tool_call>")
    assert whole(client, tools=[WEATHER, CLOCK], tool_choice=allowed("auto", "clock"))[1:] == ([], "stop")
    assert "weather" in prompt_of(running)
    assert len(whole(client, tools=[WEATHER, CLOCK], tool_choice=allowed("auto", "weather"))[1]) == 1


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("some", "tool_choice: got 'some', expected none, auto, required"),
        ({"type": "function"}, "tool_choice: got an object, expected none, auto, required"),
        ({"type": "function", "function": {"name": "rm"}}, "tool_choice: got 'rm', expected one of tools"),
        (allowed("required"), "tool_choice: got required, expected tools to choose from"),
        (allowed("auto", "rm"), "tool_choice.allowed_tools.tools[0]: got 'rm', expected one of tools"),
        (allowed("never", "clock"), "tool_choice.allowed_tools.mode: got 'never', expected auto or required"),
        ({"type": "allowed_tools", "allowed_tools": 1}, "allowed_tools: got 1, expected an object"),
        ({"type": "allowed_tools", "allowed_tools": {"tools": 1}}, "tools: got 1, expected a list"),
    ],
)
def test_a_choice_of_nothing_is_refused(talk, choice, said):
    running, _ = talk(TAGGED, CALL)
    refused = running.chat(tools=[WEATHER, CLOCK], tool_choice=choice)
    assert refused.status_code == 400
    assert said in refused.json()["error"]["message"]
    assert running.engine.last is None


NESTED = {
    "type": "function",
    "function": {
        "name": "trip",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/Place"}, "by": {"$ref": "#/$defs/Way"}},
            "required": ["to", "by"],
            "$defs": {
                "Place": {"type": "object", "properties": {"city": {"const": "Oslo"}}, "required": ["city"]},
                "Way": {"enum": ["bus"]},
            },
        },
    },
}


@pytest.mark.parametrize("ask", [whole, streamed])
def test_nested_parameters_are_obeyed_by_a_real_engine(real, ask):
    pytest.importorskip("llguidance")
    spaces = {str(token): -100 for token in real.server.service.tokenizer.encode(" \t\r\n", special_tokens=False)}
    with real.openai() as client:
        found = ask(client, tools=[NESTED], tool_choice="required", max_tokens=150, logit_bias=spaces)
    assert found == ("", [("trip", {"to": {"city": "Oslo"}, "by": "bus"})], "tool_calls")


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "trip"}}])
def test_a_forced_call_that_is_cut_short_is_nothing(real, ask, choice):
    pytest.importorskip("llguidance")
    with real.openai() as client:
        assert ask(client, tools=[NESTED], tool_choice=choice, max_tokens=20) == ("", [], "length")


def test_what_cannot_be_kept_of_a_schema_is_refused_for_strict_tools(real):
    pytest.importorskip("llguidance")
    parameters = {"properties": {"on": {"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 1}}}
    for strict, status in ((False, 200), (True, 400)):
        tool = {"type": "function", "function": {"name": "lamp", "parameters": parameters, "strict": strict}}
        got = real.chat(tools=[tool], tool_choice="required", max_tokens=1)
        assert got.status_code == status
        assert got.json().get("error", {"param": "tools"})["param"] == "tools"


def test_the_schemas_of_all_tools_together_have_a_limit(talk):
    running, _ = talk(TAGGED, CALL)
    names = [f"{'x' * 60}{at}" for at in range(600)]
    parameters = {"properties": {name: {"type": "integer"} for name in names}}
    tools = [{"type": "function", "function": {"name": f"f{at}", "parameters": parameters}} for at in range(2)]
    error = running.chat(tools=tools, tool_choice="required").json()["error"]
    assert (error["param"], "more than 65536 bytes" in error["message"]) == ("tools", True)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 2**18}}}]
    error = running.chat(tools=tools, tool_choice="required").json()["error"]
    assert error["message"].startswith("tools: got 262163 bytes of parameters, expected at most 262144 where a call is")
    assert error["param"] == "tools"


def test_a_reference_that_leads_nowhere_is_refused(talk):
    running, _ = talk(TAGGED, CALL)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "b.json"}}}}}
    error = running.chat(tools=[CLOCK, tool], tool_choice="required").json()["error"]
    assert error["message"].startswith("tools[1].function.parameters: got $ref 'b.json', expected one that leads")
    assert (error["param"], running.engine.last) == ("tools", None)


def test_a_named_function_ends_with_stop(talk):
    _, client = talk(TAGGED, CALL)
    named = {"type": "function", "function": {"name": "weather"}}
    assert whole(client, tools=[WEATHER], tool_choice=named)[1:] == ([("weather", {"city": "Oslo"})], "stop")
    assert streamed(client, tools=[WEATHER], tool_choice="required")[1:] == (
        [("weather", {"city": "Oslo"})], "tool_calls",
    )  # fmt: skip


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("separate", [True, False])
def test_a_call_may_stand_behind_a_thought(talk, ask, separate):
    call = f"<tool_call>{CALL}</tool_call>"
    _, client = talk(TAGGED + "{# <think> #}", f"<think>I could {call}</think>\n\n{call}")
    given = {"tools": [WEATHER], "extra_body": {"separate_reasoning": separate}}
    found = [("weather", {"city": "Oslo"})]
    if separate:
        assert ask(client, **given) == ("", found, "tool_calls")
    _, client = talk(TAGGED + "{# <think> #}", f"<think>I could {call}</think>\n\n{CALL}")
    assert ask(client, **given, tool_choice="required") == ("", found, "tool_calls")


def test_only_calls_leave_no_content(talk):
    running, _ = talk(TAGGED, f"\n<tool_call>{CALL}</tool_call>\n")
    message = running.chat(tools=[WEATHER]).json()["choices"][0]["message"]
    assert (message["content"], len(message["tool_calls"])) == (None, 1)


def test_the_operator_may_name_the_parser(serve):
    answer = f"So.\n```json\n{CALL}\n```"
    for parser, count in (("qwen2.5-coder", 1), ("auto", 0), ("none", 0)):
        running = serve({"tool_call_parser": parser}, answer=answer)
        choice = running.chat(tools=[WEATHER]).json()["choices"][0]
        assert len(choice["message"].get("tool_calls", [])) == count


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A model whose markers of calls are special tokens, which texts leave out."""
    directory = write_model(tmp_path_factory.mktemp("special") / "tiny")
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    tokenizer.save(str(path))
    (directory / "chat_template.jinja").write_text("{{ tools | tojson }}[TOOL_CALLS]{{ messages[0].content }}")
    return directory


@pytest.mark.parametrize("ask", [whole, streamed])
def test_markers_that_are_special_tokens_are_seen(mistral, ask):
    answer = '<s>Well.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}</s>'
    with running(FakeEngine(Tokenizer(mistral), answer=answer)) as server, server.openai() as client:
        assert ask(client, tools=[WEATHER]) == ("Well.", [("weather", {"city": "Oslo"})], "tool_calls")
        assert ask(client) == ('Well.weather{"city": "Oslo"}', [], "stop")
        shown = ask(client, tools=[WEATHER], extra_body={"skip_special_tokens": False})
        assert shown == ("<s>Well.</s>", [("weather", {"city": "Oslo"})], "tool_calls")


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
