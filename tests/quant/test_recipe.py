"""Recipes as files."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml

from eightfold.errors import ConfigError, InputError
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe, Target
from eightfold.quant.recipe_file import make_recipe, parse_level, read_recipe, render_recipe
from eightfold.scheme import QuantType
from tests.refusal import error_line

RECIPES = [
    *(Recipe(kind) for kind in (QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX)),
    Recipe(QuantType.W8A16, weight_symmetric=False),
    Recipe(
        QuantType.W8A8,
        modules=(("*.down_proj", QuantType.W8A8_DYNAMIC), ("model.layers.0.*", QuantType.FLOAT)),
        keep_float=("*.o_proj", "*é?"),
        quantize_lm_head=True,
        anti_outlier=AntiOutlier.M4,
        act_method=ActMethod.HISTOGRAM,
        disable_level=3,
        exact_levels=True,
        fa_quant=True,
        fa_amp=2,
        save_float32=True,
    ),
    Recipe(QuantType.W8A8_DYNAMIC, kv_int8=True, kv_symmetric=False, kv_observe=KVObserve.PRE_ROPE),
    Recipe(QuantType.W8A8, act_method=ActMethod.AUTO, anti_outlier=AntiOutlier.M6),
    Recipe(QuantType.W8A8_MIX, act_method=ActMethod.EXTREMES, anti_outlier=AntiOutlier.SMOOTH, target=Target.CPU),
]


def made(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return make_recipe(read_recipe(path), str(path))


def refusal(tmp_path, text, kind=ConfigError):
    with pytest.raises(kind) as caught:
        made(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip(tmp_path, recipe):
    assert made(tmp_path, render_recipe(recipe)) == recipe


def test_the_last_pattern_stays_last(tmp_path):
    recipe = made(tmp_path, 'scheme: w8a8\nmodules:\n  "*.z": w8a16\n  "*.a": float\n')
    assert recipe.modules == (("*.z", QuantType.W8A16), ("*.a", QuantType.FLOAT))


@pytest.mark.parametrize(("value", "method"), [(1, "minmax"), (2, "histogram"), (3, "auto"), ('"2"', "histogram")])
def test_act_method_by_number(tmp_path, value, method):
    assert made(tmp_path, f"scheme: w8a8\nact_method: {value}\n").act_method.value == method


@pytest.mark.parametrize("level", ["L4", "l4", "4"])
def test_level_as_text_or_number(tmp_path, level):
    assert made(tmp_path, f"scheme: w8a8\ndisable_level: {level}\n").disable_level == 4


@pytest.mark.parametrize("text", ["", "4", "L", "L-1", "Lx", "L1.5", "L²"])
def test_level_is_ln(text):
    with pytest.raises(ConfigError, match="L0, L1, L2"):
        parse_level(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "scheme: w8a8\nanti_outlir: m4\n",
            "key 'anti_outlir' in {path}: got a key that recipes do not have, expected 'anti_outlier'",
        ),
        ("scheme: w4a4\n", "scheme in {path}: got 'w4a4', expected w8a8, w8a8-dynamic, w8a8-mix or w8a16"),
        ("scheme: float\n", "scheme in {path}: got 'float'"),
        ('scheme: w8a8\nmodules: {"*.o_proj": int4}\n', "modules in {path}: got 'int4'"),
        ("scheme: w8a8\nmodules: ['*.o_proj']\n", "modules in {path}: got ['*.o_proj'], expected pattern: type"),
        ("scheme: w8a8\ndisable_level: five\n", "disable_level: got 'five'"),
        ("scheme: w8a8\ndisable_level: -1\n", "disable_level: got -1, expected 0 or more"),
        ("scheme: w8a8\nfa_quant: true\nkv_int8: true\n", "got `fa_quant` and `kv_int8`, expected one of them"),
        ("scheme: w8a8\nfa_amp: 1\n", "fa_amp: got 1"),
        ("scheme: w8a8\nkv_symmetric: false\n", "kv_symmetric: got no `kv_int8`"),
        ("scheme: w8a8\nweight_symmetric: false\n", "weight_symmetric: got scheme W8A8, expected W8A16"),
        ("scheme: w8a8\nanti_outlier: m9\n", "anti_outlier in {path}: got 'm9'"),
        ("scheme: w8a8\nact_method: 4\n", "act_method in {path}: got 4"),
        ("scheme: w8a8\nkeep_float: '*.o_proj'\n", "keep_float in {path}: got '*.o_proj'"),
        ("anti_outlier: m4\n", "scheme: got none"),
    ],
)
def test_refused_choices(tmp_path, text, found):
    message = refusal(tmp_path, text)
    assert found.format(path=tmp_path / "recipe.yaml") in message
    assert "\n" not in message


FLAGS = "true or false"
COUNT = "a whole number"
PATTERNS = """a list of patterns, such as ['*.down_proj']"""
MODULES = "pattern: type"
METHODS = "'m1', 'm2', 'm3', 'm4', 'm5', 'm6', 'iter', 'flex', 'smooth' or 'rotate'"


@pytest.mark.parametrize(
    ("key", "value", "got", "expected"),
    [
        ("fa_quant", "'yes'", "'yes'", FLAGS),
        ("fa_quant", "1", "1", FLAGS),
        ("kv_int8", "null", "null", FLAGS),
        ("exact_levels", "[true]", "[True]", FLAGS),
        ("weight_symmetric", "'false'", "'false'", FLAGS),
        ("save_float32", "0.0", "0.0", FLAGS),
        ("disable_level", "true", "true", f"{COUNT} or Ln"),
        ("disable_level", "2.0", "2.0", f"{COUNT} or Ln"),
        ("disable_level", "null", "null", f"{COUNT} or Ln"),
        ("fa_amp", "true", "true", COUNT),
        ("fa_amp", "'2'", "'2'", COUNT),
        ("keep_float", "null", "null", PATTERNS),
        ("keep_float", "", "null", PATTERNS),
        ("keep_float", "'*.o_proj'", "'*.o_proj'", PATTERNS),
        ("keep_float", "[1]", "[1]", PATTERNS),
        ("keep_float", "{'*': float}", "{'*': 'float'}", PATTERNS),
        ("modules", "null", "null", MODULES),
        ("modules", "{0: w8a16}", "{0: 'w8a16'}", MODULES),
        ("modules", "{'*': null}", "null", "w8a8, w8a8-dynamic, w8a8-mix, w8a16 or float"),
        ("anti_outlier", "4", "4", METHODS),
        ("anti_outlier", "false", "false", METHODS),
        ("act_method", "null", "null", "'minmax', 'histogram', 'auto' or 'extremes'"),
        ("act_method", "true", "true", "'minmax', 'histogram', 'auto' or 'extremes'"),
        ("kv_observe", "null", "null", "'post-rope' or 'pre-rope'"),
    ],
)
def test_values_are_read_strictly_and_asked_for_in_words_of_the_file(tmp_path, key, value, got, expected):
    assert refusal(tmp_path, f"scheme: w8a8\n{key}: {value}\n") == (
        f"{key} in {tmp_path / 'recipe.yaml'}: got {got}, expected {expected}"
    )


def test_a_missing_scheme_is_asked_for_in_words_of_the_file(tmp_path):
    assert refusal(tmp_path, "scheme: null\n") == (
        f"scheme in {tmp_path / 'recipe.yaml'}: got null, expected w8a8, w8a8-dynamic, w8a8-mix or w8a16"
    )


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("scheme: w8a8\nfa_quant: true\n\nfa_quant: false\n", "fa_quant", 2, 4),
        ("scheme: w8a8\nscheme: w8a8\n", "scheme", 1, 2),
        ("'scheme': w8a8\nkv_int8: true\nscheme: w8a16\n", "scheme", 1, 3),
        ('scheme: w8a8\nmodules:\n  "*.o_proj": w8a16\n  "*": float\n  "*.o_proj": float\n', "*.o_proj", 3, 5),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path, text, key, first, second):
    assert refusal(tmp_path, text) == (
        f"key {key!r} in {tmp_path / 'recipe.yaml'}: got it in line {first} and in line {second}, expected it once. "
        "Remove one."
    )


def test_no_anti_outlier_may_be_said(tmp_path):
    assert made(tmp_path, "scheme: w8a8\nanti_outlier: null\n").anti_outlier is None


@pytest.mark.parametrize("text", ["a: [", "- scheme\n", "w8a8", "", "\x01"])
def test_not_a_mapping(tmp_path, text):
    assert refusal(tmp_path, text, InputError).startswith(f"recipe in {tmp_path / 'recipe.yaml'}: got ")


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"scheme: \xff\xfe\n")
    with pytest.raises(InputError, match="got byte 8 that is not UTF-8"):
        read_recipe(tmp_path / "binary")


def test_command_line_goes_before_the_file(cli, tmp_path, float_model):
    file, saved = tmp_path / "recipe.yaml", tmp_path / "saved.yaml"
    file.write_text("scheme: w8a8\nact_method: 2\nkeep_float: ['*.down_proj']\nsave_float32: true\n")
    options = ("--scheme", "w8a8-dynamic", "--keep-float", "*.o_proj", "--save-recipe", saved)
    ran = cli("quantize", float_model, tmp_path / "out", "--recipe", file, *options)
    assert ran.code == 0, ran.err
    content = yaml.safe_load(saved.read_text())
    found = [content[key] for key in ("scheme", "act_method", "keep_float", "save_float32")]
    assert found == ["w8a8-dynamic", "histogram", ["*.o_proj"], True]
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["model.layers.0.self_attn.o_proj.weight"] == "FLOAT"
    assert description["model.layers.0.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    again = cli("quantize", float_model, tmp_path / "again", "--recipe", saved)
    assert again.code == 0, again.err
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_command_line_can_contradict_a_file(cli, tmp_path, float_model):
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: w8a8\nkv_int8: true\n")
    message = error_line(cli("quantize", float_model, tmp_path / "out", "--recipe", file, "--fa-quant"))
    assert message.startswith(f"attention: got --fa-quant and kv_int8 of {file}, expected one of them")
    assert not (tmp_path / "out").exists()


def test_a_setting_of_a_file_is_named_with_the_file_and_not_by_an_option(cli, tmp_path, float_model):
    file = tmp_path / "recipe.yaml"

    def refused(text, *options):
        file.write_text(text)
        return error_line(cli("quantize", float_model, tmp_path / "out", "--recipe", file, *options))

    known = "expected a name or pattern such as "
    for key, value in (("keep_float", "['*.no_proj']"), ("modules", "{'*.no_proj': float}")):
        message = refused(f"scheme: w8a16\n{key}: {value}\n")
        assert message.startswith(f"{key} in {file}: got '*.no_proj', which matches no linear, {known}"), message
    message = refused("scheme: w8a16\nkeep_float: ['*']\n", "--keep-float", "*.no_proj")
    assert message.startswith("--keep-float: got '*.no_proj', which matches no linear, ")
    message = refused("scheme: w8a8\nfa_quant: true\n", "--kv-int8")
    assert message.startswith(f"attention: got fa_quant of {file} and --kv-int8, expected one of them")
    assert refused("scheme: w8a8\ndisable_level: 99\n").startswith(f"disable_level in {file}: got L99, ")
    assert refused("scheme: w8a8\nweight_symmetric: false\n").startswith(f"weight_symmetric in {file}: got scheme W8A8")
    assert refused("scheme: w8a8\nfa_amp: -1\nfa_quant: true\n").startswith(f"fa_amp in {file}: got -1")


def test_linears_are_counted_by_what_they_become(cli, tmp_path, float_model):
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: w8a16\nmodules: {'*.mlp.*': w8a8-dynamic, '*.0.mlp.down_proj': float}\n")
    made = cli("quantize", float_model, tmp_path / "out", "--recipe", file)
    assert ": 8 linears as W8A16, 5 as W8A8_DYNAMIC, 1 kept float, " in made.out
    file.write_text("scheme: w8a16\nmodules: {'*': w8a8-dynamic}\n")
    made = cli("quantize", float_model, tmp_path / "all", "--recipe", file)
    assert ": 14 linears as W8A8_DYNAMIC, " in made.out
    made = cli("quantize", float_model, tmp_path / "none", "--scheme", "w8a16", "--keep-float", "*")
    assert ": 0 linears as W8A16, 14 kept float, " in made.out
    assert made.err.count("nothing is quantized") == 1


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 1 of the recipe in {path}: got an anchor or alias (& or *), expected every value in its place"),
        ("scheme: w8a8\nkeep_float: *x\n", "line 2 of the recipe in {path}: got an anchor or alias (& or *), "),
        (
            "keep_float: " + "[" * 50_000,
            "line 1 of the recipe in {path}: got values in more than 8 others, expected key: value",
        ),
        ('{"modules": ' + '{"a": ' * 50_000, "line 1 of the recipe in {path}: got values in more than 8 others, "),
        (
            "keep_float:\n" + "- a\n" * 30_000,
            "line 19999 of the recipe in {path}: got more than 20000 values, expected fewer",
        ),
        (
            "fa_amp: 0x" + "f" * 100_000,
            "line 1 of the recipe in {path}: got a value of 100002 characters, expected at most 1000",
        ),
        ("fa_amp: 1" + ":59" * 100_000, "line 1 of the recipe in {path}: got a value of 300001 characters, "),
        ("x" * 2_000_000, "recipe in {path}: got more than 1 MiB, expected less. Take a part."),
        ("scheme: w8a8\nact_method: 0x" + "f" * 990, "act_method in {path}: got "),
        ("0x" + "f" * 990 + ": 1\n", "key "),
        ("? [1, 2]\n: 3\n", "recipe in {path}: got no YAML (while constructing a mapping"),
        ("a" * 900 + ": 1\n", "key "),
        ("<<: {scheme: w8a8}\n", "key '<<' in {path}: got a merge of mappings, expected keys of a recipe"),
        ("scheme: !" + "t" * 900 + " w8a8\n", "recipe in {path}: got no YAML ("),
        ("scheme: !!python/object/apply:os.getcwd []\n", "recipe in {path}: got no YAML ("),
        ("keep_float: {" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}\n", "keep_float in {path}: got "),
        ("keep_float: ['" + "x" * 900 + "', 1]\n", "keep_float in {path}: got "),
        ("disable_level: '" + "9" * 900 + "'\n", "disable_level: got '9999"),
    ],
)
def test_what_takes_more_than_a_recipe_should_is_refused_in_one_short_line(tmp_path, text, said):
    started = time.process_time()
    with pytest.raises((ConfigError, InputError)) as caught:
        made(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(said.format(path=tmp_path / "recipe.yaml"))
    assert len(message) < 500 + len(str(tmp_path))
    assert time.process_time() - started < 5


def test_a_recipe_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="got a FIFO"):
        read_recipe(tmp_path / "recipe.yaml")
