"""One layer of static W8A8: watch its inputs while everything before them is already quantized.

The reference tool sends one sample after the other through the whole fake-quantized model; every observer updates
with a sample before it quantizes it. What a layer sees of sample b depends on samples 0..b only, so the same numbers
come out when all samples go through one layer, then all through the next: one layer is in memory at a time, and many
samples share one matrix product.

Activation method 1 takes the means over the calibration samples b seen so far, and not the extremes:

    lo = mean_b min(x_b),  hi = mean_b max(x_b)

That is what msModelSlim computes, although it is called min-max there. It is torch's mean of float32, taken anew for
each sample, to the last bit: in a deep model a single bit of the first scale changes a few integers, and some layers
later most of them.

Activation method 2 takes the range that loses least, searched in a histogram of a linear's input.

    grid      B bins over [lo, hi]; a sample outside widens it, and the old counts are spread over the new bins
    search    walk inwards from all bins, a quantile of 1e-5 at a time, until the error rises
    error     sum_b counts_b / width * integral over bin b of (x - nearest level)^2 dx      LEVELS levels in the range

This is torch's HistogramObserver in the old state in which msModelSlim keeps it: histogram and range are reproduced
bit for bit, oddities included, as another range would be another checkpoint.

  - A sample is counted between the ends of the grid *cut to whole numbers*, and the bins are then read as if they
    covered the grid. Of [-0.9, 3.7] only [0, 3] is counted, and stretched. If both ends are cut to the same number,
    the sample is counted between its own extremes.
  - The first range tried is taken whatever its error.
  - The right end moves unless the left one would skip more bins. A step that leads the left end nowhere is never
    repeated, so from then on the left end rests.
  - The integral behind the spread counts is rounded to float32 at the lower end of a bin and not at the upper one, so
    an empty bin may hold slightly less than nothing.

Equality in bits is worth the trouble because of the first two: a range that ends at 2.999 or at 3.001 gives another
histogram, and inputs that are quantized by it carry the difference through all later layers.

Method extremes takes what the float pass has seen: all of it, as the smoothed input has it. Nothing has to run through
the quantized layers then.

Letters: T tokens of several samples, S of one, K inputs, N outputs, B bins, C candidate ranges.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eightfold.families import Rows
from eightfold.model.reference.decoder import Batch, in_parts
from eightfold.model.reference.linear import Linear, W8A8DynamicLinear, asymmetric, divided_to_int8
from eightfold.quant.recipe import ActMethod
from eightfold.quant.statistics import InOrder, require_finite_samples, stacked, unshared

# Above this ratio of largest value to standard deviation, method `auto` takes the extremes and not the histogram.
AUTO_LIMIT = 50.0

BINS = 2048
LEVELS = 256  # of an int8 activation
UPSAMPLE = 128  # cells of the dense grid in a bin
STEP = 1e-5  # of the mass

# Ranges whose error is computed at once. Most searches end within three.
_CHUNK = 4

# The quantiles after 0, 1, ... steps, added up one by one: k * STEP differs in the last bit. As many as any walk takes.
_FROM_LEFT = np.concatenate([[0.0], np.full(100_002, STEP)]).cumsum()
_FROM_RIGHT = np.concatenate([[1.0], np.full(100_002, -STEP)]).cumsum()


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
    """Return the observer of an input; AUTO looks at `range_param`, its largest value over its deviation."""
    if method is ActMethod.EXTREMES:
        return Extremes(title)
    if method is ActMethod.AUTO:
        assert range_param is not None
        method = ActMethod.HISTOGRAM if range_param <= AUTO_LIMIT else ActMethod.MINMAX
    return HistogramObserver(title, in_order) if method is ActMethod.HISTOGRAM else MeanMinMax(title, in_order)


def _for_tokens(values: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return one value for each sample, (samples,), as one for each of its tokens, (T, 1)."""
    lengths = torch.tensor([end - begin for begin, end in spans], dtype=torch.int64)
    return values.repeat_interleave(lengths)[:, None]


