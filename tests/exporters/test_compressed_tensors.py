"""compressed-tensors: what stands in the files, and what is refused, lost or gone on with. Nothing here loads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eightfold.errors import ConfigError, OutputError, UnsupportedError
from eightfold.exporters import ExportOptions, compressed_tensors, plan_export
from eightfold.progress import silent
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.quant.families import save_random
from tests.quant.killing import killed_after
from tests.refusal import refused, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

W8A8, DYNAMIC, MIX, W8A16 = QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX, QuantType.W8A16
LAYER = "model.layers.1"


@pytest.fixture
def made(tmp_path):
    """A function that quantizes a tiny Qwen2, which has biases, and exports it; it returns both directories."""

    def make(scheme, *, activations=None, lossy=False, config=None, **recipe):
        config = config or tiny_config("Qwen2ForCausalLM", hidden_size=42, head_dim=14)
        source = write_model(tmp_path / "float", config)
        quantize_checkpoint(source, tmp_path / "int8", Recipe(scheme, **recipe), token_samples())
        return tmp_path / "int8", export(tmp_path / "int8", tmp_path / "out", activations=activations, lossy=lossy)

    return make


def export(source, target, *, activations=None, lossy=False, **options):
    plan = plan_export(source, "compressed-tensors", ExportOptions(activations=activations), lossy=lossy)
    plan.write(target, overwrite=options.pop("overwrite", False), progress=silent)
    return target


def tensors(path):
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def change(path, changed):
    """Replace tensors; None removes one, and its entry. The directory is then nobody's in particular."""
    file = next(path.glob("*.safetensors"))
    stored, description = load_file(file), path / "quant_model_description.json"
    entries = json.loads(description.read_text())
    for name, value in changed.items():
        if value is None:
            del stored[name], entries[name]
        else:
            stored[name] = value
            entries.setdefault(name, "FLOAT")
    file.chmod(0o600)
    save_file(stored, file)
    description.write_text(json.dumps(entries))
    (path / "eightfold_journal.jsonl").unlink(missing_ok=True)


def test_static_linears_keep_their_integers_scales_and_offsets(made):
    ours, out = made(W8A8)
    before, after = tensors(ours), tensors(out)
    q = f"{LAYER}.self_attn.q_proj"
    assert torch.equal(after[f"{q}.weight"], before[f"{q}.weight"])
    assert torch.equal(after[f"{q}.weight_scale"], before[f"{q}.weight_scale"])
    assert after[f"{q}.weight_scale"].dtype == torch.float32
    assert torch.equal(after[f"{q}.input_scale"], before[f"{q}.input_scale"].float())
    assert after[f"{q}.input_zero_point"].dtype == torch.int8
    assert after[f"{q}.input_zero_point"].item() == before[f"{q}.input_offset"].item() != 0
    assert torch.equal(after[f"{q}.bias"], before[f"{q}.bias"])
    suffixes = {name.rpartition(".")[2] for name in after}
    assert suffixes == {"weight", "weight_scale", "input_scale", "input_zero_point", "bias"}
    (group,) = config_of(out)["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 8,
        "type": "int",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False}
    assert group["input_activations"] == inputs
    assert config_of(out)["format"] == "int-quantized"


def test_float_linears_are_ignored_by_their_names_and_by_those_of_what_engines_join(made):
    ours, out = made(DYNAMIC, keep_float=("model.layers.0.self_attn.*_proj", "*.1.mlp.down_proj"))
    ignored = set(config_of(out)["ignore"])
    floats = {f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "o", "qkv")}
    assert ignored == {*floats, "model.layers.1.mlp.down_proj", "lm_head"}
    assert config_of(out)["config_groups"]["group_0"]["targets"] == ["Linear"]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(tensors(out)[name], tensors(ours)[name])


