"""Which linears and attentions stay float."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightfold.architectures import Names
from eightfold.config import parse_config
from eightfold.errors import ConfigError
from eightfold.families import all_linears
from eightfold.quant.plan import assign_types, attention_back, roll_back
from eightfold.quant.recipe import Recipe, Target
from eightfold.scheme import QuantType
from tests.conftest import tiny_config

CONFIG = parse_config(tiny_config(), Path("config.json"))
NAMES = list(all_linears(CONFIG))
QKV = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
GATE, UP = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
DOWN = "model.layers.0.mlp.down_proj"


def chosen(params, level, exact=False, floats=()):
    types = {name: QuantType.FLOAT if name in floats else QuantType.W8A8 for name in NAMES}
    recipe = Recipe(QuantType.W8A8, disable_level=level, exact_levels=exact)
    rows = roll_back(CONFIG, recipe, types, {**dict.fromkeys(NAMES, 1.0), **params})
    return {row.module: row.of_group for row in rows}


def test_the_widest_go_with_their_group():
    params = {**dict.fromkeys(QKV, 9.0), DOWN: 20.0}
    assert chosen(params, 2) == {DOWN: False, QKV[0]: False, QKV[1]: True, QKV[2]: True}


def test_exact_cuts_through_a_group():
    params = {**dict.fromkeys(QKV, 9.0), DOWN: 20.0}
    assert chosen(params, 2, exact=True) == {DOWN: False, QKV[0]: False}
    assert chosen(params, 3, exact=True) == {DOWN: False, QKV[0]: False, QKV[1]: False}


def test_ties_keep_the_order_of_the_model():
    assert list(chosen({}, 4, exact=True)) == NAMES[:4]
    assert list(chosen({Names().head: 5.0}, 3, exact=True)) == [Names().head, *NAMES[:2]]


def test_float_linears_are_no_candidates_and_not_named():
    found = chosen({GATE: 9.0, UP: 9.0, DOWN: 8.0}, 1, floats=(GATE,))
    assert found == {UP: False}


def test_level_zero_and_every_level():
    assert chosen({}, 0) == {}
    assert list(chosen({}, len(NAMES))) == NAMES


def test_rows_say_how_wide():
    types = dict.fromkeys(NAMES, QuantType.W8A8)
    params = {name: float(i) for i, name in enumerate(NAMES)}
    (row,) = roll_back(CONFIG, Recipe(QuantType.W8A8, disable_level=1, exact_levels=True), types, params)
    assert (row.module, row.range_param, row.of_group) == (Names().head, len(NAMES) - 1.0, False)


def test_attention_back_takes_the_smallest_scores():
    scores = {0: 0.5, 1: 0.2, 3: 0.2, 4: 0.1, 7: 0.2}
    assert attention_back(scores, 0) == []
    assert attention_back(scores, 1) == [4]
    assert attention_back(scores, 3) == [1, 3, 4]
    assert attention_back(scores, 9) == [0, 1, 3, 4, 7]


@pytest.mark.parametrize("scheme", [QuantType.W8A8, QuantType.W8A8_MIX, QuantType.W8A8_DYNAMIC, QuantType.W8A16])
@pytest.mark.parametrize(
    ("target", "beside_static"),
    [
        (None, {}),
        ("mindie", {"down_proj": QuantType.FLOAT}),
        ("vllm-ascend", {"down_proj": QuantType.W8A16}),
        ("cpu", {"down_proj": QuantType.W8A16, "o_proj": QuantType.W8A8_DYNAMIC}),
    ],
)
def test_a_target_says_what_is_stored_otherwise_beside_static_linears(scheme, target, beside_static):
    types = assign_types(CONFIG, Recipe(scheme, target=None if target is None else Target(target)))
    is_static = scheme in (QuantType.W8A8, QuantType.W8A8_MIX)
    wanted = {name: scheme for name in NAMES if name != Names().head} | {Names().head: QuantType.FLOAT}
    for ending, kind in beside_static.items() if is_static else ():
        wanted |= {name: kind for name in NAMES if name.endswith(ending)}
    assert types == wanted


def test_patterns_go_before_a_target():
    recipe = Recipe(QuantType.W8A8, target=Target.CPU, modules=((DOWN, QuantType.W8A8),))
    types = assign_types(CONFIG, recipe)
    assert types[DOWN] is QuantType.W8A8
    assert types[DOWN.replace("0", "1")] is QuantType.W8A16


@pytest.mark.parametrize(
    ("target", "choices", "expected"),
    [
        ("vllm-ascend", {"fa_quant": True}, "fa_quant: got it with target vllm-ascend, "),
        ("vllm-ascend", {"weight_symmetric": False}, "weight_symmetric: got False with target vllm-ascend, "),
        ("mindie", {"modules": (("*.o_proj", QuantType.W8A8),)}, "modules: got W8A16 and W8A8 with target mindie, "),
    ],
)
def test_what_a_target_does_not_read_is_refused(target, choices, expected):
    with pytest.raises(ConfigError) as caught:
        Recipe(QuantType.W8A16, target=Target(target), **choices)
    assert str(caught.value).startswith(expected)
