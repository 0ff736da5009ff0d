"""Products of packed tokens, 16 by 16, with what follows them: bit for bit what single kernels make of them."""

from __future__ import annotations

import numpy as np

from tests.native import KERNELS
from tests.native.operands import INPUTS, ISA, NOTHING, at_page_end, each, exact_product, reals, rng, seen, sums_of

LANES = 16
PACKED = each(("tokens", "inputs", "outputs"), [
    (1, 3, 1), (9, 64, 16), (16, 576, 7), (17, 65, 64), (31, 130, 65), (33, 20, 130), (64, 68, 48), (70, 33, 81),
])  # fmt: skip


@ISA
@each("inputs", INPUTS)
def test_integer_products_of_packed_tokens_are_exact(isa, inputs):
    for outputs, tokens in ((1, 1), (3, 16), (7, 17), (16, 33), (19, 63), (33, 64), (64, 80), (67, 97), (140, 130)):
        weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (outputs, inputs), np.int8))
        x = rng(outputs).integers(0, 256, (tokens, inputs), np.uint8)
        out = np.full((-(-tokens // 16) * 16, outputs), 77, np.int32)
        KERNELS.gemm_packed(isa, weight, x, out)
        np.testing.assert_array_equal(out[:tokens], exact_product(weight, seen(isa, x)))


@ISA
@PACKED
@each("adds", [False, True])
def test_packed_static_is_a_product_and_what_follows(isa, tokens, inputs, outputs, adds):
    weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (outputs, inputs), np.int8))
    x = rng(outputs).integers(0, 256, (tokens, inputs), np.uint8)
    bias, deq_scale = at_page_end(sums_of(outputs, 1)), at_page_end(reals(outputs, 2))
    y = reals(tokens * outputs, 3).reshape(tokens, outputs)
    expected = y.copy()
    for t, acc in enumerate(exact_product(weight, seen(isa, x))):
        KERNELS.finish_static(isa, acc, bias, deq_scale, expected[t], adds)
    KERNELS.packed_static(isa, weight, x, bias, deq_scale, y, adds)
    np.testing.assert_array_equal(y, expected)


@ISA
@PACKED
@each("adds", [False, True])
@each("full", [False, True])
def test_packed_16_is_two_products_and_what_follows(isa, tokens, inputs, outputs, adds, full):
    weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (outputs, inputs), np.int8))
    high, low = (rng(outputs, i).integers(0, 256, (tokens, inputs), np.uint8) for i in (1, 2))
    weight_sum, weight_scale = at_page_end(sums_of(outputs, 1, 2**16)), at_page_end(reals(outputs, 2))
    offset, bias = (at_page_end(reals(outputs, 3 + i)) if full else NOTHING for i in (0, 1))
    scale, total = np.abs(reals(tokens, 5)), sums_of(tokens, 6, 2**20)
    y = reals(tokens * outputs, 7).reshape(tokens, outputs)
    expected = y.copy()
    for t, (top, rest) in enumerate(
        zip(*(exact_product(weight, seen(isa, half)) for half in (high, low)), strict=True)
    ):
        KERNELS.finish_16(
            isa, top, rest, weight_sum, weight_scale, offset, bias, scale[t], int(total[t]), expected[t], adds
        )
    KERNELS.packed_16(isa, weight, high, low, weight_sum, weight_scale, offset, bias, scale, total, y, adds)
    np.testing.assert_array_equal(y, expected)


def pairs(make, outputs: int, seed: int, *more: float) -> np.ndarray:
    return at_page_end(np.stack([make(outputs, seed + i, *more) for i in (0, 1)]))


@ISA
@PACKED
@each("gelu", [False, True])
def test_gated_static_is_two_products_their_gate_mul_and_its_quantization(isa, tokens, inputs, outputs, gelu):
    weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (2, outputs, inputs), np.int8))
    x = rng(outputs).integers(0, 256, (tokens, inputs), np.uint8)
    bias, deq_scale = pairs(sums_of, outputs, 1, 2**12), pairs(reals, outputs, 3) / np.float32(2**14)
    inv_scale, offset = 3.7, -5.0
    blocks, fours = -(-tokens // LANES), -(-outputs // 4)
    made = np.full((blocks, fours, LANES, 4), 77, np.uint8)
    KERNELS.gated_static(isa, weight, x, bias, deq_scale, inv_scale, offset, made, gelu)
    found = made.transpose(0, 2, 1, 3).reshape(blocks * LANES, 4 * fours)[:tokens, :outputs]
    expected = np.empty((tokens, outputs), np.uint8)
    gated = np.empty((2, outputs), np.float32)
    for t, (gate, up) in enumerate(zip(*(exact_product(weight[i], seen(isa, x)) for i in (0, 1)), strict=True)):
        for i, acc in enumerate((gate, up)):
            KERNELS.finish_static(isa, acc, bias[i], deq_scale[i], gated[i])
        KERNELS.gate_mul(isa, gated[0], gated[1], gated[0], gelu)
        KERNELS.quantize_static(isa, gated[0], inv_scale, offset, expected[t])
    assert len(np.unique(expected)) > min(expected.size, 40) // 4  # neither all clipped nor all the same
    np.testing.assert_array_equal(found, expected)


@ISA
@PACKED
@each("full", [False, True])
@each("gelu", [False, True])
def test_gated_16_is_gate_mul_of_two_products(isa, tokens, inputs, outputs, full, gelu):
    weight = at_page_end(rng(inputs, outputs).integers(-128, 128, (2, outputs, inputs), np.int8))
    high, low = (rng(outputs, i).integers(0, 256, (tokens, inputs), np.uint8) for i in (1, 2))
    weight_sum, weight_scale = pairs(sums_of, outputs, 1, 2**16), pairs(reals, outputs, 3) / np.float32(2**22)
    offset, bias = (pairs(reals, outputs, 5 + 2 * i) if full else np.zeros((0, 0), np.float32) for i in (0, 1))
    scale, total = np.abs(reals(tokens, 9)), sums_of(tokens, 10, 2**20)
    y, expected = np.full((tokens, outputs), 77, np.float32), np.empty((tokens, outputs), np.float32)
    gated = np.empty((2, tokens, outputs), np.float32)
    for i in (0, 1):
        some = (offset[i], bias[i]) if full else (NOTHING, NOTHING)
        KERNELS.packed_16(isa, weight[i], high, low, weight_sum[i], weight_scale[i], *some, scale, total, gated[i])
    for t in range(tokens):
        KERNELS.gate_mul(isa, gated[0, t], gated[1, t], expected[t], gelu)
    KERNELS.gated_16(isa, weight, high, low, weight_sum, weight_scale, offset, bias, scale, total, y, gelu)
    np.testing.assert_array_equal(y, expected)
