"""`eightfold analyze`, and `quantize --max-kl`."""

from __future__ import annotations

import json
import re

import pytest

from eightfold.evaluate import evaluate_reference
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.quant.analysis import Analysis
from eightfold.quant.within import held_out
from tests.conftest import tiny_config, token_samples, write_model

SAMPLES = token_samples(17)


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(SAMPLES))
    return "--calib-ids", path


def test_a_limit_is_proved_on_samples_that_were_held_out(cli, tmp_path, float_model, ids):
    command = ("quantize", float_model, tmp_path / "out", "--scheme", "w8a8", "--max-kl", "0.001", *ids)
    made = cli(*command)
    assert made.code == 0, made.err
    found = re.search(r"KL (\S+) on (\d+) held-out tokens \(limit 0.001; losses add up to (\S+)\)", made.out)
    assert found, made.out
    rest, held = held_out(SAMPLES)
    assert (len(rest), len(held)) == (15, 2)
    proof = json.loads((tmp_path / "out" / "eightfold_report.json").read_text())["held_out"]
    decoders = [Decoder(Checkpoint.open(tmp_path / name), dynamic="symmetric") for name in ("out", "float")]
    measured = evaluate_reference(decoders[0], held, decoders[1])
    assert proof["kl"] == pytest.approx(measured.kl_mean, rel=1e-3)
    assert (proof["tokens"], proof["top1"]) == (measured.tokens, pytest.approx(measured.top1_agreement))
    assert proof["kl"] <= 0.001 < 0.2
    again = cli(*command)
    assert (again.code, again.out) == (0, f"{tmp_path / 'out'}: already complete\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_tighter_limit_keeps_more(cli, tmp_path, float_model, ids):
    def counts(limit: str, target: str) -> dict[str, int]:
        out = tmp_path / f"{target}-{limit}"
        made = cli(
            "quantize", float_model, out, "--scheme", "w8a8", "--target", target, "--max-kl", limit, *ids, "--json"
        )
        assert made.code == 0, made.err
        return made.json()["types"]

    assert counts("0.1", "mindie") == {"W8A8": 14, "FLOAT": 1}
    tight = counts("0.00008", "mindie")
    assert set(tight) == {"W8A8", "FLOAT"}
    assert tight["FLOAT"] > 1
    assert {"W8A16", "W8A8_DYNAMIC"} & counts("0.00008", "cpu").keys()


def test_what_nothing_reaches_is_refused_and_leaves_nothing(cli, tmp_path, float_model, ids):
    made = cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a8", "--max-kl", "1e-12", *ids)
    assert made.code == 2
    assert "--max-kl: got 1e-12, which nothing reached, expected at least what was reached: KL" in made.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "ids.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheme", "w8a8-mix"), "--max-kl: got scheme w8a8-mix, expected w8a8, w8a8-dynamic or w8a16"),
        (("--scheme", "w8a8", "--all-static"), "--max-kl: got every linear static, expected a --target"),
        (("--scheme", "w8a8", "--anti-outlier", "m4"), "--max-kl: got anti_outlier m4, expected smooth"),
        (("--scheme", "w8a8", "--train-steps", "5"), "--max-kl: got it with --train-steps, expected one of them"),
        (("--scheme", "w8a8", "--fa-quant"), "--max-kl: got int8 attention, expected float attention: its loss is"),
        (("--scheme", "w8a8", "--device", "cuda"), "--max-kl: got it with --device cuda, expected cpu"),
        (("--scheme", "w8a8", "--calib-limit", "1"), "--max-kl: got 1 calibration samples, expected at least 2, of"),
    ],
)
def test_what_does_not_go_with_a_limit_is_refused(cli, tmp_path, float_model, words, message):
    made = cli("quantize", float_model, tmp_path / "out", "--max-kl", "0.01", *words)
    assert made.code == 2
    assert made.err.splitlines()[-1].startswith(f"eightfold: {message}")
    assert not (tmp_path / "out").exists()


def test_mixtures_have_no_limit_and_no_analysis(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config("Qwen3MoeForCausalLM"))
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a8", "--max-kl", "0.01")
    assert "--max-kl: got a mixture of experts, expected a dense model" in made.err
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--max-kl", "0.01")
    assert "--max-kl: got a model that is quantized by names, expected" in made.err
    assert "analyze: got a mixture of experts" in cli("analyze", source).err


def test_a_plan_tells_what_a_limit_costs(cli, tmp_path, float_model, ids):
    words = ("quantize", float_model, tmp_path / "out", "--scheme", "w8a8", *ids, "--plan", "--json")
    plain, limited = cli(*words), cli(*words, "--max-kl", "0.01")
    assert limited.code == 0, limited.err
    phases = [[phase["phase"] for phase in made.json()["plan"]] for made in (plain, limited)]
    assert phases[1] == [*phases[0], "losses", "proof"]
    assert limited.json()["disk_bytes"] > plain.json()["disk_bytes"]
    assert not (tmp_path / "out").exists()


def test_an_analysis_as_a_table_as_json_and_as_a_page(cli, tmp_path, float_model, ids):
    shown = cli("analyze", float_model, *ids, "--html", tmp_path / "page.html")
    assert shown.code == 0, shown.err
    assert re.search(r"^linears +w8a8 +w8a8-dynamic +w8a16 +int8 +float$", shown.out, re.MULTILINE)
    assert f"eightfold quantize {float_model} OUT --scheme w8a8 --target cpu --max-kl " in shown.out
    assert "<svg" in (tmp_path / "page.html").read_text()
    found = Analysis.from_json(cli("analyze", float_model, *ids, "--json").json())
    assert [(each.layer, each.group) for each in found.groups] == [
        (layer, group) for layer in (0, 1) for group in ("qkv", "o", "gate_up", "down")
    ]
    assert all(each.loss["W8A8"] > each.loss["FLOAT"] == 0 for each in found.groups)
    assert found.ranges[0].tokens[0][2] != ""
    assert found.samples == len(SAMPLES)


def test_a_quantized_model_is_not_analyzed(cli, tmp_path, float_model):
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16").code == 0
    refused = cli("analyze", tmp_path / "out")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert "got a quantized one, expected float weights" in refused.err


def test_a_model_without_a_tokenizer_needs_ids(cli, tmp_path, ids):
    source = write_model(tmp_path / "float", tokenizer=False)
    refused = cli("analyze", source)
    assert refused.code == 2
    assert "tokenizer" in refused.err.splitlines()[-1]
    shown = cli("analyze", source, *ids)
    assert shown.code == 0, shown.err


def test_few_calibration_tokens_are_told(cli, tmp_path, float_model):
    path = tmp_path / "ids.json"

    def told(samples: list[list[int]], *words: str) -> bool:
        path.write_text(json.dumps(samples))
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        made = cli("quantize", float_model, out, "--scheme", "w8a8", "--calib-ids", path, *words)
        assert made.code == 0, made.err
        return "may not show the largest inputs (sinks): give at least 4 samples and 512 tokens." in made.err

    many = [list(range(128))] * 4
    assert not told(many)
    assert told(many[:3])
    assert told([*many[:3], [1, 2, 3]])
    assert not told(many[:3], "--anti-outlier", "none")
