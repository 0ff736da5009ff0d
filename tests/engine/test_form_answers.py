"""Answers that have a form, in an engine: where they begin and end, and what is said when they cannot go on."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import CompletionOutput
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from tests.engine.models import EOS, Small, answers, greedy, run, step, tokens
from tests.engine.test_structured import DEAD_END

A, B, X, Y = 64, 65, 87, 88  # of the tokenizer


@pytest.fixture(scope="module")
def engine(small) -> Engine:
    return small("w8a8").engine()


def answer(engine: Engine, form: StructuredOutput, bias: dict[int, float] | None = None, **fields: Any) -> Any:
    """Return the one answer of random logits to a form."""
    params = SamplingParams(**{"seed": 5, "max_tokens": 40, **fields}, structured=form, logit_bias=bias or {})
    engine.add_request("it", [1, 2, 3], params)
    return run(engine)["it"][0]


OPENINGS = ["<|user|>", "ab", ". "]


@pytest.mark.parametrize("limits", [{}, {"speculate": 4}, {"pages": 7}, {"prefix_caching": False, "speculate": 8}])
def test_forms_begin_behind_a_text_in_any_company(small, limits):
    """What stands before is free, without an end; EOS would be the likeliest token there."""
    of = small("w8a8")
    pages = limits.get("pages")
    sizes = {"kv_memory": pages * of.page_bytes} if pages else {}
    engine = of.engine(**sizes, **{name: value for name, value in limits.items() if name != "pages"})
    if "speculate" in limits:
        engine.scheduler.guesser.row_cost = 0.02  # measured on a busy machine it may be too much for a guess
    requests, encode = {}, engine.tokenizer.encode
    rng = random.Random(3)
    repeating = tokens(rng, 34) * 7  # the third block begins soon
    for at, text in enumerate(OPENINGS):
        marks = encode(text)
        bias = {EOS: 100.0, encode("z")[0]: 7.0, **{token: 5.5 if len(marks) > 1 else 3.5 for token in marks}}
        form = StructuredOutput(regex="[0-9]{2,5}x", begins_after=text)
        params = SamplingParams(
            n=3, seed=at, max_tokens=280, structured=form, logit_bias=bias, skip_special_tokens=False
        )
        requests[text] = repeating, params
        engine.add_request(text, *requests[text])
    found = run(engine)
    alone = of.engine()
    for text, outputs in found.items():
        for answer in outputs:
            rest = answer.text.partition(text)[2]
            assert answer.finish_reason == "stop"
            assert re.fullmatch("[0-9]{2,5}x", rest), answer.text
            assert EOS not in answer.token_ids
    assert {each: [answer.token_ids for answer in outputs] for each, outputs in found.items()} == answers(
        alone, requests
    )
    assert any(len(answer.token_ids) > 20 for outputs in found.values() for answer in outputs)
    assert bool(engine.stats.preemptions) == bool(pages)
    if limits.get("speculate"):
        assert engine.stats.accepted > 0


def test_an_answer_that_is_cut_before_its_form(small):
    form = StructuredOutput(regex="a", begins_after="never said")
    (answer,) = answers(small("w8a8").engine(), {"": ([1, 2], greedy(20, structured=form, ignore_eos=False))})[""]
    assert len(answer) == 20


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "<|user|>", "<|assistant|></s>"])
@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 30}, {"skip_special_tokens": False}])
def test_a_form_may_hold_the_text_of_tokens_that_are_none(engine, text, fields):
    """Such as that of EOS."""
    found = answer(engine, StructuredOutput(choices=(text, f"{text} and more")), {EOS: 100.0}, **fields)
    assert found.text in (text, f"{text} and more")
    assert (found.finish_reason, found.stop_reason) == ("stop", None)
    assert max(found.token_ids) < 256


def test_a_form_that_ignores_eos_goes_on_while_it_can(engine):
    more = {EOS: 100.0, A: 20.0}
    for fields, expected in (
        ({}, ("a", "stop")),
        ({"ignore_eos": True}, ("a" * 40, "length")),
        ({"min_tokens": 7}, ("a" * 7, "stop")),
        ({"min_tokens": 7, "ignore_eos": True}, ("a" * 40, "length")),
    ):
        found = answer(engine, StructuredOutput(regex="a+"), more, **fields)
        assert (found.text, found.finish_reason) == expected
        found = answer(engine, StructuredOutput(regex="a{1,9}"), more, **fields)
        assert (found.text, found.finish_reason) == (("a" * 9, "stop") if expected[1] == "length" else expected)
        assert found.token_ids == [A] * len(found.text)
    found = answer(engine, StructuredOutput(regex="a{0}"), more, ignore_eos=True)  # there is but one text: none
    assert (found.text, found.finish_reason, found.token_ids) == ("", "stop", [])


def test_a_form_that_is_complete_with_the_last_token_was_not_cut(engine):
    form = StructuredOutput(choices=("aaaa",))
    for most, expected in ((3, ("aaa", "length")), (4, ("aaaa", "stop")), (5, ("aaaa", "stop"))):
        found = answer(engine, form, max_tokens=most)
        assert (found.text, found.finish_reason) == expected


def test_stop_strings_and_tokens_of_a_request_end_its_form_too(engine):
    form = StructuredOutput(choices=("ab,x",))
    found = answer(engine, form, stop=(",",))
    assert (found.text, found.finish_reason, found.stop_reason) == ("ab", "stop", ",")
    found = answer(engine, form, stop_token_ids=(B,))
    assert (found.text, found.finish_reason, found.stop_reason) == ("a", "stop", B)


def test_stop_strings_hold_before_a_form_as_in_vllm(engine):
    form = StructuredOutput(regex="a", begins_after="</think>")
    found = answer(engine, form, {X: 50.0}, stop=("xx",), stop_token_ids=(Y,))
    assert (found.text, found.finish_reason, found.stop_reason) == ("", "stop", "xx")


@pytest.mark.parametrize("limits", [{}, {"speculate": 4}])
@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_cannot_go_on_in_its_form_is_an_error_of_its_own(small, limits, streams):
    of: Small = small("w8a8")
    engine = of.engine(**limits)
    dead = SamplingParams(n=2, structured=StructuredOutput(grammar=DEAD_END), max_tokens=20)
    alive = StructuredOutput(grammar='start: "x" | "y" a\na: a')
    engine.add_request("dead", [1, 2], dead, streams=streams)
    engine.add_request("beside", [7, 8, 9], greedy(30), streams=streams)
    engine.add_request("one of two", [3], SamplingParams(n=8, seed=3, structured=alive), streams=streams)
    found: dict[str, dict[int, CompletionOutput]] = {}
    while engine.has_unfinished:
        for output in step(engine):
            found.setdefault(output.request_id, {}).update({each.index: each for each in output.outputs})
    reason = "structured grammar: got a form in which no token can come next, expected one that can be kept to until"
    for each in found["dead"].values():
        assert (each.finish_reason, each.text, each.token_ids) == ("error", "x", [X])
        assert str(each.stop_reason).startswith(reason)
    ends = {each.text: each.finish_reason for each in found["one of two"].values()}
    assert ends == {"x": "stop", "y": "error"}
    assert found["beside"][0].token_ids == of.answer([7, 8, 9], 30)
