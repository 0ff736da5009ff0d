"""Lists of prompts."""

from __future__ import annotations

import random
from contextlib import contextmanager
from unittest import mock

import pytest

from eightfold import LLM, SamplingParams
from eightfold.engine import llm as module
from eightfold.errors import CapacityError, InputError
from eightfold.progress import Task
from tests.engine.models import assert_idle, greedy, tokens


@pytest.fixture
def llm(small) -> LLM:
    return LLM(small("w8a8").directory, max_num_seqs=4, threads=1)


def test_answers_in_the_order_of_the_prompts(llm, small):
    rng = random.Random(1)
    prompts = [tokens(rng, rng.randint(1, 300)) for _ in range(12)]
    params = [greedy(rng.randint(1, 40)) for _ in prompts]
    found = llm.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in found] == [
        small("w8a8").answer(prompt, each.max_tokens) for prompt, each in zip(prompts, params, strict=True)
    ]
    assert all(output.finished for output in found)
    assert_idle(llm.engine)


HELLO = [71, 68, 75, 75, 78]


@pytest.mark.parametrize("prompts", ["hello", ["hello"], HELLO, [HELLO], tuple(HELLO)])
def test_a_prompt_is_a_text_or_tokens_alone_or_in_a_list(llm, small, prompts):
    (output,) = llm.generate(prompts, greedy(5))
    assert output.prompt_ids == tuple(HELLO)
    assert output.outputs[0].token_ids == small("w8a8").answer(output.prompt_ids, 5)


def test_texts_and_tokens_in_one_list_and_none_at_all(llm):
    assert [output.prompt_ids for output in llm.generate(["a", [5, 6]], greedy(1))] == [
        tuple(llm.engine.tokenizer.encode("a")),
        (5, 6),
    ]
    assert llm.generate([], greedy(1)) == []


def test_without_params_the_defaults_hold(llm):
    (output,) = llm.generate("hello")
    assert len(output.outputs[0].token_ids) <= SamplingParams().max_tokens


def test_chat(llm, small):
    messages = [{"role": "user", "content": "hi"}]
    expected = llm.engine.tokenizer.encode_chat(messages, add_generation_prompt=True)
    for found in (llm.chat(messages, greedy(5)), llm.chat([messages, messages], greedy(5))):
        for output in found:
            assert output.prompt_ids == tuple(expected)
            assert output.outputs[0].token_ids == small("w8a8").answer(expected, 5)
    assert len(found) == 2


def test_nothing_is_computed_if_one_prompt_is_refused(llm):
    with pytest.raises(CapacityError, match="prompt: got no tokens"):
        llm.generate([[1, 2], []], greedy(5))
    assert llm.engine.stats.prompt_tokens == 0
    assert_idle(llm.engine)


def test_as_many_params_as_prompts(llm):
    with pytest.raises(InputError, match=r"^params: got 1 of them, expected one, or one for each of 2 prompts$"):
        llm.generate([[1], [2]], [greedy(1)])


def test_an_interrupt_leaves_nothing_behind(llm):
    step, seen = llm.engine.step, []

    def interrupted():
        seen.append(None)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return step()

    llm.engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], greedy(50))
    assert_idle(llm.engine)
    assert len(llm.generate([[1], [2]], greedy(50))) == 2


def test_progress_hears_of_every_answer(llm):
    heard = []

    @contextmanager
    def progress(title, total, unit):
        heard.append((title, total, unit))
        task = Task()
        task.advance = lambda: heard.append("one")  # type: ignore[arg-type]
        yield task

    llm.generate([[1], [2], [3]], greedy(5), progress=progress)
    assert heard == [("generate", 3, "answer"), "one", "one", "one"]


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, False)])
def test_a_bar_on_a_terminal_when_it_takes_long(llm, capsys, monkeypatch, terminal, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with mock.patch("rich.progress.Progress.start") as start:
        llm.generate([[1], [2]], greedy(200))
    assert bool(start.call_count) == shown
    monkeypatch.setattr(module, "QUIET_SECONDS", 60.0)
    with mock.patch("rich.progress.Progress.start") as start:
        llm.generate([[1], [2]], greedy(5))
    assert not start.call_count
    assert capsys.readouterr().out == ""
