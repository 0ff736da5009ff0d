"""The formulas of outlier suppression, written out once more in float64, and what all of them must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eightfold.quant.recipe import AntiOutlier
from eightfold.quant.smooth import (
    EXPONENTS,
    SINK_ROOM,
    HeadSharing,
    search_exponents,
    smooth_scale,
    source_scale,
)
from eightfold.quant.statistics import InputWatcher
from eightfold.scheme import QuantType

K = 12
LENGTHS = (9, 5, 7)
SHARING = HeadSharing(kv_heads=2, queries=3, head_dim=2)  # of K channels

# A few float32 roundings (2**-24 each) and a power, which torch has to a last bit or two.
CLOSE = 1e-6

# Deviations of the channels: a few stand out, by more and less.
LOUD = (1, 3, 40, 6, 2, 10, 1, 15, 4, 0.5, 8, 25)


def samples(seed=0, loud=LOUD):
    generator = torch.Generator().manual_seed(seed)
    channels = torch.tensor(loud, dtype=torch.float32)
    return [torch.randn(length, K, generator=generator) * channels + 0.3 for length in LENGTHS]


def statistics(xs, **options):
    watcher = InputWatcher("x", sum(map(len, xs)), keep_rms=True, **options)
    for x in xs:
        watcher.update(x, [(0, len(x))])
    return watcher.stats()


def linears(*outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.exp(torch.randn(K, generator=generator))  # weights of different size, too
    return [torch.randn(n, K, generator=generator) * columns * 0.2 for n in outputs]


def array(tensor):
    return tensor.double().numpy()


def largest(xs, weights):
    """a and w of the formulas."""
    a = np.abs(np.concatenate([array(x) for x in xs])).max(0)
    w = np.maximum(np.abs(np.concatenate([array(weight) for weight in weights])).max(0), 1e-5)
    return a, w


def require_close(found, expected, tolerance=CLOSE):
    assert found.dtype == torch.float32
    np.testing.assert_allclose(array(found), expected, rtol=tolerance, atol=0)


# m1 and m4: a formula, nothing to search.


@pytest.mark.parametrize(("method", "exponents"), [("m1", (0.5, 0.5)), ("m4", (0.9, 0.1))])
def test_fixed_exponents(method, exponents):
    xs, weights = samples(), linears(6, 4)
    a, w = largest(xs, weights)
    scale = smooth_scale(AntiOutlier(method), statistics(xs), weights).scale
    require_close(scale, a ** exponents[0] / w ** exponents[1])


@pytest.mark.parametrize("method", ["m1", "m4", "m6"])
def test_a_channel_without_values_gets_the_smallest_scale(method):
    xs, weights = samples(loud=(0, *LOUD[1:])), linears(6, 4)
    for x in xs:
        x[:, 0] = 0
    assert float(smooth_scale(AntiOutlier(method), statistics(xs), weights).scale[0]) == pytest.approx(1e-5)


@pytest.mark.parametrize(("method", "exponents"), [("m1", (0.5, 0.5)), ("m4", (0.9, 0.1))])
def test_a_channel_without_weights_counts_as_one_of_tiny_weights(method, exponents):
    xs, weights = samples(), linears(6, 4)
    for weight in weights:
        weight[:, 3] = 0
    a, _ = largest(xs, weights)
    found = float(smooth_scale(AntiOutlier(method), statistics(xs), weights).scale[3])
    assert found == pytest.approx(a[3] ** exponents[0] / 1e-5 ** exponents[1], rel=CLOSE)


# m2: a threshold, searched by what quantizing the first sample does to the readers' output.


def int8(x):
    """x quantized by one scale and offset whose range holds x and 0, and back."""
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (hi - lo) / 255
    offset = np.round(-lo / step) - 128
    return (np.clip(np.round(x / step + offset), -128, 127) - offset) * step


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attended(outputs):
    """What m2 compares for q, k and v: each piece of q as wide as k, against all of k."""
    q, k, v = outputs
    width = k.shape[1]
    pieces = [q[:, at : at + width] for at in range(0, q.shape[1], width)]
    return np.concatenate([softmax(piece @ k.T / math.sqrt(width)) @ v for piece in pieces], axis=1)


def by_threshold(xs, weights, biases, combine):
    """m2 written out: every threshold, the whole product. Returns the scale, and the errors."""
    low, high, reach, spread = np.inf, -np.inf, -np.inf, 0.0
    for x in map(array, xs):
        low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
        centred = x - (low + high) / 2
        reach, spread = np.maximum(reach, centred.max(0)), max(spread, centred.std(ddof=1))
    a, w = largest(xs, weights)
    if 3 * spread >= reach.max():  # type: ignore[attr-defined]
        return np.sqrt(a / w), []
    x, centre = array(xs[0]), (low + high) / 2
    pairs = [
        (array(weight), 0.0 if bias is None else array(bias)) for weight, bias in zip(weights, biases, strict=True)
    ]
    exact = combine([x @ weight.T + bias for weight, bias in pairs])
    best, errors = np.ones_like(a), []
    for i in range(100):
        threshold = reach.max() if i == 99 else spread + (reach.max() - spread) * i / 99  # type: ignore[attr-defined]
        ratio = np.maximum(1.0, reach / threshold)
        scale = np.where(ratio > 1, np.sqrt(ratio * threshold / w), 1.0)
        changed = int8((x - centre) / scale) * scale + centre
        error = float(((combine([changed @ weight.T + bias for weight, bias in pairs]) - exact) ** 2).mean())
        if not errors or error < min(errors):
            best = scale
        errors.append(error)
    return best, errors


# In float32 a value on the border between two integers may go the other way than in float64: seeds are such that none
# does, and the scales then differ by roundings alone.
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("outputs", [(5, 5), (6, 4), (8, 4, 4), (4, 4, 4), (6, 4, 4)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_m2_takes_the_threshold_of_least_error(seed, outputs, has_bias):
    xs, weights = samples(seed), linears(*outputs, seed=seed)
    biases = [torch.linspace(-1, 2, len(weight)) if has_bias else None for weight in weights]
    attention = len(outputs) == 3 and outputs[0] % outputs[1] == 0
    expected, errors = by_threshold(xs, weights, biases, attended if attention else lambda outputs: outputs[0])
    assert len(errors) == 100
    require_close(smooth_scale(AntiOutlier.M2, statistics(xs), weights, biases=biases).scale, expected)


def test_m2_finds_thresholds_in_the_middle():
    # Otherwise the test above would compare ones with ones, or the first threshold with itself.
    kinds = set()
    for seed in range(8):
        scale = smooth_scale(AntiOutlier.M2, statistics(samples(seed)), linears(5, 5, seed=seed)).scale
        kinds.add(int((scale != 1).sum()))
    assert len(kinds) >= 3


@pytest.mark.parametrize("seed", [8, 13, 20, 21, 22, 23])
def test_m2_tries_a_hundred_thresholds(seed):
    # So many channels that some lie between two thresholds: more thresholds, or fewer, choose otherwise.
    generator = torch.Generator().manual_seed(seed)
    loud = torch.logspace(0, 2, 200)
    xs = [torch.randn(length, 200, generator=generator) * loud for length in LENGTHS]
    weights = [torch.randn(6, 200, generator=generator) / loud]
    expected, _ = by_threshold(xs, weights, [None], lambda outputs: outputs[0])
    require_close(smooth_scale(AntiOutlier.M2, statistics(xs), weights).scale, expected)


@pytest.mark.parametrize("method", [AntiOutlier.M2, AntiOutlier.M3])
def test_of_equal_errors_the_first_wins(method):
    stats, weights = statistics(samples()), [torch.zeros(4, K)]  # no candidate errs
    first = torch.ones(K)
    if method is AntiOutlier.M2:
        first = torch.where(stats.reach > stats.spread, (stats.reach / 1e-5).sqrt(), 1.0)
        assert 0 < (first != 1).sum() < K
    require_close(smooth_scale(method, stats, weights).scale, array(first))


def test_m2_without_outliers_is_m1():
    xs, weights = samples(loud=(1,) * K), linears(5, 5)
    _, errors = by_threshold(xs, weights, [None, None], lambda outputs: outputs[0])
    assert not errors
    stats = statistics(xs)
    found = smooth_scale(AntiOutlier.M2, stats, weights).scale
    assert torch.equal(found, smooth_scale(AntiOutlier.M1, stats, weights).scale)


def test_m2_leaves_all_channels_alone_where_that_is_best():
    xs, weights = samples(0), linears(5, 5, seed=0)
    for weight in weights:  # the louder a channel, the more it counts: dividing it costs more than others gain
        weight *= torch.tensor(LOUD) ** 2
    expected, errors = by_threshold(xs, weights, [None, None], lambda outputs: outputs[0])
    assert min(errors) == errors[99] and (expected == 1).all()
    found = smooth_scale(AntiOutlier.M2, statistics(xs), weights).scale
    assert torch.equal(found, torch.ones(K))


# m3: powers of the mean magnitude, searched by what quantizing the weights does to all outputs.


def int8_rows(weight, symmetric):
    """A weight quantized by rows, and back."""
    if symmetric:
        step = np.abs(weight).max(1, keepdims=True) / 127
        return np.round(weight / step) * step
    lo = np.minimum(weight.min(1, keepdims=True), 0)
    hi = np.maximum(weight.max(1, keepdims=True), 0)
    step = (hi - lo) / 255
    offset = np.round(-lo / step) - 128
    return (np.clip(np.round(weight / step + offset), -128, 127) - offset) * step


def by_weights(x, weights, symmetric):
    """m3 written out: returns the scale and the ratio."""
    mean = np.abs(x).mean(0)
    tried = []
    for i in range(20):
        scale = np.maximum(mean ** (0.05 * i), 1e-4)
        scale = scale / np.sqrt(scale.max() * scale.min())
        changes = [int8_rows(weight * scale, symmetric) / scale - weight for weight in weights]
        tried.append((sum(((x @ change.T) ** 2).mean() for change in changes), i, scale))
    _, i, scale = min(tried, key=lambda t: t[:2])
    return scale, i / 20


@pytest.mark.parametrize("symmetric", [True, False])
def test_m3_takes_the_power_of_least_error(symmetric):
    ratios = set()
    for seed in range(8):
        xs, weights = samples(seed), linears(6, 4, 5, seed=seed)
        expected, ratio = by_weights(array(xs[0]), [array(weight) for weight in weights], symmetric)
        found = smooth_scale(AntiOutlier.M3, statistics(xs), weights, weight_symmetric=symmetric)
        require_close(found.scale, expected)
        assert found.note == f"ratio {ratio:.2f}"
        ratios.add(ratio)
    assert len(ratios) >= 3


def test_m3_keeps_scales_away_from_zero():
    xs, weights = samples(), linears(6, 4)
    xs[0][:, 3] = 0
    expected, ratio = by_weights(array(xs[0]), [array(weight) for weight in weights], True)
    assert ratio > 0
    require_close(smooth_scale(AntiOutlier.M3, statistics(xs), weights).scale, expected)
    assert expected[3] == pytest.approx(1e-4 / math.sqrt(1e-4 * (np.abs(array(xs[0])).mean(0).max() ** ratio)))


# m5: outliers by their own distribution, the positive and the negative peaks each for themselves.


def cut(peaks):
    """Return from where on peaks are outliers: values in any order, the large ones suspected."""
    low, high = np.quantile(peaks, 0.2), np.quantile(peaks, 0.8)
    limit = high + 1.5 * (high - low)
    suspects = sorted(peaks[peaks > limit], reverse=True)
    best = -1000.0
    if len(suspects) > 1:
        for i in range(len(suspects) - 1):
            rest = suspects[i + 1 :]
            metric = suspects[i] - suspects[i + 1] - (np.var(rest, ddof=1) if len(rest) > 1 else 0.0)
            if metric > best:
                best, limit = metric, suspects[i + 1]
    return limit


def by_outliers(lo, hi):
    """m5 written out."""
    up, down = cut(hi), cut(-lo)
    positive = np.where(hi > up, (hi / hi[hi <= up].max()), 1.0) ** 0.7
    negative = np.where(-lo > down, (lo / lo[-lo <= down].min()), 1.0) ** 0.7
    return np.maximum(positive, negative)


# Large positive peaks, large negative ones, and how many channels are outliers; the other peaks are 1 to 1.2.
PEAKS: dict[str, tuple[list[float], list[float], int]] = {
    "none": ([], [], 0),
    "one above": ([50], [], 1),
    "one below": ([], [70], 1),
    "the widest gap is above two": ([9, 9.5, 30], [], 1),
    "one that is nearly ordinary": ([2.5, 9, 9.5], [], 2),
    "what varies below the gap counts": ([5, 9, 14], [], 2),
    "two below": ([], [2.5, 9, 9.5], 2),
    "both sides in one channel": ([50], [80], 1),
    "one on each side": ([50], [0, 80], 2),
}


def peaks(large):
    """Return the peaks of 24 channels, the large ones first; 0 stands for an ordinary one."""
    ordinary = [1 + 0.05 * (i % 5) for i in range(24)]
    return [value or 1.0 for value in large] + ordinary[len(large) :]


@pytest.mark.parametrize("case", PEAKS)
def test_m5_divides_outliers_by_how_far_they_stand_out(case):
    above, below, count = PEAKS[case]
    x = torch.tensor([peaks(above), [-value for value in peaks(below)]])
    expected = by_outliers(array(x[1]), array(x[0]))
    found = smooth_scale(AntiOutlier.M5, statistics([x]), [torch.ones(2, 24)])
    assert (expected > 1).sum() == count
    require_close(found.scale, expected)
    assert found.note == f"{count} outliers"


def test_m5_of_random_peaks():
    counts = set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 40, generator=generator).exp() ** 2 * torch.tensor([[1.0], [-1.0]])
        expected = by_outliers(array(x[1]), array(x[0]))
        require_close(smooth_scale(AntiOutlier.M5, statistics([x]), [torch.ones(2, 40)]).scale, expected)
        counts.add(int((expected > 1).sum()))
    assert len(counts) >= 5


def test_m5_without_anything_positive_to_measure_against_looks_at_the_other_side():
    # Positive peaks: zeros and one outlier, which cannot be compared with zero.
    hi, lo = [0.0] * 9 + [5.0], [-1.0] * 8 + [-20.0, -1.0]
    found = smooth_scale(AntiOutlier.M5, statistics([torch.tensor([hi, lo])]), [torch.ones(2, 10)]).scale
    require_close(found, [1.0] * 8 + [20.0**0.7, 1.0])


# m6: the search is in test_flex_smooth.py.


def test_m6_applies_the_exponents_it_found():
    xs, weights = samples(), linears(6, 4)
    stats = statistics(xs)
    alpha, beta = search_exponents(stats, weights)
    a, w = largest(xs, weights)
    found = smooth_scale(AntiOutlier.M6, stats, weights)
    require_close(found.scale, a**alpha / w**beta)
    assert found.note == f"alpha {alpha:.2f}, beta {beta:.2f}"


# smooth: fixed exponents, and room for sinks.


def test_smooth_of_an_input_quantized_by_token():
    xs, weights = samples(), linears(6, 4)
    a, w = largest(xs, weights)
    alpha, beta = EXPONENTS[QuantType.W8A8_DYNAMIC][0]
    found = smooth_scale(AntiOutlier.SMOOTH, statistics(xs), weights, kind=QuantType.W8A8_DYNAMIC)
    require_close(found.scale, a**alpha / w**beta)
    assert found.note == f"alpha {alpha}, beta {beta}"


@pytest.mark.parametrize("kind", SINK_ROOM)
@pytest.mark.parametrize(("loud", "sinks"), [(50_000.0, 1), (1.5, 0)])
def test_smooth_divides_the_channels_of_sinks_until_they_fit(kind, loud, sinks):
    xs, weights = samples(), linears(6, 4)
    xs[1][0, 8] = loud  # the loudest token, or one among others
    x = np.concatenate([array(each) for each in xs])
    ordinary = np.abs(np.delete(x, np.abs(x).max(1).argmax(), axis=0)).max(0)
    a, w = largest(xs, weights)
    alpha, beta = EXPONENTS[kind][1]
    plain = ordinary**alpha / w**beta
    limit = (ordinary / plain).max()
    found = smooth_scale(AntiOutlier.SMOOTH, statistics(xs, num_loud=1), weights, kind=kind, is_product=True)
    require_close(found.scale, np.maximum(plain, a / (SINK_ROOM[kind] * limit)))
    assert (np.abs(x / array(found.scale)).max(0) <= SINK_ROOM[kind] * limit * (1 + CLOSE)).all()
    assert ("1 channels of sinks" in found.note) == bool(sinks)
    assert (array(found.scale) > plain * (1 + CLOSE)).sum() == sinks


def test_sinks_have_more_room_where_each_token_has_a_scale():
    assert SINK_ROOM[QuantType.W8A8_DYNAMIC] > SINK_ROOM[QuantType.W8A8]


def test_smooth_of_an_input_that_is_zero_but_for_sinks_stays_finite():
    x = torch.zeros(5, K)
    x[2, 3] = 700.0
    scale = smooth_scale(AntiOutlier.SMOOTH, statistics([x], num_loud=1), linears(4), is_product=True).scale
    assert torch.isfinite(scale).all() and (scale > 0).all()


# Value heads that several query heads share.


def shared(channels, reduce):
    """Each channel of o_proj gets what `reduce` makes of those that read the same row of v_proj."""
    result = np.empty(K)
    for g in range(2):
        for d in range(2):
            same = [(g * 3 + q) * 2 + d for q in range(3)]
            result[same] = reduce(channels[same])
    return result


def test_m4_averages_over_the_heads_that_share():
    xs, weights = samples(), linears(6)
    a, w = largest(xs, weights)
    found = smooth_scale(AntiOutlier.M4, statistics(xs), weights, SHARING).scale
    require_close(found, shared(a**0.9 / w**0.1, np.mean))


def test_m6_takes_the_largest_of_the_heads_that_share():
    xs, weights = samples(2), linears(6, seed=2)
    stats = statistics(xs)
    alpha, beta = search_exponents(stats, weights)  # on the channels as they are
    assert alpha > 0 and beta > 0
    a, w = largest(xs, weights)
    found = smooth_scale(AntiOutlier.M6, stats, weights, SHARING).scale
    require_close(found, shared(a, np.max) ** alpha / shared(w, np.max) ** beta)
    alpha, beta = search_exponents(stats, weights, by_token=True)
    found = smooth_scale(AntiOutlier.FLEX, stats, weights, SHARING).scale
    require_close(found, shared(a, np.max) ** alpha / shared(w, np.max) ** beta)


def test_iter_is_m4():
    stats, weights = statistics(samples(2)), linears(6, seed=2)
    for sharing in (None, SHARING):
        found, plain = (smooth_scale(method, stats, weights, sharing) for method in (AntiOutlier.ITER, AntiOutlier.M4))
        assert torch.equal(found.scale, plain.scale)


def test_smooth_takes_the_largest_of_the_heads_that_share():
    xs, weights = samples(2), linears(6, seed=2)
    a, w = largest(xs, weights)
    found = smooth_scale(AntiOutlier.SMOOTH, statistics(xs), weights, SHARING, kind=QuantType.W8A8_DYNAMIC).scale
    require_close(found, shared(a, np.max) ** 0.5 / shared(w, np.max) ** 0.1)


def test_sharing_by_one_query_head_each_is_no_sharing():
    alone, stats, weights = HeadSharing(3, 1, 4), statistics(samples()), linears(6)
    for method in (AntiOutlier.M4, AntiOutlier.M6, AntiOutlier.SMOOTH):
        found, plain = (smooth_scale(method, stats, weights, sharing) for sharing in (alone, None))
        assert torch.equal(found.scale, plain.scale)
        assert torch.equal(source_scale(found.scale, alone), plain.scale)


def test_split_and_expand_are_inverse():
    rows = torch.arange(4.0)  # of v_proj: (head 0, 0), (0, 1), (1, 0), (1, 1)
    channels = SHARING.expand(rows.view(2, 2))
    assert channels.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert SHARING.split(channels).shape == (2, 3, 2)
    assert torch.equal(source_scale(channels, SHARING), rows)


def test_channels_of_another_width_are_refused():
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        smooth_scale(AntiOutlier.M4, statistics(samples()), linears(6), HeadSharing(2, 3, 4))


# What all methods must keep.

METHODS = list(AntiOutlier)


@pytest.mark.parametrize("method", METHODS)
def test_the_float_product_is_unchanged(method):
    xs, weights = samples(3), linears(8, 4, 4, seed=3)
    scale = smooth_scale(method, statistics(xs), weights).scale
    assert (scale != 1).any()
    for x in xs:
        for weight in weights:
            exact = array(x) @ array(weight).T
            smoothed = (array(x) / array(scale)) @ (array(weight) * array(scale)).T
            # K products, each off by two roundings of float64.
            bound = K * 2**-51 * (np.abs(array(x)) @ np.abs(array(weight)).T)
            assert (np.abs(smoothed - exact) <= bound).all()


@pytest.mark.parametrize("method", [AntiOutlier.M4, AntiOutlier.M6, AntiOutlier.SMOOTH])
def test_the_product_through_shared_heads_is_unchanged(method):
    generator = torch.Generator().manual_seed(4)
    v_weight = torch.randn(4, 5, generator=generator) * torch.tensor([[1.0], [9.0], [0.2], [30.0]])
    (o_weight,) = linears(6, seed=4)
    x = torch.randn(20, 5, generator=generator)
    mix = torch.softmax(torch.randn(6, 20, 20, generator=generator), -1).double().numpy()  # attention of each head

    def through(v_weight, o_weight):
        values = (array(x) @ v_weight.T).reshape(20, 2, 2)
        heads = [mix[head] @ values[:, head // 3] for head in range(6)]
        return np.concatenate(heads, axis=1), np.concatenate(heads, axis=1) @ o_weight.T

    inputs, exact = through(array(v_weight), array(o_weight))
    scale = smooth_scale(method, statistics([torch.from_numpy(inputs).float()]), [o_weight], SHARING).scale
    rows = array(source_scale(scale, SHARING))
    assert np.ptp(rows) > 0.1
    divided, smoothed = through(array(v_weight) / rows[:, None], array(o_weight) * array(scale))
    np.testing.assert_allclose(divided, inputs / array(scale), rtol=1e-12)
    np.testing.assert_allclose(smoothed, exact, rtol=0, atol=1e-12 * np.abs(exact).max())  # sums of 12, in float64


@pytest.mark.parametrize("method", METHODS)
def test_nothing_given_is_modified_and_scales_are_positive(method):
    xs, weights = samples(), linears(8, 4, 4)
    stats = statistics(xs)
    given = [*weights, stats.absmax, stats.lo, stats.hi, stats.first, stats.tokens, stats.reach]
    before = [tensor.clone() for tensor in given]
    scale = smooth_scale(method, stats, weights).scale
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert scale.shape == (K,) and scale.dtype == torch.float32
    assert (scale > 0).all() and torch.isfinite(scale).all()


@pytest.mark.parametrize("method", [AntiOutlier.M2, AntiOutlier.M3])
def test_searches_see_the_first_sample_only(method):
    # The extremes over all samples are those of the second, which stays; the third is other tokens within them.
    xs, weights = samples(), linears(6, 4)
    wide = torch.cat([xs[1], torch.stack([torch.full((K,), 1.0), torch.full((K,), -1.0)]) * 200])
    stats = [statistics([xs[0], wide, third]) for third in (xs[2], xs[2].flip(0) * 0.5)]
    assert torch.equal(*[smooth_scale(method, s, weights).scale for s in stats])
