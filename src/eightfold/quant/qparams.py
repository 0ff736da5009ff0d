"""The formulas of int8 for weights; those from a range to its parameters are in reference/linear.py.

    symmetric     scale = max(absmax / 127, EPS)              offset = 0
    asymmetric    scale = max((hi - lo) / 255, EPS)           offset = rne(-lo / scale) - 128,   lo <= 0 <= hi
    quantize      q = clamp(rne(x / scale + offset), q_min, 127)
    dequantize    x ~ (q - offset) * scale

The offset is added before the only rounding. EPS is float32's machine epsilon: a row of zeros gets that scale.
Everything here is float32; what goes to disk is rounded once, elsewhere.

Letters: N outputs, K inputs.

Source: the published msModelSlim formulas, checked bit for bit against its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.reference.linear import Q_MAX, Q_MIN, asymmetric, symmetric

# Symmetric weights stay off -128, so that -w and w are stored alike.
Q_MIN_SYMMETRIC = -127


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N, 1) float32
    offset: Tensor  # (N, 1) float32, integral

    def sum(self) -> Tensor:
        """Return sum_k of the integers, (N,) int32."""
        return self.values.sum(1, dtype=torch.int32)


def quantize_weight(weight_NK: Tensor, *, is_symmetric: bool) -> QuantizedWeight:
    """Quantize a weight with one scale for each output channel.

    Args:
        weight_NK: (N, K) float32, finite. Not modified.
        is_symmetric: offset 0 and values in [-127, 127]; otherwise an offset for each channel and [-128, 127].
    """
    lo, hi = torch.aminmax(weight_NK, dim=1, keepdim=True)
    if is_symmetric:
        scale = symmetric(torch.maximum(-lo, hi))
        offset, q_min = torch.zeros_like(scale), Q_MIN_SYMMETRIC
    else:
        scale, offset = asymmetric(lo, hi)
        q_min = Q_MIN
    values = (weight_NK / scale).add_(offset).round_().clamp_(q_min, Q_MAX).to(torch.int8)
    return QuantizedWeight(values, scale, offset)


def static_params(
    weight: QuantizedWeight, bias_N: Tensor | None, input_scale: Tensor, input_offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what static W8A8 adds to a symmetric weight.

    Args:
        weight: symmetric.
        bias_N: (N,) float32 or None.
        input_scale: (1,) float32.
        input_offset: (1,) float32, integral.

    Returns:
        deq_scale (N,) float32 = input_scale * weight_scale, and quant_bias (N,) int32 = rne(bias / deq_scale -
        input_offset * sum_k weight). The bias term is clamped so that sums stay in int32; it reaches the clamp
        only in a channel whose weights are all next to nothing.
    """
    deq_scale = input_scale * weight.scale[:, 0]
    # float64: the products pass 2**24 for wide layers, where float32 would no longer hold every integer.
    correction = -input_offset.double() * weight.sum().double()
    if bias_N is not None:
        # What the other terms can add must not carry the int32 sum over its end.
        room = max(0, 2**31 - 1 - (Q_MAX - Q_MIN) * Q_MAX * weight.values.shape[1])
        correction += (bias_N.double() / deq_scale.double()).clamp(-room, room)
    return deq_scale, torch.round(correction).to(torch.int32)


def pack_deq_scale(deq_scale_N: Tensor) -> Tensor:
    """Return the float32 bit patterns in the low halves of int64, as float16 models store deq_scale."""
    return deq_scale_N.to(torch.float32).view(torch.int32).to(torch.int64)
