"""Integer products are exact, and every linear is its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference import linear
from eightfold.model.reference.linear import (
    EXACT_K,
    FloatLinear,
    W8A8DynamicLinear,
    W8A8Linear,
    W8A16Linear,
    divided_to_int8,
    float_linear,
    int_matmul,
    int_matmul_float,
    release_widened,
    to_int8_,
    token_params,
)
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import token_samples, write_model

T, K, N = 7, 65, 5

# One rounding to float32, relative.
ROUNDING = 2.0**-24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float64)


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T


def portable_int_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int_matmul as it runs where torch has no trustworthy int8 product."""
    saved = linear._fast_int_matmul
    linear._fast_int_matmul = lambda: None  # type: ignore[assignment]
    try:
        return int_matmul(x, weight)
    finally:
        linear._fast_int_matmul = saved


PRODUCTS = pytest.mark.parametrize("product", [int_matmul, int_matmul_float, portable_int_matmul])


@PRODUCTS
@pytest.mark.parametrize("k", [1, 31, 1024, 1025, 3000])
@pytest.mark.parametrize("n", [1, 5, 17])
@pytest.mark.parametrize("t", [1, 2, 3, 7, 16, 17])
def test_int8_products_are_exact(product: Callable[..., torch.Tensor], t, n, k):
    x, weight = int8(t, k, seed=t), int8(n, k, seed=n + 100)
    result = product(x, weight)
    assert result.dtype == torch.int32
    np.testing.assert_array_equal(result.numpy(), exact_product(x, weight))


@PRODUCTS
@pytest.mark.parametrize("k", [1, 2, 31, EXACT_K - 1, EXACT_K, EXACT_K + 1, 3000])
@pytest.mark.parametrize("a", [-128, -127, 127])
@pytest.mark.parametrize("b", [-128, -127, 127])
def test_extreme_values_neither_saturate_nor_round(product: Callable[..., torch.Tensor], a, b, k):
    # A kernel that adds pairs in int16 saturates at 32,767 (127 * 127 * 2 = 32,258 fits, 128 * 128 * 2 does not);
    # float32 loses the last bit past 2**24 = 128 * 128 * 1024.
    x, weight = torch.full((17, k), a, dtype=torch.int8), torch.full((3, k), b, dtype=torch.int8)
    x[1, -1], weight[2, -1] = 1, -1  # odd sums too
    np.testing.assert_array_equal(product(x, weight).numpy(), exact_product(x, weight))


@PRODUCTS
def test_no_tokens_give_no_rows(product: Callable[..., torch.Tensor]):
    assert product(int8(0, 31), int8(3, 31)).shape == (0, 3)


def test_a_piece_of_exact_k_products_stays_below_the_float32_limit():
    assert 128 * 128 * EXACT_K <= 2**24


def test_a_fast_product_that_saturates_is_not_used(monkeypatch):
    def saturating(x: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
        # As AVX2 does it: unsigned times signed, pairs added in int16 that saturates, the shift taken back at the end.
        products = (x.int() + 128)[:, :, None] * weight_KN.int()[None]
        pairs = (products[:, ::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1, dtype=torch.int32) - 128 * weight_KN.sum(0, dtype=torch.int32)

    def refusing(x: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this machine")

    for product in (saturating, refusing, None):
        monkeypatch.setattr(torch, "_int_mm", product)
        assert linear._fast_int_matmul.__wrapped__() is None
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: (x.long() @ w.long()).int())
    assert linear._fast_int_matmul.__wrapped__() is torch._int_mm


def test_halves_round_to_even():
    scaled = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -127.5, 127.5, -128.5, 1e9, -1e9])
    expected = [0, 2, 2, 0, -2, -2, 126, 126, -128, 127, -128, 127, -128]
    assert to_int8_(scaled, torch.tensor([0.0])).tolist() == expected


def test_offset_is_added_before_the_only_rounding():
    # Rounding first would give 2 + 1 and -2 + 1; a second rounding is never seen with an integral offset otherwise.
    assert to_int8_(torch.tensor([1.5, -1.5]), torch.tensor([1.0])).tolist() == [2, 0]


def test_float_linear_is_its_formula():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, bias = normal(T, K, seed=1), normal(N, K, seed=2).to(dtype), normal(N, seed=3)
        y = FloatLinear(weight, bias)(x)
        expected = f64(x) @ f64(weight.float()).T + f64(bias)
        # K products and the bias, each rounded, and K sums: at most 2 K + 1 roundings of what the terms add up to.
        bound = (2 * K + 1) * ROUNDING * (np.abs(f64(x)) @ np.abs(f64(weight.float())).T + np.abs(f64(bias)))
        assert y.dtype == torch.float32
        assert (np.abs(f64(y) - expected) <= bound).all()
        without = FloatLinear(weight, None)(x)
        assert (np.abs(f64(without) + f64(bias) - expected) <= bound).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_offset", [False, True])
