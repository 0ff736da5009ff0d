"""What a request may ask for, and how it hears that it may not."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from eightfold.engine.sampling_params import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams, StructuredOutput
from eightfold.errors import EightfoldError, InputError


def refusal(**fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        SamplingParams(**fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.skip_special_tokens
    assert not params.is_greedy


GOOD: dict[str, list[Any]] = {
    "n": [1, 128],
    "temperature": [0, 0.0, 1e-9, 2, 100.5],
    "top_k": [-1, 0, 1, 10**9],
    "top_p": [1e-9, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.5, 1],
    "repetition_penalty": [1e-3, 1, 2.5],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "stop": [(), "a", ["a", "b"], ("🙂",)],
    "stop_token_ids": [(), [3], (3, 5)],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "logit_bias": [{}, {5: -100}, {5: 100.0, 7: 0}],
    "max_tokens": [1, 10**9, None],
    "min_tokens": [0, 16],
}


@pytest.mark.parametrize("name", GOOD)
def test_the_ends_of_every_range_are_inside(name):
    for value in GOOD[name]:
        SamplingParams(**{name: value})


BAD: dict[str, list[Any]] = {
    "n": [0, 129, -1, 1.0, "1", True, None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, 10**400],
    "top_k": [-2, 1.0, True, None, "5"],
    "top_p": [0, -0.5, 1.0001, math.nan, None, True, "1"],
    "min_p": [-0.01, 1.5, math.nan, None, False],
    "repetition_penalty": [0, -1, math.nan, math.inf, None],
    "presence_penalty": [-2.1, 2.1, math.nan, "0", None],
    "frequency_penalty": [-2.1, 2.1, math.nan, [], None],
    "seed": [-(2**63) - 1, 2**64, 1.5, True, "7"],
    "stop": ["", ["a", ""], [1], 5, None, {"a"}, "\ud800", ["x"] * (MAX_STOPS + 1), "x" * (MAX_STOP_LENGTH + 1)],
    "stop_token_ids": [[-1], [1.0], [True], 5, None, "12"],
    "include_stop_str_in_output": [None, 1, "yes"],
    "logprobs": [-1, 21, True, 1.0, "5"],
    "prompt_logprobs": [-1, 21, True, 1.0],
    "logit_bias": [{5: 101}, {5: -100.5}, {5: math.nan}, {"5": 1}, {-1: 1}, {True: 1}, {5: None}, {5: True}, [], None],
    "ignore_eos": [None, 0, "no"],
    "min_tokens": [-1, 17, 1.0, True, None],
    "max_tokens": [0, -5, 1.5, True, "16"],
    "skip_special_tokens": [None, 1],
    "kept_special_ids": [[-1], [True], 5, None],
    "structured": ["json", {"regex": "a"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_is_outside_is_refused_by_name(name, value):
    assert refusal(**{name: value}).startswith(name)


MESSAGES: dict[str, Any] = {
    "n: got 0, expected a whole number from 1 to 128": {"n": 0},
    "temperature: got -1, expected a number of at least 0": {"temperature": -1},
    "temperature: got nan, expected a number of at least 0": {"temperature": math.nan},
    "top_p: got 0, expected a number above 0 and up to 1": {"top_p": 0},
    "min_p: got 2, expected a number from 0 to 1": {"min_p": 2},
    "repetition_penalty: got 0.0, expected a number above 0": {"repetition_penalty": 0.0},
    "top_k: got -2, expected a whole number of at least -1": {"top_k": -2},
    "logprobs: got True, expected a whole number from 0 to 20": {"logprobs": True},
    "min_tokens: got 5, expected a whole number from 0 to 4": {"min_tokens": 5, "max_tokens": 4},
    "stop: got '', expected a text that is not empty": {"stop": ["a", ""]},
    "stop: got 65 texts, expected at most 64": {"stop": ["x"] * 65},
    "stop: got 1025 characters, expected at most 1024": {"stop": "x" * 1025},
    "stop: got '\\ud800', expected text that UTF-8 can hold": {"stop": "\ud800"},
    "stop_token_ids: got '12', expected a list of token ids": {"stop_token_ids": "12"},
    "logit_bias token id: got '5', expected a whole number of at least 0": {"logit_bias": {"5": 1}},
    "logit_bias: got 101, expected a number from -100 to 100": {"logit_bias": {5: 101}},
    "ignore_eos: got 0, expected true or false": {"ignore_eos": 0},
    "structured: got 'json', expected a StructuredOutput": {"structured": "json"},
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    assert refusal(**MESSAGES[message]) == message


def test_a_huge_value_is_not_shown_whole():
    assert len(refusal(stop=[["x" * 10_000]])) < 120
    assert len(refusal(n=10**4000)) < 120
    assert "got a huge int" in refusal(temperature=10**5000)


def test_numbers_of_numpy_are_taken_where_they_are_pythons():
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5
    assert "expected a whole number" in refusal(top_k=np.int64(5))  # no int, and its sums could overflow


def test_values_are_copied_and_of_one_type():
    stops, biases = ["a", "a", "b"], {5: 1}
    params = SamplingParams(stop=stops, stop_token_ids=[3, 3], logit_bias=biases)  # type: ignore[arg-type]
    stops.append("c")
    biases[6] = 1
    assert (params.stop, params.stops, params.stop_token_ids) == (("a", "b"), ("a", "b"), (3,))
    assert params.logit_bias == {5: 1.0}
    assert SamplingParams(stop="ab").stops == ("ab",)


def test_the_same_params_are_equal_and_hash_alike_and_travel():
    first = SamplingParams(stop="a", logit_bias={5: 1}, structured=StructuredOutput(regex="a"))
    second = SamplingParams(stop=["a"], logit_bias={5: 1.0}, structured=StructuredOutput(regex="a"))  # type: ignore[arg-type]
    assert first == second and hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first == copy.deepcopy(first)


def test_hardly_any_temperature_is_none():
    assert SamplingParams(temperature=0.9e-5).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy


def structured_refusal(**fields: Any) -> str:
    with pytest.raises(EightfoldError) as caught:
        StructuredOutput(**fields)
    return str(caught.value)


def test_exactly_one_form():
    for form in ({"json_schema": "{}"}, {"regex": "a"}, {"grammar": "start: A"}, {"json_object": True}):
        StructuredOutput(**form)
    assert StructuredOutput(choices=["a", "b"]).choices == ("a", "b")  # type: ignore[arg-type]
    expected = "expected exactly one of json_schema, regex, grammar, json_object or choices"
    assert structured_refusal() == f"structured output: got nothing, {expected}"
    assert (
        structured_refusal(regex="a", json_object=True) == f"structured output: got regex and json_object, {expected}"
    )
    assert structured_refusal(choices=()) == f"structured output: got nothing, {expected}"


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"regex": ""}, "structured regex: got '', expected a text that is not empty"),
        ({"regex": 5}, "structured regex: got 5, "),
        ({"grammar": b"a"}, "structured grammar: got b'a', "),
        ({"grammar": "\udfff"}, "structured grammar: got '\\udfff', expected text that UTF-8 can hold"),
        ({"json_schema": {}}, "structured json_schema: got {}, expected a text"),
        ({"json_schema": "[]"}, "structured json_schema: got [], expected a JSON object"),
        ({"json_schema": "{"}, "structured json_schema: got Expecting property name"),
        ({"json_schema": "[" * 100_000}, "structured json_schema: got "),
        ({"json_object": 1}, "structured json_object: got 1, expected true or false"),
        ({"choices": "ab"}, "structured choices: got 'ab', expected a list of texts"),
        ({"regex": "a", "begins_after": None}, "structured begins_after: got None, expected a valid string"),
        ({"regex": "a", "begins_after": "\ud800"}, "structured begins_after: got '\\ud800', expected text that UTF-8"),
        ({"regex": "a", "begins_after": "x" * 1025}, "structured begins_after: got 1025 characters, expected at most"),
        ({"begins_after": "a"}, "structured output: got nothing, expected exactly one of json_schema, "),
        ({"choices": ["a", ""]}, "structured choices: got '', expected a text that is not empty"),
    ],
)
def test_forms_of_the_wrong_type(fields, start):
    assert structured_refusal(**fields).startswith(start)


def test_arguments_that_nobody_knows():
    assert refusal(structured_outputs={}).startswith("SamplingParams: got the argument structured_outputs, which it ")
    assert refusal(max_token=5, n="x").endswith("does not know. Did you mean `max_tokens`?")


def test_what_a_form_begins_after_is_no_form():
    found = StructuredOutput(regex="a", begins_after="</think>")
    assert (found.given, found.begins_after) == (("regex", "a"), "</think>")


def test_a_schema_is_kept_as_it_is():
    schema = json.dumps({"type": "object", "properties": {"b": {}, "a": {}}})
    assert StructuredOutput(json_schema=schema).json_schema == schema
