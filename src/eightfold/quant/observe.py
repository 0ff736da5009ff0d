"""Running statistics of a linear's input.

    lo = mean_b min(x_b),  hi = mean_b max(x_b)      over the calibration samples b seen so far

The mean over samples, and not the extreme: that is what activation method 1 of msModelSlim computes, although it is
called min-max there. It is torch's mean of float32, taken anew for each sample, to the last bit: in a deep model a
single bit of the first scale changes a few integers, and some layers later most of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.model.reference.linear import asymmetric
from eightfold.quant.statistics import InOrder, require_finite_samples, stacked, unshared


class MeanMinMax:
    """Activation method 1: per-tensor, asymmetric, averaged over samples."""

    def __init__(self, title: str, in_order: InOrder = unshared) -> None:
        self._title, self._in_order = title, in_order
        self._lo_B = torch.zeros(0)  # of each sample
        self._hi_B = torch.zeros(0)

    @property
    def samples(self) -> int:
        """How many it has seen."""
        return len(self._lo_B)

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples, in order; see `InOrder`.

        Args:
            x_TK: (T, K) float32, the input of the linear for all tokens of these samples.
            spans: (begin, end) of each sample's tokens.

        Returns:
            scale and offset, each (T, 1) float32: for a sample's tokens those that hold once it has been seen.

        Raises:
            InputError: a sample's activations are not finite.
        """
        row_lo, row_hi = x_TK.amin(1), x_TK.amax(1)
        own_lo = stacked([row_lo[begin:end].min() for begin, end in spans])
        own_hi = stacked([row_hi[begin:end].max() for begin, end in spans])
        ends_R2, own = self._in_order(torch.stack([own_lo, own_hi], dim=1))
        lo, hi = ends_R2.unbind(1)
        require_finite_samples(self._title, self.samples, lo, hi)
        seen = range(self.samples + own + 1, self.samples + own + len(spans) + 1)
        self._lo_B, self._hi_B = torch.cat([self._lo_B, lo]), torch.cat([self._hi_B, hi])
        running_lo, running_hi = (stacked([x[:n].mean() for n in seen]) for x in (self._lo_B, self._hi_B))
        scale, offset = asymmetric(running_lo, running_hi)
        lengths = torch.tensor([end - begin for begin, end in spans], dtype=torch.int64)
        return scale.repeat_interleave(lengths)[:, None], offset.repeat_interleave(lengths)[:, None]

    def params(self) -> tuple[Tensor, Tensor]:
        """Return the final scale and offset, each (1,) float32."""
        return asymmetric(self._lo_B.mean()[None], self._hi_B.mean()[None])
