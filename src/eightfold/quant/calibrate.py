"""One layer of static W8A8: watch its inputs while everything before them is already quantized.

The reference tool sends one sample after the other through the whole fake-quantized model; every observer updates
with a sample before it quantizes it. What a layer sees of sample b depends on samples 0..b only, so the same numbers
come out when all samples go through one layer, then all through the next: one layer is in memory at a time, and many
samples share one matrix product.

Activation method 1 takes the means over the calibration samples b seen so far, and not the extremes:

    lo = mean_b min(x_b),  hi = mean_b max(x_b)

That is what msModelSlim computes, although it is called min-max there. It is torch's mean of float32, taken anew for
each sample, to the last bit: in a deep model a single bit of the first scale changes a few integers, and some layers
later most of them. Method 2 is in histogram.py.

Letters: T tokens of several samples, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eightfold.model.reference.decoder import Batch
from eightfold.model.reference.linear import Linear, W8A8DynamicLinear, asymmetric, divided_to_int8
from eightfold.quant.histogram import HistogramObserver
from eightfold.quant.qparams import QuantizedWeight
from eightfold.quant.recipe import ActMethod
from eightfold.quant.statistics import InOrder, require_finite_samples, stacked, unshared

# Above this ratio of largest value to standard deviation, method `auto` takes the extremes and not the histogram.
AUTO_LIMIT = 50.0


class Observer(Protocol):
    """Running parameters of one input."""

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples, in order; with several processes, see statistics.InOrder, each its own.

        Args:
            x_TK: (T, K) float32, the input of the linears for all tokens of these samples.
            spans: (begin, end) of each sample's tokens.

        Returns:
            scale and offset, each (T, 1) float32: for a sample's tokens those that hold once it has been seen.

        Raises:
            InputError: a sample's activations are not finite.
        """
        ...

    def params(self) -> tuple[Tensor, Tensor]:
        """Return the scale and offset that hold now, each (1,) float32."""
        ...


def observer_for(method: ActMethod, title: str, range_param: float | None, in_order: InOrder = unshared) -> Observer:
    """Return the observer of an input.

    Args:
        method: what the user chose.
        title: names the input in errors.
        range_param: largest value over standard deviation; only AUTO looks at it.
        in_order: see statistics.InOrder.
    """
    if method is ActMethod.AUTO:
        assert range_param is not None
        method = ActMethod.HISTOGRAM if range_param <= AUTO_LIMIT else ActMethod.MINMAX
    return HistogramObserver(title, in_order) if method is ActMethod.HISTOGRAM else MeanMinMax(title, in_order)


class MeanMinMax:
    """Activation method 1: per-tensor, asymmetric, averaged over samples."""

    def __init__(self, title: str, in_order: InOrder = unshared) -> None:
        self._title, self._in_order = title, in_order
        self._lo_B, self._hi_B = torch.zeros(0), torch.zeros(0)  # of each sample

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples; see Observer."""
        row_lo, row_hi = x_TK.amin(1), x_TK.amax(1)
        own_lo = stacked([row_lo[begin:end].min() for begin, end in spans])
        own_hi = stacked([row_hi[begin:end].max() for begin, end in spans])
        ends_R2, own = self._in_order(torch.stack([own_lo, own_hi], dim=1))
        lo, hi = ends_R2.unbind(1)
        seen = len(self._lo_B)
        require_finite_samples(self._title, seen, lo, hi)
        counts = range(seen + own + 1, seen + own + len(spans) + 1)
        self._lo_B, self._hi_B = torch.cat([self._lo_B, lo]), torch.cat([self._hi_B, hi])
        running_lo, running_hi = (stacked([x[:n].mean() for n in counts]) for x in (self._lo_B, self._hi_B))
        scale, offset = asymmetric(running_lo, running_hi)
        lengths = torch.tensor([end - begin for begin, end in spans], dtype=torch.int64)
        return scale.repeat_interleave(lengths)[:, None], offset.repeat_interleave(lengths)[:, None]

    def params(self) -> tuple[Tensor, Tensor]:
        """Return the final scale and offset; see Observer."""
        return asymmetric(self._lo_B.mean()[None], self._hi_B.mean()[None])


class StaticMember(W8A8DynamicLinear):
    """A linear whose int8 inputs have the parameters that an observer has found so far."""


@dataclass(frozen=True)
class ObservedGroup:
    """Linears whose common input is observed and, for its static members, quantized as observed so far."""

    observer: Observer
    members: tuple[Linear, ...]

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return every member's output."""
        scale_T1, offset_T1 = self.observer.update(x_TK, batch.spans)
        # Divided by the scale here; inference multiplies by a reciprocal.
        xq = divided_to_int8(x_TK, scale_T1, offset_T1)
        return tuple(
            member.multiply(xq, scale_T1, offset_T1) if isinstance(member, StaticMember) else member(x_TK)
            for member in self.members
        )


def static_member(weight: QuantizedWeight, bias_N: Tensor | None) -> StaticMember:
    """Return the linear that multiplies int8 inputs whose scales are given for each token."""
    return StaticMember(weight.values, weight.scale[:, 0], weight.sum(), bias_N)
