"""Balanced heads: the same attention, of queries, keys and values that one scale for a head rounds less coarsely."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eightfold.config import parse_config
from eightfold.families import layer_linears
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch
from eightfold.model.reference.load import Decoder
from eightfold.quant.float_pass import LayerStatistics
from eightfold.quant.head_balance import (
    HeadBalance,
    HeadObserver,
    best_scale,
    can_balance,
    channel_pairs,
    product_noise,
    value_noise,
    value_scale,
)
from eightfold.quant.layer import SmoothedLayer
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(4)

# Without biases and with them, partly turned, neighbours turned, all in one tensor, and that by heads.
MODELS = {
    "llama": tiny_config(),
    "qwen2": tiny_config("Qwen2ForCausalLM"),
    "glm4": tiny_config("Glm4ForCausalLM", attention_bias=True),
    "phi3": tiny_config("Phi3ForCausalLM", partial_rotary_factor=0.5, head_dim=12, hidden_size=48),
    "internlm2": tiny_config("InternLM2ForCausalLM", head_dim=12, bias=False),
}


def parsed(config, folder):
    return parse_config(config, folder / "config.json")


def random_balance(config):
    generator = torch.Generator().manual_seed(0)
    sizes = (config.head_dim, config.head_dim // 2)
    return HeadBalance(*((2 * torch.randn(config.num_kv_heads, size, generator=generator)).exp() for size in sizes))


@pytest.mark.parametrize("name", MODELS)
def test_scales_of_heads_change_no_output(tmp_path, name):
    source = write_model(tmp_path / name, MODELS[name], tokenizer=False)
    decoder = Decoder(Checkpoint.open(source))
    config = decoder.checkpoint.config
    layer = SmoothedLayer(decoder, 0, {}, lambda name: torch.float32, random_balance(config))
    ids = SAMPLES[0]
    batch, hidden = Batch.of([len(ids)], decoder.turns()), decoder.embed(ids)
    with torch.inference_mode():
        blocks = decoder.block(0), layer.block()
        expected, found = (block(hidden, batch) for block in blocks)
        plain, mixed = (block.qkv(hidden, batch) for block in blocks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [torch.allclose(*outputs, rtol=0.1) for outputs in zip(plain, mixed, strict=True)] == [False, False, False]


def test_rows_are_scaled_alike_in_pieces(tmp_path):
    decoder = Decoder(Checkpoint.open(write_model(tmp_path / "m", MODELS["internlm2"], tokenizer=False)))
    layer = SmoothedLayer(decoder, 0, {}, lambda name: torch.float32, random_balance(decoder.checkpoint.config))
    linear = layer_linears(decoder.checkpoint.config, 0)[0]
    pieces = [layer.rows(linear, at, min(at + 7, linear.n)) for at in range(0, linear.n, 7)]
    assert torch.equal(torch.cat(pieces), layer.weight(linear))


def test_every_channel_is_in_one_pair(tmp_path):
    for config in MODELS.values():
        found = parsed(config, tmp_path)
        pairs = torch.cat(channel_pairs(found))
        assert sorted(pairs.tolist()) == list(range(found.head_dim))
    first, second = channel_pairs(parsed(MODELS["glm4"], tmp_path))
    assert first.tolist() == [0, 2, 4, 6, 8, 9, 10, 11]
    assert second.tolist() == [1, 3, 5, 7, 12, 13, 14, 15]


def heads(config, tokens=64):
    """Return queries and keys with one pair of keys that has a large bias, as Qwen2's have."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(tokens, config.num_heads, config.head_dim, generator=generator)
    k = torch.randn(tokens, config.num_kv_heads, config.head_dim, generator=generator)
    k[:, 0, 3] += 60
    return q, k


def test_a_bias_of_keys_goes_to_queries(tmp_path):
    config = parsed(tiny_config(), tmp_path)
    q, k = heads(config)
    observer = HeadObserver(config)
    observer(q[:32], k[:32], k[:32])
    other = HeadObserver(config)
    other(q[32:], k[32:], k[32:])
    observer.merge(other)
    ones = torch.ones_like(k[0])
    found = observer.balance(ones, ones, 0.0)
    assert found.pairs is not None
    assert float(found.pairs[0, 3]) > 3 * float(found.pairs[0, :3].max())
    torch.testing.assert_close(found.pairs.log().mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values, value_scale(k.abs().amax(0), ones, 0.0))