class MeanMinMax:
    """Activation method 1: per-tensor, asymmetric, averaged over samples."""

    def __init__(self, title: str, in_order: InOrder = unshared) -> None:
        self._title, self._in_order = title, in_order
        self._lo_B, self._hi_B = torch.zeros(0), torch.zeros(0)  # of each sample

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
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
        return _for_tokens(scale, spans), _for_tokens(offset, spans)

    def params(self) -> tuple[Tensor, Tensor]:
        return asymmetric(self._lo_B.mean()[None], self._hi_B.mean()[None])


class Extremes:
    """From the smallest to the largest value of all tokens, per-tensor and asymmetric."""

    def __init__(self, title: str, known: tuple[Tensor, Tensor] | None = None) -> None:
        """Start with nothing seen, or with a range, () float32 both, that holds whatever is going to be seen."""
        self._title, self._is_known = title, known is not None
        self._lo, self._hi = known or (torch.zeros(()), torch.zeros(()))
        self._seen = 0

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        if not self._is_known:
            samples = [x_TK[begin:end] for begin, end in spans]
            lo_B, hi_B = stacked([sample.min() for sample in samples]), stacked([sample.max() for sample in samples])
            require_finite_samples(self._title, self._seen, lo_B, hi_B)
            self._lo, self._hi = torch.minimum(self._lo, lo_B.min()), torch.maximum(self._hi, hi_B.max())
            self._seen += len(spans)
        scale, offset = self.params()
        return scale.expand(len(x_TK))[:, None], offset.expand(len(x_TK))[:, None]

    def params(self) -> tuple[Tensor, Tensor]:
        return asymmetric(self._lo[None], self._hi[None])


class StaticMember(W8A8DynamicLinear):
    """A linear whose int8 inputs have the parameters that an observer has found so far."""


@dataclass(frozen=True)
class ObservedGroup:
    """Linears whose common input is observed and, for its static members, quantized as observed so far."""

    observer: Observer
    members: tuple[Linear, ...]
    parts: tuple[Rows, ...] = ()  # see LinearGroup

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        scale_T1, offset_T1 = self.observer.update(x_TK, batch.spans)
        # Divided by the scale here; inference multiplies by a reciprocal.
        xq = divided_to_int8(x_TK, scale_T1, offset_T1)
        found = tuple(
            member.multiply(xq, scale_T1, offset_T1) if isinstance(member, StaticMember) else member(x_TK)
            for member in self.members
        )
        return in_parts(found, self.parts)


