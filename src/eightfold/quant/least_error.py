"""Scales of least error, where rows of weights are rounded, and inputs too or not (static W8A8, W8A16).

A row is rounded in steps of its largest weight / 127, a static input in steps of its range / 255. With scales s the
errors of an output are, up to a factor,

    err_n = max_k (w_nk s_k)**2 / 127**2  sum_k m_k / s_k**2            m_k = mean(x_k**2)
          + (R / 255)**2  sum_k (w_nk s_k)**2                           R = max_k hi_k / s_k + max_k -lo_k / s_k

without the second line where inputs are not rounded; hi >= 0 >= lo are a channel's ends. The sum of their logarithms
over the linears of a group, each summed over its rows, is convex in log s. With the norm of a high power P for each
maximum, it is least where what s_k makes larger and what it makes smaller balance in each channel:

    f_l p_lk + (1 - f_l) q_lk  =  f u_k + (1 - f) r_k       the left side as the mean over the linears l
    f_l   share of the second line in the error of a linear;  f, their mean
    p_lk  share of (w_nk s_k)**2, summed over rows
    q_lk  sum_n a_n (w_nk s_k)**P / b_n  over  sum_n a_n,    b_n = sum_k (w_nk s_k)**P,    a_n = b_n**(2 / P)
    r_k   share of m_k / s_k**2
    u_k   share in R:  of each of its terms, the share of (hi_k / s_k)**P or (-lo_k / s_k)**P

Multiplying s_k by c changes the ratio of both sides by at most about c**(P + 2), which gives the step:
s_k *= (right / left)**(1 / (P + 2)). A small P takes long steps, a large one is near to the maximum: P grows.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.model.reference.linear import Q_MAX, Q_MIN

# P, a power of two, and how many steps it takes. 100 steps with the last P gain nothing more that could be measured.
SCHEDULE = ((16, 5), (32, 3), (64, 3), (128, 2))
_FAINT = 0.01  # of the median power: a channel that calibration hardly shows keeps so much
_REACH = 8.0  # of log s, either way
_MOST = 60.0  # e**this times many channels is finite; only channels without weights get so far
_LONGEST = 16.0  # P times a step of log s: e**(P log s) stays finite between two changes of P
_GRID = 128  # steps of s to a factor of two, so that the last bits of sums do not decide about integers
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class _Rows:
    """A linear's weights under the scales with which a power began."""

    raised_NK: Tensor  # (|w s| / top)**P
    top_N: Tensor  # square of the largest |w s|
    squares_K: Tensor  # sum_n w**2

    @classmethod
    def of(cls, weight_NK: Tensor, scale_K: Tensor, power: int) -> _Rows:
        largest = torch.linalg.vector_norm(weight_NK, math.inf).clamp(min=_TINY)
        raised = torch.ldexp(weight_NK, -torch.frexp(largest).exponent)  # at most 1, so that squares stay finite
        squares_K = torch.linalg.vector_norm(raised, dim=0).square()
        raised.mul_(scale_K)
        top_N1 = torch.maximum(raised.amax(1, keepdim=True), -raised.amin(1, keepdim=True)).clamp(min=_TINY)
        raised.div_(top_N1)
        for _ in range(int(math.log2(power))):
            raised.square_()
        return cls(raised, top_N1[:, 0].square(), squares_K)


def least_error_scale(
    weights: Sequence[Tensor],
    rms_K: Tensor,
    ends: tuple[Tensor, Tensor] | None = None,
    spread: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the scales of an input, (K,) float32; their geometric mean is about 1.

    Args:
        weights: (N, K) float32 of all linears that read it. Not modified.
        rms_K: sqrt(m), of the input.
        ends: lo and hi of each channel, (K,) each, where the input gets a static scale; None: it is not rounded.
        spread: for channels that share a scale: returns (K,) sums over those that share, at each of them.
    """
    power_K = rms_K.square()
    power_K = power_K.clamp(min=max(_FAINT * float(power_K.median()), _TINY))
    log_s = torch.zeros_like(rms_K)
    for power, steps in SCHEDULE:
        began, rows = log_s, [_Rows.of(weight_NK, log_s.exp(), power) for weight_NK in weights]
        for _ in range(steps):
            moved_K = (power * (log_s - began)).clamp(max=_MOST).exp()
            left, right = _sides(rows, power_K, ends, log_s, moved_K, power)
            if spread is not None:
                left, right = spread(left), spread(right)
            log_s = log_s + (right / left).log().clamp(-_LONGEST, _LONGEST) / (power + 2)
            log_s = (log_s - log_s.mean()).clamp(-_REACH, _REACH)
    return torch.exp2((log_s * (_GRID / math.log(2))).round() / _GRID)


def _sides(
    rows: Sequence[_Rows],
    power_K: Tensor,
    ends: tuple[Tensor, Tensor] | None,
    log_s: Tensor,
    moved_K: Tensor,
    power: int,
) -> tuple[Tensor, Tensor]:
    """Return both sides of the balance, (K,) each; `moved_K` is s**P over that of the scales where `rows` began."""
    square_K = (2 * log_s).exp()
    rest_K = power_K / square_K
    size, in_range_K = (0.0, rest_K) if ends is None else _range(ends, log_s, power)
    left, of_inputs = torch.zeros_like(log_s), 0.0
    for each in rows:
        b_N = (each.raised_NK @ moved_K).clamp(min=_TINY)
        a_N = each.top_N * b_N ** (2 / power)
        larger_K = each.squares_K * square_K
        error = (size / (Q_MAX - Q_MIN)) ** 2 * float(larger_K.sum())
        share = error / max(error + float(a_N.sum()) * float(rest_K.sum()) / Q_MAX**2, _TINY)
        left += share * _shares(larger_K) + (1 - share) * _shares(((a_N / b_N) @ each.raised_NK) * moved_K)
        of_inputs += share / len(rows)
    return left / len(rows), of_inputs * _shares(in_range_K) + (1 - of_inputs) * _shares(rest_K)


def _range(ends: tuple[Tensor, Tensor], log_s: Tensor, power: int) -> tuple[float, Tensor]:
    """Return R, and each channel's part in it, (K,)."""
    total, parts = 0.0, torch.zeros_like(log_s)
    for end_K in (-ends[0], ends[1]):
        reach_K = end_K.clamp(min=0) / log_s.exp()
        largest = float(reach_K.amax().clamp(min=_TINY))
        raised_K = (reach_K / largest) ** power
        size = largest * float(raised_K.sum()) ** (1 / power)
        total, parts = total + size, parts + size * _shares(raised_K)
    return total, parts


def _shares(values: Tensor) -> Tensor:
    """Return values of sum 1, none of which is nothing."""
    return values / values.sum().clamp(min=_TINY) + 1e-12
