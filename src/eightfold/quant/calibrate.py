"""One layer of static W8A8: watch its inputs while everything before them is already quantized.

The reference tool sends one sample after the other through the whole fake-quantized model; every observer updates
with a sample before it quantizes it. What a layer sees of sample b depends on samples 0..b only, so the same numbers
come out when all samples go through one layer, then all through the next: one layer is in memory at a time, and many
samples share one matrix product.

Letters: T tokens of several samples, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eightfold.quant.observe import MeanMinMax
from eightfold.quant.qparams import QuantizedWeight
from eightfold.reference.decoder import Batch
from eightfold.reference.linear import Linear, W8A8DynamicLinear, to_int8_


@dataclass(frozen=True)
class ObservedGroup:
    """Linears whose common input is observed and, for its quantized members, quantized as observed so far."""

    observer: MeanMinMax
    members: tuple[W8A8DynamicLinear | Linear, ...]  # a W8A8DynamicLinear for a member that is being quantized

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return every member's output."""
        scale_T1, offset_T1 = self.observer.update(x_TK, batch.spans)
        # Divided by the scale here; inference multiplies by a reciprocal.
        xq = to_int8_(x_TK / scale_T1, offset_T1)
        return tuple(
            member.multiply(xq, scale_T1, offset_T1) if isinstance(member, W8A8DynamicLinear) else member(x_TK)
            for member in self.members
        )


def quantized_member(weight: QuantizedWeight, bias_N: Tensor | None) -> W8A8DynamicLinear:
    """Return the linear that multiplies int8 inputs whose scales are given for each token."""
    return W8A8DynamicLinear(weight.values, weight.scale[:, 0], weight.sum(), bias_N)
