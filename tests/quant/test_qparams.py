"""The formulas, with numbers worked out by hand, and the properties they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.model.reference import linear
from eightfold.model.reference.linear import asymmetric, symmetric
from eightfold.quant import qparams
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.qparams import QuantizedWeight, pack_deq_scale, quantize_weight, static_params
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import token_samples

EPS = 2.0**-23


def test_symmetric_scale_is_absmax_over_127():
    assert symmetric(torch.tensor([127.0, 1.0])).tolist() == [1.0, np.float32(1) / np.float32(127)]


def test_symmetric_scale_of_nothing_is_epsilon():
    assert symmetric(torch.zeros(1)).item() == EPS


@pytest.mark.parametrize(
    ("lo", "hi", "scale", "offset"),
    [
        (-128.0, 127.0, 1.0, 0.0),
        (0.0, 255.0, 1.0, -128.0),
        (-255.0, 0.0, 1.0, 127.0),
        (10.0, 255.0, 1.0, -128.0),  # zero is always inside
        (-255.0, -3.0, 1.0, 127.0),
        (-0.5, 254.5, 1.0, -128.0),  # 0.5 rounds to the even 0
        (-1.5, 253.5, 1.0, -126.0),  # 1.5 rounds to the even 2
        (0.0, 0.0, EPS, -128.0),
    ],
)
def test_asymmetric_parameters(lo, hi, scale, offset):
    got_scale, got_offset = asymmetric(torch.tensor([lo]), torch.tensor([hi]))
    assert got_scale.item() == scale
    assert got_offset.item() == offset


def test_symmetric_weight_by_hand():
    weight = quantize_weight(torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5]]), is_symmetric=True)
    assert weight.values.tolist() == [[127, -127, 0, 2, -2]]  # halves go to the even neighbour
    assert weight.scale.tolist() == [[1.0]]
    assert weight.offset.tolist() == [[0.0]]
    assert weight.sum().tolist() == [0]


def test_asymmetric_weight_adds_the_offset_before_it_rounds():
    # scale 1, offset -127: 0.5 - 127 = -126.5 rounds to -126; rounding first would give 0 - 127 = -127.
    weight = quantize_weight(torch.tensor([[-1.0, 254.0, 0.5]]), is_symmetric=False)
    assert weight.offset.tolist() == [[-127.0]]
    assert weight.values.tolist() == [[-128, 127, -126]]


def test_zero_row_gets_epsilon_and_zeros():
    weight = quantize_weight(torch.zeros(2, 3), is_symmetric=True)
    assert weight.scale.tolist() == [[EPS], [EPS]]
    assert not weight.values.any()


def test_weight_is_not_modified():
    weight = torch.randn(4, 5)
    before = weight.clone()
    quantize_weight(weight, is_symmetric=False)
    assert torch.equal(weight, before)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.booleans(),
)
def test_error_is_at_most_half_a_step(rows, is_symmetric):
    weight = torch.tensor(rows, dtype=torch.float32)
    stored = quantize_weight(weight, is_symmetric=is_symmetric)
    real = (stored.values.double() - stored.offset.double()) * stored.scale.double()
    # Half a step, the float32 rounding of w / s + o (below 256, so 2**-16), and, asymmetric, up to half a step
    # more at one end, where the rounded offset moves the range against the clamp.
    bound = stored.scale.double() * ((0.5 if is_symmetric else 1.0) + 2.0**-15)
    assert ((real - weight.double()).abs() <= bound).all()
    assert stored.values.min() >= (-127 if is_symmetric else -128)


def test_static_parameters_reproduce_the_float_linear():
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(5, 7, generator=generator), is_symmetric=True)
    bias = torch.randn(5, generator=generator)
    scale, offset = torch.tensor([0.03]), torch.tensor([-17.0])
    deq_scale, quant_bias = static_params(weight, bias, scale, offset)
    xq = torch.randint(-128, 128, (3, 7), generator=generator)
    got = (xq @ weight.values.long().T + quant_bias).double() * deq_scale.double()
    real = (weight.values.double() * weight.scale.double()).T
    want = ((xq.double() - offset.double()) * scale.double()) @ real + bias.double()
    # quant_bias is rounded: half a step of deq_scale. Products of two float32 scales are off by 2**-24 of the sums.
    bound = deq_scale.double() * (0.5 + 2.0**-22 * 128 * 128 * 7)
    assert ((got - want).abs() <= bound).all()
    assert quant_bias.dtype == torch.int32


def test_quant_bias_without_bias_is_exact():
    weight = QuantizedWeight(torch.full((1, 70000), 127, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1))
    _, quant_bias = static_params(weight, None, torch.tensor([1.0]), torch.tensor([-127.0]))
    assert quant_bias.tolist() == [127 * 127 * 70000]  # float32 would miss it: above 2**24


def test_quant_bias_saturates_instead_of_wrapping():
    weight = QuantizedWeight(torch.zeros(2, 1, dtype=torch.int8), torch.full((2, 1), EPS), torch.zeros(2, 1))
    _, quant_bias = static_params(weight, torch.tensor([1e9, -1e9]), torch.tensor([EPS]), torch.tensor([0.0]))
    room = 2**31 - 1 - 255 * 127  # K = 1: what the products and the offset can add to it
    assert quant_bias.tolist() == [room, -room]


def test_packed_deq_scale_holds_the_bits():
    scale = torch.tensor([1.0, 3e-9, 0.1])
    packed = pack_deq_scale(scale)
    assert packed.dtype == torch.int64
    assert packed.tolist() == np.array([1.0, 3e-9, 0.1], np.float32).view(np.uint32).astype(np.int64).tolist()
    assert (packed >> 32 == 0).all()


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_pieces_of_rows_give_what_the_whole_weight_gives(monkeypatch, is_symmetric):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(13, 7, generator=generator) * torch.logspace(-6, 3, 13)[:, None]
    weight[4] = 0
    whole = quantize_weight(weight, is_symmetric=is_symmetric)
    monkeypatch.setattr(linear, "_PIECE_ELEMENTS", 21)
    asked = []

    def rows(begin: int, end: int) -> torch.Tensor:
        asked.append((begin, end))
        return weight[begin:end].clone()

    pieces = qparams.quantize_rows(13, 7, rows, is_symmetric=is_symmetric)
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]
    for found, expected in zip(vars(pieces).values(), vars(whole).values(), strict=True):
        assert torch.equal(found, expected)


def test_a_symmetric_row_needs_no_clamp():
    # The largest quotient, x / fl(x / 127), is 127 (1 + 2**-24) at most, which rounds to 127: for every float32.
    bits = torch.arange(0, 1 << 23, dtype=torch.int32)
    x = (bits | 0x3F800000).view(torch.float32)[:, None]  # every significand; the exponent changes nothing
    assert int(qparams.quantize_rows(1 << 23, 1, lambda b, e: x[b:e].clone(), is_symmetric=True).values.min()) == 127


def test_a_quantization_in_small_pieces_writes_the_same_bytes(float_model, monkeypatch):
    recipe = Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4)
    out = [float_model.parent / name for name in ("whole", "pieces")]
    for directory, elements in zip(out, (1 << 19, 100), strict=True):
        monkeypatch.setattr(linear, "_PIECE_ELEMENTS", elements)
        quantize_checkpoint(float_model, directory, recipe, token_samples())
    name = "quant_model_weight_w8a8.safetensors"
    assert (out[0] / name).read_bytes() == (out[1] / name).read_bytes()


@pytest.mark.parametrize("k", [1, 700, 131_072, 131_073])
def test_sums_of_rows_are_exact(k):
    # -128 in every place: the largest sum that there is; in float32 it is held up to K = 2**24 / 128.
    values = torch.full((3, k), -128, dtype=torch.int8)
    values[1] = torch.arange(k) % 255 - 127
    found = QuantizedWeight(values, torch.ones(3, 1), torch.zeros(3, 1)).sum()
    assert found.dtype == torch.int32
    assert torch.equal(found.to(torch.int64), values.to(torch.int64).sum(1))
