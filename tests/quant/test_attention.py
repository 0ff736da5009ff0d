"""Ranges of heads and channels, each against its definition."""

from __future__ import annotations

import pytest
import torch

from eightfold.quant.attention import (
    FAQuantObserver,
    HeadRange,
    KVObserver,
    StretchObserver,
    recall_window,
    stretch_score,
)
from eightfold.quant.methods import KVObserve

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


def test_head_range_is_the_largest_over_samples():
    observer = HeadRange(1.0)
    a, b = normal(7, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    observer.update(a)
    observer.update(b)
    want = torch.cat((a, b)).abs().amax((0, 2)) / 127
    assert torch.equal(observer.scale(), want[:, None])


def test_faquant_cuts_queries_and_keys_but_not_values():
    observer = FAQuantObserver()
    x = normal(2000, 1, 8).clamp(-2, 2)
    x[3, 0, 5] = 50
    observer(x, x, x)
    assert observer.value.scale().item() == torch.tensor(50.0).div(127).item()
    assert observer.query.scale().item() == observer.key.scale().item() <= 2 / 127 + 1e-8


def observed(observe, is_symmetric=True, divisor=None):
    observer = KVObserver(observe)
    k, v, rotated = torch.tensor([[1.0, -4], [2, 3]]), torch.tensor([[-1.0, 8], [3, 2]]), torch.tensor([[6.0, -1]] * 2)
    observer.projections(k, v)
    for row in rotated:
        observer(torch.zeros(1, 2, 1), row.reshape(1, 2, 1), torch.zeros(1, 2, 1))
    return observer.params(is_symmetric, divisor)


def test_keys_are_watched_before_rope():
    params = observed(KVObserve.PRE_ROPE)
    assert torch.equal(params.key_scale, torch.tensor([2.0, 4.0]) / 127)
    assert not params.key_offset.any()
    # 6 lies outside [-2, 2] twice, -1 inside [-4, 4].
    assert (params.clipped_keys, params.keys) == (2, 4)


def test_keys_are_watched_after_rope():
    params = observed(KVObserve.POST_ROPE)
    assert torch.equal(params.key_scale, torch.tensor([6.0, 1.0]) / 127)
    assert (params.clipped_keys, params.keys) == (0, 0)


def test_rotated_keys_are_kept_as_they_were():
    observer, key = KVObserver(KVObserve.PRE_ROPE), torch.full((1, 1, 1), 9.0)
    observer.projections(torch.ones(1, 1), torch.ones(1, 1))
    observer(key, key, key)
    key.zero_()
    assert observer.params(True, None).clipped_keys == 1


def test_clipping_begins_past_128_below_and_127_above():
    observer = KVObserver(KVObserve.PRE_ROPE)
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
