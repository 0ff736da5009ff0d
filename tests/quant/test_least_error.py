"""Scales for weights alone: that no other scale is better, and what they hold."""

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


def error(weights, rms, scale):
    """The formula of the module, with the maximum itself."""
    m, s = rms.double() ** 2, scale.double()
    rows = [(w.double().abs() * s).amax(1).square().sum().log() for w in weights]
    return float(sum(rows) + len(weights) * (m / s**2).sum().log())


def rounding_error(weights, xs, scale):
    total = 0.0
    for weight in weights:
        scaled = weight * scale
        step = scaled.abs().amax(1, keepdim=True) / 127
        total += float(((xs @ ((scaled / step).round() * step / scale - weight).T) ** 2).mean())
    return total


@pytest.mark.parametrize("seed", range(3))
def test_no_other_scale_has_much_less_error(seed):
    weights, rms = group(seed)
    found = least_error_scale(weights, rms)
    least = error(weights, rms, found)
    assert least < error(weights, rms, torch.ones(K)) - 0.3
    generator = torch.Generator().manual_seed(seed)
    for size in (0.02, 0.1, 0.5):
        for _ in range(50):
            other = found * torch.exp(size * torch.randn(K, generator=generator))
            assert error(weights, rms, other) > least - 0.02


def test_weights_that_are_really_rounded_lose_less():
    weights, rms = group(outputs=(200,))
    xs = torch.randn(500, K, generator=torch.Generator().manual_seed(1)) * rms
    scale = least_error_scale(weights, rms)
    assert rounding_error(weights, xs, scale) < 0.6 * rounding_error(weights, xs, torch.ones(K))


def test_the_size_of_linears_and_inputs_does_not_matter():
    weights, rms = group()
    found = least_error_scale(weights, rms)
    assert torch.equal(least_error_scale([100 * weights[0], weights[1] / 64], 8 * rms), found)


def test_channels_of_heads_that_share_get_one_scale():
    weights, rms = group()
    sharing = HeadSharing(2, 3, 2)
    watcher = InputWatcher("x", 4, keep_rms=True)
    watcher.update(torch.randn(4, K) * rms, [(0, 3), (3, 4)])
    scale = smooth_scale(AntiOutlier.SMOOTH, watcher.stats(), weights, sharing, kind=QuantType.W8A16).scale
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


@pytest.mark.parametrize("at", [0.0, 1e-12, 1e6])
def test_channels_without_input_rows_without_weights_and_sinks_stay_finite(at):
    weights, rms = group()
    rms[3], weights[0][5] = at, 0.0
    found = least_error_scale(weights, rms)
    assert torch.isfinite(found).all() and (found > 0).all()
    nothing = least_error_scale([torch.zeros(4, K)], torch.zeros(K))
    assert torch.equal(nothing, torch.ones(K))
