"""Activation method 2: the histogram, how it grows, and the search in it, against slow definitions written out here."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.errors import InputError
from eightfold.model.reference.linear import EPS, asymmetric
from eightfold.quant import calibrate
from eightfold.quant.calibrate import (
    BINS,
    LEVELS,
    UPSAMPLE,
    HistogramObserver,
    candidates,
    count,
    quantization_errors,
    search_range,
    spread,
    widen,
)

END = BINS - 1


def scalars(*values):
    return tuple(torch.tensor(value, dtype=torch.float32) for value in values)


def heavy(seed, tokens=40, width=48):
    """Values with far outliers."""
    generator = torch.Generator().manual_seed(seed)
    normal, divisor = torch.randn(tokens, width, generator=generator), torch.rand(tokens, width, generator=generator)
    return normal / (divisor + 0.01)


def observed(*samples):
    """The observer after these samples, one update each."""
    observer = HistogramObserver("x")
    for sample in samples:
        observer.update(sample, [(0, len(sample))])
    return observer


# --- counting ---------------------------------------------------------------------------------------------------------


def counted(values, lo, hi):
    return count(torch.tensor(values), *scalars(lo, hi))


def test_values_are_counted_between_whole_numbers():
    counts = counted([-0.9, 0.0, 1.5, 3.0, 3.7], -0.9, 3.7)
    assert counts.nonzero().flatten().tolist() == [0, BINS // 2, END]  # 0, 1.5 and 3 of [0, 3]
    assert counts.sum() == 3


def test_ends_that_are_cut_to_one_number_give_way_to_the_samples_own():
    counts = counted([-0.25, 0.0, 0.75], -0.4, 0.9)
    assert counts.nonzero().flatten().tolist() == [0, BINS // 4, END]  # of [-0.25, 0.75]


# --- growing ----------------------------------------------------------------------------------------------------------


def test_lower_end_stays_and_the_upper_end_makes_whole_rows():
    # A cell is 2048 / (2048 * 128) = 1/128, a row of one in every bin is 16 wide: 2050 needs 128.125 of them.
    lo, hi, cells = widen(*scalars(0.0, 2048.0, 5.0, 2050.0))
    assert (float(lo), float(hi), cells) == (0.0, 129 * 16.0, 129)


@pytest.mark.parametrize("extremes", [(-1.0, 2.0), (-3.0, 5.0), (0.1, 0.2)])
def test_range_that_is_not_exceeded_stays(extremes):
    lo, hi, cells = widen(*scalars(-3.0, 5.0), *scalars(*extremes))
    assert (float(lo), float(hi), cells) == (-3.0, 5.0, UPSAMPLE)


@pytest.mark.parametrize(("new_lo", "new_hi"), [(-3.0, 9.5), (-4.7, 5.0), (-4.7, 6.1), (-500.0, 700.0)])
def test_old_counts_are_spread_as_on_a_dense_grid(new_lo, new_hi):
    counts = torch.randint(0, 50, (BINS,), generator=torch.Generator().manual_seed(1)).float()
    old = scalars(-3.0, 5.0)
    lo, hi, cells = widen(*old, *scalars(new_lo, new_hi))
    dense = np.zeros(BINS * cells)
    start = round((-3.0 - float(lo)) / (8.0 / (BINS * UPSAMPLE)))
    dense[start : start + BINS * UPSAMPLE] = np.repeat(counts.numpy(), UPSAMPLE)
    # Exact: the counts are whole and their sum over the cells stays below 2**24.
    assert counts.sum() * UPSAMPLE < 2**24
    expected = dense.reshape(BINS, cells).sum(1) / UPSAMPLE
    assert torch.equal(spread(counts, *old, lo, hi, cells), torch.from_numpy(expected).float())  # type: ignore[call-arg]


def test_integral_is_rounded_at_the_lower_end_of_a_bin_only():
    counts = torch.zeros(BINS)
    counts[:2] = torch.tensor([2.0**17, 3 / 128])  # over their cells: 2**24 + 3, in float32 2**24 + 4
    lo, hi, cells = widen(*scalars(0.0, 8.0, 0.0, 8.01))
    assert set(spread(counts, *scalars(0.0, 8.0), lo, hi, cells)[2:].tolist()) == {-1 / 128}  # type: ignore[call-arg]
    assert torch.equal(spread(counts, *scalars(0.0, 8.0, 0.0, 8.0), UPSAMPLE), counts)  # type: ignore[call-arg]


def test_second_sample_is_added_to_the_spread_counts_of_the_first():
    first, second = torch.linspace(0, 4, 500)[None], torch.linspace(-2, 9, 700)[None]
    observer = observed(first, second)
    lo, hi, cells = widen(*scalars(0.0, 4.0, -2.0, 9.0))
    old = spread(counted(first.tolist(), 0.0, 4.0), *scalars(0.0, 4.0), lo, hi, cells)  # type: ignore[call-arg]
    assert torch.equal(observer._counts_B, count(second, lo, hi) + old)
    assert (observer._lo, observer._hi) == (lo, hi)


def test_single_value_is_forgotten():
    alone, after = observed(heavy(2)), observed(torch.full((2, 3), 0.7), heavy(2))
    assert torch.equal(alone._counts_B, after._counts_B)
    assert alone.params() == after.params()


@pytest.mark.parametrize("tiny", [1e-42, 1e-9])
def test_range_that_is_next_to_nothing_does_no_harm(tiny):
    alone, after = observed(heavy(2) * 1e4), observed(torch.tensor([[0.0, tiny]]), heavy(2) * 1e4)
    assert alone.params() == after.params()


@pytest.mark.parametrize("largest", [0.0, 1e-42, 1e-31])  # the cells of the second are denormal, the third's width is
def test_zeros_and_hardly_more_give_the_smallest_scale(largest):
    scale, offset = observed(*(torch.tensor([[0.0, largest * factor]]) for factor in (1, 2, 0.5, 3))).params()
    assert (scale.item(), offset.item()) == (EPS, -128.0)


# --- searching --------------------------------------------------------------------------------------------------------


def slow_walk(counts):
    """Yield the ranges of the search, step by step and bin by bin."""
    total, mass = counts.sum().item(), counts.cumsum(0).numpy()
    first, last, from_left, from_right = 0, END, 0.0, 1.0
    while from_left < from_right:
        next_first, next_last = first, last
        while next_first < last and mass[next_first] < np.float32((from_left + 1e-5) * total):
            next_first += 1
        while next_last > first and mass[next_last] > np.float32((from_right - 1e-5) * total):
            next_last -= 1
        if next_first - first > last - next_last:
            from_left += 1e-5
            first = next_first
            yield first, last
        else:
            from_right -= 1e-5
            if next_last < last:
                last = next_last
                yield first, last


def slow_search(counts, lo, hi):
    best, least = (0, END), float("inf")
    for candidate in slow_walk(counts):
        error = quantization_errors(counts, float(hi) - float(lo), [candidate]).item()
        if error > least:
            break
        best, least = candidate, error
    width = (hi - lo) / BINS
    return lo + width * best[0], lo + width * (best[1] + 1)


def slow_error(counts, extent, first, last):
    """Integrate piece by piece in float64; a piece ends where a bin or a level's interval does."""
    width = extent / BINS
    level = width * (last - first + 1) / LEVELS
    borders = first * width + level * np.arange(1, LEVELS)
    edges = np.sort(np.concatenate([np.arange(BINS + 1) * width, borders]))
    begin, end = edges[:-1], edges[1:]
    middle = (begin + end) / 2
    centre = first * width + level * (np.clip((middle - first * width) // level, 0, LEVELS - 1) + 0.5)
    density = counts[np.minimum((middle // width).astype(int), END)] / width
    return float((density * ((end - centre) ** 3 - (begin - centre) ** 3) / 3).sum())


def random_counts(seed, filled):
    generator = np.random.default_rng(seed)
    counts = np.floor(generator.pareto(1.0, BINS) * 20) * (generator.random(BINS) < filled)
    return torch.from_numpy(counts).float()


@pytest.mark.parametrize("filled", [1.0, 0.5, 0.02])
def test_walk_is_the_one_in_single_steps(filled):
    counts = random_counts(3, filled)
    assert list(islice(candidates(counts), 300)) == list(islice(slow_walk(counts), 300))


@pytest.mark.parametrize("bins", [{}, {0: 1}, {END: 5}, {700: 9}, {0: 1, END: 1}, {10: 3, 11: 90_000, 12: 1, 2000: 4}])
def test_walk_ends_where_the_one_in_single_steps_does(bins):
    counts = torch.zeros(BINS)
    for at, value in bins.items():
        counts[at] = value
    assert list(candidates(counts)) == list(slow_walk(counts))


@pytest.mark.parametrize(("side", "total"), [(0, 2.0**20), (1, 2.0**20 + 2000)])
def test_thresholds_are_rounded_like_the_counts(side, total):
    quantile = (1e-5, 1 - 1e-5)[side] * total
    first = float(np.float32(quantile))
    # Bin 5 holds just the quantile, rounded outwards: not rounded, the threshold would be beyond it.
    assert (first < quantile, first > quantile)[side]
    counts = torch.zeros(BINS)
    counts[5], counts[50] = first, total - first
    assert counts.sum().item() == total
    assert list(candidates(counts)) == list(slow_walk(counts))


def test_walk_knows_counts_slightly_below_nothing():
    counts = random_counts(4, 0.3)
    counts[counts == 0] = -0.125  # the cumulative sum is no longer sorted
    assert list(islice(candidates(counts), 300)) == list(islice(slow_walk(counts), 300))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_how_many_errors_are_computed_at_once_changes_nothing(chunk, monkeypatch):
    monkeypatch.setattr(calibrate, "_CHUNK", chunk)
    for seed in range(5):
        counts, ends = random_counts(seed, 0.2), scalars(-7.0, 30.0)
        assert search_range(counts, *ends) == slow_search(counts, *ends)


@pytest.mark.parametrize(("first", "last"), [(0, END), (100, 1500), (3, 2040), (900, 930)])
def test_error_is_the_integral(first, last):
    counts = random_counts(5, 0.7)
    error = quantization_errors(counts, 24.0, [(first, last)]).item()
    # float32: a place is exact to 2**-24 of the extent, and half a level of the widest range is 2**-9 of it. So the
    # distance from a level is off by 2**-15, its cube by three times that; most places lie far from narrow ranges.
    assert error == pytest.approx(slow_error(counts.numpy(), 24.0, first, last), rel=2**-13)


def test_uniform_values_keep_their_range():
    x = (torch.arange(8 * BINS).float() / BINS)[None]
    lo, hi = search_range(count(x, *scalars(0.0, 8.0)), *scalars(0.0, 8.0))
    # Every bin is fuller than a step. The first candidate, the last bin cut off, is taken unseen; the next is worse.
    assert (float(lo), float(hi)) == (0.0, 8.0 * END / BINS)


def test_far_outlier_is_cut():
    # 2**18 values in bins 0..31 of [0, 64] and one at its end: fewer than 1e-5. The first step goes to bin 30, at
    # which less than 1 - 1e-5 is reached; the next, to bin 29, cuts values for nothing.
    x = torch.cat([torch.arange(2**18) / 2**18, torch.tensor([64.0])])[None]
    scale, offset = observed(x).params()
    assert (scale.item(), offset.item()) == (asymmetric(torch.zeros(1), torch.tensor([31 / 32]))[0].item(), -128.0)


# --- the observer -----------------------------------------------------------------------------------------------------


# gain of a sample, then the scale and offset of msModelSlim 26.1.0 (on torch 2.13) once it has seen it.
RECORDED = [
    (1.0, 0.38657382130622864, -31.0),
    (1.5, 0.5685918927192688, -30.0),
    (0.75, 0.5796849727630615, -32.0),
    (4.0, 1.5427660942077637, -31.0),
    (1.0, 1.5427660942077637, -31.0),
    (3.0, 1.5078067779541016, -33.0),
]


def scattered(step):
    return (torch.arange(20_000) * step % 65536).float() / 65536


def test_parameters_are_those_of_msmodelslim():
    observer = HistogramObserver("x")
    for index, (gain, scale, offset) in enumerate(RECORDED):
        top, bottom = scattered(48271 + 2 * index) - 0.375, scattered(40503 + 2 * index)
        x = (gain * top / (bottom * bottom + 0.01))[:, None]
        observer.update(x, [(0, len(x))])
        # Equal here. Another build of torch may add the errors of a range up in another order, in the last bits.
        assert observer.params()[0].item() == pytest.approx(scale, rel=2**-22)
        assert observer.params()[1].item() == offset


def test_each_sample_gets_the_parameters_of_its_moment():
    first, second = heavy(6, tokens=3), heavy(7, tokens=5) * 2
    scale, offset = HistogramObserver("x").update(torch.cat([first, second]), [(0, 3), (3, 8)])
    assert scale.shape == offset.shape == (8, 1)
    (scale_1, offset_1), (scale_2, offset_2) = observed(first).params(), observed(first, second).params()
    assert scale_1 != scale_2
    assert torch.equal(scale, torch.cat([scale_1.expand(3), scale_2.expand(5)])[:, None])
    assert torch.equal(offset, torch.cat([offset_1.expand(3), offset_2.expand(5)])[:, None])


def test_order_of_samples_matters():
    small, large = heavy(8), heavy(9) * 5
    assert observed(small, large).params() != observed(large, small).params()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    gain=st.floats(0.05, 50.0),
    data=st.data(),
)
def test_cutting_the_samples_into_calls_changes_nothing(seed, lengths, gain, data):
    ends = np.cumsum(lengths).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    x = heavy(seed, tokens=ends[-1]) * gain
    cut = data.draw(st.integers(1, len(spans) - 1))
    at = spans[cut][0]
    whole, parts = HistogramObserver("x"), HistogramObserver("x")
    expected = whole.update(x, spans)
    pieces = [
        parts.update(x[:at], spans[:cut]),
        parts.update(x[at:], [(begin - at, end - at) for begin, end in spans[cut:]]),
    ]
    for index in (0, 1):
        assert torch.equal(expected[index], torch.cat([piece[index] for piece in pieces]))
    assert whole.params() == parts.params()
    assert whole.samples == parts.samples == len(spans)


def test_range_lies_inside_what_was_seen():
    observer = observed(*(heavy(seed) for seed in range(4)))
    lo, hi = search_range(observer._counts_B, observer._lo, observer._hi)
    assert observer._lo <= lo < hi <= observer._hi


def test_sample_that_is_not_finite_is_named_and_changes_nothing():
    observer = observed(heavy(10))
    before = observer.params()
    broken = torch.stack([torch.zeros(4), torch.tensor([1.0, float("inf"), 0.0, 2.0])])
    with pytest.raises(InputError, match=r"input of x in calibration sample 2 .*finite numbers"):
        observer.update(broken, [(0, 1), (1, 2)])
    assert observer.samples == 1
    assert observer.params() == before
