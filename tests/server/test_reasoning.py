"""What a model thinks, in answers to chats: told from the content, in front of forms and calls, continued."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eightfold.engine.async_llm import AsyncLLM
from eightfold.engine.reasoning import STYLES, Start, Thinking
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.engine.settings import EngineConfig
from eightfold.tokenizer import Tokenizer
from tests.server.running import Running, running

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
# The prompt opens the thought; the model does, unless the prompt has an empty one; it is only taken out of old turns.
OPENED = TURNS + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}{# </think> #}"
ITSELF = TURNS + (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SILENT = TURNS.replace("m.content", "m.content.split('</think>')[-1]") + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NONE = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"

INSIDE = "\nLet me see.\nYes\n</think>\n\nIt is good.\n"
WHOLE = "<think>" + INSIDE
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def whole(server, **fields):
    answer = server.chat(**fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice


def streamed(server, **fields):
    """Return the same, put together from the pieces of a stream."""
    asked = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    message: dict[str, Any] = {"content": ""}
    reason = None
    for event in server.events("/v1/chat/completions", asked):
        (choice,) = event["choices"]
        reason = choice["finish_reason"]
        for name, value in choice["delta"].items():
            message[name] = message[name] + value if name in message else value
    return {"message": message, "finish_reason": reason}


def said(choice):
    message = choice["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return message.get("reasoning_content"), message["content"], choice["finish_reason"]


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize(
    ("template", "answer", "fields", "expected"),
    [
        (OPENED, INSIDE, {}, ("Let me see.\nYes", "It is good.\n", "stop")),
        (ITSELF, WHOLE, {}, ("Let me see.\nYes", "It is good.\n", "stop")),
        (SILENT, INSIDE, {}, (None, INSIDE, "stop")),
        (SILENT, WHOLE, {}, ("Let me see.\nYes", "It is good.\n", "stop")),
        (ITSELF, "\n It is.\n", {}, (None, "\n It is.\n", "stop")),
        (ITSELF, "<think>\n\n</think>\n\nIt is.", {}, (None, "It is.", "stop")),
        (ITSELF, "It is.</think>", OFF, (None, "It is.</think>", "stop")),
        (ITSELF, WHOLE, OFF, (None, WHOLE, "stop")),
        (NONE, WHOLE, {}, (None, WHOLE, "stop")),
        (OPENED, INSIDE, {"max_tokens": 7}, ("Let me", "", "length")),
        (OPENED, INSIDE, {"max_tokens": 17}, ("Let me see.\nYes", "", "length")),
        (OPENED, INSIDE, {"include_reasoning": False}, (None, "It is good.\n", "stop")),
        (OPENED, INSIDE, {"separate_reasoning": False}, (None, INSIDE, "stop")),
    ],
)
def test_reasoning_is_told_from_content(serve, ask, template, answer, fields, expected):
    assert said(ask(serve(template=template, answer=answer), **fields)) == expected


def test_calls_are_looked_for_behind_a_thought(serve):
    server = serve(template=OPENED + "{# tools <tool_call> #}", answer=f"I do {CALL}.</think>{CALL}")
    choice = whole(server, tools=TOOLS)
    assert said(choice) == (f"I do {CALL}.", None, "tool_calls")
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f"]


def test_completions_are_not_split(serve):
    answer = serve(template=OPENED, answer=WHOLE).post("/v1/completions", {"prompt": "<think>", "max_tokens": 99})
    assert answer.json()["choices"][0]["text"] == WHOLE


def test_log_probabilities_are_of_all_tokens_unless_reasoning_is_hidden(serve):
    server = serve(template=OPENED, answer=INSIDE)
    found = whole(server, logprobs=True)["logprobs"]["content"]
    assert "".join(each["token"] for each in found[:12]) == INSIDE[:12]
    assert len(found) == len(INSIDE.encode())
    assert whole(server, logprobs=True, include_reasoning=False)["logprobs"] is None
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    events = [event["choices"][0] for event in server.events("/v1/chat/completions", asked)]
    assert sum(len(each["logprobs"]["content"]) for each in events if each["logprobs"]) == len(found)
    events = server.events("/v1/chat/completions", {**asked, "include_reasoning": False})
    assert not any(event["choices"][0]["logprobs"] for event in events)


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (OPENED, {}, ("</think>", "")),
        (ITSELF, {}, ("", "")),  # <think> is no token here, so the model might never write it
        (SILENT, {}, ("", "")),
        (NONE, {}, ("", "")),
        (OPENED, {"separate_reasoning": False}, ("</think>", "")),
    ],
)
def test_forms_begin_behind_a_thought(serve, template, fields, expected):
    server = serve(template=template, answer="x")
    for form in ({"guided_regex": "x"}, {"tools": TOOLS, "tool_choice": "required"}):
        whole(server, **fields, **form)
        found = server.engine.last[1].structured
        assert (found.begins_after, found.opened_by) == expected


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("none", WHOLE, (None, WHOLE, "stop")),
        ("qwen3", INSIDE, (None, INSIDE, "stop")),
        ("deepseek_r1", INSIDE, ("Let me see.\nYes", "It is good.\n", "stop")),
        ("deepseek_r1", WHOLE, ("Let me see.\nYes", "It is good.\n", "stop")),
        ("deepseek_r1", "a", ("a", "", "stop")),
        ("mistral", "[THINK]a[/THINK]\nb", ("a", "b", "stop")),
    ],
)
def test_the_parser_can_be_chosen(serve, ask, name, answer, expected):
    server = serve({"reasoning_parser": name}, answer=answer)
    assert said(ask(server)) == expected
    whole(server, guided_regex="x")
    form = server.engine.last[1].structured
    assert form.begins_after == ("" if name == "none" else STYLES[name].end)
    assert form.opened_by == ("" if name in ("none", "deepseek_r1") else STYLES[name].begin)


# --- tags that are tokens of their own


@pytest.fixture(scope="module")
def tagged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with tokens for two kinds of tags: ordinary added ones, and special ones."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

    directory = shutil.copytree(model, tmp_path_factory.mktemp("tagged") / "tiny")
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    fast.add_tokens([AddedToken(tag) for tag in STYLES["qwen3"][:2]])
    fast.add_special_tokens([AddedToken(tag) for tag in STYLES["mistral"][:2]])
    fast.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def thinker(tagged: Path, config: EngineConfig) -> Iterator[Running]:
    (tagged / "chat_template.jinja").write_text(OPENED)
    with running(AsyncLLM.load(tagged, config)) as found:
        yield found


@pytest.mark.parametrize("streams", [False, True])
def test_a_real_model_thinks_and_then_keeps_to_a_form(thinker, streams):
    pytest.importorskip("llguidance")
    tokenizer = thinker.engine.engine.tokenizer
    (end,), (eos,) = (tokenizer.encode(text, special_tokens=False) for text in ("</think>", "</s>"))
    asked = {"guided_regex": "[0-9]{3}", "seed": 1, "logit_bias": {str(end): 3, str(eos): 9}, "max_tokens": 300}
    choice = (streamed if streams else whole)(thinker, **asked)
    reasoning, content, reason = said(choice)
    assert re.fullmatch("[0-9]{3}", content)
    assert (bool(reasoning), reason) == (True, "stop")
    usage = thinker.chat(**asked).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] - 3 > 1


def test_a_real_model_need_not_think_before_a_form(tagged, config):
    """As Qwen3 does by itself, and what was tuned on top of it does not."""
    pytest.importorskip("llguidance")
    (tagged / "chat_template.jinja").write_text(ITSELF)
    with running(AsyncLLM.load(tagged, config)) as server:
        tokenizer = server.engine.engine.tokenizer
        begin, end, eos = (
            str(tokenizer.encode(text, special_tokens=False)[0]) for text in (*STYLES["qwen3"][:2], "</s>")
        )
        asked = {"guided_regex": "[0-9]{3}", "seed": 2, "max_tokens": 300}
        thought = whole(server, **asked, logit_bias={begin: 9, end: 8, eos: 9})
        plain = whole(server, **asked, logit_bias={begin: -99, end: 99, eos: 9})
        for choice, thinks in ((thought, True), (plain, False)):
            reasoning, content, reason = said(choice)
            assert (bool(reasoning), reason) == (thinks, "stop")
            assert re.fullmatch("[0-9]{3}", content)
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert re.fullmatch("[0-9]{3}", said(whole(server, **asked, **off, logit_bias={begin: 99}))[1])


def test_tags_that_texts_leave_out_are_seen(tagged, config):
    """They are forced one by one: the model would hardly come upon them."""
    pytest.importorskip("llguidance")
    with running(AsyncLLM.load(tagged, config), reasoning_parser="mistral") as server:
        tokenizer = server.engine.engine.tokenizer
        (begin,), (end,) = (tokenizer.encode(tag, special_tokens=False) for tag in STYLES["mistral"][:2])
        raw = {"max_tokens": 1, "logit_bias": {str(begin): 100}, "temperature": 0}
        assert said(whole(server, **raw)) == (None, "", "length")
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "[THINK]b"}]
        ends = {"max_tokens": 1, "logit_bias": {str(end): 100}, "temperature": 0, "continue_final_message": True}
        answer = server.post("/v1/chat/completions", {"messages": messages, "logprobs": True, **ends}).json()
        assert said(answer["choices"][0]) == (None, "", "length")
        assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "[/THINK]"
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
        completion = {"prompt": "a", "max_tokens": 1, "logit_bias": {str(begin): 100}, "temperature": 0}
        assert server.post("/v1/completions", completion).json()["choices"][0]["text"] == ""


# --- which style, and where an answer begins


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OPENED, STYLES["qwen3"]),
        (ITSELF, STYLES["qwen3"]),
        (SILENT, STYLES["qwen3"]),
        (NONE + "{# [THINK] [/THINK] #}", STYLES["mistral"]),
        (NONE, None),
    ],
)
def test_the_style_is_that_of_the_template(model, template, expected):
    assert Thinking(Tokenizer(model, template)).style == expected


def test_with_tokens_for_thoughts_a_template_that_takes_them_out_is_of_a_model_that_always_thinks(tagged):
    thinking = Thinking(Tokenizer(tagged, SILENT))
    assert thinking.style == STYLES["deepseek_r1"]
    start = thinking.start("<|assistant|>")[1]
    form = start.params(SamplingParams(structured=StructuredOutput(regex="x"))).structured
    assert (start.begins_inside, form.begins_after, form.opened_by) == (False, "</think>", "")


@pytest.mark.parametrize(
    ("prompt", "begins_after", "opened_by"),
    [("<|assistant|>", "</think>", "<think>"), ("<think>\n", "</think>", ""), ("<think>\n\n</think>\n\n", "", "")],
)
def test_a_model_that_may_think_decides_before_a_form(tagged, prompt, begins_after, opened_by):
    start = Thinking(Tokenizer(tagged, ITSELF)).start(prompt)[1]
    form = start.params(SamplingParams(structured=StructuredOutput(regex="x"))).structured
    assert (form.begins_after, form.opened_by) == (begins_after, opened_by)


def test_a_vocabulary_with_tags_is_enough_to_see_a_thought_but_does_not_delay_forms(tagged):
    thinking = Thinking(Tokenizer(tagged, NONE))
    assert thinking.style == STYLES["qwen3"]  # and not that of the special tokens
    prompt, start = thinking.start("<|assistant|>")
    assert (prompt, start.style, start.begins_inside, start.delays_form) == (
        "<|assistant|>", STYLES["qwen3"], False, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("inside", "token_ids", "expected"),
    [
        (True, [1, 2, 8, 3], 3),
        (True, [1, 2], 2),
        (False, [7, 1, 8, 3], 3),
        (False, [7, 1], 2),
        (False, [1, 2, 8], 0),
        (False, [], 0),
    ],
)
def test_tokens_of_a_thought_are_counted(inside, token_ids, expected):
    assert Start(STYLES["qwen3"], begins_inside=inside, tags=(7, 8)).tokens_of_thought(token_ids) == expected
    assert Start(tags=(7, 8)).tokens_of_thought(token_ids) == 0
    assert Start(STYLES["qwen3"]).tokens_of_thought(token_ids) is None


# --- answers that continue a message


def prompt_of(server, *messages, **fields):
    answer = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}, *messages], **fields})
    assert answer.status_code == 200, answer.text
    return server.server.service.tokenizer.decode(answer.json()["tokens"], keep_special=True)


@pytest.mark.parametrize("how", [{"continue_final_message": True}, {"prefix": True}, {"add_generation_prompt": False}])
def test_the_last_message_is_left_open(serve, how):
    server, prefix = serve(template=NONE, answer=" world"), how.pop("prefix", False)
    last = {"role": "assistant", "content": "Hello ", **({"prefix": True} if prefix else {})}
    fields = {"continue_final_message": not prefix, **how}
    assert prompt_of(server, last, **fields) == "<|user|>Hi</s><|assistant|>Hello "
    asked = {"messages": [{"role": "user", "content": "Hi"}, last], **fields}
    assert server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]["content"] == " world"
    assert len(server.engine.last[0]) == len("Hi") + 3 + len("Hello ")


def test_a_message_that_the_template_trims_is_trimmed(serve):
    server = serve(template=NONE.replace("m.content", "m.content | trim"))
    last = {"role": "assistant", "content": " Hello "}
    assert prompt_of(server, last, continue_final_message=True) == "<|user|>Hi</s><|assistant|>Hello"


@pytest.mark.parametrize(
    ("template", "last", "answer", "prompt", "expected"),
    [
        (ITSELF, {"content": "<think>\nOkay"}, ", so</think>\n\nHi", "<think>\nOkay", (", so", "Hi")),
        (OPENED, {"content": "<think>\nOkay"}, ", so</think>\n\nHi", "<think>\nOkay", (", so", "Hi")),
        (ITSELF, {"content": "<think>a</think>b"}, "</think>", "<think>a</think>b", (None, "</think>")),
        (SILENT, {"content": "It"}, " is", "It", (None, " is")),
        (ITSELF, {"content": "A <think>"}, " is", "A <think>", (None, " is")),
        (SILENT, {"content": ""}, "<think>a</think>b", "", ("a", "b")),
    ],
)
def test_a_thought_that_was_begun_goes_on(serve, template, last, answer, prompt, expected):
    server, last = serve(template=template, answer=answer), {"role": "assistant", **last}
    assert prompt_of(server, last, continue_final_message=True) == f"<|user|>Hi</s><|assistant|>{prompt}"
    asked = {"messages": [{"role": "user", "content": "Hi"}, last], "continue_final_message": True}
    choice = server.post("/v1/chat/completions", asked).json()["choices"][0]
    assert said(choice) == (*expected, "stop")


# As Qwen3's does it: every last answer has a thought, if only an empty one.
REWRITES = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("last", "prompt", "inside"),
    [
        ({"content": "It"}, "<think>\n\n</think>\n\nIt", False),
        ({"content": "<think>\nOkay"}, "<think>\nOkay", True),
        ({"content": "<think>\na\n</think>\nb"}, "<think>\na\n</think>\n\nb", False),
        ({"content": "", "reasoning_content": "Okay"}, "<think>\nOkay", True),
        ({"content": None, "reasoning": "Okay"}, "<think>\nOkay", True),
        ({"content": "b", "reasoning_content": "a"}, "<think>\na\n</think>\n\nb", False),
    ],
)
def test_a_template_that_writes_thoughts_itself(serve, last, prompt, inside):
    server, last = serve(template=REWRITES, answer="x</think>y"), {"role": "assistant", **last}
    assert prompt_of(server, last, continue_final_message=True) == f"<|user|>Hi</s><|assistant|>{prompt}"
    asked = {"messages": [{"role": "user", "content": "Hi"}, last], "continue_final_message": True}
    choice = server.post("/v1/chat/completions", asked).json()["choices"][0]
    assert said(choice) == (("x", "y", "stop") if inside else (None, "x</think>y", "stop"))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "only one of them"),
        ({"continue_final_message": 1}, "continue_final_message", "true or false"),
        ({"include_reasoning": "no"}, "include_reasoning", "true or false"),
        ({"separate_reasoning": "no"}, "separate_reasoning", "true or false"),
        ({"continue_final_message": True, "messages": [{"role": "user", "content": "a"}]}, "messages", "assistant"),
    ],
)
def test_what_cannot_be_is_refused(serve, fields, param, words):
    asked = {"messages": [{"role": "assistant", "content": "a"}], **fields}
    server = serve(template=NONE)
    answer = server.post("/v1/chat/completions", asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]
    assert server.engine.last is None


def test_a_template_that_drops_the_last_message_cannot_continue_it(serve):
    for template in (SILENT, "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}</think>"):
        last = {"role": "assistant", "content": "<think>a</think>b"}
        asked = {"messages": [{"role": "user", "content": "Hi"}, last], "continue_final_message": True}
        answer = serve(template=template).post("/v1/chat/completions", asked)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "continued" in answer.json()["error"]["message"]


def test_the_log_of_a_thought_says_nothing_of_it(serve, caplog):
    with caplog.at_level("INFO", "eightfold.server"):
        whole(serve(template=OPENED, answer=INSIDE))
    assert "Let me see" not in json.dumps([record.__dict__.get("record", "") for record in caplog.records], default=str)
