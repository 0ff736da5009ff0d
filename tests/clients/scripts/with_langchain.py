"""LangChain's ChatOpenAI."""

from __future__ import annotations

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from schemas import Parent, is_ada

from report import FAMILY, HELLO, KEY, MODEL, RAIN, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL, WEATHER, Report, refused

report = Report("langchain-openai", "langchain-openai")


def model(**settings):
    return ChatOpenAI(
        **{"base_url": URL, "api_key": KEY, "model": MODEL, "temperature": 0, "max_retries": 0, **settings}
    )


@tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return RAIN if city == "Paris" else "unknown"


@report.capability("chat")
def _():
    answer = model(max_tokens=20).invoke(HELLO)
    assert answer.content and answer.usage_metadata["output_tokens"]
    assert OpenAI(base_url=URL, api_key=KEY, model=MODEL, max_tokens=5).invoke("One, two,")
    batch = model(max_tokens=20).batch([HELLO, HELLO])
    assert [one.content for one in batch] == [answer.content] * 2
    return answer.content


@report.capability("stream")
def _():
    chunks = list(model(max_tokens=20, stream_usage=True).stream(HELLO))
    text = "".join(chunk.content for chunk in chunks)
    assert text == model(max_tokens=20).invoke(HELLO).content
    assert any(chunk.usage_metadata for chunk in chunks)
    return text


@report.capability("nested models")
def _():
    return is_ada(model().with_structured_output(Parent, method="function_calling").invoke(FAMILY))


@report.capability("forced tools")
def _():
    for choice in ("any", "get_weather"):
        answer = model().bind_tools([get_weather], tool_choice=choice).invoke(WEATHER)
        assert answer.tool_calls[0]["args"] == {"city": "Paris"}, answer
    return answer.tool_calls


@report.capability("automatic tools")
def _():
    bound, messages = model(max_tokens=60).bind_tools([get_weather]), [SystemMessage(SYSTEM), HumanMessage(WEATHER)]
    answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    streamed = None
    for chunk in bound.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == call["args"] == {"city": "Paris"}, streamed
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage), result
    text = bound.invoke([*messages, answer, result]).content
    assert "12" in text, text
    return text


@report.capability("structured output")
def _():
    is_ada(model().with_structured_output(Parent).invoke(FAMILY))
    keys = "Answer with a JSON object of the keys name, age, address (city, postcode) and children (an empty list). "
    assert model().with_structured_output(None, method="json_mode").invoke(keys + FAMILY)
    return is_ada(model().with_structured_output(Parent, method="json_schema", strict=True).invoke(FAMILY))


@report.capability("reasoning")
def _():
    # Its chat completions leave thoughts out: only the responses API has them.
    thinking = model(base_url=THINKING_URL, use_responses_api=True, reasoning={"summary": "auto"}, max_tokens=60)
    for answer in (thinking.invoke(SUM), sum(thinking.stream(SUM), start=AIMessageChunk(""))):
        (block,) = (block for block in answer.content_blocks if block["type"] == "reasoning")
        assert "5" in block["reasoning"], answer
    return block["reasoning"]


@report.capability("errors")
def _():
    refused(lambda: model(api_key="wrong").invoke(HELLO), Exception, "API key")
    refused(lambda: model(model="x").invoke(HELLO), Exception, "'x'")
    refused(
        lambda: OpenAIEmbeddings(base_url=URL, api_key=KEY, model=MODEL, check_embedding_ctx_length=False).embed_query(
            "x"
        ),
        Exception,
        "mbed",
    )
    return refused(lambda: model().invoke(TOO_LONG), ContextOverflowError)
