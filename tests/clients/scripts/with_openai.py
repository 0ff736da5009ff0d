"""OpenAI's own client for Python: chat completions and completions."""

from __future__ import annotations

import json

import openai
from schemas import Parent, is_ada

from report import FAMILY, HELLO, KEY, MODEL, RAIN, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL, WEATHER, Report, refused

report = Report("openai (Python)", "openai")
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
chats = client.chat.completions
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text, **fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


@report.capability("chat")
def _():
    answer = chats.create(**user(HELLO, max_completion_tokens=20))
    assert answer.choices[0].message.content and answer.usage.completion_tokens
    return answer.choices[0].message.content


@report.capability("stream")
def _():
    whole = chats.create(**user(HELLO, max_tokens=20)).choices[0].message.content
    chunks = list(chats.create(**user(HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True})))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens
    with chats.stream(**user(HELLO, max_tokens=20)) as events:
        assert events.get_final_completion().choices[0].message.content == whole
    texts = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts)
    return whole


@report.capability("nested models")
def _():
    tool = openai.pydantic_function_tool(Parent)
    answer = chats.parse(**user(FAMILY, tools=[tool], tool_choice="required"))
    return is_ada(answer.choices[0].message.tool_calls[0].function.parsed_arguments)


@report.capability("forced tools")
def _():
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        call = chats.create(**user(WEATHER, tools=[TOOL], tool_choice=choice)).choices[0].message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    return call.function.arguments


@report.capability("automatic tools")
def _():
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": WEATHER}]
    fields = {"model": MODEL, "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    choice = chats.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    with chats.stream(**fields) as events:
        streamed = events.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls", streamed
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments, streamed
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": RAIN}]
    answer = chats.create(**fields).choices[0].message.content
    assert "12" in answer, answer
    return answer


@report.capability("structured output")
def _():
    answer = chats.parse(**user(FAMILY, response_format=Parent))
    with chats.stream(**user(FAMILY, response_format=Parent)) as events:
        assert events.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
    return is_ada(answer.choices[0].message.parsed)


@report.capability("reasoning")
def _():
    thinking = openai.OpenAI(base_url=THINKING_URL, api_key=KEY).chat.completions
    message = thinking.create(**user(SUM, max_tokens=60)).choices[0].message
    assert "5" in message.reasoning_content and "</think>" not in message.content, message
    chunks = list(thinking.create(**user(SUM, max_tokens=60, stream=True)))
    streamed = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert streamed == message.reasoning_content, streamed
    form = thinking.parse(**user(FAMILY, response_format=Parent)).choices[0].message
    assert form.reasoning_content, form
    is_ada(form.parsed)
    return message.reasoning_content


@report.capability("errors")
def _():
    wrong = openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0)
    refused(lambda: wrong.models.list(), openai.AuthenticationError, code="invalid_api_key")
    refused(lambda: chats.create(**user(HELLO) | {"model": "x"}), openai.NotFoundError, code="model_not_found")
    refused(lambda: client.embeddings.create(model=MODEL, input="x"), openai.APIStatusError, "mbed")
    return refused(lambda: chats.create(**user(TOO_LONG)), openai.BadRequestError, code="context_length_exceeded")
