"""Ranges of heads and channels, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from eightfold.model.reference.attention import Rotation, apply_rope, rope_tables
from eightfold.quant.attention import (
    HEADROOM,
    FAQuantObserver,
    KVObserver,
    StretchObserver,
    TurnedRange,
    recall_window,
    stretch_score,
    turned_extremes,
)
from eightfold.quant.recipe import KVObserve

EPS = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_window(values, share):
    ordered = sorted(values)
    held = int(share * len(ordered))
    if not 1 <= held < len(ordered):
        return ordered[0], ordered[-1]
    width = [ordered[i + held - 1] - ordered[i] for i in range(len(ordered) - held + 1)]
    start = width.index(min(width))
    return ordered[start], ordered[start + held - 1]


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_recall_window_is_the_narrowest_of_all(count, share):
    for seed in range(5):
        # Multiples of 1/64: differences are exact, and equal widths occur.
        values = torch.round(normal(3, count, seed=seed).pow(3) * 64) / 64
        lo, hi = recall_window(values, share)
        found = list(zip(lo.tolist(), hi.tolist(), strict=True))
        want = [naive_window(row, share) for row in values.tolist()]
        assert [b - a for a, b in found] == [b - a for a, b in want]
        for row, (a, b) in zip(values, found, strict=True):
            assert int(((row >= a) & (row <= b)).sum()) >= int(share * count)


def test_recall_window_of_everything_is_the_extremes():
    values = normal(4, 50)
    lo, hi = recall_window(values, 1.0)
    assert torch.equal(lo, values.amin(1))
    assert torch.equal(hi, values.amax(1))


def test_recall_window_drops_one_of_ten_thousand():
    values = torch.zeros(1, 10_000)
    values[0, :9_999] = torch.linspace(-1, 1, 9_999)
    values[0, 9_999] = 100
    assert [x.item() for x in recall_window(values, 0.9999)] == [-1, 1]


def test_a_head_s_range_is_the_largest_over_samples():
    observer = FAQuantObserver()
    a, b = normal(7, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    observer(a, a, a)
    observer(b, b, b)
    want = torch.cat((a, b)).abs().amax((0, 2)) / 127
    assert torch.equal(observer.scales()[2], want[:, None])


def test_faquant_cuts_queries_and_keys_but_not_values():
    observer = FAQuantObserver()
    x = normal(2000, 1, 8).clamp(-2, 2)
    x[3, 0, 5] = 50
    observer(x, x, x)
    query, key, value = (scale.item() for scale in observer.scales())
    assert value == torch.tensor(50.0).div(127).item()
    assert query == key <= 2 / 127 + 1e-8


def kv_observer(observe):
    """One head of one pair, which RoPE does not turn."""
    return KVObserver(observe, Rotation(torch.zeros(1)), 8)


def observed(observe, is_symmetric=True, divisor=None):
    observer = kv_observer(observe)
    k, v, rotated = torch.tensor([[1.0, -4], [2, 3]]), torch.tensor([[-1.0, 8], [3, 2]]), torch.tensor([[6.0, -1]] * 2)
    observer.projections(k, v)
    for row in rotated:
        observer(torch.zeros(1, 1, 2), row.reshape(1, 1, 2), torch.zeros(1, 1, 2))
    return observer.params(is_symmetric, divisor)


def test_keys_are_watched_before_rope():
    params = observed(KVObserve.PRE_ROPE)
    assert torch.equal(params.key_scale, torch.tensor([2.0, 4.0]) / 127)
    assert not params.key_offset.any()
    # 6 lies outside [-2, 2] twice, -1 inside [-4, 4].
    assert (params.clipped_keys, params.keys) == (2, 4)


def test_keys_are_watched_after_rope():
    params = observed(KVObserve.POST_ROPE)
    assert torch.equal(params.key_scale, torch.tensor([6.0, 1.0]) * 1.25 / 127)
    assert not params.key_offset.any()
    assert (params.clipped_keys, params.keys) == (0, 0)


def turned_range(w, context_len, *keys):
    found = TurnedRange(Rotation(torch.tensor([w])), context_len)
    for k_SD in keys:
        found.see(torch.tensor(k_SD)[:, None])
    return found.lo.tolist(), found.hi.tolist()


def test_a_pair_that_turns_fully_reaches_its_radius_in_both_channels():
    # 6 steps of 1.1 are more than a whole turn; headroom alone would give 3.75 and 3.75.
    assert turned_range(1.1, 7, [[3.0, 3.0], [3.0, -4.0]]) == ([-5, -5], [5, 5])


def test_a_pair_that_does_not_turn_has_headroom_only():
    assert turned_range(0.0, 1000, [[2.0, -4.0]], [[-1.0, 3.0]]) == ([-1.25, -5], [2.5, 3.75])


def test_a_slow_pair_turns_as_far_as_the_context():
    lo, hi = turned_range(0.01, 171, [[2.0, 0.0]])
    # To 1.7 past a quarter turn: the second channel reaches the radius, the first goes below zero.
    # 0.01 * 170 and a cosine: a few roundings of float32.
    assert lo == pytest.approx([2 * math.cos(1.7), 0], abs=1e-6)
    assert hi == [2.5, 2]


def test_a_key_is_turned_back_from_where_it_stood():
    lo, hi = turned_range(0.5, 4, [[0.0, 0.0]] * 3 + [[2.0, 0.0]])
    # From -1.5 to 0: roundings as above.
    assert lo == pytest.approx([0, -2 * math.sin(1.5)], abs=1e-6)
    assert hi == pytest.approx([2.5, 0], abs=1e-6)


def test_a_sample_may_be_longer_than_the_context():
    # At position 2: turned back by up to 2, from 0.93 through 0, and not ahead.
    lo, hi = turned_range(1.0, 1, [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert lo[1] == pytest.approx(5 * math.sin(math.atan2(4, 3) - 2), abs=1e-6)
    assert hi == [5, 5]


@pytest.mark.parametrize("span", [0.0, 0.3, 1.7, 3.5, 6.2, 6.4, 50.0])
def test_turned_extremes_are_those_of_all_angles_between(span):
    steps = 2000
    k_SGD = normal(40, 3, 4).double()
    back = -torch.rand(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 7
    ahead = (back + span).clamp(min=0)
    lo, hi = turned_extremes(k_SGD, back, ahead)
    x, y = k_SGD.chunk(2, dim=-1)
    angles = back + (ahead - back) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None, None]
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    turned = torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)
    # A peak between two angles `step` apart is missed by at most r (1 - cos(step / 2)) < r step^2 / 8.
    step = float((ahead - back).max()) / steps
    missed = torch.hypot(x, y).repeat(1, 1, 2) * step**2 / 8 + 1e-12
    for found, sampled in ((hi, turned.amax(0)), (-lo, -turned.amin(0))):
        assert (found >= sampled - 1e-12).all()
        assert (found <= sampled + missed).all()


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("pairs", [4, 3])  # of four: the other channels are not turned
def test_the_range_holds_the_calibration_keys_at_every_position(pairs, is_interleaved):
    context_len, heads, size = 300, 2, 2 * pairs
    turns = Rotation(torch.tensor([1.0, 0.1, 0.01, 0.001])[:pairs], is_interleaved=is_interleaved)
    k_SGD = normal(20, heads, 8) + 3 * normal(heads, 8, seed=1)
    cos, sin = (table[:, None].expand(-1, 20, -1) for table in rope_tables(torch.arange(context_len), turns))
    found = TurnedRange(turns, context_len)
    moved = [apply_rope(k_SGD, cos[p], sin[p], is_interleaved=is_interleaved) for p in range(context_len)]
    found.see(torch.stack([moved[p][p] for p in range(20)]))
    everywhere = torch.stack(moved).flatten(0, 1).flatten(1)
    # Angles up to 300 are exact to 2**-16 in float32, keys up to 12.
    slack = 12 * 2.0**-14
    assert (found.hi >= everywhere.amax(0) - slack).all()
    assert (found.lo <= everywhere.amin(0) + slack).all()
    # Nor is it wider than the radius, or headroom, needs.
    turned, kept = k_SGD[..., :size], k_SGD[..., size:]
    x, y = (turned[..., ::2], turned[..., 1::2]) if is_interleaved else turned.chunk(2, dim=-1)
    radius = torch.hypot(x, y).amax(0)
    radius = radius.repeat_interleave(2, -1) if is_interleaved else radius.repeat(1, 2)
    radius = torch.cat((radius, kept.abs().amax(0)), -1).flatten()
    widest = torch.maximum(found.hi, -found.lo)
    seen = everywhere[: 20 * 20].abs().amax(0)  # at positions 0 to 19, where the sample stood and more
    assert (widest <= torch.maximum(radius, HEADROOM * seen) + slack).all()


def test_rotated_keys_are_kept_as_they_were():
    observer, key = kv_observer(KVObserve.PRE_ROPE), torch.full((1, 1, 1), 9.0)
    observer.projections(torch.ones(1, 1), torch.ones(1, 1))
    observer(key, key, key)
    key.zero_()
    assert observer.params(True, None).clipped_keys == 1


def test_clipping_begins_past_128_below_and_127_above():
    observer = kv_observer(KVObserve.PRE_ROPE)
    observer.projections(torch.full((1, 1), 127.0), torch.ones(1, 1))  # scale 1
    keys = torch.tensor([-129.0, -128.5, -128.4, 127.4, 127.6, 128.0]).reshape(6, 1, 1)
    observer(keys, keys, keys)
    params = observer.params(True, None)
    # Rounded half to even: -129, -128, -128, 127, 128, 128.
    assert (params.clipped_keys, params.keys) == (3, 6)


def test_asymmetric_ranges_reach_to_zero():
    params = observed(KVObserve.PRE_ROPE, is_symmetric=False)
    assert torch.equal(params.key_scale, torch.tensor([2.0, 7.0]) / 255)  # [0, 2] and [-4, 3]
    assert params.key_offset.tolist() == [-128, round(4 * 255 / 7) - 128]
    assert params.value_offset.tolist() == [round(255 / 4) - 128, -128]  # [-1, 3] and [0, 8]


def test_value_range_follows_smoothing():
    params = observed(KVObserve.POST_ROPE, divisor=torch.tensor([2.0, 0.5]))
    assert torch.equal(params.value_scale, torch.tensor([1.5, 16.0]) / 127)


@pytest.mark.parametrize("top", [0, 1, 2, 3])
def test_stretch_score_counts_down_to_two_thousandths(top):
    # 1000 values: two are 0.2 %, which is not more than that; bins of 0.01 up to 1.
    values = torch.full((1000,), 0.305)
    values[:top] = -1.0
    values[top + 1] = 0.0
    # Walking two bins at a time, 0.305 (bin 30) is reached once the bins from 30 on are counted.
    want = {0: 0.98, 1: 0.30, 2: 0.30, 3: 0.98}[top]
    assert stretch_score(values) == want


def test_stretch_score_of_zeros_and_of_the_first_sample():
    assert stretch_score(torch.zeros(2, 3, 4)) == 1.0
    observer = StretchObserver()
    even, spiked = torch.ones(1, 1, 1000), torch.full((1, 1, 1000), 0.105)
    spiked[..., 0] = 1.0
    observer(even, spiked, even)
    assert observer.score == 0.10
    observer(even, even, even)
    assert observer.score == 0.10
