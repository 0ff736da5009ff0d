"""Instructor in its default mode, which forces a call of a tool, and in the modes of structured output."""

from __future__ import annotations

from collections.abc import Iterable

import instructor
import openai
from schemas import Address, Child, Parent, is_ada

from report import FAMILY, KEY, MODEL, THINKING_URL, TOO_LONG, URL, Report, refused

report = Report("instructor", "instructor")
plain = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
client = instructor.from_openai(plain)
MODES = ("JSON", "JSON_SCHEMA", "MD_JSON", "TOOLS_STRICT", "RESPONSES_TOOLS")  # beside its default, TOOLS


def asked(text=FAMILY, **fields):
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_retries": 1,
        **fields,
    }


@report.capability("nested models")
def _():
    return is_ada(client.create(response_model=Parent, **asked()))


@report.capability("forced tools")
def _():
    child = client.create(response_model=Child, **asked("Byron is 7 and lives in Paris, postcode 75."))
    assert child.name.strip() == "Byron" and child.age == 7, child
    cities = client.create(response_model=Iterable[Address], **asked("Ada lives in London N1, Byron in Paris 75."))
    assert list(cities), cities
    return child.model_dump_json()


@report.capability("stream")
def _():
    # strict, its default, refuses every member of an enumeration at the end of a stream.
    parts = list(client.create_partial(response_model=Parent, strict=False, **asked()))
    return is_ada(Parent.model_validate(parts[-1].model_dump()))


@report.capability("structured output")
def _():
    for mode in MODES:
        other = instructor.from_openai(plain, mode=instructor.Mode[mode])
        answer = other.create(response_model=Address, **asked("Where does Byron live? He lives in Paris, postcode 75."))
        assert answer.city == "Paris", (mode, answer)
    return ", ".join(MODES)


@report.capability("reasoning")
def _():
    thinking = openai.OpenAI(base_url=THINKING_URL, api_key=KEY)
    other = instructor.from_openai(thinking, mode=instructor.Mode.JSON_SCHEMA)
    parent, raw = other.create_with_completion(response_model=Parent, **asked())
    is_ada(parent)
    return raw.choices[0].message.reasoning_content


@report.capability("errors")
def _():
    refused(lambda: client.create(response_model=Child, **asked() | {"model": "x"}), Exception, "'x'")
    wrong = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0))
    refused(lambda: wrong.create(response_model=Child, **asked()), Exception, "key")
    return refused(lambda: client.create(response_model=Child, **asked(TOO_LONG)), Exception, "maximum context length")
