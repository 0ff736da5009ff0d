"""The formulas of int8 for weights; those from a range to its parameters are in model/reference/linear.py.

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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.model.reference.linear import Q_MAX, Q_MIN, asymmetric, row_pieces, symmetric

_EXACT_SUM_K = 2**24 // 128


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N, 1) float32
    offset: Tensor  # (N, 1) float32, integral

    def sum(self) -> Tensor:
        """Return sum_k of the integers, (N,) int32."""
        # In float32, which holds sums of int8 up to 2**24: K <= 131,072. Integer sums take ten times as long.
        if self.values.shape[1] > _EXACT_SUM_K:
            return self.values.sum(1, dtype=torch.int32)
        pieces = [self.values[rows].to(torch.float32).sum(1) for rows in row_pieces(self.values)]
        return torch.cat(pieces).to(torch.int32)


def quantize_weight(weight_NK: Tensor, *, is_symmetric: bool) -> QuantizedWeight:
    """Quantize a weight with one scale for each output channel.

    Args:
        weight_NK: (N, K) float32, finite. Not modified.
        is_symmetric: offset 0 and values in [-127, 127]; otherwise an offset for each channel and [-128, 127].
    """
    n, k = weight_NK.shape
    return quantize_rows(
        n, k, lambda begin, end: weight_NK[begin:end].clone(), is_symmetric=is_symmetric, device=weight_NK.device
    )


def quantize_rows(
    n: int,
    k: int,
    rows: Callable[[int, int], Tensor],
    *,
    is_symmetric: bool,
    device: torch.device | None = None,
) -> QuantizedWeight:
    """Quantize a weight a few rows at a time, so that its float32 values are never in memory together.

    Args:
        n: rows of the weight.
        k: columns.
        rows: returns rows `begin` to `end`, (end - begin, K) float32, made anew: they are modified.
        is_symmetric: see quantize_weight.
        device: where the integers go; None for the one in use.
    """
    values = torch.empty(n, k, dtype=torch.int8, device=device)
    scale = torch.empty(n, 1, dtype=torch.float32, device=device)
    offset = torch.zeros_like(scale)
    for piece in row_pieces(values):
        x = rows(piece.start, piece.stop)
        # amin and amax: torch.aminmax along a dimension takes ten times as long as both.
        lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if is_symmetric:
            scale[piece] = symmetric(torch.maximum(-lo, hi))
            # No quotient passes 127 by as much as rounding takes away again: -w and w are stored alike, off -128.
            values[piece] = x.div_(scale[piece]).round_()
        else:
            scale[piece], offset[piece] = asymmetric(lo, hi)
            values[piece] = x.div_(scale[piece]).add_(offset[piece]).round_().clamp_(Q_MIN, Q_MAX)
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
