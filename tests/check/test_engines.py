"""What vLLM and transformers would do, on directories of ours and on exported ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.check import engines
from eightfold.exporters import ExportOptions, plan_export
from eightfold.format.named import NamedDirectory
from eightfold.progress import silent
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import token_samples, write_model
from tests.quant.families import save_random

W8A8, DYNAMIC, MIX, W8A16 = QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX, QuantType.W8A16


@pytest.fixture
def made(tmp_path):
    """A function that quantizes a tiny Llama, and exports it; it returns both directories."""

    def make(scheme, **recipe):
        quantize_checkpoint(
            write_model(tmp_path / "float"), tmp_path / "int8", Recipe(scheme, **recipe), token_samples()
        )
        return tmp_path / "int8", export(tmp_path / "int8", tmp_path / "out")

    return make


def export(source, target):
    plan = plan_export(source, "compressed-tensors", ExportOptions(), lossy=True)
    plan.write(target, overwrite=False, progress=silent)
    return target


def rules(path, loader):
    report = engines.check(NamedDirectory.open(path), loader)
    return {finding.rule.removeprefix(f"{loader}."): finding.verdict.value for finding in report.findings}


def test_ours_needs_a_plugin_in_vllm_and_an_export_for_transformers(made):
    ours, _ = made(W8A8)
    assert rules(ours, "vllm") == {"plugin": "warns"}
    assert rules(ours, "transformers") == {"names": "refuses"}


@pytest.mark.parametrize(
    ("scheme", "recipe", "there", "transformers"),
    [
        (W8A8, {}, {}, {"package", "static"}),
        (DYNAMIC, {}, {}, {"package"}),
        (MIX, {}, {}, {"package"}),
        (W8A16, {}, {"cpu"}, {"package"}),
        (W8A16, {"weight_symmetric": False}, {"cpu", "zero-points"}, {"package", "zero-points"}),
    ],
)
def test_exported_directories_load_and_a_person_should_know(made, scheme, recipe, there, transformers):
    _, out = made(scheme, **recipe)
    assert rules(out, "vllm") == dict.fromkeys(there, "warns")
    assert rules(out, "transformers") == dict.fromkeys(transformers, "warns")


def test_what_vllm_makes_otherwise_of_ours(made):
    ours, _ = made(MIX, kv_int8=True, keep_float=("*.0.self_attn.q_proj",))
    assert rules(ours, "vllm") == {"plugin": "warns", "mix": "warns", "attention": "ignores", "mixed-group": "refuses"}


def test_linears_that_become_one_have_to_be_stored_alike_in_exports_too(made):
    _, out = made(DYNAMIC, keep_float=("*.0.mlp.up_proj",))
    assert rules(out, "vllm") == {"mixed-group": "refuses"}


def test_norms_have_no_bias(made):
    ours, _ = made(DYNAMIC)
    file = next(ours.glob("*.safetensors"))
    stored = load_file(file)
    stored["model.layers.0.input_layernorm.bias"] = torch.ones(48)
    file.chmod(0o600)
    save_file(stored, file)
    assert rules(ours, "vllm")["norm-bias"] == "refuses"


def test_experts(tmp_path):
    source = save_random("Qwen3Moe", tmp_path / "float")
    quantize_by_name(plan_by_name(source, Recipe(DYNAMIC)), tmp_path / "int8")
    assert rules(tmp_path / "int8", "vllm") == {"plugin": "warns", "experts": "warns"}
    out = export(tmp_path / "int8", tmp_path / "out")
    assert rules(out, "vllm") == {"experts": "warns"}
    assert rules(out, "transformers") == {"package": "warns", "experts": "refuses"}
    quantize_by_name(plan_by_name(source, Recipe(W8A16, modules=(("*.experts.*", W8A16),))), tmp_path / "other")
    assert rules(tmp_path / "other", "vllm")["scheme-experts"] == "refuses"
    packed = export(tmp_path / "other", tmp_path / "packed")
    assert rules(packed, "transformers") == {"package": "warns"}
    assert rules(packed, "vllm") == {"cpu": "warns", "experts": "warns"}


def test_float_directories_have_nothing_to_be_found(float_model):
    assert [rules(float_model, loader) for loader in engines.LOADERS] == [{}, {}]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"quant_method": "gptq"}, "method"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}, "unread"),
    ],
)
def test_other_writers_are_not_judged(float_model, settings, rule):
    path = float_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    assert rules(float_model, "vllm") == {rule: "refuses"}


def test_the_command_checks_for_them_when_they_are_named(made, cli):
    ours, out = made(W8A8)
    done = cli("check", ours, "--for", "transformers")
    assert done.code == 1
    assert "Run: eightfold export DIR OUT --to compressed-tensors" in done.out
    done = cli("check", out, "--for", "vllm", "--for", "transformers", "--json")
    assert done.code == 0
    assert [report["loader"] for report in done.json()["reports"]] == ["vllm", "transformers"]
    assert done.json()["reports"][0]["summary"]["linears"] == {"W8A8": 14}
