"""Sequences do not see each other, the cache forgets nothing, and only the asked embedding rows are read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eightfold.errors import CheckpointError, InputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.attention import KVCache, attend, rotation, visible
from eightfold.model.reference.decoder import Batch, Turns, apply_block_, rms_norm, token_batches
from eightfold.model.reference.load import Decoder
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.rope import RopeParameters
from eightfold.scheme import QuantType
from tests.conftest import random_tensors, tiny_config, token_samples, write_model

WINDOW = 5
VARIANTS = {
    "llama": tiny_config(),
    "mistral": tiny_config("MistralForCausalLM", sliding_window=WINDOW),
    "qwen2": tiny_config("Qwen2ForCausalLM", sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": tiny_config("Qwen3ForCausalLM", num_key_value_heads=1),
}
VARIANT = pytest.mark.parametrize("variant", VARIANTS)
SAMPLES = token_samples(6)


def decoder_of(tmp_path: Path, variant: str) -> Decoder:
    return Decoder(Checkpoint.open(write_model(tmp_path / variant, VARIANTS[variant], tokenizer=False)))


def rounding(reference: torch.Tensor) -> float:
    """Return how far two orders of the same float32 sums may be apart.

    A sum of K terms collects sqrt(K) roundings of 2**-24 (random signs) of what it adds up to; 2 layers of 8 such
    stages, each adding to the noise, K at most 80; and both sides round.
    """
    return 2 * math.sqrt(2 * 8 * 80) * 2**-24 * float(reference.abs().max())


def split(hidden: torch.Tensor, samples: list[list[int]]) -> list[torch.Tensor]:
    return list(hidden.split([len(sample) for sample in samples]))


@VARIANT
def test_a_sequence_does_not_depend_on_its_neighbours(tmp_path, variant):
    decoder = decoder_of(tmp_path, variant)
    together = split(decoder.hidden_states(SAMPLES), SAMPLES)
    for sample, found in zip(SAMPLES, together, strict=True):
        alone = decoder.hidden_states([sample])
        torch.testing.assert_close(found, alone, rtol=0, atol=rounding(alone))


@VARIANT
def test_a_sequence_does_not_depend_on_the_order_of_the_batch(tmp_path, variant):
    decoder = decoder_of(tmp_path, variant)
    forward = split(decoder.hidden_states(SAMPLES), SAMPLES)
    backward = split(decoder.hidden_states(SAMPLES[::-1]), SAMPLES[::-1])
    for a, b in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rounding(a))


@pytest.mark.parametrize("max_tokens", [1, 20, 30, 40, 10**6])
def test_the_cut_into_batches_changes_nothing(tmp_path, max_tokens):
    decoder = decoder_of(tmp_path, "mistral")
    whole = decoder.hidden_states(SAMPLES)
    hidden = decoder.embed([token for sample in SAMPLES for token in sample])
    for layer_idx in range(2):
        lengths = [len(sample) for sample in SAMPLES]
        apply_block_(decoder.block(layer_idx), hidden, lengths, decoder.turns(), max_tokens)
    torch.testing.assert_close(hidden, whole, rtol=0, atol=rounding(whole))


@pytest.mark.parametrize("scheme", [QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16])
def test_quantized_sequences_do_not_depend_on_their_neighbours(tmp_path, scheme):
    source = write_model(tmp_path / "float", tokenizer=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(scheme), SAMPLES)
    decoder = Decoder(Checkpoint.open(tmp_path / "out"))
    together = split(decoder.hidden_states(SAMPLES), SAMPLES)
    for sample, found in zip(SAMPLES, together, strict=True):
        alone = decoder.hidden_states([sample])
        # Float noise decides where a value lies near a half: there an integer moves by one, and with it 1/255 of the
        # range of one input. W8A16 rounds no activation.
        bound = rounding(alone) if scheme is QuantType.W8A16 else float(alone.abs().max()) / 255
        torch.testing.assert_close(found, alone, rtol=0, atol=bound)


@VARIANT
def test_the_cache_step_by_step_equals_the_whole_forward(tmp_path, variant):
    decoder = decoder_of(tmp_path, variant)
    sample = token_samples(1, seed=9)[0] + list(range(10))
    whole = decoder.logits(sample)
    steps = cached_logits(decoder, sample, [1] * len(sample))
    torch.testing.assert_close(steps, whole, rtol=0, atol=rounding(whole))


@VARIANT
@pytest.mark.parametrize("pieces", [[12, 1, 1, 1], [3, 9, 3], [1, 14], [WINDOW, WINDOW, WINDOW]])
def test_the_cache_takes_pieces_of_any_length(tmp_path, variant, pieces):
    decoder = decoder_of(tmp_path, variant)
    sample = list(range(40, 40 + sum(pieces)))
    whole = decoder.logits(sample)
    torch.testing.assert_close(cached_logits(decoder, sample, pieces), whole, rtol=0, atol=rounding(whole))


@torch.inference_mode()
def cached_logits(decoder: Decoder, sample: list[int], pieces: list[int]) -> torch.Tensor:
    config = decoder.checkpoint.config
    blocks = [decoder.block(layer_idx) for layer_idx in range(config.num_layers)]
    caches = [KVCache(len(sample), config.num_kv_heads, config.head_dim) for _ in blocks]
    found, at = [], 0
    for length in pieces:
        x_TE = decoder.embed(sample[at : at + length])
        for block, cache in zip(blocks, caches, strict=True):
            x_TE = block(x_TE, Batch.of([length], decoder.turns(), first_position=at), [cache])
        found.append(decoder.head()(x_TE))
        at += length
    assert all(cache.context_len == len(sample) for cache in caches)
    return torch.cat(found)


def test_a_batch_of_caches_is_one_cache_for_each_sequence(tmp_path):
    decoder = decoder_of(tmp_path, "qwen3")
    config, first, second = decoder.checkpoint.config, list(range(8)), list(range(50, 58))
    block = decoder.block(0)
    caches = [KVCache(8, config.num_kv_heads, config.head_dim) for _ in range(2)]
    for at in range(8):
        batch = Batch.of([1, 1], decoder.turns(), first_position=at)
        together = block(decoder.embed([first[at], second[at]]), batch, caches)
    for row, sample in enumerate((first, second)):
        hidden = decoder.embed(sample)
        apply_block_(block, hidden, [8], decoder.turns())
        torch.testing.assert_close(together[row], hidden[-1], rtol=0, atol=rounding(hidden))


def test_what_comes_later_changes_nothing_before_it(tmp_path):
    decoder = decoder_of(tmp_path, "llama")
    first, second = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 250, 6]
    a, b = decoder.logits(first), decoder.logits(second)
    torch.testing.assert_close(a[:4], b[:4], rtol=0, atol=rounding(a))
    assert float((a[5] - b[5]).abs().max()) > 100 * rounding(a)


def test_window_masks():
    causal = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    two = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(4, 4, None).int().tolist() == causal
    assert visible(4, 4, 2).int().tolist() == two
    assert visible(2, 4, 2).int().tolist() == two[2:]  # the new tokens are the last ones
    assert visible(1, 4, 1).int().tolist() == [[0, 0, 0, 1]]
    assert visible(4, 4, 4).int().tolist() == causal


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("new", [1, 2, 6])
def test_attention_is_its_formula(new, window):
    context, heads, kv_heads, dim = 6, 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(new, heads, dim, generator=generator)
    k, v = (torch.randn(context, kv_heads, dim, generator=generator) for _ in range(2))
    expected = torch.zeros(new, heads, dim, dtype=torch.float64)
    for row in range(new):
        position = context - new + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            keys, values = (t[first : position + 1, head // 2].double() for t in (k, v))
            weights = torch.softmax(keys @ q[row, head].double() / math.sqrt(dim), 0)
            expected[row, head] = weights @ values
    # Weights sum to 1, so the result is at most the largest value; scores of up to 4 carry 8 + 2 roundings into the
    # exponential (40 * 2**-24 relative), normalizing and summing six of them 10 more.
    bound = 50 * 2**-24 * float(v.abs().max())
    torch.testing.assert_close(attend(q, k, v, window).double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "groups"),
    [
        ([], 10, []),
        ([3], 10, [[0]]),
        ([5, 5, 1], 10, [[0, 1], [2]]),
        ([10, 10], 10, [[0], [1]]),
        ([11, 1], 10, [[0], [1]]),  # a long one alone
        ([1, 11, 1], 10, [[0], [1], [2]]),
        ([4, 4, 4, 4], 10, [[0, 1], [2, 3]]),
        ([1, 1, 1], 1, [[0], [1], [2]]),
        ([0, 0, 3], 3, [[0, 1, 2]]),
    ],
)
def test_token_batches(lengths, max_tokens, groups):
    assert token_batches(lengths, max_tokens) == groups


def test_a_batch_lays_sequences_one_after_the_other():
    turns = rotation(RopeParameters(), 4, 0)
    batch = Batch.of([2, 3], Turns(turns), first_position=7)
    assert batch.spans == [(0, 2), (2, 5)]
    angles = torch.tensor([7.0, 8.0, 7.0, 8.0, 9.0])
    # inv_freq[0] is 1: the first column is the position itself; the tables are those very roundings.
    assert torch.equal(batch.cos_TD[:, 0], angles.cos())
    assert torch.equal(batch.sin_TD[:, 2], angles.sin())
    assert batch.cos_TD.shape == (5, 4)


def test_rms_norm_is_its_formula():
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(-1, 2, 16)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * gain.double()
    # 16 squares and sums, a root, two products: fewer than 16 roundings, those under the root count half.
    torch.testing.assert_close(rms_norm(x, gain, 0.1).double(), expected, rtol=16 * 2**-24, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embed_returns_the_rows_of_the_ids(tmp_path, dtype):
    config = tiny_config(torch_dtype=dtype)
    decoder = Decoder(Checkpoint.open(write_model(tmp_path / "m", config, tokenizer=False)))
    table = random_tensors(config)["model.embed_tokens.weight"].float()
    ids = [0, 319, 7, 7]
    found = decoder.embed(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, table[ids])
    assert decoder.embed([]).shape == (0, 48)


def test_embed_returns_a_copy(tmp_path):
    decoder = decoder_of(tmp_path, "llama")
    decoder.embed([3]).zero_()
    assert decoder.embed([3]).abs().sum() > 0


@pytest.mark.parametrize(("ids", "got"), [([0, 320], 320), ([-1, 5], -1), ([10**12], 10**12), ([-1, 320], -1)])
def test_embed_refuses_ids_outside_the_vocabulary(tmp_path, ids, got):
    with pytest.raises(InputError) as failure:
        decoder_of(tmp_path, "llama").embed(ids)
    assert str(failure.value) == f"token id: got {got}, expected 0 to 319"


def test_a_tied_head_is_the_embedding_also_where_a_copy_is_stored(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = write_model(tmp_path / "m", tiny_config(tie_word_embeddings=True), tokenizer=False)
    expected = Decoder(Checkpoint.open(directory)).logits([1, 2])
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(320, 48)}, directory / "model.safetensors")
    assert torch.equal(Decoder(Checkpoint.open(directory)).logits([1, 2]), expected)


def test_on_layer_is_called_after_each_layer(tmp_path):
    calls: list[int] = []
    decoder_of(tmp_path, "llama").hidden_states([[1, 2]], lambda: calls.append(1))
    assert len(calls) == 2


def test_released_layers_are_read_again(tmp_path):
    decoder = decoder_of(tmp_path, "llama")
    before = decoder.logits([1, 2, 3])
    decoder.release_block(0)
    assert torch.equal(decoder.logits([1, 2, 3]), before)


def test_a_norm_that_is_not_finite_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = write_model(tmp_path / "m", tokenizer=False)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][5] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight\[5.*got nan"):
        Decoder(Checkpoint.open(directory)).logits([1])
