"""Running statistics of a linear's input.

    lo = mean_b min(x_b),  hi = mean_b max(x_b)      over the calibration samples b seen so far

The mean over samples, and not the extreme: that is what activation method 1 of msModelSlim computes, although it is
called min-max there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.quant.statistics import require_finite_samples
from eightfold.reference.linear import asymmetric


class MeanMinMax:
    """Activation method 1: per-tensor, asymmetric, averaged over samples."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._lo = torch.zeros(1, dtype=torch.float64)  # sum over samples
        self._hi = torch.zeros(1, dtype=torch.float64)
        self.samples = 0

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples, in order.

        Args:
            x_TK: (T, K) float32, the input of the linear for all tokens of these samples.
            spans: (begin, end) of each sample's tokens.

        Returns:
            scale and offset, each (T, 1) float32: for a sample's tokens those that hold once it has been seen.

        Raises:
            InputError: a sample's activations are not finite.
        """
        row_lo, row_hi = torch.aminmax(x_TK, dim=1)
        lo = torch.stack([row_lo[begin:end].min() for begin, end in spans]).double()
        hi = torch.stack([row_hi[begin:end].max() for begin, end in spans]).double()
        require_finite_samples(self._title, self.samples, lo, hi)
        seen = torch.arange(self.samples + 1, self.samples + len(spans) + 1)
        running_lo, running_hi = (self._lo + lo.cumsum(0)) / seen, (self._hi + hi.cumsum(0)) / seen
        self._lo, self._hi = self._lo + lo.sum(), self._hi + hi.sum()
        self.samples += len(spans)
        scale, offset = asymmetric(running_lo.float(), running_hi.float())
        lengths = torch.tensor([end - begin for begin, end in spans])
        return scale.repeat_interleave(lengths)[:, None], offset.repeat_interleave(lengths)[:, None]

    def params(self) -> tuple[Tensor, Tensor]:
        """Return the final scale and offset, each (1,) float32."""
        return asymmetric((self._lo / self.samples).float(), (self._hi / self.samples).float())
