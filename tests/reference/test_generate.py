"""The greedy oracle says the likeliest token after all before it, whatever is quantized."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import InputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model

PROMPT = [1, 2, 3, 4, 5]
CONTEXT = 128


def assert_likeliest(decoder: Decoder, count: int) -> None:
    tokens = list(decoder.generate(PROMPT, count))
    assert tokens == [int(decoder.logits(PROMPT + tokens[:at])[-1].argmax()) for at in range(count)]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_token_is_the_most_likely_one_after_all_before(tmp_path, architecture):
    config = tiny_config(architecture, sliding_window=4, use_sliding_window=True, max_window_layers=1)
    assert_likeliest(Decoder(Checkpoint.open(write_model(tmp_path / "float", config, tokenizer=False))), 12)


@pytest.mark.parametrize("scheme", [QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16])
def test_quantized_models_generate_what_their_logits_say(tmp_path, scheme):
    source = write_model(tmp_path / "float", tokenizer=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(scheme), token_samples())
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert_likeliest(Decoder(checkpoint), 8)
    if scheme is QuantType.W8A8_DYNAMIC:
        symmetric, asymmetric = (Decoder(checkpoint, mode).logits(PROMPT) for mode in ("symmetric", "asymmetric"))
        assert not torch.equal(symmetric, asymmetric)
        assert torch.equal(Decoder(checkpoint).logits(PROMPT), asymmetric)


def test_tokens_come_one_by_one_up_to_the_limit_and_the_context(tmp_path):
    decoder = Decoder(Checkpoint.open(write_model(tmp_path / "float", tokenizer=False)))
    coming = decoder.generate(PROMPT, 10**6)  # nobody waits for all of them
    assert [next(coming) for _ in range(3)] == list(decoder.generate(PROMPT, 3))
    assert list(decoder.generate(PROMPT, 0)) == []
    assert len(list(decoder.generate(range(CONTEXT - 2), 2))) == 2
    with pytest.raises(InputError, match=r"token id: got 320, expected 0 to 319"):
        next(decoder.generate([1, 320], 3))