@pytest.mark.parametrize(("activations", "is_symmetric"), [(None, True), ("symmetric", True), ("asymmetric", False)])
def test_dynamic_linears_have_no_parameters_of_inputs(made, activations, is_symmetric):
    _, out = made(DYNAMIC, activations=activations)
    suffixes = {name.rpartition(".")[2] for name in tensors(out)}
    assert suffixes == {"weight", "weight_scale", "bias"}
    inputs = config_of(out)["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) == ("token", True, is_symmetric)


def test_mixed_phases_become_dynamic(made):
    ours, out = made(MIX)
    inputs = config_of(out)["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("token", True)
    suffixes = {name.rpartition(".")[2] for name in tensors(out)}
    assert suffixes == {"weight", "weight_scale", "bias"}
    notes = plan_export(ours, "compressed-tensors", ExportOptions(), lossy=False).notes
    assert any("W8A8_MIX becomes W8A8_DYNAMIC" in note for note in notes)


def unpacked(packed, count):
    """Return what int32 hold, as compressed-tensors says it: the lowest byte first, 128 more."""
    values = packed.numpy().view(np.uint32)[..., None] >> np.array([0, 8, 16, 24], np.uint32) & 255
    return values.reshape(len(packed), -1)[:, :count].astype(np.int64) - 128


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_weights_alone_are_packed(made, is_symmetric):
    ours, out = made(W8A16, weight_symmetric=is_symmetric)
    before, after = tensors(ours), tensors(out)
    for module in (f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.up_proj"):  # of 42 inputs: not a multiple of 4
        n, k = before[f"{module}.weight"].shape
        assert after[f"{module}.weight_shape"].tolist() == [n, k]
        assert after[f"{module}.weight_packed"].shape == (n, -(-k // 4))
        assert np.array_equal(unpacked(after[f"{module}.weight_packed"], k), before[f"{module}.weight"].numpy())
        if is_symmetric:
            assert f"{module}.weight_zero_point" not in after
        else:
            zero = after[f"{module}.weight_zero_point"]
            assert zero.shape == (-(-n // 4), 1)
            offset = before[f"{module}.weight_offset"].flatten().numpy()
            assert np.array_equal(unpacked(zero.reshape(1, -1), n)[0], offset)
    group = config_of(out)["config_groups"]["group_0"]
    assert (group["weights"]["symmetric"], group["input_activations"]) == (is_symmetric, None)
    assert config_of(out)["format"] == "pack-quantized"


def test_mixtures_name_the_linears_of_each_group(made):
    modules = (("*.mlp.down_proj", W8A16), ("*.0.self_attn.o_proj", DYNAMIC))
    _, out = made(W8A8, modules=modules)
    config = config_of(out)
    assert config["format"] == "mixed-precision"
    by_form = {
        (g["format"], (g["input_activations"] or {}).get("dynamic")): g for g in config["config_groups"].values()
    }
    assert by_form["pack-quantized", None]["targets"] == [r"re:.*\.mlp\.down_proj$"]
    assert by_form["int-quantized", True]["targets"] == ["model.layers.0.self_attn.o_proj"]
    static = by_form["int-quantized", False]["targets"]
    assert r"re:.*\.self_attn\.q_proj$" in static
    assert "model.layers.1.self_attn.o_proj" in static
    assert not any("down_proj" in target for target in static)


def test_a_tied_head_is_left_out_and_ignored(made):
    _, out = made(W8A16, config=tiny_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors(out)
    assert config_of(out)["ignore"] == ["lm_head"]


def test_the_other_files_come_along_and_ours_do_not(made):
    _, out = made(DYNAMIC)
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    own = {"config.json", "model.safetensors", "eightfold_journal.jsonl", "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == copied | own
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_int8_caches_are_lost_only_by_consent(made, cli, tmp_path):
    with pytest.raises(ConfigError, match=r"the int8 key/value cache \(C8\) of 2 layers.*`lossy`"):
        made(DYNAMIC, kv_int8=True)
    message = refused(cli, "export", tmp_path / "int8", tmp_path / "out", "--to", "compressed-tensors", within=tmp_path)
    assert message.endswith("Give --lossy to write the model without.")
    done = cli("export", tmp_path / "int8", tmp_path / "out", "--to", "compressed-tensors", "--lossy", "--json")
    assert done.code == 0
    assert "note: lost: the int8 key/value cache (C8) of 2 layers" in done.err
    assert len(json.loads(done.out)["losses"]) == 1
    assert not any("kv_cache" in name for name in tensors(tmp_path / "out"))


def test_zero_norm_biases_are_dropped_and_others_refused(made, tmp_path):
    ours, out = made(W8A8, anti_outlier=AntiOutlier.M4)
    assert f"{LAYER}.input_layernorm.bias" in tensors(ours)
    assert not any(name.endswith("norm.bias") for name in tensors(out))
    change(ours, {f"{LAYER}.input_layernorm.bias": torch.full((42,), 0.5)})
    with pytest.raises(UnsupportedError, match=r"input_layernorm\.bias.*a norm that adds something"):
        export(ours, tmp_path / "other")


@pytest.mark.parametrize(
    ("suffix", "value", "said"),
    [
        ("input_offset", 0.5, r"input_offset.*0\.5.*whole numbers"),
        ("weight_offset", 3.0, r"weight_offset.*expected zeros"),
    ],
)
def test_offsets_that_the_format_cannot_hold_are_refused(made, tmp_path, suffix, value, said):
    ours, _ = made(W8A8)
    name = f"{LAYER}.self_attn.o_proj.{suffix}"
    change(ours, {name: torch.full_like(tensors(ours)[name], value)})
    with pytest.raises(UnsupportedError, match=said):
        export(ours, tmp_path / "other")


def test_a_bias_that_is_in_quant_bias_alone_is_found_again(made, tmp_path):
    ours, out = made(W8A8)
    name = f"{LAYER}.self_attn.q_proj.bias"
    change(ours, {name: None})
    found, expected = tensors(export(ours, tmp_path / "other"))[name], tensors(out)[name].float()
    step = tensors(ours)[name.replace("bias", "deq_scale")].abs()
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= step).all()


def test_a_weight_scale_that_was_left_out_is_computed(made, tmp_path):
    ours, out = made(W8A8)
    name = f"{LAYER}.self_attn.q_proj.weight_scale"
    change(ours, {name: None})
    plan = plan_export(ours, "compressed-tensors", ExportOptions(), lossy=False)
    assert "1 weight_scale is not stored, and computed as deq_scale / input_scale." in plan.notes
    plan.write(tmp_path / "other", overwrite=False, progress=silent)
    torch.testing.assert_close(tensors(tmp_path / "other")[name], tensors(out)[name], rtol=1e-6, atol=0)


def test_experts_are_exported_by_name(tmp_path):
    source = save_random("Qwen3Moe", tmp_path / "float")
    quantize_by_name(plan_by_name(source, Recipe(DYNAMIC)), tmp_path / "int8")
    out = export(tmp_path / "int8", tmp_path / "out")
    before, after = tensors(tmp_path / "int8"), tensors(out)
    name = f"{LAYER}.mlp.experts.2.up_proj"
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    config = config_of(out)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert f"{LAYER}.mlp.gate" in config["ignore"]


def test_a_family_without_an_engine_is_exported_by_the_description(tmp_path):
    source = save_random("DeepseekV3", tmp_path / "float")
    quantize_by_name(plan_by_name(source, Recipe(DYNAMIC)), tmp_path / "int8")
    out = export(tmp_path / "int8", tmp_path / "out")
    before, after = tensors(tmp_path / "int8"), tensors(out)
    assert set(after) == {name for name in before if not name.endswith("weight_offset")}
    config = json.loads((out / "config.json").read_text())
    assert "quantize" not in config
    assert config["model_type"] == "deepseek_v3"


def test_float_models_are_refused(cli, float_model):
    target = float_model.parent / "out"
    message = refused(cli, "export", float_model, target, "--to", "compressed-tensors", within=float_model.parent)
    assert message == (
        f"model to export in {float_model}: got a float one, expected an 8-bit directory. Quantize it first; other "
        "engines read a float model as it is."
    )


def test_large_models_are_cut_into_shards(made, monkeypatch):
    monkeypatch.setattr(compressed_tensors, "PART_BYTES", 40_000)
    _, out = made(DYNAMIC)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    assert {name: index["weight_map"][name] for name in tensors(out)} == index["weight_map"]


def test_an_export_that_is_killed_anywhere_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    ours, out = made(W8A16, weight_symmetric=False)
    whole, target = snapshot(out), tmp_path / "killed"
    with killed_after(10**9, monkeypatch) as watch:
        export(ours, target)
    assert snapshot(target) == whole
    for left in range(1, watch.seen, 17):
        target = tmp_path / f"killed{left}"
        with killed_after(left, monkeypatch):
            export(ours, target)
        export(ours, target)
        assert snapshot(target) == whole, left


def test_what_was_begun_otherwise_is_not_gone_on_with(made, tmp_path):
    ours, out = made(DYNAMIC)
    with pytest.raises(OutputError, match="`activations`: symmetric -> asymmetric"):
        export(ours, out, activations="asymmetric")
    before = snapshot(out)
    export(ours, out)  # already there
    assert snapshot(out) == before
    export(ours, out, activations="asymmetric", overwrite=True)
    assert config_of(out)["config_groups"]["group_0"]["input_activations"]["symmetric"] is False


@pytest.mark.parametrize(("name", "value"), [("lm_head.weight", np.nan), (f"{LAYER}.mlp.up_proj.bias", np.inf)])
def test_a_float_that_is_no_number_is_refused_and_nothing_stays(cli, made, tmp_path, name, value):
    ours, _ = made(DYNAMIC, config=tiny_config("LlamaForCausalLM", mlp_bias=True))
    stored = tensors(ours)[name].clone()
    stored.view(-1)[5] = value
    change(ours, {name: stored})
    message = refused(cli, "export", ours, tmp_path / "new", "--to", "compressed-tensors", within=tmp_path)
    assert message.startswith(f"{name}[")
    assert f"got {value}, expected a finite number" in message


def test_no_torch_is_needed(made, tmp_path):
    import subprocess
    import sys

    ours, _ = made(W8A8)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'gguf')))\n"
        "from eightfold.cli.main import main\n"
        "sys.exit(main())\n"
    )
    words = ["export", str(ours), str(tmp_path / "again"), "--to", "compressed-tensors"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