class HistogramObserver:
    """Activation method 2: per-tensor, asymmetric, of least squared error."""

    def __init__(self, title: str, in_order: InOrder = unshared) -> None:
        self._title, self._in_order = title, in_order
        self._lo = self._hi = torch.zeros(())  # ends of the grid, () float32
        self._counts_B = torch.zeros(BINS)
        self._params: tuple[Tensor, Tensor] | None = None  # of the grid as it is, once they are looked for
        self.samples = 0

    def update(self, x_TK: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Take in more samples, in order; see `InOrder`.

        How the grid widens follows from the extremes of the samples alone. So those are put in order first, samples
        are counted on the grids that they will meet, and then the counts are put in order.
        """
        samples = [x_TK[begin:end] for begin, end in spans]
        extremes = [torch.stack(torch.aminmax(x_SK)) for x_SK in samples]
        ends_R2, own = self._in_order(stacked(extremes, 2))
        require_finite_samples(self._title, self.samples, *ends_R2.unbind(1))
        grids = self._grids(ends_R2)
        counts = [count(x_SK, *grid[:2]) for x_SK, grid in zip(samples, grids[own:], strict=False)]
        counts_RB, _ = self._in_order(stacked(counts, BINS))
        found = []
        for index, (grid, counts_B) in enumerate(zip(grids, counts_RB, strict=True)):
            self._see(grid, counts_B)
            if own <= index < own + len(spans):
                found.append(self.params())
        scale, offset = (torch.cat([torch.zeros(0), *(pair[part] for pair in found)]) for part in (0, 1))
        return _for_tokens(scale, spans), _for_tokens(offset, spans)

    def params(self) -> tuple[Tensor, Tensor]:
        if self._params is None:
            clip_lo, clip_hi = search_range(self._counts_B, self._lo, self._hi)
            self._params = asymmetric(clip_lo[None], clip_hi[None])
        return self._params

    def _grids(self, ends_R2: Tensor) -> list[_Grid]:
        lo, hi, grids = self._lo, self._hi, []
        for new_lo, new_hi in ends_R2:
            forgets = is_forgettable(lo, hi, new_lo, new_hi)
            grids.append(_Grid(new_lo, new_hi, None) if forgets else _Grid(*widen(lo, hi, new_lo, new_hi)))
            lo, hi = grids[-1][:2]
        return grids

    def _see(self, grid: _Grid, counts_B: Tensor) -> None:
        if grid.cells is not None:
            counts_B = counts_B + spread(self._counts_B, self._lo, self._hi, grid.lo, grid.hi, grid.cells)
        self._lo, self._hi, self._counts_B = grid.lo, grid.hi, counts_B
        self._params = None
        self.samples += 1


class _Grid(NamedTuple):
    """Where a sample is counted."""

    lo: Tensor  # () float32
    hi: Tensor
    cells: int | None  # of the grid before, in each bin; None: what that held is forgotten


def count(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the histogram of x, (B,) float32, between lo and hi cut to whole numbers (see the top of this file)."""
    return torch.histc(x, BINS, min=float(lo.trunc()), max=float(hi.trunc()))


def is_forgettable(lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor) -> bool:
    """Return whether the grid [lo, hi] holds nothing, one value only, or hardly more beside what comes.

    The reference forgets a single value, and fails where the new range is millions of times the old one.
    """
    wide = torch.maximum(new_hi, hi) - torch.minimum(new_lo, lo)
    return bool(hi - lo <= (wide * 2.0**-24).clamp(min=1e-30))


def widen(lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the grid over both ranges and how many cells of the old one's dense grid each of its bins holds.

    A bin of the new grid is a whole number of cells; what that adds goes to the upper end, so a lower end of 0 stays.
    """
    low, high = torch.minimum(new_lo, lo), torch.maximum(new_hi, hi)
    row = BINS * _cell(lo, hi)  # a new bin of so many cells makes the grid so many rows wide
    cells = int(torch.ceil((high - low) / row))
    return low, high + (cells * row - (high - low)), cells


def _cell(lo: Tensor, hi: Tensor) -> Tensor:
    return (hi - lo) / (BINS * UPSAMPLE)


def spread(counts_B: Tensor, lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor, cells: int) -> Tensor:
    """Return the counts of the grid [lo, hi] in the bins of the wider grid [new_lo, new_hi].

    Every bin is UPSAMPLE cells of equal counts; a new bin is `cells` of them. The count of a new bin is what the
    integral over the cells gains between its ends. Only the old grid is dense here, however wide the new one is.
    """
    if new_lo == lo and new_hi == hi:
        return counts_B
    start = round(float((lo - new_lo) / _cell(lo, hi)))
    dense = counts_B.repeat_interleave(UPSAMPLE).cumsum(0, dtype=torch.float64)
    integral = torch.cat([torch.zeros(1, dtype=torch.float64), dense])  # from lo, after 0, 1, ... cells
    upper = integral[(torch.arange(1, BINS + 1) * cells - start).clamp_(0, BINS * UPSAMPLE)]
    lower = torch.cat([torch.zeros(1), upper[:-1].float()])
    return ((upper - lower) / UPSAMPLE).float()


def search_range(counts_B: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of the grid [lo, hi] to which the search clips, as two () float32."""
    if lo == hi:
        return lo, hi
    best, least = (0, BINS - 1), float("inf")
    walk = candidates(counts_B)
    while chunk := list(islice(walk, _CHUNK)):
        errors = [least, *quantization_errors(counts_B, float(hi) - float(lo), chunk).tolist()]
        rising = next((at for at in range(len(chunk)) if errors[at + 1] > errors[at]), len(chunk))
        if rising:
            best, least = chunk[rising - 1], errors[rising]
        if rising < len(chunk):
            break
    width = (hi - lo) / BINS
    return lo + width * best[0], lo + width * (best[1] + 1)


def candidates(counts_B: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the (first, last) bins of the ranges to try, each inside the one before.

    A step moves one end to the bin in which the next quantile of that side lies, the side that skips more bins; the
    right one when they skip equally many, also when that is none.
    """
    total = float(counts_B.sum())
    mass_B = counts_B.cumsum(0).cpu().numpy()
    first, last, left, right = 0, BINS - 1, 0, 0  # steps taken from either side
    while _FROM_LEFT[left] < _FROM_RIGHT[right]:
        next_first = _first_reaching(mass_B, first, last, np.float32(_FROM_LEFT[left + 1] * total))
        next_last = _last_within(mass_B, first, last, np.float32(_FROM_RIGHT[right + 1] * total))
        if next_first - first > last - next_last:
            first, left = next_first, left + 1
        elif next_last < last:
            last, right = next_last, right + 1
        elif first < last:
            right = _next_moving_step(mass_B[last], right + 1, total)
            continue
        else:
            return
        yield first, last


def _first_reaching(mass_B: npt.NDArray[np.float32], first: int, last: int, threshold: np.float32) -> int:
    reached = mass_B[first:last] >= threshold
    at = int(reached.argmax()) if first < last else 0
    return first + at if first < last and reached[at] else last


def _last_within(mass_B: npt.NDArray[np.float32], first: int, last: int, threshold: np.float32) -> int:
    within = mass_B[first + 1 : last + 1][::-1] <= threshold
    at = int(within.argmax()) if first < last else 0
    return last - at if first < last and within[at] else first


def _next_moving_step(mass: np.float32, right: int, total: float) -> int:
    """Return after how many steps, from `right` on, the next one from the right asks for less than this mass."""

    def moves(step: int) -> bool:
        return bool(mass > np.float32(_FROM_RIGHT[step + 1] * total))

    return bisect_left(range(len(_FROM_RIGHT) - 1), True, lo=right, key=moves)


def quantization_errors(counts_B: Tensor, extent: float, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return the squared error that LEVELS levels over each range of bins make on the histogram, (C,) float32.

    Every level stands for an interval, its own in the middle; what lies outside the range goes to the outermost. Counts
    are taken as spread evenly over their bins.

    Args:
        counts_B: (B,) float32.
        extent: hi - lo of the grid.
        ranges: (first, last) bins of each, C of them.
    """
    width = extent / BINS
    level_C1 = torch.tensor([width * (last - first + 1) / LEVELS for first, last in ranges])[:, None]
    first_C1 = torch.tensor([first for first, _ in ranges])[:, None]
    begin_CB = (torch.arange(BINS) - first_C1) * width
    end_CB = begin_CB + width
    begin_level_CB = torch.div(begin_CB, level_C1, rounding_mode="floor").clamp_(0, LEVELS - 1)
    end_level_CB = torch.div(end_CB, level_C1, rounding_mode="floor").clamp_(0, LEVELS - 1)
    density_B = counts_B / width
    half_C1 = level_C1 / 2
    from_begin = _square_integral(begin_CB - (begin_level_CB + 0.5) * level_C1, half_C1)
    whole = _square_integral(-half_C1, half_C1)
    to_end = _square_integral(-half_C1, end_CB - (end_level_CB * level_C1 + half_C1))
    between_CB = end_level_CB - begin_level_CB - 1  # whole levels; -1 where a bin lies in one: begin and end overlap
    return (from_begin * density_B + between_CB * (whole * density_B) + to_end * density_B).sum(1)


def _square_integral(begin: Tensor, end: Tensor) -> Tensor:
    return (end * end * end - begin * begin * begin) / 3
