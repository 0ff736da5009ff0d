"""The linears of every scheme, in float32 and exact integers.

    FLOAT         y = x W^T + b
    W8A16         y = x ((W - weight_offset) * weight_scale)^T + b
    W8A8          y = (xq W^T + quant_bias) * deq_scale            xq = clamp(rne(x * (1 / input_scale) + input_offset))
    W8A8_MIX      a prompt's tokens as W8A8_DYNAMIC, generated tokens as W8A8
    W8A8_DYNAMIC  y = (xq W^T - o_t * sum_k W) * s_t * weight_scale + b        one s_t, o_t for each token

    rne: round half to even; clamp to [-128, 127]. Reciprocals are float32 and taken once: at load,
    or for each token.

Letters: T tokens, K inputs, N outputs. x (T, K) float32, y (T, N) float32, W (N, K) int8.

Source: format description of msModelSlim; per-token symmetric quantization is what the NPU operator does, the
asymmetric form is more accurate and needs nothing else from the file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# Range of a stored offset and of an activation.
Q_MIN, Q_MAX = -128, 127
EPS = torch.finfo(torch.float32).eps

# 128 * 128 * 1024 = 2**24: up to this many products of int8 are summed without rounding in float32.
EXACT_K = 1024

DynamicMode = Literal["asymmetric", "symmetric"]


class Linear(Protocol):
    """Maps (T, K) float32 to (T, N) float32."""

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y."""
        ...


@functools.cache
def _fast_int_matmul() -> Callable[[Tensor, Tensor], Tensor] | None:
    # torch's int8 product is many times faster than the float32 detour, but on CPUs without VNNI instructions such
    # kernels have been known to saturate pairs in int16. So it is asked, with the values that would show it.
    product: Callable[[Tensor, Tensor], Tensor] | None = getattr(torch, "_int_mm", None)
    if product is None:
        return None
    x = torch.tensor([[127, -128], [-128, 127], [127, 127], [-128, -128]], dtype=torch.int8).repeat(5, 64)
    w = torch.tensor([[127, 127], [-127, -127], [-128, 127]], dtype=torch.int8).repeat(11, 64)
    try:
        exact = torch.equal(product(x, w.T).to(torch.int64), x.to(torch.int64) @ w.to(torch.int64).T)
    except RuntimeError:
        return None
    return product if exact else None