def test_w8a16_is_its_formula(has_offset, has_bias):
    x, weight = normal(T, K, seed=1), int8(N, K, seed=2)
    scale = normal(N, 1, seed=3).abs() * 0.01 + 0.001
    offset = torch.tensor([[-128.0], [127.0], [3.0], [-1.0], [0.0]]) * has_offset
    bias = normal(N, seed=4) if has_bias else None
    stored = weight.clone()
    y = W8A16Linear(weight, scale, offset, bias)(x)
    real = (f64(weight) - f64(offset)) * f64(scale)
    added = f64(bias) if bias is not None else np.zeros(N)
    # As for the float linear, and one rounding more in each weight's product with its scale.
    bound = (2 * K + 2) * ROUNDING * (np.abs(f64(x)) @ np.abs(real).T + np.abs(added))
    assert (np.abs(f64(y) - (f64(x) @ real.T + added)) <= bound).all()
    assert torch.equal(weight, stored)


def static_linear(input_scale: float, input_offset: float, quant_bias: torch.Tensor) -> W8A8Linear:
    return W8A8Linear(
        int8(N, K, seed=2),
        quant_bias,
        normal(N, seed=3).abs() * 1e-3,
        1.0 / torch.tensor([input_scale]),
        torch.tensor([input_offset]),
    )


def rne_clamped(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), -128, 127)


@pytest.mark.parametrize("input_offset", [-128.0, -17.0, 0.0, 127.0])
def test_static_w8a8_is_its_formula(input_offset):
    # A scale of 2**-5 makes x / scale exact in float32, so that both sides round the same number.
    quant_bias = torch.tensor([0, 1, -(2**24) - 1, 2**30, -7], dtype=torch.int32)
    layer = static_linear(2.0**-5, input_offset, quant_bias)
    x = normal(T, K, seed=1) * 3
    x[0, :4] = torch.tensor([0.5, 1.5, 2.5, -0.5]) / 32  # halves
    given = x.clone()
    xq = rne_clamped(f64(x) * 32 + input_offset)
    assert xq.min() == -128 or xq.max() == 127  # clamping is part of it
    sums = xq @ f64(layer.weight).T + f64(quant_bias)
    expected = sums * f64(layer.deq_scale)
    # The sum is exact; it is rounded on its way to float32, and so is the product.
    assert (np.abs(f64(layer(x)) - expected) <= 2.001 * ROUNDING * np.abs(expected)).all()
    assert torch.equal(x, given)


def test_static_w8a8_multiplies_by_the_reciprocal():
    # The quotient in float32 is -117.49999; times the reciprocal, rounded to 3.3333333, it is -117.5, and -118 is even.
    scale, x = torch.tensor([0.3]), torch.zeros(1, K)
    x[0, 0] = -35.25
    assert (float(torch.round(x[0, 0] / scale)), float(torch.round(x[0, 0] * (1 / scale)))) == (-117, -118)
    layer = static_linear(0.3, 0.0, torch.zeros(N, dtype=torch.int32))
    expected = -118 * f64(layer.weight)[:, 0] * f64(layer.deq_scale)
    assert (np.abs(f64(layer(x))[0] - expected) <= 2.001 * ROUNDING * np.abs(expected)).all()


def test_the_reciprocal_is_taken_once_at_load_in_float32(tmp_path):
    source = write_model(tmp_path / "float", tokenizer=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A8), token_samples())
    checkpoint = Checkpoint.open(tmp_path / "out")
    stored = load_float32(checkpoint, "model.layers.0.mlp.down_proj.input_scale")
    loaded = Decoder(checkpoint).block(0).mlp.down.linears[0]  # type: ignore[attr-defined]
    assert loaded.inv_input_scale.dtype == torch.float32
    assert torch.equal(loaded.inv_input_scale, 1 / stored)


def tokens() -> torch.Tensor:
    x = normal(8, K, seed=5)
    x[1] = 0  # nothing to scale by
    x[2] = x[2].abs() + 1  # all positive: the range still holds 0
    x[3] = -x[3].abs() - 1
    x[4] = 0
    x[4, 7] = 3.0  # a single value
    x[5] *= 1e-12  # below EPS
    x[6] *= 1e6
    x[7, 0] = 50.0  # an outlier
    return x


def dynamic_linear(mode: Any, bias: torch.Tensor | None) -> W8A8DynamicLinear:
    weight = int8(N, K, seed=2)
    return W8A8DynamicLinear(weight, normal(N, seed=3).abs() * 1e-3, weight.sum(1, dtype=torch.int32), bias, mode)


