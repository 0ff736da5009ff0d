"""One layer of static W8A8: watch its inputs while everything before them is already quantized.

The reference tool sends one sample after the other through the whole fake-quantized model; every observer updates
with a sample before it quantizes it. What a layer sees of sample b depends on samples 0..b only, so the same numbers
come out when all samples go through one layer, then all through the next: one layer is in memory at a time, and many
samples share one matrix product.

Letters: T tokens of several samples, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eightfold.model.reference.decoder import Batch
from eightfold.model.reference.linear import Linear, W8A8DynamicLinear, divided_to_int8
from eightfold.quant.histogram import HistogramObserver
from eightfold.quant.methods import ActMethod
from eightfold.quant.observe import MeanMinMax
from eightfold.quant.qparams import QuantizedWeight
from eightfold.quant.statistics import InOrder, unshared

# Above this ratio of largest value to standard deviation, method `auto` takes the extremes and not the histogram.
AUTO_LIMIT = 50.0


class Observer(Protocol):
    """Running parameters of one input."""

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples; return the scale and offset that hold for each token, (T, 1) each."""
        ...

    def params(self) -> tuple[Tensor, Tensor]:
        """Return the final scale and offset, (1,) each."""
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