def test_values_that_stand_out_become_smaller():
    generator = torch.Generator().manual_seed(3)
    v, w = (torch.randn(3, 16, generator=generator).exp() for _ in range(2))
    v[0, 5] = 30.0
    v.clamp_(min=0.5)
    step = float(v.max()) / 127
    for input_noise in (0.0, 0.01 * step**2, step**2):
        found = value_scale(v, w, input_noise)
        least = value_noise(found, v, w, input_noise)
        assert (found >= 1).all()
        assert int(found[0].argmax()) == 5
        # No other scale of at least 1 is better by more than the steps of the search.
        tried = (found * (0.3 * torch.randn(4000, 3, 16, generator=generator)).exp()).clamp(min=1)
        assert (value_noise(tried, v, w, input_noise).amin(0) > 0.97 * least).all()
    none, much = value_scale(v, w, 0.0), value_scale(v, w, 1e6 * step**2)
    torch.testing.assert_close((v / none).amin(1), (v / none).amax(1))  # nothing speaks against equal ones
    assert torch.equal(much, torch.ones_like(v))  # nothing but the input of o_proj counts


def test_scales_are_as_good_as_a_long_search_finds():
    generator = torch.Generator().manual_seed(2)
    q, k = ((torch.randn(size, generator=generator) * 1.5).exp() for size in ((3, 2, 8), (3, 8)))
    f, e = q.square() * 0.1, k.square() * 0.1
    found = best_scale(q, k, f, e)
    least = product_noise(found, q, k, f, e)
    assert (least < 0.9 * product_noise(torch.ones_like(found), q, k, f, e)).all()
    tried = found * (0.3 * torch.randn(4000, 3, 8, generator=generator) * torch.rand(4000, 1, 1)).exp()
    assert (product_noise(tried, q, k, f, e).amin(0) > 0.97 * least).all()


def test_channels_that_are_zero_have_finite_scales():
    q, k = torch.zeros(1, 2, 4), torch.zeros(1, 4)
    q[..., 1:3], k[..., 2:] = 1.0, 5.0
    found = best_scale(q, k, q.square(), k.square())
    assert torch.isfinite(found).all() and (found > 0).all()
    zeros = torch.zeros(1, 4)
    assert torch.isfinite(best_scale(zeros[:, None], zeros, zeros[:, None], zeros)).all()


@pytest.mark.parametrize(("family", "balances"), [("Qwen2ForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_faquant_of_smooth_balances_values_and_where_no_norm_is_between_pairs(tmp_path, family, balances):
    source = write_model(tmp_path / "source", tiny_config(family), tokenizer=False)
    assert can_balance(Checkpoint.open(source).config) is balances
    outs = {}
    smooth = Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.SMOOTH, act_method=ActMethod.EXTREMES)
    for name, recipe in {"with": replace(smooth, fa_quant=True), "without": smooth}.items():
        outcome = quantize_checkpoint(source, tmp_path / name, recipe, SAMPLES)
        assert outcome.smoothing.max_logit_difference < 1e-3 * outcome.smoothing.max_logit
        note = outcome.smoothing.choices.get("model.layers.1.heads", "")
        assert ("values" in note, "pairs" in note) == (name == "with", balances and name == "with")
        outs[name] = Checkpoint.open(tmp_path / name)
    for linear, changes in (("q_proj", balances), ("k_proj", balances), ("v_proj", True)):
        tensor = f"model.layers.1.self_attn.{linear}.deq_scale"  # a factor of a row is one of its scale
        found = [torch.from_numpy(out.array(tensor).copy()) for out in outs.values()]
        assert torch.equal(*found) is not changes


def test_what_was_found_is_kept_in_a_file(tmp_path):
    for pairs in (None, torch.rand(2, 4)):
        found = HeadBalance(torch.rand(2, 8), pairs)
        LayerStatistics(heads=found).save(tmp_path / "statistics")
        kept = LayerStatistics.load(tmp_path / "statistics").heads
        assert kept is not None and torch.equal(kept.values, found.values)
        assert kept.pairs is pairs or (kept.pairs is not None and pairs is not None and torch.equal(kept.pairs, pairs))
