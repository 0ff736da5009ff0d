"""LiteLLM with its provider openai/."""

from __future__ import annotations

import json

import litellm
from schemas import Parent, is_ada

from report import FAMILY, HELLO, KEY, MODEL, RAIN, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL, WEATHER, Report, refused

report = Report("litellm", "litellm")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def complete(messages, **fields):
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    settings = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "temperature": 0, "max_retries": 0}
    return litellm.completion(**{**settings, "messages": messages, **fields})


@report.capability("chat")
def _():
    answer = complete(HELLO, max_tokens=20)
    assert answer.choices[0].message.content and answer.usage.completion_tokens
    settings = {"model": f"text-completion-openai/{MODEL}", "api_base": URL, "api_key": KEY}
    assert litellm.text_completion(prompt="One, two,", max_tokens=5, **settings).choices[0].text
    return answer.choices[0].message.content


@report.capability("stream")
def _():
    chunks = list(complete(HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == complete(HELLO, max_tokens=20).choices[0].message.content
    assert chunks[-1].usage.completion_tokens
    return text


@report.capability("nested models")
def _():
    function = {"name": "Parent", "description": Parent.__doc__, "parameters": Parent.model_json_schema()}
    answer = complete(FAMILY, tools=[{"type": "function", "function": function}], tool_choice="required")
    return is_ada(Parent.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments))


@report.capability("forced tools")
def _():
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = complete(WEATHER, tools=[TOOL], tool_choice=choice)
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    return call.function.arguments


@report.capability("automatic tools")
def _():
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": WEATHER}]
    message = complete(messages, tools=[TOOL], max_tokens=60).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    chunks = list(complete(messages, tools=[TOOL], max_tokens=60, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=messages).choices[0]
    assert built.finish_reason == "tool_calls", built
    assert built.message.tool_calls[0].function.arguments == call.function.arguments, built
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": RAIN}]
    text = complete(messages, tools=[TOOL], max_tokens=60).choices[0].message.content
    assert "12" in text, text
    return text


@report.capability("structured output")
def _():
    answer = complete(FAMILY, response_format=Parent)
    return is_ada(Parent.model_validate_json(answer.choices[0].message.content))


@report.capability("reasoning")
def _():
    message = complete(SUM, api_base=THINKING_URL, max_tokens=60).choices[0].message
    assert "5" in message.reasoning_content, message
    chunks = list(complete(SUM, api_base=THINKING_URL, max_tokens=60, stream=True))
    streamed = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert streamed == message.reasoning_content, streamed
    return message.reasoning_content


@report.capability("errors")
def _():
    refused(lambda: complete(HELLO, api_key="wrong"), litellm.AuthenticationError)
    refused(lambda: complete(HELLO, model="openai/x"), litellm.NotFoundError)
    embed = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "input": ["x"]}
    refused(lambda: litellm.embedding(**embed), Exception, "mbed")
    return refused(lambda: complete(TOO_LONG), litellm.ContextWindowExceededError)