def numpy_token_params(x: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    # float32 as in the formula: which side of a half a value falls on depends on it.
    lo, hi = x.min(1, keepdims=True), x.max(1, keepdims=True)
    eps = np.finfo(np.float32).eps
    if mode == "symmetric":
        scale = np.maximum(np.maximum(-lo, hi) / np.float32(127), eps)
        return scale, np.zeros_like(scale)
    lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
    scale = np.maximum((hi - lo) / np.float32(255), eps)
    return scale, np.rint(-lo / scale) - 128


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_dynamic_w8a8_is_its_formula(mode, has_bias):
    x, bias = tokens(), normal(N, seed=4) if has_bias else None
    layer, given = dynamic_linear(mode, bias), x.clone()
    scale, offset = numpy_token_params(x.numpy(), mode)
    assert scale.dtype == np.float32
    xq = rne_clamped(x.numpy() / scale + offset).astype(np.float64)
    scale, offset = scale.astype(np.float64), offset.astype(np.float64)
    added = f64(bias) if bias is not None else np.zeros(N)
    real = (xq @ f64(layer.weight).T - offset * f64(layer.weight).sum(1)) * scale * f64(layer.weight_scale)
    # The integer is exact; it is rounded to float32, twice multiplied and once added to.
    bound = 3.001 * ROUNDING * np.abs(real) + ROUNDING * np.abs(real + added)
    assert (np.abs(f64(layer(x)) - (real + added)) <= bound).all()
    assert torch.equal(x, given)


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_dynamic_w8a8_is_the_float_product_up_to_a_step(mode):
    # |x - (q - o) s| <= s / 2 for each input, and half a step more where the rounding of the asymmetric offset pushes
    # the end of the range over the clamp. Float rounding, 4 * 255 * 2**-24 of a step, is in the thousandth.
    x, layer = tokens(), dynamic_linear(mode, None)
    scale = f64(token_params(x, mode)[0])
    weight = f64(layer.weight) * f64(layer.weight_scale)[:, None]
    bound = 1.001 * scale * np.abs(weight).sum(1)
    assert (np.abs(f64(layer(x)) - f64(x) @ weight.T) <= bound).all()


def test_a_row_of_zeros_gives_the_bias():
    bias = normal(N, seed=4)
    for mode in ("symmetric", "asymmetric"):
        y = dynamic_linear(mode, bias)(torch.zeros(2, K))
        assert torch.equal(y, bias.expand(2, N))


def test_token_params_are_those_of_the_range():
    x = torch.tensor([[0.0, 0.0], [0.0, 255.0], [-255.0, 0.0], [-127.0, 64.0], [1.0, 2.0], [-2.0, -1.0]])
    scale, offset = token_params(x, "asymmetric")
    eps = float(np.finfo(np.float32).eps)
    assert scale[:, 0].tolist() == pytest.approx([eps, 1.0, 1.0, 191 / 255, 2 / 255, 2 / 255], rel=2 * ROUNDING)
    # -lo / s = 127 * 255 / 191 = 169.55 rounds to 170.
    assert offset[:, 0].tolist() == [-128.0, -128.0, 127.0, 42.0, -128.0, 127.0]
    scale, offset = token_params(x, "symmetric")
    expected = [eps, 255 / 127, 255 / 127, 1.0, 2 / 127, 2 / 127]
    assert scale[:, 0].tolist() == pytest.approx(expected, rel=2 * ROUNDING)
    assert offset.abs().max() == 0


def test_tokens_do_not_see_each_other():
    x = tokens()
    for mode in ("symmetric", "asymmetric"):
        layer = dynamic_linear(mode, normal(N, seed=4))
        assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@pytest.mark.parametrize("t", [1, 5, 64])
def test_a_few_rows_at_a_time_are_all_rows_at_once(monkeypatch, t):
    generator = torch.Generator().manual_seed(t)
    x_TK, weight_NK = torch.randn(t, 48, generator=generator), torch.randint(-127, 128, (40, 48)).to(torch.int8)
    scale_T1, offset_T1 = torch.rand(t, 1, generator=generator) + 0.01, torch.arange(t)[:, None] - 100.0
    dynamic = W8A8DynamicLinear(weight_NK, torch.rand(40), weight_NK.sum(1, dtype=torch.int32), torch.randn(40))
    w8a16 = W8A16Linear(weight_NK, torch.rand(40, 1), torch.rand(40, 1), None)
    found = []
    for elements in (1, 3 * 48 + 1, 1 << 19):
        monkeypatch.setattr("eightfold.model.reference.linear._PIECE_ELEMENTS", elements)
        xq = divided_to_int8(x_TK, scale_T1, offset_T1)
        found.append((xq, dynamic.multiply(xq, scale_T1, offset_T1), w8a16(x_TK)))
    assert torch.equal(found[0][0], (x_TK / scale_T1 + offset_T1).round().clamp(-128, 127).to(torch.int8))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_weights_that_share_memory_for_float32_do_not_mix():
    small, large = torch.randn(8, 16).to(torch.bfloat16), torch.randn(32, 64).to(torch.bfloat16)
    for weight in (small, large, small):
        x = torch.randn(4, weight.shape[1])
        with torch.inference_mode():
            inside = FloatLinear(weight, None)(x)
        assert torch.equal(inside, FloatLinear(weight, None)(x))
        assert torch.equal(inside, float_linear(x, weight.to(torch.float32), None))
    release_widened()
    assert torch.equal(FloatLinear(small, None)(x), inside)
