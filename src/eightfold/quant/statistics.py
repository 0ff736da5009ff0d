"""What a group of linears reads while the float model runs over the calibration set.

    per channel     absmax, lo, hi       over all tokens
    per sample b    std_b                unbiased deviation of its whole (T_b, K) input; std = max_b std_b
    around a moving centre               c_b = (lo + hi) / 2 of the samples 0..b
                    reach                max_b (max_t x - c_b), one-sided
                    spread               max_b of the unbiased deviation of x - c_b
    range_param     max(|t_max|, |t_min|) / std        over the first samples, of x / s for any scale s

reach and spread depend on the order of the samples; that is how the reference tool computes what its method m2 reads.

Letters: T tokens of several samples, K channels, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.errors import InputError

FEATURE_SAMPLES = 5  # how many samples range_param is measured on

_TINY = 1e-300


@dataclass(frozen=True)
class Features:
    """Moments and extremes of the first samples, enough for range_param of the input divided by any scale."""

    sums_BK: Tensor  # (B, K) float64, B = min(FEATURE_SAMPLES, samples)
    squares_BK: Tensor  # (B, K) float64, sums of squares
    lo: Tensor  # (K,) float32, over these samples
    hi: Tensor  # (K,) float32
    counts: tuple[int, ...]  # elements (tokens x K) of each sample

    def range_param(self, scale: Tensor | None = None) -> float:
        """Return the largest magnitude of x / scale in deviations: how much of the range is there for outliers.

        Args:
            scale: (K,) float32, positive; None means 1.
        """
        inverse = torch.ones_like(self.lo, dtype=torch.float64) if scale is None else scale.double().reciprocal()
        sums, squares = self.sums_BK @ inverse, self.squares_BK @ inverse.square()
        moments = zip(sums.tolist(), squares.tolist(), self.counts, strict=True)
        std = max(_deviation(total, square, count) for total, square, count in moments)
        extreme = max(abs(float((self.hi * inverse).max())), abs(float((self.lo * inverse).min())))
        return extreme / max(std, _TINY)  # an input of zeros gives 0


@dataclass(frozen=True)
class InputStats:
    """What the input of one group showed; K channels, all float32."""

    absmax: Tensor  # (K,) max |x| over all tokens
    lo: Tensor  # (K,) extremes over all tokens
    hi: Tensor  # (K,)
    std: float  # largest over samples
    first: Tensor  # (T0, K) the first sample's input; (0, K) when it was not kept
    tokens: Tensor  # (Ts, K) evenly spaced tokens of all samples, all of them when they are few; or (0, K)
    features: Features  # of the first samples
    reach: Tensor  # (K,) how far above its moving centre a channel went
    spread: float  # largest deviation around the moving centres


class InputWatcher:
    """Takes in the input of one group, a few samples at a time."""

    def __init__(
        self,
        title: str,
        total_tokens: int,
        max_tokens: int = 2048,
        keep_first: bool = True,
        keep_tokens: bool = True,
    ) -> None:
        """Start without samples.

        Args:
            title: of the group, for messages.
            total_tokens: of all samples that will come.
            max_tokens: how many of them to keep, at most.
            keep_first: keep the first sample's input.
            keep_tokens: keep evenly spaced tokens.
        """
        self._title = title
        self._stride = max(1, math.ceil(total_tokens / max_tokens))
        self._keep_first, self._keep_tokens = keep_first, keep_tokens
        self._samples = self._tokens_seen = 0
        # Tensors of one element widen to (K,) with the first sample.
        self._lo, self._hi = torch.tensor(math.inf), torch.tensor(-math.inf)
        self._reach = torch.tensor(-math.inf)
        self._std = self._spread = 0.0
        self._first: Tensor | None = None
        self._tokens: list[Tensor] = []
        self._moments: list[tuple[Tensor, Tensor, int]] = []  # of the first samples
        self._early_lo, self._early_hi = self._lo, self._hi

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> None:
        """Take in more samples, in order.

        Args:
            x_TK: (T, K) float32, the group's input for all tokens of these samples.
            spans: (begin, end) of each sample's tokens.

        Raises:
            InputError: a sample's activations are not finite.
        """
        # amin and amax: torch.aminmax along a dimension takes ten times as long as both.
        lo_BK = torch.stack([x_TK[begin:end].amin(0) for begin, end in spans])
        hi_BK = torch.stack([x_TK[begin:end].amax(0) for begin, end in spans])
        require_finite_samples(self._title, self._samples, lo_BK.amin(1), hi_BK.amax(1))
        for (begin, end), lo, hi in zip(spans, lo_BK, hi_BK, strict=True):
            self._take(x_TK[begin:end], lo, hi)
        if self._keep_tokens:
            self._tokens.append(x_TK[-self._tokens_seen % self._stride :: self._stride].clone())
        self._tokens_seen += len(x_TK)

    def _take(self, x_TK: Tensor, lo: Tensor, hi: Tensor) -> None:
        wide = x_TK.double()
        sums, squares, count = wide.sum(0), wide.square_().sum(0), x_TK.numel()
        self._lo, self._hi = torch.minimum(self._lo, lo), torch.maximum(self._hi, hi)
        centre = (self._lo + self._hi) / 2
        self._reach = torch.maximum(self._reach, hi - centre)
        self._std = max(self._std, _deviation(float(sums.sum()), float(squares.sum()), count))
        self._spread = max(self._spread, _deviation(*_shifted(sums, squares, centre.double(), len(x_TK)), count))
        if self._samples < FEATURE_SAMPLES:
            self._moments.append((sums, squares, count))
            self._early_lo, self._early_hi = self._lo, self._hi
        if self._samples == 0 and self._keep_first:
            self._first = x_TK.clone()
        self._samples += 1

    def stats(self) -> InputStats:
        """Return what has been seen; at least one sample must have been."""
        nothing = torch.zeros(0, len(self._lo))
        sums, squares, counts = zip(*self._moments, strict=True)
        return InputStats(
            absmax=torch.maximum(-self._lo, self._hi),
            lo=self._lo,
            hi=self._hi,
            std=self._std,
            first=nothing if self._first is None else self._first,
            tokens=torch.cat(self._tokens) if self._tokens else nothing,
            features=Features(torch.stack(sums), torch.stack(squares), self._early_lo, self._early_hi, counts),
            reach=self._reach,
            spread=self._spread,
        )


def require_finite_samples(title: str, seen: int, lo_B: Tensor, hi_B: Tensor) -> None:
    """Check the extremes of samples for NaN and infinity.

    Args:
        title: of the group of linears, for the message.
        seen: how many samples came before these.
        lo_B: (B,) smallest value of each sample.
        hi_B: (B,) largest value.

    Raises:
        InputError: names the first sample that is not finite.
    """
    bad = (~(torch.isfinite(lo_B) & torch.isfinite(hi_B))).nonzero()
    if len(bad):
        raise InputError(
            f"input of {title}",
            where=f"calibration sample {seen + int(bad[0])} (counted from 0)",
            got=f"values from {float(lo_B[bad[0]])} to {float(hi_B[bad[0]])}",
            expected="finite numbers",
            action="Remove the sample, or check the float model.",
        )


def _shifted(sums_K: Tensor, squares_K: Tensor, centre_K: Tensor, tokens: int) -> tuple[float, float]:
    """Return sum and sum of squares of x - centre over all elements, from those of x by channel (float64)."""
    total = (sums_K - tokens * centre_K).sum()
    square = (squares_K - 2 * centre_K * sums_K + tokens * centre_K.square()).sum()
    return float(total), float(square)


def _deviation(total: float, square: float, count: int) -> float:
    """Return the unbiased standard deviation of `count` numbers with this sum and sum of squares."""
    return math.sqrt(max(square - total * total / count, 0.0) / max(count - 1, 1))
