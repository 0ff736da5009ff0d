"""Pydantic AI: `openai:` is the responses API, its default; with the argument `chat`, chat completions."""

from __future__ import annotations

import sys

from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.exceptions import ModelAuthenticationError, ModelContextWindowExceededError, ModelNotFoundError
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from schemas import Answer, Parent, is_ada

from report import (
    FAMILY,
    HELLO,
    KEY,
    MODEL,
    SYSTEM,
    SYSTEM_IN_JSON,
    THINKING_URL,
    TOO_LONG,
    URL,
    WEATHER,
    Report,
    refused,
)

is_chat = sys.argv[1:] == ["chat"]
report = Report("pydantic-ai, chat" if is_chat else "pydantic-ai", "pydantic-ai-slim")


def model(url=URL, key=KEY, name=MODEL):
    kind = OpenAIChatModel if is_chat else OpenAIResponsesModel
    return kind(name, provider=OpenAIProvider(base_url=url, api_key=key))


def agent(served=None, **settings):
    return Agent(served or model(), model_settings={"temperature": 0, "max_tokens": 200}, **settings)


def weather_agent(system=SYSTEM, **settings):
    found = agent(system_prompt=system, **settings)

    @found.tool_plain
    def get_weather(city: str) -> dict:
        """Current weather of a city."""
        assert city == "Paris"
        return {"weather": "rain", "degrees": 12}

    return found


@report.capability("chat")
def _():
    answer = agent().run_sync(HELLO)
    assert answer.output and answer.usage.output_tokens
    return answer.output


@report.capability("stream")
async def _():
    async with agent().run_stream(HELLO) as stream:
        text = "".join([part async for part in stream.stream_text(delta=True)])
    assert text == (await agent().run(HELLO)).output
    async with agent(output_type=Parent).run_stream(FAMILY) as stream:
        is_ada([part async for part in stream.stream_output()][-1])
    async with weather_agent().run_stream(WEATHER) as stream:
        assert "12" in await stream.get_output()
    return text


@report.capability("nested models")
def _():
    return is_ada(agent(output_type=Parent).run_sync(FAMILY).output)


@report.capability("forced tools")
def _():
    kinds = agent(output_type=[Parent, int]).run_sync(FAMILY).output  # one of two tools, which the model chooses
    assert isinstance(kinds, (Parent, int))
    return repr(kinds)


@report.capability("automatic tools")
def _():
    answer = weather_agent().run_sync(WEATHER)
    assert "12" in answer.output, answer.output
    return answer.output


@report.capability("structured output")
def _():
    is_ada(agent(output_type=PromptedOutput(Parent)).run_sync(FAMILY).output)
    found = weather_agent(SYSTEM_IN_JSON, output_type=NativeOutput(Answer)).run_sync(WEATHER).output
    assert "rain" in found.answer, found  # which only the tool could tell
    return is_ada(agent(output_type=NativeOutput(Parent)).run_sync(FAMILY).output)


@report.capability("reasoning")
def _():
    answer = agent(model(THINKING_URL), output_type=NativeOutput(Parent)).run_sync(FAMILY)
    is_ada(answer.output)
    parts = [part for message in answer.all_messages() for part in message.parts if isinstance(part, ThinkingPart)]
    assert parts, answer.all_messages()
    return parts[0].content or repr(parts[0])


@report.capability("errors")
def _():
    refused(lambda: agent(model(key="wrong")).run_sync(HELLO), ModelAuthenticationError)
    refused(lambda: agent(model(name="x")).run_sync(HELLO), ModelNotFoundError)
    return refused(lambda: agent().run_sync(TOO_LONG), ModelContextWindowExceededError)
