"""OpenAI's Agents SDK with its default, the responses API."""

from __future__ import annotations

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from schemas import Answer, Parent, is_ada

from report import (
    FAMILY,
    HELLO,
    KEY,
    MODEL,
    RAIN,
    SUM,
    SYSTEM,
    SYSTEM_IN_JSON,
    THINKING_URL,
    TOO_LONG,
    URL,
    WEATHER,
    Report,
    refused,
)

set_tracing_disabled(True)
report = Report("openai-agents", "openai-agents")


def agent(url=URL, key=KEY, model=MODEL, tool_choice=None, **settings):
    served = OpenAIResponsesModel(model, openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0))
    sampling = ModelSettings(temperature=0, max_tokens=200, tool_choice=tool_choice)
    return Agent(name="assistant", model=served, model_settings=sampling, **settings)


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return RAIN if city == "Paris" else "unknown"


@function_tool
def remember(person: Parent) -> str:
    """Remember a person."""
    return is_ada(person)


@report.capability("chat")
def _():
    return Runner.run_sync(agent(), HELLO).final_output


@report.capability("stream")
async def _():
    run = Runner.run_streamed(agent(), HELLO)
    found = [event.data async for event in run.stream_events() if event.type == "raw_response_event"]
    text = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    assert text and text == run.final_output, run.final_output
    run = Runner.run_streamed(agent(instructions=SYSTEM, tools=[get_weather]), WEATHER)
    names = [event.name async for event in run.stream_events() if event.type == "run_item_stream_event"]
    assert "tool_called" in names and "12" in run.final_output, (names, run.final_output)
    return text


@report.capability("nested models")
def _():
    run = Runner.run_sync(
        agent(tools=[remember], tool_choice="required", tool_use_behavior="stop_on_first_tool"), FAMILY
    )
    return run.final_output


@report.capability("forced tools")
def _():
    for choice in ("required", "get_weather"):
        run = Runner.run_sync(agent(instructions=SYSTEM, tools=[get_weather], tool_choice=choice), WEATHER)
        assert "12" in run.final_output, run.final_output
    return run.final_output


@report.capability("automatic tools")
def _():
    run = Runner.run_sync(agent(instructions=SYSTEM, tools=[get_weather]), WEATHER)
    assert "12" in run.final_output, run.final_output
    return run.final_output


@report.capability("structured output")
def _():
    run = Runner.run_sync(agent(instructions=SYSTEM_IN_JSON, tools=[get_weather], output_type=Answer), WEATHER)
    assert "rain" in run.final_output.answer, run.final_output  # which only the tool could tell
    return is_ada(Runner.run_sync(agent(output_type=Parent), FAMILY).final_output)


@report.capability("reasoning")
def _():
    run = Runner.run_sync(agent(THINKING_URL), SUM)
    (item,) = (item for item in run.new_items if item.type == "reasoning_item")
    text = "".join(part.text for part in item.raw_item.content or item.raw_item.summary)
    assert "5" in text, text
    return text


@report.capability("errors")
def _():
    refused(lambda: Runner.run_sync(agent(key="wrong"), HELLO), openai.AuthenticationError)
    refused(lambda: Runner.run_sync(agent(model="x"), HELLO), openai.NotFoundError)
    return refused(lambda: Runner.run_sync(agent(), TOO_LONG), openai.BadRequestError, "maximum context length")
