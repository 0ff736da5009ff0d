"""compressed-tensors directories that are imported: as our own exports, as others write them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.exporters import ExportOptions, plan_export
from eightfold.format import patterns
from eightfold.format.checkpoint import Checkpoint
from eightfold.importers import ImportOptions, importer_of
from eightfold.model.reference.load import Decoder
from eightfold.progress import silent
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import random_tensors, tiny_config, token_samples, write_model
from tests.quant.killing import killed_after
from tests.refusal import refused, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

W8A8, DYNAMIC, W8A16 = QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16
CONFIG = tiny_config("Qwen2ForCausalLM", hidden_size=42, head_dim=14)
INTEGERS = {"num_bits": 8, "type": "int", "symmetric": True}
WEIGHTS = {**INTEGERS, "strategy": "channel", "dynamic": False, "group_size": None, "observer": "minmax"}
TOKENS = {**INTEGERS, "strategy": "token", "dynamic": True}
STATIC = {**INTEGERS, "strategy": "tensor", "dynamic": False}
Q = "model.layers.0.self_attn.q_proj"


def take(source, target, **options):
    importer = importer_of(source)
    return importer.convert(source, target, ImportOptions(**options))


def tensors(path):
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("scheme", "choices", "tied"),
    [
        (W8A8, {}, False),
        (DYNAMIC, {"keep_float": ("*.0.mlp.down_proj",)}, True),
        (W8A16, {"weight_symmetric": False}, False),
        (W8A8, {"modules": (("*.mlp.down_proj", W8A16), ("*.mlp.up_proj", DYNAMIC))}, True),
    ],
)
def test_what_was_exported_comes_back_to_the_last_bit(tmp_path, scheme, choices, tied):
    source = write_model(tmp_path / "float", {**CONFIG, "tie_word_embeddings": tied})
    quantize_checkpoint(source, tmp_path / "int8", Recipe(scheme, **choices), token_samples())
    plan = plan_export(tmp_path / "int8", "compressed-tensors", ExportOptions(), lossy=False)
    plan.write(tmp_path / "ct", overwrite=False, progress=silent)
    take(tmp_path / "ct", tmp_path / "back")
    before, after = tensors(tmp_path / "int8"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    # A bias is stored rounded, and quant_bias was made of what it was before.
    same = {name for name in before if before[name].dtype == after[name].dtype and before[name].equal(after[name])}
    changed = before.keys() - same
    assert {name.rpartition(".")[2] for name in changed} <= {"quant_bias"}
    for name in changed:
        assert (before[name] - after[name]).abs().max() <= before[name].abs().max() * 2**-7
    assert (tmp_path / "int8/config.json").read_bytes() == (tmp_path / "back/config.json").read_bytes()
    entries = [json.loads((tmp_path / name / "quant_model_description.json").read_text()) for name in ("int8", "back")]
    assert entries[0] == entries[1]


def written(path, group, change=lambda tensors: None, *, settings=None, packed=False):
    """Write a model as llm-compressor does: scales in the model's dtype, integers down to -128."""
    stored = {}
    for name, value in random_tensors(CONFIG).items():
        if value.dim() != 2 or "embed" in name or "lm_head" in name:
            stored[name] = value
            continue
        module, w = name.removesuffix(".weight"), value.float()
        scale = (w.abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
        integers = (w / scale.float()).round().clamp(-128, 127).to(torch.int8)
        integers[0, 0] = -128
        stored[f"{module}.weight_scale"] = scale
        if packed:
            filled = torch.nn.functional.pad(integers.int() + 128, (0, -integers.shape[1] % 4)).to(torch.uint8)
            stored[f"{module}.weight_packed"] = filled.view(torch.int32)
            stored[f"{module}.weight_shape"] = torch.tensor(integers.shape)
        else:
            stored[f"{module}.weight"] = integers
    change(stored)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, **group}},
        "ignore": ["lm_head"],
        **(settings or {}),
    }
    path.mkdir()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    return stored


