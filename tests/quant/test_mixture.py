"""Calibration of models with experts: what is static, what stays as it is, who has seen data, and what loaders want."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.check import by_name
from eightfold.errors import ConfigError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.description import read_description
from eightfold.format.named import NamedDirectory
from eightfold.model.reference.experts import Router
from eightfold.model.reference.load import Decoder
from eightfold.quant import budget, estimate
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.estimate import estimate_run
from eightfold.quant.experts import FixedRouter
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.plan import assign_types
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import token_samples
from tests.quant.families import save_random
from tests.quant.killing import killed_after

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("Qwen3Moe", "Qwen2Moe", "Mixtral")
STATIC, DYNAMIC, W8A16 = QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16
SAMPLES = token_samples(vocab=64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return lambda name: root / name if (root / name).exists() else save_random(name, root / name)


def tensors_of(path):
    return load_file(next(path.glob("*.safetensors")))


def description_of(path):
    return dict(read_description(path / "quant_model_description.json").tags)


def config_of(path):
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_without_calibration_make_the_same_bytes(tmp_path, saved, name):
    everything = (("model.layers.1.*", W8A16),)  # but routers
    for scheme, modules in ((DYNAMIC, everything), (W8A16, ())):
        recipe = Recipe(scheme, keep_float=("*.layers.1.self_attn.o_proj",), modules=modules)
        quantize_checkpoint(saved(name), tmp_path / "layers", recipe, overwrite=True)
        quantize_by_name(plan_by_name(saved(name), recipe), tmp_path / "names", overwrite=True)
        ours, theirs = tensors_of(tmp_path / "layers"), tensors_of(tmp_path / "names")
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
        assert description_of(tmp_path / "layers") == description_of(tmp_path / "names")
        assert config_of(tmp_path / "layers") == config_of(tmp_path / "names")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen3Moe", {"anti_outlier": AntiOutlier.M6, "fa_quant": True, "disable_level": 2}),
        ("Qwen2Moe", {"anti_outlier": AntiOutlier.M2, "kv_int8": True}),
        ("Mixtral", {"anti_outlier": AntiOutlier.M4, "act_method": ActMethod.AUTO}),
        ("Qwen2Moe", {"anti_outlier": AntiOutlier.SMOOTH, "act_method": ActMethod.EXTREMES}),
    ],
)
def test_attention_is_static_and_experts_are_dynamic(tmp_path, saved, name, options):
    outcome = quantize_checkpoint(saved(name), tmp_path / "out", Recipe(STATIC, **options), SAMPLES)
    back = {row.module for row in outcome.rolled_back}
    for module, kind in outcome.types.items():
        in_attention = ".self_attn." in module
        is_float = module in back or module == "lm_head" or module.endswith((".gate", "shared_expert_gate"))
        assert kind is (QuantType.FLOAT if is_float else STATIC if in_attention else DYNAMIC), module
    assert all(".self_attn." in module for module in back)
    assert len(back) == (3 if options.get("disable_level") else 0)
    checkpoint = Checkpoint.open(tmp_path / "out")
    expected, found = (Decoder(each).logits(SAMPLES[0]) for each in (Checkpoint.open(saved(name)), checkpoint))
    assert float((found - expected).norm() / expected.norm()) < 0.05
    directory = NamedDirectory.open(tmp_path / "out")
    for loader in directory.layout.engines:
        findings = [f for f in by_name.check(directory, loader).findings if not f.verdict.is_harmless]
        rules = {finding.rule for finding in findings}
        refuses_attention = "fa_quant" in options and loader in ("vllm-ascend", "sglang")
        assert rules == ({f"{loader}.fa-scheme"} if refuses_attention else set())
    text = config_of(tmp_path / "out")
    assert text["num_experts"] == text["num_local_experts"] == 4
    assert {key: text.get(key) for key in directory.layout.mindie_keys} == (
        {"quantize": "w8a8", "moe_quantize": "w8a8_dynamic"}
        if name == "Mixtral"
        else {"quantize": "w8a8_dynamic", "attn_quantize": "w8a8"}
    )


def test_smoothing_leaves_routers_and_what_reads_their_norm_alone(tmp_path, saved):
    quantize_checkpoint(saved("Qwen2Moe"), tmp_path / "out", Recipe(DYNAMIC, anti_outlier=AntiOutlier.M4), SAMPLES)
    ours, source = tensors_of(tmp_path / "out"), tensors_of(saved("Qwen2Moe"))
    for name in ("post_attention_layernorm", "mlp.gate", "mlp.shared_expert_gate"):
        assert ours[f"model.layers.1.{name}.weight"].equal(source[f"model.layers.1.{name}.weight"])
    assert not ours["model.layers.1.input_layernorm.weight"].equal(source["model.layers.1.input_layernorm.weight"])
    plain = quantize_checkpoint(saved("Qwen2Moe"), tmp_path / "plain", Recipe(DYNAMIC))
    assert plain.smoothing is None
    experts = [name for name in ours if ".mlp." in name]
    assert all(ours[name].equal(tensors_of(tmp_path / "plain")[name]) for name in experts)


def test_experts_without_data_are_named(tmp_path, saved):
    source, out = saved("Mixtral"), tmp_path / "out"
    outcome = quantize_checkpoint(source, out, Recipe(STATIC), [[5]])  # one token, two of four experts
    assert {layer_idx: len(idle) for layer_idx, idle in outcome.idle_experts.items()} == {0: 2, 1: 2}
    (note,) = [note for note in outcome.notes if "calibration token" in note]
    assert note.startswith("4 experts saw no calibration token (2 in layer 0, 2 in layer 1; ")
    report = json.loads((out / "eightfold_report.json").read_text())
    assert report["idle_experts"] == {str(layer_idx): idle for layer_idx, idle in outcome.idle_experts.items()}
    float_pass_alone = Recipe(DYNAMIC, anti_outlier=AntiOutlier.M1)
    assert quantize_checkpoint(source, tmp_path / "m1", float_pass_alone, [[5]]).idle_experts == outcome.idle_experts
    enough = quantize_checkpoint(source, tmp_path / "enough", Recipe(STATIC), SAMPLES)
    assert enough.idle_experts == {0: [], 1: []}
    assert not [note for note in enough.notes if "calibration token" in note]


def test_a_killed_run_goes_on_and_says_the_same(tmp_path, saved, monkeypatch):
    source, recipe = saved("Mixtral"), Recipe(STATIC, anti_outlier=AntiOutlier.M4, disable_level=1)
    whole = quantize_checkpoint(source, tmp_path / "whole", recipe, [[5], [5, 5]])
    with killed_after(10**9, monkeypatch) as watch:
        quantize_checkpoint(source, tmp_path / "count", recipe, [[5], [5, 5]])
    for share in (0.5, 0.85):
        with killed_after(int(watch.seen * share), monkeypatch):
            quantize_checkpoint(source, tmp_path / "out", recipe, [[5], [5, 5]])
    resumed = quantize_checkpoint(source, tmp_path / "out", recipe, [[5], [5, 5]])
    assert resumed.layers_resumed >= 1
    assert resumed.notes == whole.notes
    assert "experts saw no calibration token" in " ".join(whole.notes)
    for name in ("eightfold_report.json", "config.json", "quant_model_description.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_choice_between_equal_experts_does_not_spoil_the_proof(tmp_path, saved, monkeypatch):
    """Rounding decides between experts of nearly equal weight: the proof has to go by the float model's choices."""
    source = tmp_path / "m"
    shutil.copytree(saved("Mixtral"), source)
    weights, generator = next(source.glob("*.safetensors")), torch.Generator().manual_seed(0)
    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    common = 16 * torch.randn(32, generator=generator)
    for layer_idx in (0, 1):
        own = 1e-6 * torch.randn(4, 32, generator=generator)
        tensors[f"model.layers.{layer_idx}.block_sparse_moe.gate.weight"] = common + own
        for expert in range(4):
            tensors[f"model.layers.{layer_idx}.block_sparse_moe.experts.{expert}.w2.weight"] *= 50
    save_file(tensors, weights)
    samples = token_samples(1, vocab=64, seed=3) * 4
    recipe = Recipe(DYNAMIC, anti_outlier=AntiOutlier.M4)
    assert quantize_checkpoint(source, tmp_path / "out", recipe, samples).smoothing is not None
    monkeypatch.setattr(FixedRouter, "choose", Router.choose)
    with pytest.raises(UnsupportedError, match="largest change of a logit"):
        quantize_checkpoint(source, tmp_path / "other", recipe, samples)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((("*.experts.1.*", STATIC),), "modules: got W8A8 for model.layers.1.mlp.experts.1.gate_proj, expected "),
        ((("*.mlp.gate", W8A16),), "modules: got '*.mlp.gate', which matches no linear, expected a name or pattern"),
    ],
)
def test_types_that_experts_and_routers_cannot_have(saved, modules, message):
    with pytest.raises(ConfigError) as error:
        assign_types(Checkpoint.open(saved("Qwen3Moe")).config, Recipe(STATIC, modules=modules))
    assert str(error.value).startswith(message)


