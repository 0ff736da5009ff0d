"""The search for exponents: against every candidate written out, and against tables of made-up errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from eightfold.quant import smooth
from eightfold.quant.smooth import GRID, SCALE_MIN, balance, search_exponents, weight_absmax
from eightfold.quant.statistics import InputWatcher

T, K = 30, 16


def group(seed, *outputs):
    """Return the statistics of an input with loud channels, and weights of different size."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.exp(torch.randn(K, generator=generator) * 1.5)
    x = torch.randn(T, K, generator=generator) * loud + 0.2
    columns = torch.exp(torch.randn(K, generator=generator) * 0.7)
    weights = [torch.randn(n, K, generator=generator) * columns for n in outputs]
    return statistics(x), weights


def statistics(x):
    watcher = InputWatcher("x", len(x))
    watcher.update(x, [(0, len(x))])
    return watcher.stats()


# The search, whatever the errors are.


def two_steps(table):
    """Return what trying everything finds; `table` has the error for alpha and beta in steps of 1 / GRID."""
    best, alpha = math.inf, 0
    for i in range(GRID + 1):
        if table[i, GRID - i] <= best:
            best, alpha = table[i, GRID - i], i
    beta = GRID - alpha
    for j in range(GRID + 1):
        # The pair of the first step is one of these too, and a later one that is as good replaces it.
        if table[alpha, j] < best or (table[alpha, j] == best and j > beta):
            best, beta = table[alpha, j], j
    return alpha / GRID, beta / GRID


def search_table(monkeypatch, table, *, drops):
    """Run the search on errors of a table; return its result and the pairs that it asked for."""
    asked = []

    class Table:
        def __init__(self, stats, weights, by_token):
            pass

        def __call__(self, alpha, beta, limit):
            asked.append((alpha, beta))
            return math.inf if drops and table[alpha, beta] > limit else float(table[alpha, beta])

    monkeypatch.setattr(smooth, "_Error", Table)
    return search_exponents(*group(0, 2)), asked


@pytest.mark.parametrize("levels", [2, 3, 10, 10_000])  # few levels: many ties
@pytest.mark.parametrize("drops", [False, True])
def test_order_and_dropping_change_nothing(monkeypatch, levels, drops):
    for seed in range(50):
        table = np.random.default_rng(seed).integers(1, levels + 1, (GRID + 1, GRID + 1))
        found, _ = search_table(monkeypatch, table, drops=drops)
        assert found == two_steps(table)


def test_the_last_of_equal_errors_wins(monkeypatch):
    found, _ = search_table(monkeypatch, np.ones((GRID + 1, GRID + 1)), drops=True)
    assert found == (1.0, 1.0)


def test_every_pair_is_tried_once(monkeypatch):
    table = np.random.default_rng(0).random((GRID + 1, GRID + 1))
    (alpha, _), asked = search_table(monkeypatch, table, drops=False)
    best = round(alpha * GRID)
    assert sorted(asked[: GRID + 1]) == [(i, GRID - i) for i in range(GRID + 1)]
    assert sorted(asked[GRID + 1 :]) == [(best, j) for j in range(GRID + 1) if j != GRID - best]


# The error itself.


def relative_error(stats, weights, alpha, beta, by_token=False):
    """err of the formula: the scale and what is rounded are float32, as in the reference; products are float64."""
    stacked = torch.cat(weights).numpy()
    w = np.abs(stacked).max(0)
    scale = balance(stats.absmax, torch.from_numpy(w), alpha, beta).numpy()
    x = stats.tokens.numpy()
    lo = np.minimum((stats.lo.numpy() / scale).min(), np.float32(0))
    hi = np.maximum((stats.hi.numpy() / scale).max(), np.float32(0))
    step = (hi - lo) / np.float32(255)
    offset = np.round(-lo / step) - np.float32(128)
    if by_token:
        step, offset = np.abs(x / scale).max(1, keepdims=True) / np.float32(127), np.float32(0)
    x_int = np.round(x / scale / step + offset)
    rows = np.abs(stacked * scale).max(1, keepdims=True) / np.float32(127)
    w_int = np.clip(np.round(stacked * scale / rows), -127, 127)
    exact = x.astype(np.float64) @ stacked.T.astype(np.float64)
    quantized = ((x_int - offset).astype(np.float64) * np.float64(step)) @ (w_int.astype(np.float64) * rows).T
    return math.sqrt(((quantized - exact) ** 2).mean() / (exact**2).mean())


def ours(stats, weights, alpha, beta, limit=math.inf, **how):
    """Return the same from the sum of squares that the search compares."""
    exact = stats.tokens.double() @ torch.cat(weights).double().T
    return math.sqrt(smooth._Error(stats, weights, **how)(alpha, beta, limit) / float(exact.square().sum()))