def test_dynamic_weights_of_other_writers_are_taken_as_they_are(tmp_path):
    stored = written(tmp_path / "ct", {"input_activations": TOKENS})
    assert take(tmp_path / "ct", tmp_path / "out").startswith("14 linears as W8A8_DYNAMIC")
    made = Checkpoint.open(tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert made.quant_type(Q) is DYNAMIC
    assert after[f"{Q}.weight"].equal(stored[f"{Q}.weight"])
    assert after[f"{Q}.weight"].min() == -128
    assert after[f"{Q}.weight_scale"].equal(stored[f"{Q}.weight_scale"].float())
    assert after[f"{Q}.bias"].equal(stored[f"{Q}.bias"])
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_packed_weights_alone_are_unpacked(tmp_path):
    stored = written(tmp_path / "ct", {"input_activations": None}, packed=True)
    plain = written(tmp_path / "plain", {"input_activations": None})
    take(tmp_path / "ct", tmp_path / "out")
    take(tmp_path / "plain", tmp_path / "other")
    after, other = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert f"{Q}.weight_packed" in stored
    assert after[f"{Q}.weight"].equal(plain[f"{Q}.weight"])
    assert after.keys() == other.keys()
    assert all(after[name].equal(other[name]) for name in after)


@pytest.mark.parametrize("zero", [None, -7])
def test_static_inputs_get_what_follows_from_them(tmp_path, zero):
    scale = 0.0123456  # of no bfloat16

    def add(stored):
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            module = name.removesuffix(".weight_scale")
            stored[f"{module}.input_scale"] = torch.tensor(scale)
            if zero is not None:
                stored[f"{module}.input_zero_point"] = torch.tensor([zero], dtype=torch.int8)

    stored = written(tmp_path / "ct", {"input_activations": STATIC}, add)
    take(tmp_path / "ct", tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").quant_type(Q) is W8A8
    assert after[f"{Q}.input_scale"].equal(torch.tensor([scale]))
    assert after[f"{Q}.input_offset"].float().item() == (zero or 0)
    deq_scale = torch.tensor(scale) * stored[f"{Q}.weight_scale"].float()[:, 0]
    assert after[f"{Q}.deq_scale"].equal(deq_scale)
    folded = stored[f"{Q}.bias"].double() / deq_scale.double() - (zero or 0) * stored[f"{Q}.weight"].double().sum(1)
    assert after[f"{Q}.quant_bias"].equal(folded.round().int())


def test_one_scale_for_a_whole_weight_becomes_one_for_each_output(tmp_path):
    def shrink(stored):
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[name] = torch.tensor([0.03125])

    group = {"input_activations": TOKENS, "weights": {**WEIGHTS, "strategy": "tensor"}}
    written(tmp_path / "ct", group, shrink)
    take(tmp_path / "ct", tmp_path / "out")
    assert tensors(tmp_path / "out")[f"{Q}.weight_scale"].equal(torch.full((56, 1), 0.03125))


@pytest.mark.parametrize(
    ("group", "settings", "expected"),
    [
        ({"weights": {**WEIGHTS, "strategy": "group", "group_size": 128}}, {},
         '"strategy" of weights in config.json: got \'group\' of 128, expected channel or tensor'),
        ({"weights": {**WEIGHTS, "actorder": "weight"}}, {},
         '"actorder" of weights in config.json: got \'weight\', expected None'),
        ({"weights": {**WEIGHTS, "dynamic": True}}, {}, '"dynamic" of weights in config.json: got True'),
        ({"input_activations": {**TOKENS, "num_bits": 4}}, {}, '"num_bits" of input_activations in config.json: got 4'),
        ({"input_activations": {**TOKENS, "strategy": "tensor"}}, {}, '"strategy" of input_activations'),
        ({"output_activations": TOKENS}, {}, '"output_activations" in config.json'),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, '"sparsity_config" in config.json'),
        ({}, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, '"kv_cache_scheme" in config.json'),
        ({}, {"transform_config": {"config_groups": {"u": {}}}}, '"transform_config" in config.json'),
        ({"targets": ["re:.*mlp.*"]}, {}, "targets for model.layers.0.self_attn"),
        ({"targets": ["re:(("]}, {}, "targets in config.json: got '((' (missing ), unterminated"),
    ],
)  # fmt: skip
def test_what_our_layout_does_not_hold_is_refused_by_name(cli, tmp_path, group, settings, expected):
    written(tmp_path / "ct", {"input_activations": TOKENS, **group}, settings=settings)
    message = refused(cli, "import", tmp_path / "ct", tmp_path / "out", within=tmp_path)
    assert expected in message.replace(f"{tmp_path / 'ct'}/", ""), message


def test_a_target_that_is_tried_for_ever_is_refused(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    targets = ["re:.*self_attn", "re:([a-z_.0-9]+)+!", "Linear"]
    written(tmp_path / "ct", {"input_activations": TOKENS, "targets": targets})
    message = refused(cli, "import", tmp_path / "ct", tmp_path / "out", within=tmp_path)
    assert message.startswith(f"targets in {tmp_path / 'ct'}/config.json: got '([a-z_.0-9]+)+!' (more than 1 s on 14 n")
    checked = cli("check", tmp_path / "ct", "--for", "vllm")
    assert (checked.code, "takes no time" in checked.out) == (1, True)


def test_the_first_pattern_that_matches_counts():
    names = ["a.q_proj", "b.q_proj", "b.k_proj", "c"]
    found = patterns.first_matches([r"b\.", r".*q_proj$", r"(?!c).*"], names)
    assert found == {"a.q_proj": ".*q_proj$", "b.q_proj": r"b\.", "b.k_proj": r"b\."}
    with pytest.raises(patterns.PatternError, match="missing"):
        patterns.first_matches(["(" * 3], names)


def test_offsets_of_weights_beside_int8_inputs_are_refused(cli, tmp_path):
    def add(stored):
        stored[f"{Q}.weight_zero_point"] = torch.zeros(56, 1, dtype=torch.int8)

    written(tmp_path / "ct", {"input_activations": TOKENS}, add)
    message = refused(cli, "import", tmp_path / "ct", tmp_path / "out", within=tmp_path)
    assert "weights with offsets and W8A8_DYNAMIC" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({f"{Q}.weight_scale": None}, f"{Q}.weight_scale in DIR: got none"),
        ({f"{Q}.weight_scale": torch.full((56, 1), torch.nan)}, f"{Q}.weight_scale"),
        ({f"{Q}.weight_scale": torch.ones(56, 3)}, f"shape of {Q}.weight_scale"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight"),
        ({f"{Q}.weight": torch.zeros(56 * 42, dtype=torch.int8)}, f"{Q}.weight in DIR/model.safetensors: got [2352]"),
        ({f"{Q}.weight_scale": torch.ones(56, 1).double()}, f"type of {Q}.weight_scale"),
        ({f"{Q}.weight_packed": torch.zeros(56, 11, dtype=torch.int32)}, "got weight and weight_packed"),
        ({"model.norm.weight": torch.ones(42).double()}, "type of model.norm.weight"),
        (
            {"model.norm.weight": torch.full((42,), torch.nan)},
            "model.norm.weight[0, 0] in DIR/model.safetensors: got n",
        ),
        (
            {"lm_head.weight": torch.full((320, 42), -torch.inf)},
            "lm_head.weight[0, 0] in DIR/model.safetensors: got -",
        ),
        ({f"{Q}.bias": torch.full((56,), torch.inf)}, f"{Q}.bias"),
    ],
)
def test_damaged_files_are_refused(cli, tmp_path, change, expected):
    require_refused(cli, tmp_path, {"input_activations": TOKENS}, change, expected)


def require_refused(cli, tmp_path, group, change, expected, **options):
    def damage(stored):
        stored.update(change)
        for name in [name for name, value in stored.items() if value is None]:
            del stored[name]

    written(tmp_path / "ct", group, damage, **options)
    message = refused(cli, "import", tmp_path / "ct", tmp_path / "out", within=tmp_path)
    assert expected in message.replace(str(tmp_path / "ct"), "DIR"), message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight_zero_point": torch.zeros(7, dtype=torch.int8)}, "got [7], expected [56, 1]"),
        ({"weight_zero_point": torch.zeros(3, 1, dtype=torch.int32)}, "got [3, 1], expected [14, 1]"),
        ({"weight_zero_point": torch.full((56, 1), 300.0)}, "got 300, expected integers from -128 to 127"),
        ({"weight_shape": torch.tensor([torch.nan, 42])}, f"shape of {Q}.weight_packed"),
    ],
)
def test_damaged_packed_weights_are_refused(cli, tmp_path, change, expected):
    require_refused(cli, tmp_path, {}, {f"{Q}.{name}": value for name, value in change.items()}, expected, packed=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input_scale": torch.ones(2)}, "got [2], expected [1]"),
        ({"input_scale": torch.ones(0)}, "got [0], expected [1]"),
        ({"input_zero_point": torch.tensor([200.0])}, "got 200, expected integers from -128 to 127"),
        ({"input_zero_point": torch.tensor([1, 2], dtype=torch.int8)}, "got [2], expected [1]"),
    ],
)
def test_damaged_static_inputs_are_refused(cli, tmp_path, change, expected):
    linears = [name.removesuffix(".weight") for name in random_tensors(CONFIG) if "_proj.weight" in name]
    scales = {f"{linear}.input_scale": torch.ones(1) for linear in linears}
    damaged = {f"{Q}.{name}": value for name, value in change.items()}
    require_refused(cli, tmp_path, {"input_activations": STATIC}, {**scales, **damaged}, expected)


