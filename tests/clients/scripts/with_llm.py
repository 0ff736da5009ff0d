"""Simon Willison's llm, the command and its library, with a model of extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from schemas import Parent, is_ada

from report import FAMILY, HELLO, KEY, MODEL, SUM, SYSTEM, THINKING_URL, TOO_LONG, URL, WEATHER, Report

report = Report("llm", "llm")
home = Path(tempfile.mkdtemp())
entry = {
    "model_id": "served",
    "model_name": MODEL,
    "api_base": URL,
    "api_key_name": "served",
    "supports_schema": True,
    "supports_tools": True,
}
others = [
    {**entry, "model_id": "unknown", "model_name": "x"},
    {**entry, "model_id": "text", "completion": True},
    {**entry, "model_id": "responses", "responses": True},
    {**entry, "model_id": "thinking", "responses": True, "reasoning": True, "api_base": THINKING_URL},
]
(home / "extra-openai-models.yaml").write_text(json.dumps([entry, *others]))
(home / "keys.json").write_text(json.dumps({"served": KEY}))
WEATHER_TOOL = """
def get_weather(city: str) -> dict:
    "Current weather of a city."
    return {"weather": "rain", "degrees": 12}
"""


def llm(*args, fails=False, shows="stdout"):
    """Run the command; return what it prints there, or why it failed."""
    command = [sys.executable, "-m", "llm", *args]
    done = subprocess.run(command, env={**os.environ, "LLM_USER_PATH": str(home)}, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stderr
    return getattr(done, "stderr" if fails else shows).strip()


def ask(*args, model="served", **options):
    return llm("-m", model, "-o", "temperature", "0", *args, **options)


@report.capability("chat")
def _():
    assert ask("One, two,", "-o", "max_tokens", "5", model="text")
    return ask("--no-stream", HELLO)


@report.capability("stream")
def _():
    text = ask(HELLO)
    assert text == ask("--no-stream", HELLO)
    return text


@report.capability("automatic tools")
def _():
    for model in ("served", "responses"):
        for stream in ([], ["--no-stream"]):
            text = ask("--functions", WEATHER_TOOL, "-s", SYSTEM, *stream, WEATHER, model=model)
            assert "12" in text, text
    return text


@report.capability("structured output")
def _():
    return is_ada(Parent.model_validate_json(ask("--schema", json.dumps(Parent.model_json_schema()), FAMILY)))


@report.capability("reasoning")
def _():
    thoughts = ask(SUM, model="thinking", shows="stderr")  # of the responses API alone
    assert "5" in thoughts, thoughts
    return thoughts


@report.capability("errors")
def _():
    assert "API key" in ask("--key", "wrong", HELLO, fails=True)
    assert "'x'" in ask(HELLO, model="unknown", fails=True)
    said = ask(TOO_LONG, fails=True)
    assert "maximum context length" in said, said
    return said
