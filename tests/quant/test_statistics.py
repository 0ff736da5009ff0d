"""What the watcher keeps of an input, against the same figures taken from the whole input at once."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import InputError
from eightfold.quant.statistics import InputWatcher, loud_tokens, require_finite_samples

LENGTHS = (4, 1, 6, 3, 2, 5, 7)  # two more samples than range_param looks at
K = 6

# Sums are float64; taking a deviation from sums of squares costs some digits, here never more than this.
EXACT = 1e-12


def spans_of(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    channels = torch.tensor([1.0, 0.1, 5.0, 1.0, 20.0, 1.0])
    shift = torch.tensor([0.0, 1.0, 0.0, -3.0, 0.0, 0.0])
    return [torch.randn(length, K, generator=generator) * channels + shift for length in LENGTHS]


def watch(samples, calls=((0, 7),), **options):
    """Show the samples to a watcher, in calls of some samples each; return its statistics."""
    watcher = InputWatcher("x", sum(map(len, samples)), **options)
    for begin, end in calls:
        part = samples[begin:end]
        watcher.update(torch.cat(part), spans_of([len(sample) for sample in part]))
    return watcher.stats()


def test_extremes_are_those_of_all_tokens(samples):
    x, stats = torch.cat(samples), watch(samples)
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.equal(stats.lo, x.amin(0))
    assert torch.equal(stats.hi, x.amax(0))


@pytest.mark.parametrize("calls", [((0, 7),), ((0, 3), (3, 7)), tuple((i, i + 1) for i in range(7))])
@pytest.mark.parametrize("count", [1, 3, 14])
def test_ordinary_tokens_are_all_but_the_loudest(samples, calls, count):
    x = torch.cat(samples)
    x[11, 2] = -900.0  # only its magnitude is loud
    quiet = x[x.abs().amax(1).argsort(descending=True)[count:]]
    stats = watch(list(x.split(LENGTHS)), calls, num_loud=count)
    assert torch.equal(stats.ordinary, quiet.abs().amax(0))
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.equal(watch(list(x.split(LENGTHS))).ordinary, stats.absmax)


def test_a_watcher_of_every_second_call_keeps_what_one_of_all_keeps(samples):
    # As two ranks do: each sees its calls, the first takes in what both have kept.
    options, calls = {"num_loud": 4}, [(i, i + 1) for i in range(7)]
    ranks = [InputWatcher("x", 28, place=lambda: (0, 0), **options) for _ in range(2)]  # type: ignore[arg-type]
    for i in range(7):
        ranks[i % 2].update(samples[i], spans_of([len(samples[i])]))
    whole = InputWatcher("x", 28, **options)  # type: ignore[arg-type]
    for i in range(7):
        whole.take(ranks[i % 2].kept[i // 2])
    assert torch.equal(whole.stats().ordinary, watch(samples, calls, **options).ordinary)


@pytest.mark.parametrize(
    ("lengths", "count"), [((1000, 1000), 30), ((1000, 1001), 31), ((20,) * 10, 10), ((1,) * 10, 5), ((1,), 0)]
)
def test_few_tokens_are_loud_and_one_of_each_short_sample(lengths, count):
    assert loud_tokens(lengths) == count


def test_the_first_sample_is_kept_whole_and_as_a_copy(samples):
    watcher = InputWatcher("x", 28)
    x = torch.cat(samples)
    watcher.update(x, spans_of(LENGTHS))
    x.zero_()
    stats = watcher.stats()
    assert torch.equal(stats.first, samples[0])
    assert torch.equal(stats.tokens, torch.cat(samples))


def test_all_tokens_are_kept_when_they_are_few(samples):
    assert torch.equal(watch(samples, max_tokens=28).tokens, torch.cat(samples))


@pytest.mark.parametrize("calls", [((0, 7),), ((0, 1), (1, 4), (4, 7)), tuple((i, i + 1) for i in range(7))])
def test_many_tokens_are_thinned_evenly_wherever_calls_are_cut(samples, calls):
    # 28 tokens, at most 10: every third.
    assert torch.equal(watch(samples, calls, max_tokens=10).tokens, torch.cat(samples)[::3])


def test_what_nobody_needs_is_not_kept(samples):
    stats = watch(samples, keep_first=False, keep_tokens=False)
    assert stats.first.shape == stats.tokens.shape == (0, K)
    assert torch.equal(stats.absmax, torch.cat(samples).abs().amax(0))


def test_reach_and_spread_follow_the_moving_centre(samples):
    reach, spread = torch.full((K,), -torch.inf), 0.0
    for b, sample in enumerate(samples):
        seen = torch.cat(samples[: b + 1])
        centre = (seen.amin(0) + seen.amax(0)) / 2
        reach = torch.maximum(reach, (sample - centre).amax(0))
        spread = max(spread, float((sample.double() - centre.double()).std()))
    stats = watch(samples)
    assert torch.equal(stats.reach, reach)
    assert stats.spread == pytest.approx(spread, rel=EXACT)


def test_the_order_of_samples_decides_reach():
    low, high = torch.zeros(2, K), torch.full((2, K), 8.0)
    high[0] = 6.0
    assert watch([low, high], ((0, 2),)).reach.tolist() == [4.0] * K  # 8 - (0 + 8) / 2
    assert watch([high, low], ((0, 2),)).reach.tolist() == [1.0] * K  # 8 - (6 + 8) / 2


def range_param(samples, scale):
    """The definition, on the divided input."""
    divided = [sample.double() / scale for sample in samples[:5]]
    std = max(float((x - (x.amin(0) + x.amax(0))).std()) for x in divided)
    return max(float(x.abs().max()) for x in divided) / std


@pytest.mark.parametrize("loudest", [4, 5])  # the last one that counts, and the one after it
def test_range_param_is_that_of_the_first_five_samples(samples, loudest):
    samples[loudest] *= 100
    expected = range_param(samples, torch.ones(K, dtype=torch.float64))
    assert watch(samples).range_param() == pytest.approx(expected, rel=EXACT)


def test_range_param_of_the_input_divided_by_a_scale(samples):
    scale = torch.tensor([1.0, 0.3, 2.0, 0.5, 9.0, 1.5])
    stats = watch(samples)
    assert stats.range_param(scale) == pytest.approx(range_param(samples, scale.double()), rel=EXACT)
    assert stats.range_param(torch.full((K,), 4.0)) == pytest.approx(stats.range_param(), rel=EXACT)
    assert stats.range_param(scale) != pytest.approx(stats.range_param(), rel=0.01)


def test_range_param_of_zeros_is_zero():
    assert watch([torch.zeros(3, K)], ((0, 1),)).range_param() == 0.0


def test_cutting_the_samples_into_calls_changes_nothing(samples):
    whole, parts = watch(samples), watch(samples, ((0, 2), (2, 3), (3, 7)))
    for name in ("absmax", "lo", "hi", "first", "tokens", "reach"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.spread == parts.spread
    assert whole.range_param() == parts.range_param()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sample_that_is_not_finite_is_named(samples, value):
    watcher = InputWatcher("model.layers.3.qkv", 28)
    watcher.update(samples[0], [(0, 4)])
    broken = torch.cat(samples[1:3])
    broken[4, 2] = value
    with pytest.raises(
        InputError,
        match=r"^input of model\.layers\.3\.qkv in calibration sample 2 \(counted from 0\): "
        r"got values from \S+ to \S+, expected finite numbers\. Remove the sample, or check the float model\.$",
    ):
        watcher.update(broken, [(0, 1), (1, 7)])


def test_finite_samples_pass():
    require_finite_samples("x", 0, torch.tensor([-3e38, 0.0]), torch.tensor([3e38, 0.0]))
