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
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# Range of a stored offset and of an activation.
Q_MIN, Q_MAX = -128, 127
EPS = torch.finfo(torch.float32).eps

# 128 * 128 * 1024 = 2**24: up to this many products of int8 are summed without rounding in float32.
EXACT_K = 1024

# So many elements of a large tensor at a time pass through several operations: they stay in the caches, which was
# measured to be five to ten times as fast (docs/log.md).
_PIECE_ELEMENTS = 1 << 19

DynamicMode = Literal["asymmetric", "symmetric"]


class Linear(Protocol):
    """Maps (T, K) float32 to (T, N) float32."""

    def __call__(self, x_TK: Tensor) -> Tensor: ...


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


def row_pieces(matrix: Tensor) -> Iterator[slice]:
    """Yield runs of rows that stay in the caches of a CPU; of another device's tensor, all rows."""
    rows = len(matrix)
    step = max(1, _PIECE_ELEMENTS // max(1, matrix.shape[1])) if matrix.device.type == "cpu" else max(1, rows)
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))


class _Widened(threading.local):
    """Memory for one float32 weight, which the system then does not have to find for each product anew."""

    room: Tensor | None = None

    def like(self, weight_NK: Tensor) -> Tensor:
        """Return (N, K) float32 with any values, valid until this is asked again."""
        if weight_NK.device.type != "cpu":
            return torch.empty(weight_NK.shape, dtype=torch.float32, device=weight_NK.device)
        if self.room is None or len(self.room) < weight_NK.numel():
            self.room = None  # first let go of the old one
            with torch.inference_mode(False):  # so that it serves both modes
                self.room = torch.empty(weight_NK.numel(), dtype=torch.float32, device="cpu")
        return self.room[: weight_NK.numel()].view(weight_NK.shape)


_widened = _Widened()


def release_widened() -> None:
    """Let go of this thread's memory for float32 weights."""
    _widened.room = None


@dataclass
class FloatLinear:
    """A linear that was left alone."""

    weight: Tensor  # (N, K), any float dtype
    bias: Tensor | None  # (N,) float32

    def __call__(self, x_TK: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype != torch.float32:
            weight = _widened.like(weight).copy_(weight)
        return float_linear(x_TK, weight, self.bias)


@dataclass
class W8A16Linear:
    """int8 weights, float activations."""

    weight: Tensor  # (N, K) int8
    weight_scale: Tensor  # (N, 1) float32
    weight_offset: Tensor  # (N, 1) float32
    bias: Tensor | None  # (N,) float32

    def __call__(self, x_TK: Tensor) -> Tensor:
        real = _widened.like(self.weight)
        for rows in row_pieces(real):
            real[rows].copy_(self.weight[rows]).sub_(self.weight_offset[rows]).mul_(self.weight_scale[rows])
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
        scale_T1, offset_T1 = token_params(x_TK, self.mode)
        return self.multiply(to_int8_(x_TK * scale_T1.reciprocal(), offset_T1), scale_T1, offset_T1)

    def multiply(self, xq_TK: Tensor, scale_T1: Tensor, offset_T1: Tensor) -> Tensor:
        """Return y for int8 inputs whose tokens have these scales and integral offsets."""
        products = int_matmul(xq_TK, self.weight)
        y = products.view(torch.float32)  # in the same memory, a few rows after the other
        for rows in row_pieces(products):
            whole = products[rows].sub_(offset_T1[rows].to(torch.int32) * self.weight_sum)
            torch.mul(whole.to(torch.float32), scale_T1[rows], out=y[rows]).mul_(self.weight_scale)
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


def divided_to_int8(x_TK: Tensor, scale_T1: Tensor, offset_T1: Tensor) -> Tensor:
    """Return clamp(rne(x / scale + offset)) as int8, with parameters for each token, (T, 1) each."""
    found = torch.empty(x_TK.shape, dtype=torch.int8, device=x_TK.device)
    for rows in row_pieces(x_TK):
        found[rows] = to_int8_(x_TK[rows] / scale_T1[rows], offset_T1[rows])
    return found


def token_params(x_TK: Tensor, mode: DynamicMode) -> tuple[Tensor, Tensor]:
    """Return each token's scale and offset, (T, 1) float32.

    symmetric: s = absmax / 127, o = 0. asymmetric: s = (hi - lo) / 255, o = rne(-lo / s) - 128 with lo <= 0 <= hi.
    """
    # amin and amax: torch.aminmax along a dimension takes ten times as long as both.
    lo, hi = x_TK.amin(1, keepdim=True), x_TK.amax(1, keepdim=True)
    if mode == "symmetric":
        scale = symmetric(torch.maximum(-lo, hi))
        return scale, torch.zeros_like(scale)
    return asymmetric(lo, hi)
