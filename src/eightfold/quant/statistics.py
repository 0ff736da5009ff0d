"""What a group of linears reads while the float model runs over the calibration set.

    absmax, lo, hi     of each channel, over all tokens
    rms                of each channel, sqrt(mean of x**2) over all tokens
    reach, spread      max_b (max_t x - c_b), by channel, and max_b std(x - c_b);   c_b = (lo + hi) / 2 of samples 0..b
    ordinary           of each channel, max |x| over all tokens but the loudest ones: those with the largest inputs
    range_param        max |x| / max_b std(x - d_b);   d_b = lo + hi of sample b alone; also of x / s for any scale s

std is the unbiased deviation of a sample's whole (T_b, K) input, less a centre for each channel. That reach is
one-sided and depends on the order of the samples, and that d_b is twice the middle, is how the reference tool has it.

Letters: T tokens of several samples, K channels, B samples.

Source: the published msModelSlim wheel, its operations traced; range_param checked against its records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.errors import InputError
from eightfold.quant.analysis import InputRange
from eightfold.quant.recipe import RANGE_SAMPLES

_TINY = 1e-300
_TOP_CHANNELS = 4  # of a range

# So large a share of the tokens may be sinks, or one of each sample where that is more, but never half of all: a model
# has few of them, most at the beginning of a text.
_LOUD_SHARE = 0.015

# Puts what was found of samples, (samples of this process, ...), in order with what other processes have found of
# theirs at the same time: returns (samples of all, ...), and at which of them this process's begin.
InOrder = Callable[[Tensor], tuple[Tensor, int]]


def unshared(part: Tensor) -> tuple[Tensor, int]:
    """Return what a process found that has all the samples."""
    return part, 0


@dataclass(frozen=True)
class SampleStats:
    """Extremes of one sample (T_b, K) and, where that is asked for, sums that give the deviation of (x - c) / scale."""

    lo: Tensor  # (K,) float32
    hi: Tensor
    num_tokens: int
    sums: Tensor | None  # (K,) float64
    squares: Tensor | None  # (K,) float64, sums of squares
    power: Tensor | None  # (K,) float32, sums of squares

    @classmethod
    def of(cls, x_TK: Tensor, *, with_sums: bool, with_power: bool = False) -> SampleStats:
        # amin and amax: torch.aminmax along a dimension takes ten times as long as both.
        lo, hi = x_TK.amin(0), x_TK.amax(0)
        power = x_TK.square().sum(0) if with_power else None
        if not with_sums:
            return cls(lo, hi, len(x_TK), None, None, power)
        wide = x_TK.double()
        return cls(lo, hi, len(x_TK), wide.sum(0), wide.square_().sum(0), power)

    def deviation(self, centre: Tensor, inverse: Tensor | None = None) -> float:
        """Return the unbiased standard deviation of all elements of (x - centre) * inverse; (K,) float64 both."""
        assert self.sums is not None and self.squares is not None
        sums = self.sums - self.num_tokens * centre
        squares = self.squares - 2 * centre * self.sums + self.num_tokens * centre.square()
        if inverse is not None:
            sums, squares = sums * inverse, squares * inverse.square()
        count = self.num_tokens * len(sums)
        variance = (squares.sum() - sums.sum().square() / count) / max(count - 1, 1)
        return math.sqrt(max(float(variance), 0.0))


@dataclass(frozen=True)
class InputStats:
    """What the input of one group showed; K channels, all float32."""

    absmax: Tensor  # (K,) max |x| over all tokens
    lo: Tensor  # (K,) extremes over all tokens
    hi: Tensor  # (K,)
    first: Tensor  # (T0, K) the first sample's input; (0, K) when it was not kept
    tokens: Tensor  # (Ts, K) evenly spaced tokens of all samples, all of them when they are few; or (0, K)
    reach: Tensor  # (K,) how far above its moving centre a channel went
    spread: float  # largest deviation around the moving centres
    samples: Sequence[SampleStats]  # the first RANGE_SAMPLES, where they were kept
    ordinary: Tensor  # (K,) as absmax, less the loudest tokens where they were kept apart
    rms: Tensor | None  # (K,) where it was kept

    def range(self, layer: int, group: str) -> InputRange:
        """Return the range of this input, with the channels that reach furthest, for people."""
        top = torch.topk(self.absmax, min(_TOP_CHANNELS, len(self.absmax)))
        channels = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        lo, hi, ordinary = float(self.lo.amin()), float(self.hi.amax()), float(self.ordinary.amax())
        return InputRange(layer, group, lo, hi, ordinary, channels)

    def range_param(self, scale: Tensor | None = None) -> float:
        """Return the largest magnitude of x / scale in deviations: how much of the range is there for outliers.

        Args:
            scale: (K,) float32, positive; None means 1.
        """
        inverse = (torch.ones_like(self.lo) if scale is None else scale).double().reciprocal()
        std = max(sample.deviation(sample.lo.double() + sample.hi.double(), inverse) for sample in self.samples)
        extreme = max(float((torch.maximum(-each.lo, each.hi) * inverse).amax()) for each in self.samples)
        return extreme / max(std, _TINY)  # an input of zeros gives 0


@dataclass(frozen=True)
class Seen:
    """What is kept of a few samples."""

    samples: Sequence[SampleStats]
    first: Tensor | None  # (T0, K) all of the first sample of all
    tokens: Tensor | None  # evenly spaced ones
    apart: tuple[Tensor, Tensor] | None  # (L, K) |x| of the loudest tokens, and (K,) max |x| of the others


class InputWatcher:
    """Takes in the input of one group, a few samples at a time.

    Attributes:
        kept: of a watcher of some samples only, what it has seen, for one that takes it in in the order of the samples.
    """

    def __init__(
        self,
        title: str,
        total_tokens: int,
        max_tokens: int = 2048,
        keep_first: bool = True,
        keep_tokens: bool = True,
        keep_features: bool = True,
        keep_spread: bool = True,
        num_loud: int = 0,
        keep_rms: bool = False,
        place: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        """Start without samples.

        Args:
            title: of the group, for messages.
            total_tokens: of all samples that will come.
            max_tokens: how many of them to keep, evenly spaced, at most.
            keep_first: keep the first sample's input.
            keep_tokens: keep tokens.
            keep_features: keep what range_param needs.
            keep_spread: look at the deviation of all samples; otherwise `spread` is 0.
            num_loud: how many tokens to keep apart from the ordinary ones, see loud_tokens().
            keep_rms: keep the root mean square of each channel.
            place: of a watcher of some samples only, which sample and which token the next ones begin with.
        """
        self.kept: list[Seen] = []
        self._title, self._place = title, place
        self._stride = max(1, math.ceil(total_tokens / max_tokens))
        self._keep_first, self._keep_tokens = keep_first, keep_tokens
        self._keep_features, self._keep_spread = keep_features, keep_spread
        self._num_loud, self._keep_rms = num_loud, keep_rms
        self._num_samples = self._num_tokens = 0
        # Tensors of one element widen to (K,) with the first sample.
        self._lo, self._hi, self._reach = (torch.tensor(end) for end in (math.inf, -math.inf, -math.inf))
        self._spread = 0.0
        self._power, self._power_tokens = torch.zeros(1, dtype=torch.float64), 0
        self._loud, self._rest = torch.zeros(0, 1), torch.zeros(1)
        self._first: Tensor | None = None
        self._tokens: list[Tensor] = []
        self._samples: list[SampleStats] = []  # the first ones

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> None:
        """Take in more samples, in order.

        Args:
            x_TK: (T, K) float32, the group's input for all tokens of these samples.
            spans: (begin, end) of each sample's tokens.

        Raises:
            InputError: a sample's activations are not finite.
        """
        number, token = (self._num_samples, self._num_tokens) if self._place is None else self._place()
        samples = [
            SampleStats.of(
                x_TK[begin:end], with_sums=self._keep_spread or self._is_feature(at), with_power=self._keep_rms
            )
            for at, (begin, end) in enumerate(spans, number)
        ]
        lo_B, hi_B = (torch.stack(ends) for ends in zip(*((s.lo.amin(), s.hi.amax()) for s in samples), strict=True))
        require_finite_samples(self._title, number, lo_B, hi_B)
        seen = Seen(
            samples,
            x_TK[slice(*spans[0])].clone() if self._keep_first and number == 0 else None,
            x_TK[-token % self._stride :: self._stride].clone() if self._keep_tokens else None,
            _set_apart(x_TK, self._num_loud) if self._num_loud else None,
        )
        self._num_tokens += len(x_TK)
        if self._place is None:
            self.take(seen)
        else:
            self.kept.append(seen)

    def _is_feature(self, number: int) -> bool:
        return self._keep_features and number < RANGE_SAMPLES

    def take(self, seen: Seen) -> None:
        for sample in seen.samples:
            self._lo, self._hi = torch.minimum(self._lo, sample.lo), torch.maximum(self._hi, sample.hi)
            centre = (self._lo + self._hi) / 2
            self._reach = torch.maximum(self._reach, sample.hi - centre)
            if sample.power is not None:
                self._power = self._power + sample.power
                self._power_tokens += sample.num_tokens
            if self._keep_spread:
                self._spread = max(self._spread, sample.deviation(centre.double()))
            if self._is_feature(self._num_samples):
                self._samples.append(sample)
            self._num_samples += 1
        if seen.first is not None:
            self._first = seen.first
        if seen.tokens is not None:
            self._tokens.append(seen.tokens)
        if seen.apart is not None:
            loud, rest = seen.apart
            self._loud, quieter = _set_apart(torch.cat([self._loud.expand(-1, len(rest)), loud]), self._num_loud)
            self._rest = torch.stack([self._rest.expand_as(rest), rest, quieter]).amax(0)

    def stats(self) -> InputStats:
        """Return what has been seen; at least one sample must have been."""
        nothing = torch.zeros(0, len(self._lo))
        absmax = torch.maximum(-self._lo, self._hi)
        return InputStats(
            absmax=absmax,
            lo=self._lo,
            hi=self._hi,
            first=nothing if self._first is None else self._first,
            tokens=torch.cat(self._tokens) if self._tokens else nothing,
            reach=self._reach,
            spread=self._spread,
            samples=self._samples,
            ordinary=self._rest if self._num_loud else absmax,
            rms=(self._power / self._power_tokens).sqrt().to(torch.float32) if self._power_tokens else None,
        )


def loud_tokens(lengths: Sequence[int]) -> int:
    """Return how many tokens of samples of these lengths may be sinks."""
    total = sum(lengths)
    return min(max(math.ceil(_LOUD_SHARE * total), len(lengths)), total // 2)


def _set_apart(x_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return |x| of the `count` tokens with the largest values, (L, K), and each channel's largest of the others."""
    loudest = torch.topk(torch.maximum(-x_TK.amin(1), x_TK.amax(1)), min(count, len(x_TK))).indices
    others = torch.ones(len(x_TK), dtype=torch.bool)
    others[loudest] = False
    rest = torch.zeros_like(x_TK[0])
    if others.any():
        quiet_TK = x_TK[others]
        rest = torch.maximum(-quiet_TK.amin(0), quiet_TK.amax(0))
    return x_TK[loudest].abs(), rest


def require_finite_samples(title: str, seen: int, lo_B: Tensor, hi_B: Tensor) -> None:
    """Check the extremes (B,) of the samples that come after `seen` others for NaN and infinity.

    Raises:
        InputError: names the first sample that is not finite, and the group of linears.
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


def stacked(values: Sequence[Tensor], *shape: int) -> Tensor:
    """Return values one after the other; of none, an empty tensor (0, *shape)."""
    return torch.stack(list(values)) if values else torch.zeros(0, *shape)
