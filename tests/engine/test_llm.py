"""Lists of prompts."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from eightfold import LLM, SamplingParams
from eightfold.engine import llm as module
from eightfold.engine.sampling_params import StructuredOutput
from eightfold.errors import CapacityError, ConfigError, InputError
from eightfold.progress import Task
from tests.engine.models import assert_idle, greedy, tokens
from tests.engine.test_structured import DEAD_END, EXPLOSIVE


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
    with pytest.raises(
        InputError, match=r"^sampling_params: got 1 of them, expected one, or one for each of 2 prompts$"
    ):
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
        task.advance = lambda steps=1: heard.append("one")  # type: ignore[misc, arg-type]
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


# --- vLLM's names and forms


@pytest.mark.parametrize(
    ("prompts", "ids", "texts"),
    [
        ({"prompt": "hello"}, [HELLO], ["hello"]),
        ([{"prompt": "hello"}, "hello"], [HELLO, HELLO], ["hello", "hello"]),
        ({"prompt_token_ids": [1, 2]}, [[1, 2]], [None]),
        ([{"prompt_token_ids": (1, 2)}, [3]], [[1, 2], [3]], [None, None]),
        ({"prompt": "told", "prompt_token_ids": [1, 2], "multi_modal_data": None}, [[1, 2]], ["told"]),
        (range(1, 4), [[1, 2, 3]], [None]),
    ],
)
def test_prompts_as_vllm_has_them(llm, prompts, ids, texts):
    found = llm.generate(prompts, sampling_params=greedy(1), use_tqdm=False, lora_request=None)
    assert [output.prompt_token_ids for output in found] == ids
    assert [output.prompt for output in found] == texts


def test_a_salt_of_a_prompt_separates_it_in_the_cache(llm):
    prompt = {"prompt_token_ids": list(range(1, 200))}
    for salt, cached in (("", 0), ("", 128), ("a", 0), ("a", 128), ("b", 0)):
        (output,) = llm.generate({**prompt, "cache_salt": salt or None}, greedy(1))
        assert (output.num_cached_tokens, output.cached_tokens) == (cached, cached)


ONE = "a text, a list of token ids, or an object with prompt or prompt_token_ids"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, f"prompts: got None, expected {ONE}, or a list of these"),
        (5, f"prompts: got 5, expected {ONE}, or a list of these"),
        (b"hi", f"prompts: got b'hi', expected {ONE}, or a list of these"),
        ({1, 2}, f"prompts: got {{1, 2}}, expected {ONE}, or a list of these"),
        ([None], f"prompts[0]: got None, expected {ONE}"),
        (["a", 5], f"prompts[1]: got 5, expected {ONE}"),
        (["a", b"b"], f"prompts[1]: got b'b', expected {ONE}"),
        ([1.5], f"prompts[0]: got 1.5, expected {ONE}"),
        ([1, "a"], "prompts[1]: got 'a', expected a token id"),
        ([True], "prompts[0]: got True, expected a token id"),
        ([[1], ["a"]], "prompts[1][0]: got 'a', expected a token id"),
        ([[1, 2.0]], "prompts[0][1]: got 2.0, expected a token id"),
        ({}, f"prompts: got an object without a prompt, expected {ONE}"),
        ([{"prompt": None}], f"prompts[0]: got an object without a prompt, expected {ONE}"),
        ({"prompt": 5}, "prompts.prompt: got 5, expected a text"),
        ([{"prompt_token_ids": "ab"}], "prompts[0].prompt_token_ids: got 'ab', expected a list of token ids"),
        ([{"prompt_token_ids": ["a"]}], "prompts[0].prompt_token_ids[0]: got 'a', expected a token id"),
        ({"promt": "a"}, "prompts: got 'promt', expected an object with prompt, prompt_token_ids or cache_salt"),
        ({"prompt": "a", "cache_salt": 5}, "prompts.cache_salt: got 5, expected a text that is not empty"),
        (["\ud800"], "prompts[0]: text: got character 0 that is not Unicode, expected text that UTF-8 can hold"),
        ([[-1]], "token id: got -1, expected 0 to 319"),
        ([[10**30]], f"token id: got {10**30}, expected 0 to 319"),
    ],
)
def test_what_is_no_prompt_is_named(llm, prompts, message):
    with pytest.raises(InputError) as caught:
        llm.generate(prompts, greedy(1))
    assert str(caught.value) == message
    assert_idle(llm.engine)


def test_without_prompts_that_is_said(llm):
    with pytest.raises(InputError, match=r"^prompts: got None, expected a text"):
        llm.generate()
    with pytest.raises(InputError, match=r"^generate: prompt_token_ids: got \[\[1\]\], expected none. Give"):
        llm.generate(prompt_token_ids=[[1]])


@pytest.mark.parametrize("prompt", [None, 5, "hi", ["a"], [None], [1.5, "x"]])
def test_the_engine_itself_refuses_what_are_no_tokens(llm, prompt):
    with pytest.raises(InputError, match=r"^prompt: got .*, expected a list of token ids$"):
        llm.engine.add_request("x", prompt, greedy(1))


@pytest.mark.parametrize("params", [5, "x", {"max_tokens": 1}, [greedy(1), None], [{}]])
def test_what_are_no_params_is_named(llm, params):
    with pytest.raises(InputError, match=r"^sampling_params: got .*, expected SamplingParams, or a list of them$"):
        llm.generate(["a", "b"], params)


def test_an_argument_that_nobody_knows_is_named(llm):
    for call, message in (
        (lambda: llm.generate("a", params=greedy(1)), "generate: got the argument params, which it does not know."),
        (lambda: llm.generate("a", lora_request=5), "generate: lora_request: got 5, expected none. Merge the adapter"),
        (lambda: llm.chat([], tool=[]), "chat: got the argument tool, which it does not know. Did you mean `tools`?"),
        (lambda: llm.chat([], tools=5), "tools: got 5, expected a list of tools"),
        (lambda: llm.chat([], chat_template=5), "chat_template: got 5, expected a valid string"),
        (lambda: llm.chat([], chat_template_kwargs=[]), "chat_template_kwargs: got [], expected an object"),
        (lambda: llm.chat([], continue_final_message=1), "continue_final_message: got 1, expected true or false"),
        (lambda: llm.chat([], add_generation_prompt=True, continue_final_message=True),
         "add_generation_prompt: got `continue_final_message` too, expected one of them"),
        (lambda: llm.chat(None), "messages: got null, expected a list"),
        (lambda: llm.chat({"role": "user"}), "messages: got an object, expected a list"),
        (lambda: llm.chat([[]]), "messages[0]: expected at least one"),
        (lambda: llm.chat([{"role": "user", "content": "a"}, []]), "messages[1]: got a list, expected an object"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_chat_with_vllms_arguments(llm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "we"}]
    tool = {"type": "function", "function": {"name": "f"}}
    template = "{{ tools | tojson }}{{ x }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tools = "[" + '{"type": "function", "function": {"name": "f"}}' + "]"
    for more, expected in (
        ({"tools": [tool]}, f"{tools}<user>hi<assistant>we<assistant>"),
        ({"chat_template_kwargs": {"x": "y"}}, "nully<user>hi<assistant>we<assistant>"),
        ({"add_generation_prompt": False}, "null<user>hi<assistant>we"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "null<user>hi<assistant>we"),
        ({"continue_final_message": True}, "null<user>hi<assistant>we"),
    ):
        (output,) = llm.chat(messages, sampling_params=greedy(1), use_tqdm=False, chat_template=template, **more)
        assert output.prompt == expected
        assert output.prompt_token_ids == llm.engine.tokenizer.encode(expected, special_tokens=False)
    assert llm.chat(messages, greedy(1))[0].prompt.startswith("<|user|>hi"), "the next call has the model's template"


def test_vllms_names_of_outputs(llm):
    (output,) = llm.generate([HELLO], SamplingParams(temperature=0, max_tokens=3, logprobs=1))
    (answer,) = output.outputs
    assert answer.cumulative_logprob == sum(each.logprob for each in answer.logprobs)
    assert llm.generate([HELLO], greedy(1))[0].outputs[0].cumulative_logprob is None


def test_vllms_arguments_of_the_model(small):
    directory = small("w8a8").directory
    known: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        "enable_prefix_caching": False,
        "enable_expert_parallel": False,
    }
    nothing: dict[str, Any] = {
        "dtype": "auto",
        "quantization": None,
        "tensor_parallel_size": 1,
        "revision": None,
        "enable_lora": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(model=str(directory), tokenizer=str(directory), threads=1, **known, **nothing)
    config = llm.engine.config
    assert (config.max_model_len, config.max_num_seqs, config.max_batched_tokens) == (64, 2, 32)
    assert config.prefix_caching is False
    with pytest.warns(
        UserWarning, match=r"^LLM: gpu_memory_utilization, enforce_eager: nothing on a CPU depends on it$"
    ):
        LLM(directory, threads=1, gpu_memory_utilization=0.5, enforce_eager=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "LLM: dtype: got 'float16', expected 'auto' or 'bfloat16'. The directory says it."),
        ({"tensor_parallel_size": 2}, "LLM: tensor_parallel_size: got 2, expected 1. Start the program with torchrun."),
        ({"enable_lora": True}, "LLM: enable_lora: got True, expected False. Merge the adapter into the model"),
        ({"max_num_seq": 2}, "LLM: got the argument max_num_seq, which it does not know. Did you mean `max_num_seqs`?"),
        ({"zzz": 2}, "LLM: got the argument zzz, which it does not know"),
        ({"prefix_caching": True, "enable_prefix_caching": True},
         "LLM: enable_prefix_caching: got `prefix_caching` too, expected one of them"),
        ({"seed": "x"}, "LLM: seed: got 'x', expected a whole number from"),
        ({"tokenizer": 5}, "LLM: tokenizer: got 5, expected the path of a directory"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_obeyed_is_named(small, arguments, message):
    with pytest.raises(InputError) as caught:
        LLM(small("w8a8").directory, threads=1, **arguments)
    assert str(caught.value).startswith(message)


def test_a_model_is_a_path_and_limits_are_checked(small):
    with pytest.raises(InputError, match=r"^LLM: model: got None, expected the path of a directory$"):
        LLM(None)
    with pytest.raises(ConfigError, match="max_num_seqs: got 0"):
        LLM(small("w8a8").directory, max_num_seqs=0)


def test_a_seed_makes_answers_that_can_be_had_again(small):
    def answers(seed):
        llm = LLM(small("w8a8").directory, threads=1, seed=seed)
        params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate([HELLO, HELLO], params)]

    assert answers(5) == answers(5) != answers(6)
    assert len({tuple(each) for each in answers(5)}) == 2, "equal prompts have different answers"


# --- threads


def test_several_threads_get_their_own_answers(llm, small):
    rng = random.Random(7)
    work = [[tokens(rng, rng.randint(1, 60)) for _ in range(3)] for _ in range(6)]
    found: dict[int, object] = {}

    def ask(at):
        try:
            found[at] = [output.outputs[0].token_ids for output in llm.generate(work[at], greedy(12), progress=False)]
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {at: [small("w8a8").answer(prompt, 12) for prompt in prompts] for at, prompts in enumerate(work)}
    assert_idle(llm.engine)


def test_ctrl_c_in_one_thread_leaves_the_call_of_another_alone(llm, small):
    step, waits = llm.engine.step, threading.Event()
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(llm.generate([HELLO], greedy(20), progress=False)))

    def interrupted():
        if threading.current_thread() is threading.main_thread() and not waits.is_set():
            other.start()  # it has to wait for its turn
            waits.set()
            signal.raise_signal(signal.SIGINT)
        return step()

    llm.engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], greedy(50), progress=False)
    other.join()
    ((output,),) = found
    assert output.outputs[0].token_ids == small("w8a8").answer(HELLO, 20)
    assert_idle(llm.engine)


def test_a_call_within_another_is_refused_and_not_waited_for(llm):
    @contextmanager
    def progress(title, total, unit):
        task = Task()
        task.advance = lambda steps=1: llm.generate("a")  # type: ignore[misc, assignment]
        yield task

    with pytest.raises(InputError, match="got a call from within another"):
        llm.generate([[1]], greedy(2), progress=progress)
    assert_idle(llm.engine)
    assert len(llm.generate([[1]], greedy(2))) == 1


# --- forms


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_forms_have_limits_here_too(llm):
    """They are compiled in another process first, which begins with the first form and ends with the engine."""
    before = children()
    llm.generate("hello", greedy(2))
    assert children() <= before
    for structured in EXPLOSIVE.values():
        with pytest.raises(InputError, match=r"^structured \w+: got one that takes more than 2 s or 32 MiB to compile"):
            llm.generate(["hello", "you"], greedy(2, structured=StructuredOutput(**structured)))
    assert_idle(llm.engine)
    (output,) = llm.generate("hello", greedy(9, structured=StructuredOutput(choices=("abc",))))
    assert output.outputs[0].text == "abc"
    (helper,) = children() - before
    del llm.engine, output
    gc.collect()
    assert helper not in children()


def test_an_answer_that_cannot_be_kept_to_its_form(llm):
    params = greedy(9, structured=StructuredOutput(grammar=DEAD_END))
    dead, alive = llm.generate(["hello", "hello"], [params, greedy(3)])
    assert (dead.outputs[0].text, dead.outputs[0].finish_reason) == ("x", "error")
    assert dead.outputs[0].stop_reason.startswith("structured grammar: got ")
    assert alive.outputs[0].finish_reason == "length"
