"""Generation stops where it should, says why, and tells its listener each token."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import InputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.generate import generate
from eightfold.model.reference.load import Decoder
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model

PROMPT = [1, 2, 3, 4, 5]
CONTEXT = 128


@pytest.fixture
def decoder(tmp_path) -> Decoder:
    return Decoder(Checkpoint.open(write_model(tmp_path / "float", tokenizer=False)))


@pytest.fixture
def answer(decoder) -> list[int]:
    """What follows the prompt; its tokens are not all the same, so that a stop token can stand in the middle."""
    tokens = generate(decoder, PROMPT, 12).token_ids
    assert len(set(tokens)) > 3
    return tokens


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_token_is_the_most_likely_one_after_all_before(tmp_path, architecture):
    config = tiny_config(architecture, sliding_window=4, use_sliding_window=True, max_window_layers=1)
    decoder = Decoder(Checkpoint.open(write_model(tmp_path / "float", config, tokenizer=False)))
    tokens = generate(decoder, PROMPT, 12).token_ids
    for count, token in enumerate(tokens):
        assert token == int(decoder.logits(PROMPT + tokens[:count])[-1].argmax())


@pytest.mark.parametrize("scheme", [QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16])
def test_quantized_models_generate_what_their_logits_say(tmp_path, scheme):
    source = write_model(tmp_path / "float", tokenizer=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(scheme), token_samples())
    decoder = Decoder(Checkpoint.open(tmp_path / "out"))
    tokens = generate(decoder, PROMPT, 8).token_ids
    assert tokens == [int(decoder.logits(PROMPT + tokens[:count])[-1].argmax()) for count in range(8)]


def test_dynamic_mode_is_the_decoders(tmp_path):
    source = write_model(tmp_path / "float", tokenizer=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A8_DYNAMIC))
    checkpoint = Checkpoint.open(tmp_path / "out")
    symmetric, asymmetric = (Decoder(checkpoint, mode).logits(PROMPT) for mode in ("symmetric", "asymmetric"))
    assert not torch.equal(symmetric, asymmetric)
    assert torch.equal(Decoder(checkpoint).logits(PROMPT), asymmetric)


def test_the_limit_ends_with_length(decoder, answer):
    result = generate(decoder, PROMPT, 5)
    assert result.token_ids == answer[:5]
    assert result.finish_reason == "length"


def test_a_stop_token_ends_with_stop_and_is_not_returned(decoder, answer):
    for stop in set(answer):
        result = generate(decoder, PROMPT, 12, frozenset({stop}))
        assert result.token_ids == answer[: answer.index(stop)]
        assert result.finish_reason == "stop"


def test_the_first_of_several_stop_tokens_counts(decoder, answer):
    later = next(token for token in answer if token != answer[0])
    assert generate(decoder, PROMPT, 12, frozenset({later, answer[0]})).token_ids == []
    absent = next(token for token in range(320) if token not in answer)
    result = generate(decoder, PROMPT, 12, frozenset({later, absent}))
    assert result.token_ids == answer[: answer.index(later)]


def test_stop_tokens_in_the_prompt_do_not_stop(decoder, answer):
    assert not set(PROMPT) & set(answer)
    result = generate(decoder, PROMPT, 12, frozenset(PROMPT))
    assert (result.token_ids, result.finish_reason) == (answer, "length")


def test_a_stop_token_right_after_the_limit_is_not_looked_for(decoder, answer):
    first = answer.index(answer[-1])
    result = generate(decoder, PROMPT, first, frozenset({answer[-1]}))
    assert (result.token_ids, result.finish_reason) == (answer[:first], "length")


def test_the_listener_hears_each_returned_token_once_and_no_stop_token(decoder, answer):
    heard: list[int] = []
    generate(decoder, PROMPT, 12, on_token=heard.append)
    assert heard == answer
    heard.clear()
    stop = answer[6]
    generate(decoder, PROMPT, 12, frozenset({stop}), heard.append)
    assert heard == answer[: answer.index(stop)]


def test_the_listener_hears_a_token_before_the_next_is_computed(decoder, answer):
    class Enough(Exception):
        pass

    heard: list[int] = []

    def listen(token: int) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise Enough

    with pytest.raises(Enough):
        generate(decoder, PROMPT, 12, on_token=listen)
    assert heard == answer[:3]


def test_no_new_tokens_are_none(decoder):
    result = generate(decoder, PROMPT, 0)
    assert (result.token_ids, result.finish_reason) == ([], "length")


def test_prompt_and_answer_may_fill_the_context(decoder):
    assert len(generate(decoder, list(range(CONTEXT - 2)), 2).token_ids) == 2


def test_a_prompt_with_a_foreign_token_is_refused(decoder):
    with pytest.raises(InputError, match=r"token id: got 320, expected 0 to 319"):
        generate(decoder, [1, 320], 3)
