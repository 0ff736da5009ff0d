"""Which type each group gets: few bytes first, then fast types."""

from __future__ import annotations

import pytest

from eightfold.quant.analysis import GroupLoss
from eightfold.quant.choice import choose, total_bytes, total_loss, types_for
from eightfold.quant.recipe import Recipe, Target
from eightfold.scheme import QuantType


def group(layer: int, nbytes: int, **loss: float) -> GroupLoss:
    sizes = {kind: nbytes * (2 if kind == "FLOAT" else 1) for kind in (*loss, "FLOAT")}
    return GroupLoss(layer, "g", (f"layers.{layer}.g",), sizes, {**loss, "FLOAT": 0.0})


STATIC = [group(0, 100, W8A8=0.1), group(1, 100, W8A8=0.02), group(2, 10, W8A8=0.01), group(3, 100, W8A8=0.001)]
SEVERAL = [group(at, 100, W8A8=0.1 * (at + 1), W8A8_DYNAMIC=0.01, W8A16=0.001) for at in range(3)]


def test_what_loses_most_a_byte_is_kept_float_first():
    assert choose(STATIC, 1.0) == ["W8A8"] * 4
    assert choose(STATIC, 0.04) == ["FLOAT", "W8A8", "W8A8", "W8A8"]
    assert choose(STATIC, 0.025) == ["FLOAT", "W8A8", "FLOAT", "W8A8"]
    assert choose(STATIC, 0.0) == ["FLOAT"] * 4


def test_what_need_not_be_float_becomes_int8_again():
    # By gain a byte the small one comes first, but then the large one is needed, and it alone is enough.
    groups = [group(0, 1000, W8A8=0.5), group(1, 10, W8A8=0.02)]
    assert choose(groups, 0.1) == ["FLOAT", "W8A8"]


def test_slow_int8_types_come_before_float_and_fast_ones_where_there_is_room():
    assert choose(SEVERAL, 1.0) == ["W8A8"] * 3
    assert choose(SEVERAL, 0.003) == ["W8A16"] * 3
    assert choose(SEVERAL, 0.13) == ["W8A8", "W8A8_DYNAMIC", "W8A8_DYNAMIC"]
    assert choose(SEVERAL, 0.0015) == ["FLOAT", "FLOAT", "W8A16"] or choose(SEVERAL, 0.0015).count("W8A16") == 1


@pytest.mark.parametrize("limit", [0.5, 0.1, 0.05, 0.01, 0.005, 0.002])
def test_limits_are_kept_and_smaller_ones_cost_no_less(limit):
    found, tighter = choose([*STATIC, *SEVERAL], limit), choose([*STATIC, *SEVERAL], limit / 2)
    assert total_loss([*STATIC, *SEVERAL], found) <= limit
    assert total_bytes([*STATIC, *SEVERAL], found) <= total_bytes([*STATIC, *SEVERAL], tighter)


def test_what_has_one_type_keeps_it():
    kept = GroupLoss(0, "g", ("l",), {"FLOAT": 5}, {"FLOAT": 0.0})
    assert choose([kept, *STATIC], 1.0)[0] == "FLOAT"


def test_targets_take_types():
    def names(scheme: QuantType, target: Target) -> list[str]:
        return [kind.value for kind in types_for(Recipe(scheme, target=target))]

    assert names(QuantType.W8A8, Target.MINDIE) == ["W8A8", "FLOAT"]
    assert names(QuantType.W8A8, Target.VLLM_ASCEND) == ["W8A8", "W8A8_DYNAMIC", "W8A16", "FLOAT"]
    assert names(QuantType.W8A8_DYNAMIC, Target.CPU) == ["W8A8_DYNAMIC", "W8A16", "FLOAT"]
    assert names(QuantType.W8A16, Target.CPU) == ["W8A16", "FLOAT"]
