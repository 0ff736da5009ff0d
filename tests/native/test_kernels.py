"""Single kernels of every instruction set: integers bit for bit, floats within what their roundings can do.

Products of packed tokens are tested in test_packed_products.py.

U = 2**-24 is half a unit in the last place of float32, relative: what one rounding costs at most.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.native import KERNELS
from tests.native.operands import (
    INPUTS,
    ISA,
    ISAS,
    NOTHING,
    at_page_end,
    each,
    exact_product,
    reals,
    rng,
    seen,
    sums_of,
)

F32, F16, BF16 = 0, 1, 2
U = 2.0**-24
ALIGN = 64


def widened(stored: np.ndarray, dtype: int) -> np.ndarray:
    """Return stored weights as float64."""
    if dtype == BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def stored_as(x: np.ndarray, dtype: int) -> np.ndarray:
    """Return float32 values in a stored dtype; bfloat16 is cut, not rounded."""
    if dtype == BF16:
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16 if dtype == F16 else np.float32)


def product(isa: str, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), len(weight)), 77, np.int32)
    KERNELS.gemm_i8(isa, weight, x, out)
    return out


@ISA
@each("inputs", INPUTS)
def test_integer_products_are_exact(isa, inputs):
    for outputs in (*range(1, 10), 67):
        weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (outputs, inputs), np.int8))
        tokens = 1 + outputs % 13
        x = rng(outputs).integers(0, 256, (tokens, inputs), np.uint8)
        np.testing.assert_array_equal(product(isa, weight, x), exact_product(weight, seen(isa, x)))


@ISA
@each("tokens", range(1, 14))
def test_integer_products_of_any_number_of_tokens(isa, tokens):
    weight = at_page_end(rng(tokens).integers(-128, 128, (9, 193), np.int8))
    x = rng(tokens, 1).integers(0, 256, (tokens, 193), np.uint8)
    np.testing.assert_array_equal(product(isa, weight, x), exact_product(weight, seen(isa, x)))


@ISA
@each("weight_value", [-128, 127])
@each("value", [0, 127, 128, 255])
def test_integer_products_of_extreme_values_do_not_saturate(isa, weight_value, value):
    inputs = 65_793  # the most that the loader allows: 255 * 128 * 65793 < 2**31
    weight = np.full((5, inputs), weight_value, np.int8)
    x = np.full((3, inputs), value, np.uint8)
    assert (product(isa, weight, x) == weight_value * int(seen(isa, x)[0, 0]) * inputs).all()


@ISA
@each("inputs", INPUTS)
def test_row_sums(isa, inputs):
    weight = at_page_end(rng(inputs).integers(-128, 128, (7, inputs), np.int8))
    weight[0], weight[1] = -128, 127
    out = np.empty(7, np.int32)
    KERNELS.row_sums(isa, weight, out)
    np.testing.assert_array_equal(out, weight.sum(1, dtype=np.int32))


def activations(size: int, seed: int) -> np.ndarray:
    """Return float32 values with halves, ties, zeros and values far outside the range of int8."""
    x = rng(size, seed).normal(0, 40, size).astype(np.float32)
    special = np.array([0.5, -0.5, 1.5, 2.5, -2.5, 0.0, -0.0, 126.5, 127.5, -128.5, 1e9, -1e9, 3e38, -3e38], np.float32)
    where = rng(seed).permutation(size)[: min(size // 2, len(special))]
    x[where] = special[: len(where)]
    return x


def to_int8(scaled: np.ndarray, offset: np.float32) -> np.ndarray:
    return np.clip(np.rint(scaled + offset), -128, 127)


def padded_like(x: np.ndarray) -> np.ndarray:
    return np.full(-(-len(x) // ALIGN) * ALIGN, 77, np.uint8)


@ISA
@each("size", INPUTS)
@each("inv_scale", [1.0, 1 / 3, 3e-3])
@each("offset", [0.0, -3.0, 128.0, -128.0])
def test_quantize_static(isa, size, inv_scale, offset):
    x = activations(size, 1)
    out = padded_like(x)
    KERNELS.quantize_static(isa, x, inv_scale, offset, out)
    expected = to_int8(x * np.float32(inv_scale), np.float32(offset))
    np.testing.assert_array_equal(seen(isa, out[:size]), expected + KERNELS.zero(isa))
    assert (out[size:] == KERNELS.zero(isa)).all()


def token_range(x: np.ndarray) -> tuple[np.float32, np.float32]:
    return min(x.min(), np.float32(0)), max(x.max(), np.float32(0))


TOKENS: dict[str, Any] = {
    "both signs": lambda size: rng(size).normal(0, 3, size),
    "positive": lambda size: rng(size).uniform(1, 2, size),
    "negative": lambda size: rng(size).uniform(-9, -2, size),
    "zeros": lambda size: np.zeros(size),
    "tiny": lambda size: rng(size).normal(0, 1e-12, size),
    "huge": lambda size: rng(size).uniform(-1e38, 1e38, size),
}
TOKEN = each("kind", TOKENS)


@ISA
@TOKEN
@each("size", INPUTS)
def test_quantize_token(isa, kind, size):
    x = TOKENS[kind](size).astype(np.float32)
    lo, hi = token_range(x)
    eps = np.finfo(np.float32).eps
    for symmetric in (True, False):
        scale = max(max(-lo, hi) / np.float32(127) if symmetric else (hi - lo) / np.float32(255), eps)
        offset = np.float32(0) if symmetric else np.rint(-lo / scale) - np.float32(128)
        out = padded_like(x)
        assert KERNELS.quantize_token(isa, x, symmetric, out) == (scale, offset)
        expected = to_int8(x * (np.float32(1) / scale), offset)
        np.testing.assert_array_equal(seen(isa, out[:size]), expected + KERNELS.zero(isa))
        assert (out[size:] == KERNELS.zero(isa)).all()


@ISA
@TOKEN
@each("size", INPUTS)
def test_quantize_16(isa, kind, size):
    x = TOKENS[kind](size).astype(np.float32)
    lo, hi = token_range(x)
    scale = max(max(-lo, hi) / np.float32(32512), np.float32(1e-30))
    q = np.clip(np.rint(x * (np.float32(1) / scale)), -32512, 32512).astype(np.int32)
    high, low = padded_like(x), padded_like(x)
    assert KERNELS.quantize_16(isa, x, high, low) == (scale, int(q.sum()))
    zero = KERNELS.zero(isa)
    halves = [seen(isa, half[:size]).astype(np.int32) for half in (high, low)]
    np.testing.assert_array_equal(256 * (halves[0] - zero) + halves[1], q)
    assert (high[size:] == zero).all() and (low[size:] == 0).all()


FINISH = each("size", [1, 5, 16, 67])


@ISA
@FINISH
def test_finish_static_wraps_around_and_rounds_twice(isa, size):
    acc, bias, deq_scale, y = sums_of(size, 1), sums_of(size, 2), reals(size, 3), np.empty(size, np.float32)
    KERNELS.finish_static(isa, acc, bias, deq_scale, y)
    np.testing.assert_array_equal(y, (acc + bias).astype(np.float32) * deq_scale)


@ISA
@FINISH
def test_what_follows_a_product_may_be_added(isa, size):
    acc, more, deq_scale, before = sums_of(size, 1), sums_of(size, 2, 2**22), reals(size, 3), reals(size, 4) * 1e9
    for finish in (
        lambda y, adds: KERNELS.finish_static(isa, acc, more, deq_scale, y, adds),
        lambda y, adds: KERNELS.finish_token(isa, acc, more, deq_scale, deq_scale, 0.0371, 5, y, adds),
        lambda y, adds: KERNELS.finish_16(isa, acc, more, more, deq_scale, NOTHING, deq_scale, 3.7e-5, 11, y, adds),
    ):
        alone, added = np.empty(size, np.float32), before.copy()
        finish(alone, False)
        finish(added, True)
        np.testing.assert_array_equal(added, before + alone)


@ISA
@each("size", [1, 6, 16, 37, 128])
def test_scale_heads_rounds_each_time(isa, size):
    acc, offset, scale = at_page_end(reals(size, 1) * 1e6), at_page_end(reals(size, 2)), at_page_end(reals(size, 3))
    y, inverse = np.full(size + 1, 77, np.float32), np.float32(1 / 16129)
    KERNELS.scale_heads(isa, acc, inverse, offset, scale, y)
    np.testing.assert_array_equal(y[:size], (acc * inverse - offset) * scale)
    KERNELS.scale_heads(isa, acc, inverse, NOTHING, NOTHING, y)
    np.testing.assert_array_equal(y[:size], acc * inverse)
    assert y[size] == 77


@ISA
@FINISH
@each("with_bias", [False, True])
@each("offset", [-128, 0, 127])
def test_finish_token(isa, size, with_bias, offset):
    acc, weight_sum, weight_scale = sums_of(size, 1), sums_of(size, 2, 2**22), reals(size, 3)
    bias, scale, y = reals(size, 4) if with_bias else NOTHING, np.float32(0.0371), np.empty(size, np.float32)
    KERNELS.finish_token(isa, acc, weight_sum, weight_scale, bias, scale, offset, y)
    expected = (acc - np.int32(offset + KERNELS.zero(isa)) * weight_sum).astype(np.float32) * scale * weight_scale
    np.testing.assert_array_equal(y, expected + bias if with_bias else expected)


def rounded(exact: Fraction) -> np.float32:
    """Round a fraction to float32 once."""
    if exact == 0:
        return np.float32(0)
    shift = 30 - (exact.numerator.bit_length() - exact.denominator.bit_length())
    whole, rest = divmod(exact * Fraction(2) ** shift, 1)
    # About 31 bits, the last of them set if anything was cut off: rounding these to 24 is rounding the whole.
    return np.float32(np.ldexp(float(2 * whole + (rest != 0)), -shift - 1))


@ISA
@FINISH
@each("with_offset", [False, True])
@each("with_bias", [False, True])
def test_finish_16_fuses_what_it_says(isa, size, with_offset, with_bias):
    high, low, weight_sum = sums_of(size, 1, 2**30), sums_of(size, 2, 2**30), sums_of(size, 3, 2**22)
    weight_scale, scale, total, y = reals(size, 4), np.float32(3.7e-5), 20_011_337, np.empty(size, np.float32)
    offset = reals(size, 5) * 100 if with_offset else NOTHING
    bias = reals(size, 6) if with_bias else NOTHING
    KERNELS.finish_16(isa, high, low, weight_sum, weight_scale, offset, bias, scale, total, y)
    top = (high - KERNELS.zero(isa) * weight_sum).astype(np.float32)
    for n in range(size):
        v = rounded(Fraction(float(top[n])) * 256 + Fraction(float(np.float32(low[n]))))
        if with_offset:
            v = rounded(Fraction(float(np.float32(-total))) * Fraction(float(offset[n])) + Fraction(float(v)))
        v = v * scale * weight_scale[n]
        assert y[n] == (v + bias[n] if with_bias else v)


@ISA
@each("size", [1, 6, 16, 37, 128])
def test_quantize_heads_with_one_scale_or_many(isa, size):
    x = activations(size, 7)
    many, offsets = rng(size).uniform(0.1, 3, size).astype(np.float32), np.rint(reals(size, 8) * 30)
    for inv_scale, offset in ((many[:1], NOTHING), (many[:1], offsets[:1]), (many, NOTHING), (many, offsets)):
        out = np.full(size + 1, 77, np.int8)
        total = KERNELS.quantize_heads(isa, x, inv_scale, offset, out)
        with np.errstate(over="ignore"):
            scaled = x * inv_scale
        expected = to_int8(scaled, offset if len(offset) else np.float32(0))  # type: ignore[arg-type]
        np.testing.assert_array_equal(out[:size], expected.astype(np.int8))
        assert total == expected.sum()
        assert out[size] == 77


@ISA
@each("size", [1, 7, 8, 65])
def test_add_rounds_once(isa, size):
    x, y = reals(size, 1), reals(size, 2)
    expected = x + y
    KERNELS.add(isa, x, y)
    np.testing.assert_array_equal(x, expected)


@ISA
@each("dtype", [F32, F16, BF16])
@each("inputs", [1, 3, 15, 16, 33, 576, 2049, 8193])
def test_float_products(isa, dtype, inputs):
    for outputs, tokens in ((1, 3), (4, 1), (5, 7), (67, 2)):
        weight = at_page_end(stored_as(reals(outputs * inputs, 1).reshape(outputs, inputs), dtype))
        x = at_page_end(reals(tokens * inputs, 2).reshape(tokens, inputs))
        out = np.empty((tokens, outputs), np.float32)
        KERNELS.gemm_float(isa, weight, dtype, x, out)
        real, x64 = widened(weight, dtype), x.astype(np.float64)
        # K products that are fused with their sums, and at most 16 + 5 sums of lanes and blocks, each rounded once.
        bound = (inputs + 21) * U * (np.abs(x64) @ np.abs(real).T)
        assert (np.abs(out - x64 @ real.T) <= bound).all()


@ISA
@each("dtype", [F32, F16, BF16])
def test_a_row_has_the_same_bits_whatever_other_rows_are_there(isa, dtype):
    inputs, outputs = 2500, 11
    weight = stored_as(reals(outputs * inputs, 1).reshape(outputs, inputs), dtype)
    x = reals(13 * inputs, 2).reshape(13, inputs)

    def run(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), len(weight)), np.float32)
        KERNELS.gemm_float(isa, np.ascontiguousarray(weight), dtype, np.ascontiguousarray(x), out)
        return out

    whole = run(weight, x)
    for begin in range(13):
        for end in range(begin + 1, 14):
            np.testing.assert_array_equal(run(weight, x[begin:end]), whole[begin:end])
    for begin in range(outputs):
        np.testing.assert_array_equal(run(weight[begin:], x[:2]), whole[:2, begin:])


@ISA
@each("size", INPUTS)
@each("with_gain", [False, True])
@each("with_bias", [False, True])
def test_rms_norm(isa, size, with_gain, with_bias):
    x, eps, y = at_page_end(reals(size, 1) * 30), 1e-5, np.empty(size, np.float32)
    gain = at_page_end(reals(size, 2)) if with_gain else NOTHING
    bias = at_page_end(reals(size, 3)) if with_bias else NOTHING
    KERNELS.rms_norm(isa, x, gain, bias, eps, y)
    x64 = x.astype(np.float64)
    product = x64 / np.sqrt(np.mean(x64**2) + np.float32(eps)) * (gain.astype(np.float64) if with_gain else 1)
    # Squares are positive: their sum is off by size + 6 roundings at most, its root by half of that; then a division,
    # a sum, a root, a reciprocal and two products. The sum with the bias is one more, of itself.
    bound = ((size + 6) / 2 + 6) * U * np.abs(product)
    expected = product + bias if with_bias else product
    assert (np.abs(y - expected) <= bound + U * (np.abs(expected) + bound)).all()


@ISA
def test_rms_norm_in_place_is_the_same(isa):
    x, gain = reals(100, 1), reals(100, 2)
    y = np.empty_like(x)
    KERNELS.rms_norm(isa, x, gain, NOTHING, 1e-6, y)
    KERNELS.rms_norm(isa, x, gain, NOTHING, 1e-6, x)
    np.testing.assert_array_equal(x, y)


@ISA
@each("size", [1, 15, 16, 17, 1000])
def test_gate_mul_with_silu(isa, size):
    gate = at_page_end(np.linspace(-100, 100, size, dtype=np.float32) if size > 1 else reals(1, 1))
    up, y = at_page_end(reals(size, 2)), np.empty(size, np.float32)
    KERNELS.gate_mul(isa, gate, up, y)
    g = gate.astype(np.float64)
    expected = g / (1 + np.exp(-g)) * up
    # exp is within 2.5e-7 (4.2 U); a sum, a quotient and a product are rounded. Below -88 exp(-g) is held at e**88,
    # so what is left is at most 100 e**-88 |up|.
    assert (np.abs(y - expected) <= 8 * U * np.abs(expected) + 100 * np.exp(-88.0) * np.abs(up)).all()


@ISA
@each("size", [1, 15, 16, 17, 1000])
@each("most", [0.01, 1, 6, 100])
def test_gate_mul_with_gelu(isa, size, most):
    gate = at_page_end(np.linspace(-most, most, size, dtype=np.float32) if size > 1 else reals(1, 1))
    up, y = at_page_end(reals(size, 2)), np.empty(size, np.float32)
    KERNELS.gate_mul(isa, gate, up, y, gelu=True)
    g = gate.astype(np.float64)
    z = 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)  # 0.5 (1 + tanh(z / 2)) = 1 / (1 + e**-z), without cancellation
    expected = g / (1 + np.exp(-np.clip(z, -700, 700))) * up
    # As silu, and e**-z is off by what four roundings make of z, as far as it weighs.
    slope = np.abs(z) / (1 + np.exp(np.clip(z, -700, 700)))
    assert (np.abs(y - expected) <= (8 + 4 * slope) * U * np.abs(expected) + 100 * np.exp(-88.0) * np.abs(up)).all()


@ISA
def test_gates_of_any_size_and_what_is_no_number(isa):
    gate = np.array([1e30, -1e30, np.inf, np.nan, 0.0, -0.0], np.float32)
    y = np.empty(6, np.float32)
    for gelu in (False, True):
        KERNELS.gate_mul(isa, gate, np.ones(6, np.float32), y, gelu=gelu)
        assert y[0] == gate[0] and y[2] == np.inf and np.isnan(y[3]) and not y[4:].any()
        assert abs(y[1]) < 1e-7 if gelu else np.isfinite(y[1])


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_have_the_same_bits_on_every_instruction_set(gelu):
    gate, up = reals(1000, 1) * 5, reals(1000, 2)
    found = [np.empty(1000, np.float32) for _ in ISAS]
    for isa, y in zip(ISAS, found, strict=True):
        KERNELS.gate_mul(isa, gate, up, y, gelu=gelu)
        np.testing.assert_array_equal(y, found[0])


def test_softened_numbers_have_the_same_bits_on_every_instruction_set():
    found = [reals(1000, 1) * 40 for _ in ISAS]
    for isa, x in zip(ISAS, found, strict=True):
        KERNELS.soften(isa, x, 30.0)
        np.testing.assert_array_equal(x, found[0])


@ISA
@each("size", [1, 15, 16, 17, 1000])
@each("cap", [0.5, 30.0, 50.0, 1e6])
def test_soften(isa, size, cap):
    for most in (1e-6 * cap, 0.2 * cap, 2 * cap, 30 * cap):
        x = np.linspace(-most, most, size, dtype=np.float32) if size > 1 else np.full(1, most, np.float32)
        y = at_page_end(x)
        KERNELS.soften(isa, y, cap)
        expected = cap * np.tanh(x.astype(np.float64) / np.float32(cap))
        # A quotient by its reciprocal, tanh (an exponential within 2.5 units, whose error the quotient e / (e + 2)
        # carries at most twice, and three sums and products), a product.
        assert (np.abs(y - expected) <= 10 * U * np.abs(expected)).all()
    x = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    KERNELS.soften(isa, x, cap)
    assert x.tolist() == [np.float32(cap), -np.float32(cap), -np.float32(cap), 0]


@ISA
@each("dim", [2, 6, 16, 80, 128])
def test_rope_is_two_rounded_products_and_a_sum(isa, dim):
    x, angle = reals(dim, 1), reals(dim // 2, 2)
    cos, sin = at_page_end(np.cos(angle)), at_page_end(np.sin(angle))
    a, b = x[: dim // 2].copy(), x[dim // 2 :].copy()
    KERNELS.rope(isa, x, cos, sin, x)
    np.testing.assert_array_equal(x, np.concatenate((a * cos - b * sin, b * cos + a * sin)))


@ISA
@each("dtype", [F16, BF16])
def test_widen_takes_every_16_bit_pattern(isa, dtype):
    """Subnormals, infinities and zeros of either sign among them; of a NaN only that it is one."""
    bits = np.arange(65536, dtype=np.uint16)
    x = bits.view(np.float16) if dtype == F16 else bits
    y = np.empty(65536, np.float32)
    KERNELS.widen(isa, x, dtype, y)
    expected = x.astype(np.float32) if dtype == F16 else (bits.astype(np.uint32) << 16).view(np.float32)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(y.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])
    assert np.isnan(y[is_nan]).all()


@ISA
@each("dtype", [F32, F16, BF16])
@each("size", [1, 7, 9, 16, 31])
def test_widen_of_any_size(isa, dtype, size):
    x = at_page_end(stored_as(reals(size, 1), dtype))
    y = np.full(size + 1, 77, np.float32)
    KERNELS.widen(isa, x, dtype, y)
    np.testing.assert_array_equal(y[:size], widened(x, dtype))
    assert y[size] == 77


@ISA
@each("size", [1, 2, 15, 16, 17, 333])
def test_argmax_takes_the_first_of_the_largest(isa, size):
    for at in {0, size // 2, size - 1}:
        x = at_page_end(-1 - np.abs(reals(size, 1)))
        x[at:] = -1
        assert KERNELS.argmax(isa, x) == at
    assert KERNELS.argmax(isa, np.full(size, -np.inf, np.float32)) == 0


@ISA
@each("size", [1, 2, 15, 16, 17, 333])
def test_argmax_passes_over_nan_and_stays_inside(isa, size):
    for at in {0, size // 2, size - 1}:
        x = reals(size, 1)
        x[at] = np.nan
        expected = 0 if size == 1 else int(np.nanargmax(x))
        assert KERNELS.argmax(isa, x) == expected
    assert KERNELS.argmax(isa, np.full(size, np.nan, np.float32)) == 0
