"""GuideLLM: a few requests of synthetic text by each of the APIs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import KEY, MODEL, URL, Report

report = Report("guidellm", "guidellm")
TARGET = URL.removesuffix("/v1")
TOKENIZER = os.environ["EIGHTFOLD_TOKENIZER"]
PROMPT, ANSWER, REQUESTS = 48, 12, 4


def benchmark(path, profile="kind=synchronous", backend=""):
    """Measure REQUESTS requests; return what the report says of them."""
    found = Path(tempfile.mkdtemp()) / "benchmarks.json"
    served = f"kind=openai_http,target={TARGET},model={MODEL},api_key={KEY},request_format={path}{backend}"
    data = f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={ANSWER}"
    options = {"backend": served, "profile": profile, "constraint": f"kind=max_requests,count={REQUESTS}", "data": data}
    options |= {"tokenizer": f"kind=hf_auto,model={TOKENIZER}", "output": f"kind=json,path={found}"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "guidellm", "run", *words, "--disable-console"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (measured,) = json.loads(found.read_text())["benchmarks"]
    metrics = measured["metrics"]
    counts = metrics["request_totals"]
    assert (counts["successful"], counts["errored"]) == (REQUESTS, 0), counts
    answers = metrics["output_token_count"]["successful"]
    assert answers["min"] == answers["max"] == ANSWER, answers
    if "stream=false" not in backend:
        assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0
    return f"{counts['successful']} requests of {path}"


@report.capability("chat")
def _():
    return benchmark("/v1/chat/completions")


@report.capability("texts")
def _():
    return benchmark("/v1/completions", "kind=concurrent,streams=2")


@report.capability("responses")
def _():
    return benchmark("/v1/responses")
