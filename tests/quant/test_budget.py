"""Where hidden states go: in memory while they fit, else in files; and what is too little for either."""

from __future__ import annotations

import pytest

from eightfold.errors import CapacityError
from eightfold.format.checkpoint import Checkpoint
from eightfold.quant import budget as module
from eightfold.quant.budget import Budget, budget_for
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe
from eightfold.scheme import QuantType

GIB = 1 << 30
NEEDS = Budget(base=GIB, step=2 * GIB, states=4 * GIB)


@pytest.mark.parametrize(("memory", "spills"), [(3 * GIB, True), (7 * GIB - 1, True), (7 * GIB, False)])
def test_states_are_in_memory_as_soon_as_all_fit(memory, spills):
    assert NEEDS.spills(memory) is spills


def test_less_than_a_layer_is_refused_with_what_would_do():
    with pytest.raises(CapacityError) as error:
        NEEDS.spills(3 * GIB - (64 << 20) - 1)
    assert str(error.value) == (
        "memory budget: got 3007 MiB, expected at least 3072 MiB for one layer of this model. "
        "Give that as `memory`, or none."
    )


@pytest.mark.parametrize(("free", "spills"), [(12 * GIB, False), (12 * GIB - 2, True), (1, True), (None, False)])
def test_without_a_budget_half_of_what_is_free_is_taken_and_nothing_refused(monkeypatch, free, spills):
    monkeypatch.setattr(module, "available_bytes", lambda: free)
    assert NEEDS.spills(None) is spills
    monkeypatch.setattr(module, "available_bytes", lambda: free and 2 * free)
    assert NEEDS.spills(None, 2) is spills


def test_hidden_states_count_once_for_each_stream_that_holds_all_samples(float_model):
    checkpoint, samples = Checkpoint.open(float_model), [[1] * 10, [2] * 20, [3] * 30, [4], [5], [6]]
    width = 4 * 48
    for recipe, tokens in (
        (Recipe(QuantType.W8A16), 0),
        (Recipe(QuantType.W8A8), 63),
        (Recipe(QuantType.W8A8, act_method=ActMethod.AUTO), 63 + 62),  # five samples decide
        (Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4), 2 * 63),
        (Recipe(QuantType.W8A8_DYNAMIC, anti_outlier=AntiOutlier.M4), 63),
    ):
        assert budget_for(checkpoint, recipe, samples).states == width * tokens
