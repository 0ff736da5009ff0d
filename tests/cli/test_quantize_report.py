"""The page of `quantize --report`: what it says is what is on disk and what the float model shows."""

from __future__ import annotations

import json

import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.report.page import number, visible
from eightfold.scheme import QuantType
from eightfold.tokenizer import Tokenizer
from eightfold.values import size_text
from tests.conftest import tiny_config, token_samples, write_model
from tests.refusal import refused, snapshot
from tests.report.parsing import Page


@pytest.fixture
def quantized(cli, float_model, tmp_path):
    """Quantize with a report; return the page and the model."""

    def make(*words):
        done = cli(
            "quantize", float_model, tmp_path / "out", "--calib-limit", 4, "--report", tmp_path / "p.html", *words
        )
        assert done.code == 0, done.err
        return Page((tmp_path / "p.html").read_text("utf-8")), Checkpoint.open(tmp_path / "out")

    return make


def linears(page):
    table = next(rows for rows in page.tables if rows[0] == ["Linear", "Stored as", "Why"])
    return {row[0]: (row[1], row[2]) for row in table[1:]}


def test_types_sizes_and_smoothing_are_those_of_the_model_that_was_made(quantized, float_model):
    page, made = quantized("--scheme", "w8a8", "--target", "cpu")
    page.require_alone()
    found = linears(page)
    assert {name: kind for name, (kind, _) in found.items()} == {name: made.quant_type(name).value for name in found}
    assert found["model.layers.0.self_attn.q_proj"][1] == "--scheme w8a8"
    assert found["model.layers.1.mlp.down_proj"][1].endswith("cannot hold; cpu takes W8A16 beside W8A8")
    assert found["model.layers.1.self_attn.o_proj"][1].endswith("loses less; cpu takes W8A8_DYNAMIC beside W8A8")
    assert found["lm_head"] == ("FLOAT", "the head stays float unless --quantize-lm-head is given")
    assert size_text(sum(info.nbytes for info in made.tensors.values())) in page.inside("dd")
    of_layers = {n: i.nbytes for n, i in made.tensors.items() if n.startswith("model.layers.") and "norm" not in n}
    assert size_text(sum(of_layers.values())) in page.inside("dd")
    choices = json.loads((made.directory / "eightfold_report.json").read_text())["anti_outlier"]["choices"]
    table = next(rows for rows in page.tables if rows[0] == ["Group", "Scale"])
    assert dict(map(tuple, table[1:])) == choices
    ranges = next(rows for rows in page.tables if "Ordinary tokens up to" in rows[0])
    assert [row[:2] for row in ranges[1:]] == [
        [str(layer), label] for layer in range(2) for label in ("q, k, v", "o_proj", "gate, up", "down_proj")
    ]


def test_reasons_name_the_option_that_decided(quantized):
    page, _ = quantized("--scheme", "w8a8", "--all-static", "--disable-level", "L1", "--keep-float", "*.1.*.o_proj")
    found = linears(page)
    assert found["model.layers.1.self_attn.o_proj"] == ("FLOAT", "--keep-float *.1.*.o_proj")
    assert sum(why.startswith("--disable-level: its inputs reach") for _, why in found.values()) == 1


def test_with_a_limit_the_page_has_the_losses_the_proof_and_the_texts_of_tokens(cli, tmp_path, float_model):
    samples, ids = token_samples(17), tmp_path / "ids.json"
    ids.write_text(json.dumps(samples))
    words = ("--scheme", "w8a8", "--max-kl", "0.001", "--calib-ids", ids, "--report", tmp_path / "p.html")
    made = cli("quantize", float_model, tmp_path / "out", *words)
    assert made.code == 0, made.err
    page = Page((tmp_path / "p.html").read_text("utf-8"))
    assert "Where the loss is" in page.inside("h2")
    proof = json.loads((tmp_path / "out" / "eightfold_report.json").read_text())["held_out"]
    assert number(proof["kl"]) in page.inside("dd")
    tokenizer = Tokenizer(float_model)
    texts = {visible(tokenizer.decode([each], keep_special=True)) for sample in samples for each in sample}
    tokens = [text for path, text in page.texts if path[-4:] == ("tr", "td", "bdi", "code") and ".layers." not in text]
    assert len(tokens) > 8
    assert {*tokens} <= {*texts, "lm_head"}


