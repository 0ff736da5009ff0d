"""The examples of whole tasks, each on a tiny model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config, write_model
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


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """A server of a model whose context takes tools and passages a byte at a time."""
    pytest.importorskip("openai")
    from eightfold import AsyncLLM
    from eightfold.engine.settings import EngineConfig
    from tests.server.running import running

    config = tiny_config(max_position_embeddings=8192)
    served = write_model(tmp_path_factory.mktemp("served") / "float", config)
    with running(AsyncLLM.load(served, EngineConfig(max_num_seqs=4, threads=1))) as server:
        yield f"{server.url}/v1"


def test_questions_at_once(url, capsys):
    from examples.tasks import ask_async

    asyncio.run(ask_async.main(url, "one", "two"))
    lines = capsys.readouterr().out
    assert "one\n  " in lines
    assert "two\n  " in lines


def test_an_order_of_each_text(tmp_path, url, capsys, monkeypatch):
    from examples.tasks import extract

    monkeypatch.setattr(extract, "MAX_TOKENS", 6000)  # a random model fills every field, a byte or an escape at a time
    (tmp_path / "mails").write_text("Three lamps for Ada, please.\n\nA chair!\n")
    extract.main(url, str(tmp_path / "mails"))
    orders = [extract.Order.model_validate_json(line) for line in capsys.readouterr().out.splitlines()]
    assert len(orders) == 2
    assert all(order.items for order in orders)


def test_an_order_that_is_cut_off_is_told(tmp_path, url, capsys, monkeypatch):
    from examples.tasks import extract

    monkeypatch.setattr(extract, "MAX_TOKENS", 3)
    (tmp_path / "mails").write_text("Three lamps for Ada, please.\n")
    extract.main(url, str(tmp_path / "mails"))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "line 1: the answer is longer than max_tokens\n")


def test_tools_are_called_with_what_the_model_wrote_and_failures_are_told():
    pytest.importorskip("openai")
    from examples.tasks import tool_loop

    assert tool_loop.result_of("Cost", '{"product": "lamp", "pieces": 3}') == '{"cost": "58.50 EUR"}'
    assert tool_loop.result_of("Stock", '{"product": "sofa"}').startswith('{"error": "')
    for name, arguments in (("Stock", "{"), ("Cost", '{"product": "lamp", "pieces": 0}'), ("None", "{}")):
        assert json.loads(tool_loop.result_of(name, arguments)).keys() == {"error"}


def test_a_loop_of_tools_ends(url, capsys, monkeypatch):
    """A random model does not call by itself: here it has to, in every round that offers tools."""
    from examples.tasks import tool_loop
    from openai import OpenAI

    monkeypatch.setattr(tool_loop, "MAX_TOKENS", 1000)  # a random model writes white space where it may
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    create: Any = client.chat.completions.create
    sent: list[dict] = []

    def forced(**fields):
        sent.append(fields | {"messages": list(fields["messages"])})
        for tool in fields.get("tools", []):  # short arguments, some of them wrong
            properties, bounds = (
                tool["function"]["parameters"]["properties"],
                {"product": ["lamp", "sofa"], "pieces": [3]},
            )
            properties.update({name: {"enum": bounds[name]} for name in properties})
        return create(**fields, **({"tool_choice": "required"} if "tools" in fields else {}))

    monkeypatch.setattr(client.chat.completions, "create", forced)
    assert isinstance(tool_loop.answer(client, "tiny", "What do 3 lamps cost?"), str)
    assert ["tools" in fields for fields in sent] == [True] * tool_loop.ROUNDS + [False]
    results = [message for message in sent[-1]["messages"] if isinstance(message, dict) and message["role"] == "tool"]
    assert len(results) == tool_loop.ROUNDS == capsys.readouterr().err.count(" -> ")


def test_a_question_to_a_folder_names_the_files(tmp_path, url, capsys):
    pytest.importorskip("bm25s")
    from examples.tasks import ask_folder

    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "garden.md").write_text(f"{'Roses need water. ' * 66}\n\nTulips sleep in winter.\n")
    (folder / "kitchen.txt").write_text("Salt preserves lemons.\n\n盐可以保存柠檬。\n")
    (folder / "picture.png").write_bytes(b"tulips")
    ask_folder.main(url, str(folder), "When do tulips sleep?")
    sources = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "notes/" in line]
    assert sources == [f"{folder / 'garden.md'}:3"]
    ask_folder.main(url, str(folder), "柠檬")
    assert f"{folder / 'kitchen.txt'}:1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has a word of the question"):
        ask_folder.main(url, str(folder), "xylophone")


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
