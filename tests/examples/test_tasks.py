"""The examples of whole tasks, each on a tiny model."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.conftest import write_model
from tests.examples.conftest import ROOT, bash

sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tasks") / "float")


def test_a_batch_in_this_process(tmp_path, model, capsys):
    from examples.tasks import batch

    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    batch.main(str(model), str(tmp_path / "prompts"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert all(row["answer"] for row in rows)


def test_questions_at_once(model, capsys):
    pytest.importorskip("openai")
    from examples.tasks import ask_async

    from eightfold import AsyncLLM
    from eightfold.engine.settings import EngineConfig
    from tests.server.running import running

    with running(AsyncLLM.load(model, EngineConfig(max_num_seqs=4, threads=1))) as served:
        asyncio.run(ask_async.main(f"{served.url}/v1", "one", "two"))
    lines = capsys.readouterr().out
    assert "one\n  " in lines
    assert "two\n  " in lines


def test_a_night_answers_each_file_once(tmp_path, model):
    program = tmp_path / "bin" / "eightfold"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT / "src"} exec {sys.executable} -m eightfold "$@"\n')
    program.chmod(0o755)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    command = f"PATH={program.parent}:$PATH sh examples/tasks/nightly.sh {model} {tmp_path}/in {tmp_path}/out"
    for _ in range(2):
        done = bash(command)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "a.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["done"]
