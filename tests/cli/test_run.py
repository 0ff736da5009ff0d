"""`run --prompt`: sampling through the engine; the greedy answer of a backend is tested where backends are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from eightfold.model.native import load
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_model
from tests.engine.models import EOS
from tests.refusal import error_line


@pytest.fixture
def run(cli, small):
    """Answer a prompt; any sampling option takes the engine."""
    return lambda *words: cli("run", small.directory, "--threads", 1, "--max-new-tokens", 20, *words)


def test_the_engine_gives_the_greedy_answer_of_the_backend(run, small):
    plain = run("--prompt", "hello", "--json").json()
    engine = run("--prompt", "hello", "--json", "--temperature", 0).json()
    measured = {"seconds": 0, "resident_weights_mib": []}
    assert {**engine, **measured} == {**plain, **measured}
    assert list(plain) == [
        "text", "token_ids", "prompt_tokens", "finish_reason", "seconds", "backend", "world_size",
        "resident_weights_mib",
    ]  # fmt: skip
    assert (plain["world_size"], len(plain["resident_weights_mib"])) == (1, 1)
    assert plain["token_ids"] == small.answer(Tokenizer(small.directory).encode("hello"), 20, frozenset({EOS}))


def test_guesses_from_the_prompt_change_no_answer(run):
    plain = run("--prompt", "hello hello hello", "--json").json()
    guessing = run("--prompt", "hello hello hello", "--json", "--speculate", 4).json()
    assert guessing["token_ids"] == plain["token_ids"]
    assert "drafted" in guessing
    assert " guesses right, " in run("--prompt", "hello hello hello", "--speculate", 4).err


def test_weights_are_measured_alone(run, monkeypatch):
    """What the tokenizer takes is not among them."""
    options: list[dict[str, Any]] = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **rest: options.append(rest) or real(*args, **rest))
    run("--prompt", "hello", "--json")
    run("--prompt", "hello")
    assert [rest["beside"] is None for rest in options] == [True, False]


def test_loading_leaves_the_process_as_it_was():
    """Garbage is collected again, and other programs' BLAS has all its threads."""
    code = """
import gc, os, sys
from eightfold.cli import console

for error in (None, KeyError, KeyboardInterrupt):
    try:
        with console.loading():
            print(gc.isenabled(), "numpy" in sys.modules, "OPENBLAS_NUM_THREADS" in os.environ)
            if error is not None:
                raise error
    except (KeyError, KeyboardInterrupt):
        pass
    print(gc.isenabled(), "OPENBLAS_NUM_THREADS" in os.environ)
gc.disable()
with console.loading():
    pass
print(gc.isenabled())
"""
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["False True False", "True False"] * 3 + ["False"]


def test_the_text_is_shown_with_its_counts(run):
    result = run("--prompt", "hello", "--seed", 3, "--temperature", 1)
    found = run("--prompt", "hello", "--seed", 3, "--temperature", 1, "--json").json()
    assert result.out == found["text"] + "\n"
    assert result.err.startswith(f"[5 + {len(found['token_ids'])} tokens, ")
    assert result.err.endswith(f" s, {found['finish_reason']}]\n")


def test_options_reach_the_sampler(run):
    words = ("--prompt", "hello", "--json", "--temperature", 1.2)
    first = run(*words, "--seed", 1).json()["token_ids"]
    assert first == run(*words, "--seed", 1).json()["token_ids"]
    assert first != run(*words, "--seed", 2).json()["token_ids"]
    greedy = run("--prompt", "hello", "--json").json()["token_ids"]
    assert run(*words, "--top-k", 1).json()["token_ids"] == greedy
    assert run(*words, "--top-p", 1e-9).json()["token_ids"] == greedy
    assert run(*words, "--min-p", 1).json()["token_ids"] == greedy


@pytest.mark.parametrize("penalty", ["--repetition-penalty", "--presence-penalty", "--frequency-penalty"])
def test_penalties_reach_the_sampler(run, penalty):
    words = ("--prompt", "hello", "--json", "--ignore-eos", "--max-new-tokens", 100)
    assert run(*words, penalty, 2).json()["token_ids"] != run(*words).json()["token_ids"]