def int_matmul(xq_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply int8 matrices exactly.

    Args:
        xq_TK: (T, K) int8.
        weight_NK: (N, K) int8.

    Returns:
        (T, N) int32; sums stay inside as long as K < 131,072 (128 * 128 * K < 2**31).
    """
    # oneDNN also reads the stride of a dimension of one, where it means nothing: with K = 1 its result is garbage.
    on_cpu = xq_TK.device.type == "cpu"
    product = _fast_int_matmul() if on_cpu and weight_NK.shape[1] > 1 else None
    return int_matmul_float(xq_TK, weight_NK) if product is None else product(xq_TK, weight_NK.T)


def int_matmul_float(xq_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply int8 matrices exactly, by float32 products: right on every machine, and several times slower.

    Products of int8 are exact in float32, and so are sums of up to EXACT_K of them; longer rows are cut.
    """
    total = torch.zeros(xq_TK.shape[0], weight_NK.shape[0], dtype=torch.int32, device=xq_TK.device)
    for at in range(0, weight_NK.shape[1], EXACT_K):
        piece = slice(at, at + EXACT_K)
        total += (xq_TK[:, piece].to(torch.float32) @ weight_NK[:, piece].to(torch.float32).T).to(torch.int32)
    return total


def float_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return x W^T + b in float32.

    oneDNN is asked directly where torch has it: on CPUs of other makers, the BLAS behind F.linear was measured at
    half its speed (see docs/log.md).
    """
    if x_TK.device.type == "cpu" and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
        return y
    return torch.nn.functional.linear(x_TK, weight_NK, bias_N)


@dataclass
class FloatLinear:
    """A linear that was left alone."""

    weight: Tensor  # (N, K), any float dtype
    bias: Tensor | None  # (N,) float32

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y; the weight is widened to float32 for the product."""
        return float_linear(x_TK, self.weight.to(torch.float32), self.bias)


@dataclass
class W8A16Linear:
    """int8 weights, float activations."""

    weight: Tensor  # (N, K) int8
    weight_scale: Tensor  # (N, 1) float32
    weight_offset: Tensor  # (N, 1) float32
    bias: Tensor | None  # (N,) float32

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y."""
        real = self.weight.to(torch.float32).sub_(self.weight_offset).mul_(self.weight_scale)
        return float_linear(x_TK, real, self.bias)


@dataclass
class W8A8Linear:
    """int8 weights, int8 activations with parameters from calibration."""

    weight: Tensor  # (N, K) int8
    quant_bias: Tensor  # (N,) int32
    deq_scale: Tensor  # (N,) float32
    inv_input_scale: Tensor  # (1,) float32
    input_offset: Tensor  # (1,) float32

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y."""
        xq = to_int8_(x_TK * self.inv_input_scale, self.input_offset)
        return int_matmul(xq, self.weight).add_(self.quant_bias).to(torch.float32).mul_(self.deq_scale)


@dataclass
class W8A8DynamicLinear:
    """int8 weights, int8 activations with parameters from the token itself."""

    weight: Tensor  # (N, K) int8
    weight_scale: Tensor  # (N,) float32
    weight_sum: Tensor  # (N,) int32, sum_k weight
    bias: Tensor | None  # (N,) float32
    mode: DynamicMode = "asymmetric"

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y."""
        scale_T1, offset_T1 = token_params(x_TK, self.mode)
        return self.multiply(to_int8_(x_TK * scale_T1.reciprocal(), offset_T1), scale_T1, offset_T1)

    def multiply(self, xq_TK: Tensor, scale_T1: Tensor, offset_T1: Tensor) -> Tensor:
        """Return y for int8 inputs whose tokens have these scales and integral offsets."""
        products = int_matmul(xq_TK, self.weight)
        products.sub_(offset_T1.to(torch.int32) * self.weight_sum)
        y = products.to(torch.float32).mul_(scale_T1).mul_(self.weight_scale)
        return y if self.bias is None else y.add_(self.bias)


@dataclass
class W8A8MixLinear:
    """int8 weights; activations by token for a prompt, with parameters from calibration for what is generated."""

    prompt: W8A8DynamicLinear
    generated: W8A8Linear

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return y for tokens of a prompt."""
        return self.prompt(x_TK)

    def by_origin(self, x_TK: Tensor, generated_T: Tensor) -> Tensor:
        """Return y; `generated_T` (T,) bool says which tokens were generated, now or before a recomputation."""
        if not generated_T.any():
            return self.prompt(x_TK)
        y_TN = self.generated(x_TK)
        if not generated_T.all():
            y_TN[~generated_T] = self.prompt(x_TK[~generated_T])
        return y_TN


def symmetric(absmax: Tensor) -> Tensor:
    """Return the scale for values in [-absmax, absmax]."""
    return (absmax / Q_MAX).clamp(min=EPS)


def asymmetric(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and offset for values in [min(lo, 0), max(hi, 0)]."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (Q_MAX - Q_MIN)).clamp(min=EPS)
    return scale, torch.round(-lo / scale) + Q_MIN


def to_int8_(scaled: Tensor, offset: Tensor) -> Tensor:
    """Return clamp(rne(scaled + offset)) as int8. Modifies `scaled`."""
    return scaled.add_(offset).round_().clamp_(Q_MIN, Q_MAX).to(torch.int8)


def token_params(x_TK: Tensor, mode: DynamicMode) -> tuple[Tensor, Tensor]:
    """Return each token's scale and offset, (T, 1) float32.

    symmetric: s = absmax / 127, o = 0. asymmetric: s = (hi - lo) / 255, o = rne(-lo / s) - 128 with lo <= 0 <= hi.
    """
    lo, hi = torch.aminmax(x_TK, dim=1, keepdim=True)
    if mode == "symmetric":
        scale = symmetric(torch.maximum(-lo, hi))
        return scale, torch.zeros_like(scale)
    return asymmetric(lo, hi)