def test_without_calibration_a_page_has_types_and_sizes(quantized, cli, tmp_path, float_model):
    page, made = quantized("--scheme", "w8a16", "--anti-outlier", "none")
    assert page.inside("h2")[:2] == ["How each linear is stored, and why", "Sizes"]
    words = ("--scheme", "w8a16", "--anti-outlier", "none", "--report", tmp_path / "q.html")
    assert cli("quantize", float_model, made.directory, *words).out.endswith("already complete\n")
    assert linears(Page((tmp_path / "q.html").read_text())) == linears(page)


def test_models_that_go_by_names_have_a_page(cli, tmp_path):
    source = write_model(tmp_path / "<script>x", tiny_config("Qwen3MoeForCausalLM"), tokenizer=False)
    words = ("--scheme", "w8a8-dynamic", "--calib", "none", "--report", tmp_path / "p.html")
    done = cli("quantize", source, tmp_path / "out", *words)
    assert done.code == 0, done.err
    page = Page((tmp_path / "p.html").read_text())
    page.require_alone()
    assert "<script>x" in page.inside("h1")[0]
    assert {"W8A8_DYNAMIC", "FLOAT"} >= {kind for kind, _ in linears(page).values()}


def test_ranges_are_those_of_the_float_model_and_asking_for_them_changes_nothing(tmp_path):
    """transformers is the oracle: what reaches each linear. m4 watches a float pass, unlike smooth."""
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "float", tiny_config(torch_dtype="float32"), tokenizer=False)
    samples, recipe = token_samples(4), Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4)
    outcome = quantize_checkpoint(source, tmp_path / "a", recipe, samples, tells_ranges=True)
    plain = quantize_checkpoint(source, tmp_path / "b", recipe, samples)
    assert plain.ranges == []
    without_mode = [{name: content for name, (_, content) in snapshot(tmp_path / each).items() if name != "."}
                    for each in ("a", "b")]  # fmt: skip
    assert without_mode[0] == without_mode[1]
    model, seen = AutoModelForCausalLM.from_pretrained(source), {}
    readers = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    for layer in range(2):
        for title, name in readers.items():
            kept = seen.setdefault((layer, title), [])
            linear = model.get_submodule(f"model.layers.{layer}.{name}")
            linear.register_forward_pre_hook(lambda module, inputs, kept=kept: kept.append(inputs[0][0]))
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([list(sample)]))
    assert [(each.layer, each.group) for each in outcome.ranges] == list(seen)
    for each in outcome.ranges:
        x_TK = torch.cat(seen[each.layer, each.group])
        top = x_TK.abs().amax(0).topk(4)
        assert (each.lo, each.hi) == pytest.approx((float(x_TK.min()), float(x_TK.max())), rel=1e-4)
        assert [channel for channel, _ in each.channels] == top.indices.tolist()
        assert [size for _, size in each.channels] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert each.ordinary < max(-each.lo, each.hi)


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_made(cli, tmp_path, float_model):
    def message(place, *words):
        command = ("quantize", float_model, tmp_path / "out", "--scheme", "w8a16", "--report", place, *words)
        return refused(cli, *command, within=tmp_path).replace(str(tmp_path), "T")

    assert message(tmp_path / "no" / "p.html") == (
        "--report: got T/no/p.html, whose folder does not exist, expected a file in a folder that exists"
    )
    assert message(tmp_path) == "--report: got T, a directory, expected a file, or nothing yet"
    assert message(tmp_path / "out" / "p.html").startswith("--report: got T/out/p.html, which is inside OUT")
    assert message(tmp_path / "p.html", "--plan") == "--report: got it together with --plan, expected one of them"