def test_half_a_character_at_the_end_is_shown(run, small):
    tokenizer = Tokenizer(small.directory)
    ids = small.answer(tokenizer.encode("hello"), 40)
    count = next(n for n in range(2, 40) if tokenizer.decode(ids[:n]).endswith("\N{REPLACEMENT CHARACTER}"))
    assert EOS not in ids[:count]
    result = run("--prompt", "hello", "--max-new-tokens", count)
    assert result.out == tokenizer.decode(ids[:count]) + "\n"


def test_an_answer_stops_at_a_text_and_not_at_the_models_end(run, small):
    whole = run("--prompt", "hello", "--json", "--ignore-eos", "--max-new-tokens", 200).json()
    assert (len(whole["token_ids"]), whole["finish_reason"]) == (200, "length")
    piece = next(c for c in whole["text"] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    words = ("--stop", piece, "--stop", "never there", "--max-new-tokens", 200)
    stopped = run("--prompt", "hello", "--json", "--ignore-eos", *words).json()
    assert (stopped["text"], stopped["finish_reason"]) == (whole["text"].partition(piece)[0], "stop")
    assert run("--prompt", "hello", "--ignore-eos", *words).out == stopped["text"] + "\n"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_does_not_fit_the_context_is_refused(run, backend):
    of_backend = ("--backend", backend)
    assert error_line(run("--prompt", "x" * 1005, *of_backend)) == (
        "prompt: got 1005 tokens and 20 new ones, expected 1 to 1024 together. "
        "Shorten the prompt or lower --max-new-tokens."
    )
    assert error_line(run("--prompt", "", *of_backend)) == (
        "prompt: got no tokens, expected at least one. Give some text with --prompt."
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_answer_ends_before_a_stop_token(cli, tmp_path, backend):
    model = write_model(tmp_path / "model")
    words = ("run", model, "--backend", backend, "--prompt", "hello", "--max-new-tokens", 12)
    whole = cli(*words, "--json").json()["token_ids"]
    assert len(whole) == 12
    stop = next(token for token in whole[2:] if token not in whole[:2])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [999, stop]}))
    found = cli(*words, "--json").json()
    assert (found["token_ids"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert cli(*words).out == found["text"] + "\n"


def test_a_cache_beyond_the_memory_is_refused(run, monkeypatch):
    monkeypatch.setattr("eightfold.model.native.model.available_bytes", lambda: 1 << 10)
    assert error_line(run("--prompt", "hello")) == (
        "key/value cache: got 32,768 bytes for 25 positions, expected at most 1,024 bytes, which are free. "
        "Lower --max-new-tokens or shorten the prompt."
    )


def test_options_that_change_nothing_are_noted(run):
    note = "note: --top-p changes nothing while --temperature is 0: the likeliest token is taken.\n"
    assert run("--prompt", "a", "--top-p", 0.5).err.startswith(note)
    assert "note" not in run("--prompt", "a", "--top-p", 0.5, "--temperature", 0.1).err


def test_a_template_that_reads_lists_of_parts_gets_one(run, tmp_path):
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    (tmp_path / "t.jinja").write_text(parts)
    chat = run("--chat", "--prompt", "hi", "--chat-template", tmp_path / "t.jinja", "--json").json()
    assert chat["prompt_tokens"] == 2


def test_a_template_of_ones_own(run, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    chat = run("--chat", "--prompt", "hi", "--chat-template", tmp_path / "t.jinja", "--json").json()
    assert chat["token_ids"] == run("--prompt", "hi!", "--json").json()["token_ids"]
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    message = error_line(run("--chat", "--prompt", "hi", "--chat-template", tmp_path / "t.jinja"))
    assert message == f"--chat-template in {tmp_path}/t.jinja: got byte 0 that is not UTF-8, expected UTF-8 text"
