"""Flex smooth: what a channel's scale owes to its inputs and what to its weights, searched for each group.

    s(alpha, beta) = max(a**alpha / w**beta, SCALE_MIN)      a: max |x|, w: max |W|, for each channel
    err(alpha, beta) = rms(Qa(X / s) Qw(W s)^T - X W^T) / rms(X W^T)
    first    alpha in 0, 1/20 .. 1 with beta = 1 - alpha
    then     beta  in 0, 1/20 .. 1 with that alpha

X: the kept tokens, W: all linears of the group, one below the other. Qa: asymmetric, one scale for the whole input,
whose range is that of all tokens, kept or not. Qw: symmetric, one scale for each row. Of equal errors the last wins.

A sum of squares only grows, so a candidate is dropped as soon as it is worse than the best one. That, and beginning
with likely candidates, changes nothing in the result.

Letters: T tokens, K inputs, N outputs, n outputs of one piece of the weights.

Source: the published msModelSlim wheel, its operations traced; there products are of dequantized float32 values, here
of the integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eightfold.model.reference.linear import asymmetric, float_linear, int_matmul, symmetric, to_int8_
from eightfold.quant.statistics import InputStats

SCALE_MIN = 1e-5
GRID = 20

# Where a search begins: alpha near 0.85 and beta near 0.1, as most results, so that other candidates are soon dropped.
_LIKELY_ALPHA, _LIKELY_BETA = 17, 2

# Outputs computed at once: a few MiB, so that the passes over them stay in the cache.
_PIECE_ELEMENTS = 1 << 19


def balance(absmax: Tensor, weight_absmax: Tensor, alpha: float, beta: float) -> Tensor:
    """Return max(a**alpha / w**beta, SCALE_MIN) for tensors of one shape, float32.

    A product, as in the wheel's search: another last bit of s tips a few integers, and with them a near tie. On the
    first layer of SmolLM2 two pairs are within 3e-5; there a quotient decides otherwise, and so does the wheel itself
    when its inputs change by 1e-7.
    """
    return (absmax**alpha * weight_absmax**-beta).clamp(min=SCALE_MIN)


def weight_absmax(weights: Sequence[Tensor]) -> Tensor:
    """Return each channel's largest |W| over linears (N, K) that share an input, (K,) float32, at least SCALE_MIN."""
    # Two passes, and no copy of |W|.
    ends = [torch.maximum(weight_NK.amax(0), -weight_NK.amin(0)) for weight_NK in weights]
    return torch.stack(ends).amax(0).clamp(min=SCALE_MIN)


def search_exponents(stats: InputStats, weights: Sequence[Tensor]) -> tuple[float, float]:
    """Return the alpha and beta of least error.

    Args:
        stats: of the group's input, with tokens.
        weights: (N, K) float32 of the linears that read it.
    """
    error = _Error(stats, weights)
    alpha, best = _least(lambda i, limit: error(i, GRID - i, limit), _LIKELY_ALPHA)
    # The best pair of the first step is among these candidates again.
    beta, _ = _least(lambda i, limit: error(alpha, i, limit), _LIKELY_BETA, (GRID - alpha, best))
    return alpha / GRID, beta / GRID


def _least(
    error: Callable[[int, float], float], likely: int, known: tuple[int, float] = (-1, math.inf)
) -> tuple[int, float]:
    """Return the grid point of least error, and that error.

    Args:
        error: of a grid point; may return infinity instead of anything above the limit.
        likely: where to begin.
        known: a grid point and its error.
    """
    found, best = known
    for i in sorted(set(range(GRID + 1)) - {found}, key=lambda i: abs(i - likely)):
        value = error(i, best)
        if value < best or (value == best and i > found):
            found, best = i, value
    return found, best


class _Error:
    """Squared error of one group's products, for exponents in steps of 1 / GRID.

    That is err**2 times what is the same for all exponents.
    """

    def __init__(self, stats: InputStats, weights: Sequence[Tensor]) -> None:
        self._stats = stats
        self._weight_absmax = weight_absmax(weights)
        rows = max(1, _PIECE_ELEMENTS // max(1, len(stats.tokens)))
        pieces = [piece_nK for weight_NK in weights for piece_nK in torch.split(weight_NK, rows)]
        self._pieces = [(piece_nK, float_linear(stats.tokens, piece_nK, None)) for piece_nK in pieces]

    def __call__(self, alpha: int, beta: int, limit: float) -> float:
        """Return the sum of squared differences; infinity once it passes the limit."""
        scale_K = balance(self._stats.absmax, self._weight_absmax, alpha / GRID, beta / GRID)
        lo, hi = (self._stats.lo / scale_K).amin(), (self._stats.hi / scale_K).amax()
        x_scale, x_offset = asymmetric(lo[None], hi[None])
        xq_TK = to_int8_((self._stats.tokens / scale_K).div_(x_scale), x_offset)
        total = 0.0
        for weight_nK, exact_Tn in self._pieces:
            wq_nK, weight_scale_n = _quantize_rows(weight_nK * scale_K)
            scale_n = x_scale * weight_scale_n
            # (xq - offset) wq^T = xq wq^T - offset * sum_k wq, whose sums stay below 2**24: float32 holds them.
            constant_n = scale_n * x_offset * wq_nK.to(torch.float32).sum(1)
            products = int_matmul(xq_TK, wq_nK).to(torch.float32)
            torch.addcmul(exact_Tn, products, scale_n, value=-1, out=products).add_(constant_n)
            total += float(torch.linalg.vector_norm(products)) ** 2
            if total > limit:
                return math.inf
        return total


def _quantize_rows(weight_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric int8 values (n, K) and their scales (n,). Modifies the weight."""
    scale_n = symmetric(weight_nK.abs().amax(1))
    return to_int8_(weight_nK.div_(scale_n[:, None]), torch.zeros(())), scale_n
