"""OpenAI's own client for Python: responses."""

from __future__ import annotations

import json

import openai
from schemas import Parent, is_ada

from report import FAMILY, HELLO, KEY, MODEL, RAIN, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL, WEATHER, Report, refused

report = Report("openai (Python), responses", "openai")
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def asked(text, **fields):
    return {"model": MODEL, "input": text, "temperature": 0, **fields}


@report.capability("chat")
def _():
    answer = client.responses.create(**asked(HELLO, max_output_tokens=20))
    assert answer.output_text and answer.usage.output_tokens
    return answer.output_text


@report.capability("stream")
def _():
    whole = client.responses.create(**asked(HELLO, max_output_tokens=20)).output_text
    events = list(client.responses.create(**asked(HELLO, max_output_tokens=20, stream=True)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole
    assert events[0].type == "response.created" and events[-1].response.output_text == whole, events[-1]
    with client.responses.stream(**asked(HELLO, max_output_tokens=20)) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole
    return whole


@report.capability("nested models")
def _():
    answer = client.responses.parse(
        **asked(FAMILY, tools=[openai.pydantic_function_tool(Parent)], tool_choice="required")
    )
    (call,) = (item for item in answer.output if item.type == "function_call")
    return is_ada(call.parsed_arguments)


@report.capability("forced tools")
def _():
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        answer = client.responses.create(**asked(WEATHER, tools=[TOOL], tool_choice=choice))
        (call,) = (item for item in answer.output if item.type == "function_call")
        assert json.loads(call.arguments) == {"city": "Paris"}, call
    return call.arguments


@report.capability("automatic tools")
def _():
    items = [{"role": "user", "content": WEATHER}]
    fields = {"model": MODEL, "instructions": SYSTEM, "input": items, "tools": [TOOL], "temperature": 0}
    answer = client.responses.create(**fields, max_output_tokens=60)
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}, call
    with client.responses.stream(**fields, max_output_tokens=60) as stream:
        streamed = [event for event in stream if event.type == "response.function_call_arguments.done"]
    assert streamed[0].arguments == call.arguments, streamed
    items += [*answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": RAIN}]
    text = client.responses.create(**fields, max_output_tokens=60).output_text
    assert "12" in text, text
    return text


@report.capability("structured output")
def _():
    return is_ada(client.responses.parse(**asked(FAMILY, text_format=Parent)).output_parsed)


@report.capability("reasoning")
def _():
    thinking = openai.OpenAI(base_url=THINKING_URL, api_key=KEY).responses
    answer = thinking.create(**asked(SUM, max_output_tokens=60))
    (item,) = (item for item in answer.output if item.type == "reasoning")
    text = "".join(part.text for part in item.content or item.summary)
    assert "5" in text and "</think>" not in answer.output_text, answer
    return text


@report.capability("errors")
def _():
    create = client.responses.create
    wrong = openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0)
    refused(lambda: wrong.responses.create(**asked(HELLO)), openai.AuthenticationError, code="invalid_api_key")
    refused(lambda: create(**asked(HELLO) | {"model": "x"}), openai.NotFoundError, code="model_not_found")
    return refused(lambda: create(**asked(TOO_LONG)), openai.BadRequestError, code="context_length_exceeded")
