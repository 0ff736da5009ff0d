"""Examples whose libraries only these environments have, or whose answers take a real model: `make clients`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

TASKS = Path(__file__).parents[2] / "examples" / "tasks"


def run(home: Path, environment: dict[str, str], name: str, *arguments: str) -> str:
    """Return what an example prints."""
    command = [str(home / "apps" / "bin" / "python"), str(TASKS / name), environment["EIGHTFOLD_URL"], *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.clients
def test_langchain(home: Path, environment: dict[str, str]):
    invoked, streamed, structured = run(home, environment, "with_langchain.py", "Paris").splitlines()
    assert "Paris" in invoked and streamed.removeprefix("stream: ")
    assert json.loads(structured.removeprefix("structured: "))["country"] == "France"


@pytest.mark.clients
def test_extraction(home: Path, environment: dict[str, str], tmp_path: Path):
    (tmp_path / "mails").write_text("Maria Keller from Hamburg urgently needs three desk lamps.\n")
    order = json.loads(run(home, environment, "extract.py", str(tmp_path / "mails")))
    assert order["customer"] == "Maria Keller" and order["items"][0]["quantity"] == 3


@pytest.mark.clients
def test_tools(home: Path, environment: dict[str, str]):
    assert "58.5" in run(home, environment, "tool_loop.py", "What do 3 pieces of the product lamp cost?")