def test_experts_by_the_recipe(tmp_path, saved):
    recipe = Recipe(STATIC, modules=(("*.experts.*", W8A16),), keep_float=("*.experts.3.*",))
    outcome = quantize_checkpoint(saved("Mixtral"), tmp_path / "out", recipe, SAMPLES)
    assert {kind.value for name, kind in outcome.types.items() if ".experts.0." in name} == {"W8A16"}
    assert {kind.value for name, kind in outcome.types.items() if ".experts.3." in name} == {"FLOAT"}
    notes = " ".join(outcome.notes)
    assert "experts are W8A16, which only MindIE's ATB models load" in notes
    assert "stored in two ways (such as model.layers.0.block_sparse_moe.experts)" in notes
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    assert tensors_of(tmp_path / "out")[name].equal(tensors_of(saved("Mixtral"))[name])


def test_experts_count_one_at_a_time_unless_samples_pass(saved):
    checkpoint, largest = Checkpoint.open(saved("Mixtral")), 32 * 48
    each = [budget._bytes_of_layer(checkpoint, 1, Recipe(kind), [8]) for kind in (STATIC, DYNAMIC)]
    assert each[0] - each[1] == (4 * 3 * largest + 4 * 32) - 3 * largest  # all four and the router, or one


def test_the_command(cli, tmp_path, saved):
    """Calibrated schemes go through the layers, the others by names; check takes both."""
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps(sample) for sample in SAMPLES))
    done = cli("quantize", saved("Qwen2Moe"), tmp_path / "out", "--scheme", "w8a8", "--calib-ids", ids)
    assert done.code == 0
    assert "8 linears as W8A8, 30 as W8A8_DYNAMIC, 4 kept float" in done.out
    assert cli("check", tmp_path / "out", "--for", "vllm-ascend", "--for", "mindie", "--for", "sglang").code == 0
    for option, value in (("--anti-outlier", "m4"), ("--keep-float", "*.o_proj")):
        out = tmp_path / option
        assert (
            cli("quantize", saved("Qwen2Moe"), out, "--scheme", "w8a8-dynamic", option, value, "--calib-ids", ids).code
            == 0
        )
    done = cli(
        "quantize", saved("Qwen2Moe"), tmp_path / "no", "--scheme", "w8a8", "--calib-ids", ids, "--memory", "9MiB"
    )
    assert done.code == 2
    assert "for one layer of this model" in done.err


