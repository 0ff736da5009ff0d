"""`eightfold quantize` from the command line to a directory that runs."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import FAMILIES, tiny_config, write_model
from tests.refusal import quantize_refused


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_and_scheme_quantizes_and_runs(cli, tmp_path, architecture, scheme):
    source = write_model(tmp_path / "float", tiny_config(architecture))
    made = cli("quantize", source, tmp_path / "out", "--scheme", scheme, "--calib-limit", 4)
    assert made.code == 0, made.err
    for backend in ("native", "reference"):
        words = ("--prompt", "hello", "--max-new-tokens", 5, "--json", "--backend", backend)
        ran = cli("run", tmp_path / "out", *words)
        assert ran.code == 0, ran.err
        document = ran.json()
        assert set(document) == {
            "text", "token_ids", "prompt_tokens", "finish_reason", "seconds", "backend", "world_size",
            "resident_weights_mib",
        }  # fmt: skip
        assert document["prompt_tokens"] == 5
        assert document["backend"] == backend


def test_description_names_every_tensor_once(cli, tmp_path, float_model):
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16").code == 0
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["version"] == "1.0.0"
    assert description["model_quant_type"] == "W8A16"
    assert description["lm_head.weight"] == "FLOAT"
    assert description["model.layers.1.mlp.down_proj.weight_scale"] == "W8A16"


def test_json_says_what_was_done_and_a_complete_directory_is_left_alone(cli, tmp_path, float_model):
    command = ("quantize", float_model, tmp_path / "out", "--scheme", "w8a16")
    made = cli(*command, "--json")
    document = made.json()
    assert len(made.out.splitlines()) == 1
    assert set(document) >= {"layers", "layers_resumed", "seconds", "peak_rss_mib"}
    assert (document["layers"], document["layers_resumed"], document["already_complete"]) == (2, 0, False)
    assert document["peak_rss_mib"] > 1
    again = cli(*command)
    assert (again.code, again.out) == (0, f"{tmp_path / 'out'}: already complete\n")
    assert cli(*command, "--json").json()["already_complete"] is True


def test_a_budget_that_cannot_work_is_refused_with_the_one_that_would(cli, tmp_path, float_model):
    message = quantize_refused(cli, float_model, "--memory", "1MiB")
    needed = re.fullmatch(
        r"memory budget: got 1 MiB, expected at least (\d+) MiB for one layer of this model. "
        r"Give that as --memory, or none.",
        message,
    )
    assert needed
    enough = f"{int(needed[1]) + 64}MiB"  # tests before this one may have left some memory to give back
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16", "--memory", enough).code == 0


def test_a_budget_that_is_no_size_is_refused(cli, float_model):
    message = quantize_refused(cli, float_model, "--memory", "much")
    assert message == "--memory: got much, expected a size such as 2GiB or 500MB. Try: eightfold quantize --help"


def test_texts_of_their_own_for_outlier_suppression(cli, tmp_path, float_model):
    (tmp_path / "calib.json").write_text(json.dumps(["alpha beta", "gamma"], indent=1))
    (tmp_path / "anti.json").write_text(json.dumps([["delta"], ["epsilon", "zeta"]]))
    data = ("--calib", tmp_path / "calib.json", "--anti-calib", tmp_path / "anti.json")
    options = ("quantize", float_model, tmp_path / "out", "--anti-outlier", "m4", *data)
    planned = cli(*options, "--scheme", "w8a8", "--plan", "--json")
    assert planned.code == 0, planned.err
    assert cli(*options, "--scheme", "w8a8").code == 0
    report = json.loads((tmp_path / "out" / "eightfold_report.json").read_text())
    assert [report[key]["samples"] for key in ("calibration", "anti_calibration")] == [2, 3]
    (tmp_path / "anti.json").write_text('["other"]')
    again = cli(*options, "--scheme", "w8a8")
    assert again.code == 2
    assert "--anti-calib: 3 samples of " in again.err
    unused = cli("quantize", float_model, tmp_path / "plain", "--scheme", "w8a8", "--anti-outlier", "none", *data)
    assert unused.code == 0
    assert unused.err.startswith("note: there is no --anti-outlier; --anti-calib changes nothing.\n")
    # Nothing but suppression reads texts here.
    enough = cli("quantize", float_model, tmp_path / "w8a16", "--scheme", "w8a16", "--anti-outlier", "m3", *data)
    assert enough.code == 0
    assert enough.err.startswith("note: nothing here needs calibration data; --calib changes nothing.\n")


def test_a_row_that_cannot_be_used_is_named_and_nothing_is_left(cli, tmp_path, float_model):
    for content, message in (
        (
            '["a", {"id": 1, "label": 2}]',
            "row 2 in {}: got an object with id, label, expected a text, or an object with ",
        ),
        ("[[1, 2]]", "row 1 in {}: got numbers"),
    ):
        (tmp_path / "calib.json").write_text(content)
        for flag in ("--calib", "--anti-calib"):
            words = ("--anti-outlier", "m4", flag, tmp_path / "calib.json")
            refused = quantize_refused(cli, float_model, *words, scheme="w8a8")
            assert refused.startswith(message.format(tmp_path / "calib.json"))
    assert refused.endswith("Give token ids as --calib-ids.")


def made_from(cli, source, out, *options):
    """Quantize on four texts; return how many linears have each type, the recipe that the report tells, and stderr."""
    made = cli("quantize", source, out, "--calib-limit", 4, "--json", *options)
    assert made.code == 0, made.err
    recipe = json.loads((out / "eightfold_report.json").read_text())["recipe"]
    return made.json()["types"], [recipe[key] for key in ("anti_outlier", "act_method", "target")], made.err


@pytest.mark.parametrize(
    ("options", "types", "recipe"),
    [
        (["w8a8"], {"W8A8": 12, "FLOAT": 3}, ["smooth", "extremes", "mindie"]),
        (
            ["w8a8", "--target", "cpu"],
            {"W8A8": 10, "W8A8_DYNAMIC": 2, "W8A16": 2, "FLOAT": 1},
            ["smooth", "extremes", "cpu"],
        ),
        (
            ["w8a8", "--target", "vllm-ascend"],
            {"W8A8": 12, "W8A16": 2, "FLOAT": 1},
            ["smooth", "extremes", "vllm-ascend"],
        ),
        (["w8a8", "--all-static"], {"W8A8": 14, "FLOAT": 1}, ["smooth", "extremes", None]),
        (["w8a8", "--act-method", "histogram"], {"W8A8": 12, "FLOAT": 3}, ["smooth", "histogram", "mindie"]),
        (["w8a8", "--anti-outlier", "m4"], {"W8A8": 14, "FLOAT": 1}, ["m4", "minmax", None]),
        (["w8a8", "--anti-outlier", "none"], {"W8A8": 14, "FLOAT": 1}, [None, "minmax", None]),
        (["w8a8-mix"], {"W8A8_MIX": 12, "FLOAT": 3}, ["smooth", "extremes", "mindie"]),
        (["w8a8-dynamic"], {"W8A8_DYNAMIC": 14, "FLOAT": 1}, ["smooth", "extremes", None]),
        (["w8a16"], {"W8A16": 14, "FLOAT": 1}, ["smooth", "extremes", None]),
        (["w8a16", "--calib", "none"], {"W8A16": 14, "FLOAT": 1}, [None, "minmax", None]),
    ],
)
def test_what_is_not_chosen_is_what_is_accurate(cli, tmp_path, float_model, options, types, recipe):
    found = made_from(cli, float_model, tmp_path / "out", "--scheme", *options)
    assert found[:2] == (types, recipe)
    assert ("down_proj stays float" in found[2]) == (recipe[2] == "mindie")


def test_a_saved_recipe_makes_the_same_again(cli, tmp_path, float_model):
    saved = tmp_path / "recipe.yaml"
    first = made_from(cli, float_model, tmp_path / "a", "--scheme", "w8a8", "--all-static", "--save-recipe", saved)
    again = made_from(cli, float_model, tmp_path / "b", "--recipe", saved)
    assert first[:2] == again[:2]


def test_types_of_other_kinds_beside_static_ones_are_not_for_mindie(cli, tmp_path, float_model):
    (tmp_path / "recipe.yaml").write_text("scheme: w8a8\nmodules: {'*.o_proj': w8a8-dynamic}\n")
    types, recipe, _ = made_from(cli, float_model, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    assert types == {"W8A8": 10, "W8A8_DYNAMIC": 2, "W8A16": 2, "FLOAT": 1}
    assert recipe[2] == "cpu"


def test_a_data_free_scheme_stays_data_free_without_texts(cli, tmp_path, float_model):
    def weights(name, *options, source=float_model):
        made = cli("quantize", source, tmp_path / name, "--scheme", "w8a8-dynamic", *options)
        assert made.code == 0, made.err
        return (tmp_path / name / "quant_model_weight_w8a8_dynamic.safetensors").read_bytes(), made.err

    plain = weights("plain", "--anti-outlier", "none")
    assert "calibrat" not in plain[1]
    assert weights("none", "--calib", "none") == plain
    bare = write_model(tmp_path / "bare", tiny_config(), tokenizer=False)
    plain, _ = weights("bare-plain", "--anti-outlier", "none", source=bare)
    found, said = weights("bare-out", source=bare)
    assert found == plain
    assert "note: without a tokenizer there are no calibration texts, so OUT is not smoothed; --calib-ids" in said
    (tmp_path / "ids.json").write_text("[[1, 2, 3], [4, 5]]")
    assert weights("ids", "--calib-ids", tmp_path / "ids.json", source=bare)[0] != plain


def test_static_schemes_need_texts(cli, float_model):
    refused = quantize_refused(cli, float_model, "--calib", "none", scheme="w8a8")
    assert refused.startswith("--calib: got none, for W8A8, expected texts: this recipe needs calibration")
    refused = quantize_refused(cli, float_model, "--all-static", "--target", "cpu", scheme="w8a8")
    assert refused == "--all-static: got it together with --target, expected one of them"