def test_other_tools_are_refused_in_one_line(cli, float_model):
    path = float_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    message = refused(cli, "import", float_model, float_model.parent / "out", within=float_model.parent)
    assert message == (
        f"\"quant_method\" in {path}: got 'gptq', expected compressed-tensors or fp8. Start from the model's "
        "unquantized weights."
    )


def test_a_float_directory_needs_no_import(cli, float_model):
    message = refused(cli, "import", float_model, float_model.parent / "out", within=float_model.parent)
    assert message.endswith("A float directory needs no import: quantize, run and eval read it.")


def test_float8_becomes_float(tmp_path, cli):
    source = write_model(tmp_path / "float8", tiny_config())
    stored, expected = load_file(source / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        scale = torch.full((len(stored[name]), 1), 0.5)
        stored[name] = (stored[name].float() / 0.5).to(torch.float8_e4m3fn)
        stored[name.replace("weight", "weight_scale")] = scale
        expected[name] = (stored[name].float() * 0.5).to(torch.float16)
    save_file(stored, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": ["Linear"]}
    method = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    done = cli("import", source, tmp_path / "out", "--dtype", "fp16")
    assert done.code == 0, done.err
    assert "14 weights widened to F16" in done.out
    after = tensors(tmp_path / "out")
    assert all(after[name].equal(value) for name, value in expected.items())
    assert Checkpoint.open(tmp_path / "out").config_raw["torch_dtype"] == "float16"
    assert not Checkpoint.open(tmp_path / "out").is_quantized

    stored["model.norm.weight"][3] = torch.nan  # of what is copied
    save_file(stored, source / "model.safetensors")
    message = refused(cli, "import", source, tmp_path / "damaged", within=tmp_path)
    assert message.startswith("model.norm.weight[3, 0] in ")


def test_an_import_that_is_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    written(tmp_path / "ct", {"input_activations": TOKENS})
    take(tmp_path / "ct", tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    for left in (20, 40, 60, 80, 100):
        target = tmp_path / f"killed{left}"
        with killed_after(left, monkeypatch):
            take(tmp_path / "ct", target)
        take(tmp_path / "ct", target)
        assert snapshot(target) == whole


def test_an_imported_model_computes_what_its_numbers_say(tmp_path):
    """With int8 weights alone it is the float model of their values."""
    stored = written(tmp_path / "ct", {"input_activations": None})
    take(tmp_path / "ct", tmp_path / "out")
    floats = {}
    for name, value in stored.items():
        scale = stored.get(f"{name.removesuffix('.weight')}.weight_scale")
        if not name.endswith("weight_scale"):
            floats[name] = value if scale is None else value.float() * scale.float()
    write_model(tmp_path / "float", CONFIG)
    save_file(floats, tmp_path / "float/model.safetensors")
    ours, theirs = (Decoder(Checkpoint.open(tmp_path / name)).logits(token_samples()[0]) for name in ("out", "float"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_of_another_family_is_told_the_way(cli, tmp_path):
    written(tmp_path / "ct", {"input_activations": TOKENS})
    path = tmp_path / "ct/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["DeepseekV3ForCausalLM"]}))
    message = refused(cli, "import", tmp_path / "ct", tmp_path / "out", within=tmp_path)
    assert "quantize DIR OUT --scheme w8a8-dynamic keeps its integers" in message
