"""Int8 attention is its formula, and does not depend on how a context is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eightfold.model.reference.attention import (
    BLOCK,
    C8Attention,
    ChannelScale,
    FAQuantAttention,
    FloatAttention,
    KVCache,
    attend,
    attend_int8,
)
from eightfold.model.reference.linear import W8A8DynamicLinear, W8A8Linear, W8A8MixLinear

HEADS, KV_HEADS, DIM = 4, 2, 8
TOKENS = BLOCK + 30

# What 255 * exp() in float32 may be off by: the last bit of a value up to 255.
EXP_ERROR = 255 * 2.0**-22


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape, seed):
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def naive_row(q, keys, values, scale, first, last):
    """One query and head over positions first to last: the formula, and how many probabilities hang on a last bit."""
    maxima, sums, totals, undecided = [], [], [], 0
    for begin in range(0, last + 1, BLOCK):
        seen = range(max(begin, first), min(begin + BLOCK, last + 1))
        if not seen:
            continue
        scores = np.array([np.float32(np.dot(q, keys[c])) * scale for c in seen], np.float32)
        scaled = 255 * np.exp((scores - scores.max()).astype(np.float64))
        undecided += int((np.abs(scaled - np.floor(scaled) - 0.5) < EXP_ERROR).sum())
        p8 = np.rint(scaled)
        maxima.append(float(scores.max()))
        sums.append(sum(p * values[c] for p, c in zip(p8, seen, strict=True)))
        totals.append(p8.sum())
    weights = [math.exp(m - max(maxima)) for m in maxima]
    numerator = sum(w * s for w, s in zip(weights, sums, strict=True))
    return numerator / sum(w * t for w, t in zip(weights, totals, strict=True)), undecided


@pytest.mark.parametrize("window", [None, 1, 50, BLOCK + 7])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (5, 5), (3, BLOCK), (2, BLOCK + 1), (4, 2 * BLOCK + 9)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_int8_is_the_formula(new, context, kv_heads, window):
    q, k, v = (
        int8(new, HEADS, DIM, seed=1),
        int8(context, kv_heads, DIM, seed=2),
        int8(context, kv_heads, DIM, seed=3),
    )
    scale = torch.tensor([1e-5, 1e-4, 3e-4, 1e-3])
    out = attend_int8(q, k, v, scale, window).numpy()
    qn, kn, vn = (x.numpy().astype(np.int64) for x in (q, k, v))
    for row in range(new):
        last = context - new + row
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(HEADS):
            group = head // (HEADS // kv_heads)
            want, undecided = naive_row(qn[row, head], kn[:, group], vn[:, group], scale[head].numpy(), first, last)
            # A few float32 roundings of values up to 127; a probability on the edge moves the mean by at most 2.
            np.testing.assert_allclose(out[row, head], want, rtol=0, atol=127 * 2.0**-20 + 2 * undecided)


def test_rows_beyond_the_piece_held_at_a_time_are_the_same():
    tokens = 300
    q, k, v = (int8(tokens, heads, DIM, seed=heads) for heads in (HEADS, KV_HEADS, 1))
    v = v.expand(tokens, KV_HEADS, DIM)
    scale = torch.full((HEADS,), 1e-4)
    whole = attend_int8(q, k, v, scale, None)
    last = attend_int8(q[-10:], k, v, scale, None)
    # As above; no probability lies on an edge for this seed.
    torch.testing.assert_close(whole[-10:], last, rtol=0, atol=127 * 2.0**-20)


def inputs(tokens=TOKENS):
    return (normal(tokens, heads, DIM, seed=heads + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))


def by_head(*scales):
    return torch.tensor(scales)[:, None].expand(len(scales), DIM).contiguous()


def attention(kind, mode="cache", window=None):
    if kind == "float":
        return FloatAttention(window)
    if kind == "fa":
        key, value = (ChannelScale(by_head(a, b), torch.zeros(())) for a, b in ((0.03, 0.025), (0.02, 0.03)))
        query = torch.tensor([0.03, 0.031, 0.025, 0.04])
        return FAQuantAttention(key=key, value=value, mode=mode, window=window, query_scale_H=query)
    offset = 5.0 if kind == "c8-offset" else 0.0
    key, value = (
        ChannelScale(0.02 + normal(KV_HEADS, DIM, seed=s).abs() / 100, torch.full((KV_HEADS, DIM), offset * s))
        for s in (1, -2)
    )
    return C8Attention(key=key, value=value, mode=mode, window=window)


KINDS = pytest.mark.parametrize("kind", ["float", "fa", "c8", "c8-offset"])
INT8_KINDS = pytest.mark.parametrize("kind", ["fa", "c8", "c8-offset"])
WINDOWS = pytest.mark.parametrize("window", [None, 40])


def through_cache(run, sizes, prompt_lens=None):
    q, k, v = inputs()
    cache = KVCache(TOKENS, KV_HEADS, DIM, run.cache_dtype)
    pieces, at = [], 0
    for i, size in enumerate(sizes):
        span = slice(at, at + size)
        pieces.append(run(q[span], k[span], v[span], cache, size if prompt_lens is None else prompt_lens[i]))
        at += size
    assert cache.context_len == at == TOKENS
    return torch.cat(pieces), cache._keys, cache._values


@KINDS
@WINDOWS
def test_cache_mode_does_not_depend_on_the_cut(kind, window):
    run = attention(kind, window=window)
    whole, keys, values = through_cache(run, [TOKENS])
    assert torch.equal(whole, run(*inputs(), None, TOKENS))
    for sizes in ([7, 1, BLOCK - 8, TOKENS - BLOCK], [1] * TOKENS):
        cut, cut_keys, cut_values = through_cache(run, sizes)
        assert torch.equal(keys, cut_keys)
        assert torch.equal(values, cut_values)
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@INT8_KINDS
def test_cache_holds_the_quantized_integers(kind):
    run = attention(kind)
    _, keys, values = through_cache(run, [TOKENS])
    _, k, v = inputs()
    for stored, x, params in ((keys, k, run.key), (values, v, run.value)):
        assert stored.dtype == torch.int8
        want = torch.round(x * (1 / params.scale) + params.offset).clamp(-128, 127)
        assert torch.equal(stored.float(), want)


@INT8_KINDS
def test_c8_reads_back_and_faquant_is_near_float(kind):
    run, (q, k, v) = attention(kind), inputs()
    out = run(q, k, v, None, TOKENS)
    if kind != "fa":
        real_k, real_v = run.key.real(run.key.quantize(k)), run.value.real(run.value.quantize(v))
        assert torch.equal(out, attend(q, real_k, real_v, None))
    # Scales are 2 to 4 % of a deviation and so are the errors of scores and values; averages are smaller.
    assert (out - attend(q, k, v, None)).std() < 0.05
    assert not torch.equal(out, attend(q, k, v, None))


@INT8_KINDS
@WINDOWS
def test_mindie_prompt_is_float_and_generation_reads_the_cache(kind, window):
    prompt = TOKENS - 9
    q, k, v = inputs()
    from_cache, keys, _ = through_cache(attention(kind, window=window), [TOKENS])
    run = attention(kind, "mindie", window)
    floats = attend(q[:prompt], k[:prompt], v[:prompt], window)
    for sizes, prompt_lens in (
        ([prompt, 9], [prompt, 0]),
        ([prompt] + [1] * 9, [prompt] + [0] * 9),
        ([TOKENS], [prompt]),
    ):
        out, mindie_keys, _ = through_cache(run, sizes, prompt_lens)
        assert torch.equal(mindie_keys, keys)
        torch.testing.assert_close(out[:prompt], floats, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out[prompt:], from_cache[prompt:], rtol=1e-5, atol=1e-6)


@INT8_KINDS
def test_mindie_second_piece_of_a_prompt_reads_the_first_from_the_cache(kind):
    run, first = attention(kind, "mindie"), 60
    q, k, v = inputs()
    out, _, _ = through_cache(run, [first, TOKENS - first])
    mixed = [torch.cat((p.real(p.quantize(x[:first])), x[first:])) for x, p in ((k, run.key), (v, run.value))]
    torch.testing.assert_close(out[first:], attend(q[first:], *mixed, None), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type, call-arg]


def test_mix_linear_picks_rows_by_origin():
    weight = int8(5, 12, seed=1)
    scale = torch.full((5,), 0.01)
    prompt = W8A8DynamicLinear(weight, scale, weight.sum(1, dtype=torch.int32), None)
    quant_bias = torch.arange(5, dtype=torch.int32)
    generated = W8A8Linear(weight, quant_bias, scale * 0.05, torch.tensor([20.0]), torch.tensor([3.0]))
    mix, x = W8A8MixLinear(prompt, generated), normal(6, 12, seed=2)
    picked = torch.tensor([True, False, False, True, True, False])
    for mask in (picked, ~picked, torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        want = torch.where(mask[:, None], generated(x), prompt(x))
        assert torch.equal(mix.by_origin(x, mask), want)
    assert not torch.equal(prompt(x), generated(x))
    assert torch.equal(mix(x), prompt(x))