@pytest.mark.parametrize("outputs", [(7,), (6, 4), (6, 4, 4)])
@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (20, 0), (0, 20), (15, 2), (10, 10), (20, 20)])
@pytest.mark.parametrize("by_token", [False, True])
def test_error_is_that_of_the_quantized_product(outputs, alpha, beta, by_token):
    # The differences are a hundredth of the products, which float32 holds to 2**-24: 6e-6 of a difference.
    stats, weights = group(3, *outputs)
    expected = relative_error(stats, weights, alpha / GRID, beta / GRID, by_token)
    assert ours(stats, weights, alpha, beta, by_token=by_token) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("outputs", "by_token"), [((7,), False), ((6, 4), True), ((6, 4, 4), False)])
def test_search_is_that_over_all_candidates(seed, outputs, by_token):
    stats, weights = group(seed, *outputs)
    table = np.full((GRID + 1, GRID + 1), np.nan)
    for i in range(GRID + 1):
        for j in range(GRID + 1):
            table[i, j] = relative_error(stats, weights, i / GRID, j / GRID, by_token)
    assert search_exponents(stats, weights, by_token=by_token) == two_steps(table)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_is_that_of_all_tokens_also_when_some_were_not_kept(sign):
    stats, weights = group(4, 6)
    x = stats.tokens.clone()
    x[1] = 3 * sign * stats.absmax  # a token that is left out
    thinned = dataclasses.replace(statistics(x), tokens=x[::3])
    kept_alone = dataclasses.replace(thinned, lo=x[::3].amin(0), hi=x[::3].amax(0))
    expected = relative_error(thinned, weights, 0.7, 0.3)
    assert relative_error(kept_alone, weights, 0.7, 0.3) != pytest.approx(expected, rel=0.1)
    assert ours(thinned, weights, 14, 6) == pytest.approx(expected, rel=2e-5)


def test_inputs_of_one_sign_keep_zero_in_range():
    stats, weights = statistics(torch.rand(T, K, generator=torch.Generator().manual_seed(5)) + 3), group(5, 6)[1]
    assert ours(stats, weights, 14, 6) == pytest.approx(relative_error(stats, weights, 0.7, 0.3), rel=2e-5)


@pytest.mark.parametrize("elements", [1, 4 * T, 1 << 19])
def test_cutting_the_weights_into_pieces_changes_nothing(monkeypatch, elements):
    stats, weights = group(6, 9, 5)
    whole = smooth._Error(stats, weights)(13, 4, math.inf)
    result = search_exponents(stats, weights)
    monkeypatch.setattr(smooth, "_PIECE_ELEMENTS", elements)
    error = smooth._Error(stats, weights)
    assert len(error._pieces) == {1: 14, 4 * T: 3 + 2, 1 << 19: 2}[elements]
    # One sum of 14 * T float32 squares against the sum of several: a few roundings.
    assert error(13, 4, math.inf) == pytest.approx(whole, rel=1e-6)
    assert search_exponents(stats, weights) == result


def test_a_candidate_is_dropped_above_the_limit_and_only_there():
    stats, weights = group(7, 9, 5)
    error = smooth._Error(stats, weights)
    value = error(13, 4, math.inf)
    assert error(13, 4, value) == value  # as good as the limit is good enough
    assert error(13, 4, value * (1 - 1e-9)) == math.inf


def test_weights_and_statistics_are_not_modified():
    stats, weights = group(8, 9, 5)
    given = [*weights, stats.tokens, stats.absmax, stats.lo, stats.hi]
    before = [tensor.clone() for tensor in given]
    search_exponents(stats, weights)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_weights_of_zeros_are_no_error():
    stats, _ = group(9, 2)
    assert search_exponents(stats, [torch.zeros(3, K)]) == (1.0, 1.0)  # every pair is exact: the last wins


# The formula of the scale.


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.35, 0.85)])
def test_balance(alpha, beta):
    a, w = torch.tensor([0.02, 1.0, 480.0]), torch.tensor([1e-5, 0.3, 7.0])
    expected = a.double().numpy() ** alpha / w.double().numpy() ** beta
    # Two powers, good to a last bit or two, and a product.
    np.testing.assert_allclose(balance(a, w, alpha, beta).numpy(), expected, rtol=1e-6)


def test_balance_stays_above_the_smallest_scale():
    found = balance(torch.tensor([0.0, 1e-7, 1.0]), torch.ones(3), 1.0, 0.0)
    assert torch.equal(found, torch.tensor([SCALE_MIN, SCALE_MIN, 1.0]))


def test_weight_absmax_is_over_all_rows_of_all_linears():
    first, second = torch.tensor([[1.0, -5.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([[-3.0, 4.0, 0.0]])
    assert torch.equal(weight_absmax([first, second]), torch.tensor([3.0, 5.0, 1e-5]))
