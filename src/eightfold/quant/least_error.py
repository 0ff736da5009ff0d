"""Scales of least error where weights are rounded and inputs are not (W8A16).

A row is rounded in steps of its largest weight / 127, so with scales s the errors of an output are, up to a factor,

    err_n = max_k (w_nk s_k)**2  sum_k m_k / s_k**2          m_k = mean(x_k**2)

The sum of their logarithms over the linears of a group, each summed over its rows, is convex in log s. With the norm
of a high power P for the maximum, it is least where each channel has the same share in both factors:

    r_k = (m_k / s_k**2) / sum_j m_j / s_j**2
    p_k = sum_n a_n (w_nk s_k)**P / b_n  over  sum_n a_n,       b_n = sum_k (w_nk s_k)**P,   a_n = b_n**(2 / P)

Multiplying s_k by c changes p_k / r_k by about c**(P + 2), which gives the step:  s_k *= (r_k / p_k)**(1 / (P + 2)).

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

POWER = 16  # P: nearer to the maximum, half a percent of the error is left to gain
_STEPS = 12  # a few suffice: five are within 1 %
_FAINT = 0.01  # of the median power: a channel that calibration hardly shows keeps so much
_REACH = 8.0  # of log s, either way
_GRID = 32  # steps of s to a factor of two, so that the last bits of sums do not decide about integers


def least_error_scale(
    weights: Sequence[Tensor], rms_K: Tensor, spread: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the scales of an input, (K,) float32; their geometric mean is about 1.

    Args:
        weights: (N, K) float32 of all linears that read it. Not modified.
        rms_K: sqrt(m), of the input.
        spread: for channels that share a scale: returns (K,) sums over those that share, at each of them.
    """
    power = rms_K.square()
    power = power.clamp(min=max(_FAINT * float(power.median()), torch.finfo(torch.float32).tiny))
    rows = [_of_rows(weight_NK) for weight_NK in weights]
    log_s = torch.zeros_like(rms_K)
    for _ in range(_STEPS):
        scaled, share = (POWER * log_s).exp(), torch.zeros_like(log_s)
        for raised_NK, top_N in rows:
            b_N = (raised_NK @ scaled).clamp(min=torch.finfo(torch.float32).tiny)
            a_N = top_N * b_N ** (2 / POWER)
            share += (a_N / b_N) @ raised_NK / a_N.sum().clamp(min=torch.finfo(torch.float32).tiny)
        rest = power * (-2 * log_s).exp()
        ends = [_shares(share * scaled), _shares(rest)]
        p, r = ends if spread is None else [spread(end) for end in ends]
        log_s += (r / p).log() / (POWER + 2)
        log_s = (log_s - log_s.mean()).clamp(-_REACH, _REACH)
    return torch.exp2((log_s * (_GRID / math.log(2))).round() / _GRID)


def _of_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (|w| / top)**P and top**2 of each row, top its largest |w|; (N, K) and (N,)."""
    top_N1 = torch.maximum(weight_NK.amax(1, keepdim=True), -weight_NK.amin(1, keepdim=True))
    raised = weight_NK / top_N1.clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(int(math.log2(POWER))):
        raised.square_()
    return raised, top_N1[:, 0].square()


def _shares(values: Tensor) -> Tensor:
    """Return values of sum 1, none of which is nothing."""
    return values / values.sum().clamp(min=torch.finfo(torch.float32).tiny) + 1e-12
