"""What an engine refuses, in which words, and that a refusal leaves nothing behind."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest

from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CapacityError, ConfigError, EightfoldError, InputError, UnsupportedError
from eightfold.model.native.model import PAGE, NativeModel
from tests.engine.models import CONTEXT, assert_idle, greedy, run


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, expected a whole number from 1 to 65536"),
        ({"max_model_len": -1}, "max_model_len: got -1, expected a whole number of at least 1"),
        ({"kv_memory": 0}, "kv_memory: got 0, expected at least 1 byte"),
        ({"kv_memory": "2GiB"}, "kv_memory: got '2GiB', expected a whole number of bytes"),
        ({"speculate": 33}, "speculate: got 33, expected a whole number from 0 to 32"),
        (
            {"max_batched_tokens": 64},
            "max_batched_tokens: got 64, expected more than `max_num_seqs`, 64. "
            "Every running sequence takes a token of a step, and prompts need some too.",
        ),
    ],
)
def test_limits_that_make_no_sense(limits, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        EngineConfig(**limits)


def test_a_longer_context_than_the_model_s(small):
    with pytest.raises(ConfigError, match=r"^max_model_len: got 1025, expected at most 1024, which is all this "):
        small("w8a8").engine(max_model_len=1025)


class TestMemory:
    """How many blocks an engine gets."""

    def test_no_more_than_the_longest_sequences_need(self, small):
        engine = small("w8a8").engine(max_num_seqs=3, max_model_len=200)
        assert engine.blocks.total == engine.model.pages == 3 * 2
        assert small("w8a8").engine(max_num_seqs=3, max_model_len=200, kv_memory=2**30).blocks.total == 6

    def test_as_many_as_fit_what_is_given(self, small):
        model = small("w8a8")
        assert model.engine(kv_memory=5 * model.page_bytes + 1).blocks.total == 5

    def test_half_of_what_is_free_beside_the_weights(self, small):
        model = small("w8a8")
        weights = 100 * model.page_bytes
        with (
            mock.patch.object(NativeModel, "weight_bytes", weights),
            mock.patch("eightfold.model.native.model.available_bytes", lambda: weights + 21 * model.page_bytes),
        ):
            assert model.engine().blocks.total == 10

    def test_not_one_block(self, small):
        model = small("w8a8")
        expected = (
            r"^key/value cache: got [\d,]+ bytes, expected at least [\d,]+ bytes, which 128 positions take\. "
            r"Raise `kv_memory` or close other programs\.$"
        )
        with pytest.raises(CapacityError, match=expected):
            model.engine(kv_memory=model.page_bytes - 1)
        with (
            mock.patch("eightfold.model.native.model.available_bytes", lambda: model.alone.weight_bytes),
            pytest.raises(CapacityError, match=expected),
        ):
            model.engine()

    def test_more_than_the_machine_has(self, small):
        with (
            mock.patch("eightfold.model.native.model.available_bytes", lambda: 2**20),
            pytest.raises(CapacityError, match=r"^key/value cache: got 2 MiB for .* Lower `kv_memory`\.$"),
        ):
            small("w8a8").engine(kv_memory=2**21)


REFUSED: dict[str, Any] = {
    "empty": ([], {}, CapacityError, "prompt: got no tokens, expected at least one"),
    "vocabulary": ([1, 320], {}, InputError, "token id: got 320, expected 0 to 319"),
    "negative": ([-1], {}, InputError, "token id: got -1, expected 0 to 319"),
    "context": (
        [1] * CONTEXT, {}, CapacityError,
        "prompt: got 1024 tokens, expected at most 1023, and room for an answer. "
        "Shorten it: the model cannot look back on more.",
    ),
    "prompt beyond the memory": (
        [1] * (3 * PAGE + 1), {"max_tokens": None}, CapacityError,
        "request: got 385 tokens and 639 new ones, expected at most 385 together, which the key/value cache holds. "
        "Raise `kv_memory`, or ask for fewer tokens.",
    ),
    "answer beyond the memory": (
        [1] * (3 * PAGE), {"max_tokens": 2}, CapacityError,
        "request: got 384 tokens and 2 new ones, expected at most 385 together, which the key/value cache holds. "
        "Raise `kv_memory`, or ask for fewer tokens.",
    ),
    "stop token": ([1], {"stop_token_ids": (320,)}, InputError, "stop_token_ids token id: got 320, expected 0 to 319"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_cannot_be_answered(small, name):
    prompt, changes, kind, message = REFUSED[name]
    model = small("w8a8")
    engine = model.engine(kv_memory=3 * model.page_bytes)
    engine.add_request("before", [1, 2], greedy(10))
    engine.step()
    with pytest.raises(EightfoldError, match=f"^{re.escape(message)}$") as refusal:
        engine.add_request("bad", prompt, greedy(5, **changes))
    assert refusal.type is kind
    assert engine.request_ids == ["before"]
    assert run(engine)["before"][0].token_ids == model.answer([1, 2], 10)


def test_what_just_fits_the_memory(small):
    model = small("w8a8")
    engine = model.engine(kv_memory=3 * model.page_bytes)
    for prompt, count in (([1] * (3 * PAGE), 1), ([1] * 300, 3 * PAGE - 300 + 1)):
        engine.add_request("", prompt, greedy(count))
        assert run(engine)[""][0].token_ids == model.answer(prompt, count)


def test_a_context_that_the_user_has_shortened(small):
    engine = small("w8a8").engine(max_model_len=100)
    with pytest.raises(CapacityError, match=r"expected at most 99, .* Shorten it or raise `max_model_len`\.$"):
        engine.add_request("", [1] * 100, greedy(1))
    engine.add_request("", [1] * 99, greedy(1))


def test_an_id_that_is_in_use(small):
    engine = small("w8a8").engine()
    engine.add_request("twice", [1, 2], greedy(3))
    with pytest.raises(InputError, match=r"^request id: got twice, expected one that no unfinished request has$"):
        engine.add_request("twice", [1, 2], greedy(3))
    run(engine)
    engine.add_request("twice", [1, 2], greedy(3))


def test_log_probabilities_of_a_prompt_that_runs_whole(small):
    engine = small("c8").engine(attention_mode="mindie")
    with pytest.raises(UnsupportedError, match=r"^prompt_logprobs: got attention mode mindie, expected cache\. "):
        engine.add_request("", [1, 2], greedy(3, prompt_logprobs=1))


def test_a_form_that_makes_no_sense(small):
    engine = small("w8a8").engine()
    with pytest.raises(InputError, match="regex"):
        engine.add_request("", [1, 2], SamplingParams(structured=StructuredOutput(regex="(")))
    assert_idle(engine)


def test_an_answer_of_a_given_form(small):
    """It ends when nothing can follow, and guesses that the form forbids are never taken."""
    engine = small("w8a8").engine(speculate=4)
    engine.scheduler.guesser.row_cost = 0.05
    params = SamplingParams(structured=StructuredOutput(regex="(abc){20}"), seed=1, max_tokens=100)
    engine.add_request("", [5, 6, 7], params)
    (answer,) = run(engine)[""]
    assert (answer.text, answer.finish_reason) == ("abc" * 20, "stop")
    assert engine.stats.accepted > 10