def test_a_plan_counts_layers_with_experts_apart(tmp_path, saved):
    checkpoint, recipe = Checkpoint.open(saved("Qwen3Moe")), Recipe(STATIC, anti_outlier=AntiOutlier.M4)
    found = estimate_run(checkpoint, recipe, SAMPLES, target=tmp_path / "out", memory=None)
    assert not list(tmp_path.iterdir())
    outcome = quantize_checkpoint(checkpoint, tmp_path / "out", recipe, SAMPLES)
    assert found.output_bytes == outcome.nbytes
    assert found.total("read_bytes") == sum(info.nbytes for info in checkpoint.tensors.values()) - 32 * 2  # a norm
    trials = [(10, {"layer 0": 9.0, "layer 1": 2.0})]
    assert estimate._seconds(checkpoint.config, trials, "layer", 10) == 9.0 + 2.0  # one of each kind
    config = replace(
        checkpoint.config, num_layers=9, experts=replace(checkpoint.config.experts, dense_layers=(0, 1, 2, 3))
    )
    assert estimate._trial_layers(config) == 5
    trials = [(10, {"layer 0": 9.0, "layer 1": 2.0, "layer 2": 3.0, "layer 3": 2.0, "layer 4": 7.0})]
    assert estimate._seconds(config, trials, "layer", 10) == 4 * 2.0 + 5 * 7.0
    assert estimate._products(config) == 3072 + 4 * 32 + 2 * 3 * 32 * 24  # attention, router, two experts
