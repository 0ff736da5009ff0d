"""Scales of least error, with static inputs and without: that no other scale is better, and what they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eightfold.quant.least_error import least_error_scale
from eightfold.quant.recipe import AntiOutlier
from eightfold.quant.smooth import HeadSharing, smooth_scale
from eightfold.quant.statistics import InputWatcher
from eightfold.scheme import QuantType

K = 12


def group(seed=0, outputs=(40, 24)):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.exp(torch.randn(K, generator=generator))
    weights = [torch.randn(n, K, generator=generator) * columns for n in outputs]
    return weights, torch.exp(2 * torch.randn(K, generator=generator))


def some_ends(rms, seed=0):
    """Lopsided ends of channels; some channels are never negative, or never positive."""
    generator = torch.Generator().manual_seed(seed + 10)
    lo, hi = (rms * 8 * torch.rand(K, generator=generator) ** 2 for _ in range(2))
    lo[2], hi[5] = -0.5 * hi[2], -0.5 * lo[5]
    return -lo, hi


def error(weights, rms, scale, ends=None):
    """The formula of the module, with the maxima themselves."""
    m, s = rms.double() ** 2, scale.double()
    size = 0.0 if ends is None else float((ends[1] / s).amax().clamp(min=0) + (-ends[0] / s).amax().clamp(min=0))
    total = 0.0
    for weight in weights:
        scaled = weight.double().abs() * s
        of_weights = (scaled.amax(1) / 127).square().sum() * (m / s**2).sum()
        total += float((of_weights + (size / 255) ** 2 * scaled.square().sum()).log())
    return total


def rounding_error(weights, xs, scale):
    total = 0.0
    for weight in weights:
        scaled = weight * scale
        step = scaled.abs().amax(1, keepdim=True) / 127
        total += float(((xs @ ((scaled / step).round() * step / scale - weight).T) ** 2).mean())
    return total


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_scale_has_much_less_error(seed, is_static):
    weights, rms = group(seed)
    ends = some_ends(rms, seed) if is_static else None
    found = least_error_scale(weights, rms, ends)
    least = error(weights, rms, found, ends)
    assert least < error(weights, rms, torch.ones(K), ends) - 0.3
    generator = torch.Generator().manual_seed(seed)
    for size in (0.02, 0.1, 0.5):
        for _ in range(50):
            other = found * torch.exp(size * torch.randn(K, generator=generator))
            assert error(weights, rms, other, ends) > least - 0.03


def test_weights_that_are_really_rounded_lose_less():
    weights, rms = group(outputs=(200,))
    xs = torch.randn(500, K, generator=torch.Generator().manual_seed(1)) * rms
    scale = least_error_scale(weights, rms)
    assert rounding_error(weights, xs, scale) < 0.6 * rounding_error(weights, xs, torch.ones(K))


@pytest.mark.parametrize("is_static", [False, True])
def test_the_size_of_linears_and_inputs_does_not_matter(is_static):
    weights, rms = group()
    lo, hi = some_ends(rms)
    found = least_error_scale(weights, rms, (lo, hi) if is_static else None)
    larger = least_error_scale([100 * weights[0], weights[1] / 64], 8 * rms, (8 * lo, 8 * hi) if is_static else None)
    assert torch.equal(larger, found)


@pytest.mark.parametrize("kind", [QuantType.W8A16, QuantType.W8A8, QuantType.W8A8_MIX])
def test_channels_of_heads_that_share_get_one_scale(kind):
    weights, rms = group()
    sharing = HeadSharing(2, 3, 2)
    watcher = InputWatcher("x", 4, keep_rms=True)
    watcher.update(torch.randn(4, K) * rms, [(0, 3), (3, 4)])
    scale = smooth_scale(AntiOutlier.SMOOTH, watcher.stats(), weights, sharing, kind=kind).scale
    heads = sharing.split(scale)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert not torch.allclose(scale, torch.ones(K))


def test_the_mean_square_is_of_all_tokens():
    weights, rms = group()
    xs = torch.randn(7, K, generator=torch.Generator().manual_seed(2)) * rms
    watcher = InputWatcher("x", 7, keep_rms=True)
    for part in (xs[:3], xs[3:]):
        watcher.update(part, [(0, 1), (1, len(part))])
    np.testing.assert_allclose(watcher.stats().rms, xs.square().mean(0).sqrt(), rtol=1e-6)
    scale = smooth_scale(AntiOutlier.SMOOTH, watcher.stats(), weights, kind=QuantType.W8A16, is_product=True)
    assert torch.equal(scale.scale, least_error_scale(weights, watcher.stats().rms))


def test_ends_count_for_static_inputs_alone():
    weights, rms = group()
    xs = torch.randn(40, K, generator=torch.Generator().manual_seed(3)) * rms
    watcher = InputWatcher("x", 40, keep_rms=True)
    watcher.update(xs, [(0, 40)])
    stats = watcher.stats()
    for kind, ends in ((QuantType.W8A8, (xs.amin(0), xs.amax(0))), (QuantType.W8A16, None)):
        scale = smooth_scale(AntiOutlier.SMOOTH, stats, weights, kind=kind).scale
        assert torch.equal(scale, least_error_scale(weights, stats.rms, ends))


@pytest.mark.parametrize("at", [0.0, 1e-12, 1e6])
def test_channels_without_input_rows_without_weights_and_sinks_stay_finite(at):
    weights, rms = group()
    rms[3], weights[0][5] = at, 0.0
    for ends in (None, (-3 * rms, 2 * rms)):
        found = least_error_scale(weights, rms, ends)
        assert torch.isfinite(found).all() and (found > 0).all()
    for ends in (None, (torch.zeros(K), torch.zeros(K))):
        assert torch.equal(least_error_scale([torch.zeros(4, K)], torch.zeros(K), ends), torch.ones(K))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e20])
def test_channels_without_weights_or_with_huge_ones_stay_finite(size):
    weights, rms = group()
    for weight in weights:
        weight[:, :3] *= size
    rms[:3] = 1e5
    for ends in (None, (-3 * rms, 2 * rms)):
        found = least_error_scale(weights, rms, ends)
        assert torch.isfinite(found).all() and (found > 0).all()
