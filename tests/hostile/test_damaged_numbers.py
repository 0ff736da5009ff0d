"""Numbers that are damaged, too large, or belong to tensors nobody would read: refused by whoever meets them."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.errors import CheckpointError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.reference import linear
from eightfold.model.reference.load import Decoder
from tests.conftest import tiny_config, write_model
from tests.refusal import error_line, quantize_refused, refused

PLACES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]


def edit(directory, change, name="model.safetensors"):
    """Change the tensors of a model directory in place."""
    path = directory / name
    path.chmod(0o600)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_run_and_eval_refuse_weights_that_are_not_finite(cli, float_model, place, value):
    def damage(tensors):
        tensors[place].view(-1)[: tensors[place].shape[-1] * 256] = value

    edit(float_model, damage)
    for command in (["run", float_model, "--prompt", "hello", "--json"], ["eval", float_model, "--chunk-len", "16"]):
        message = error_line(cli(*command))
        assert message.startswith(f"{place}[0, 0] in {float_model}/model.safetensors: got {value}")
        assert message.endswith("expected a finite number. The weights are damaged; fetch the model again.")


def test_values_beyond_float16_are_refused_when_they_would_be_stored_so(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config("Qwen2ForCausalLM", torch_dtype="float16"))
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(source, lambda tensors: tensors.update({name: tensors[name].float() + 1e6}))
    message = refused(cli, "quantize", source, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith(f"values of {name} in {source}: got ")
    assert message.endswith(
        "expected finite ones, at most 65504 in F16. Store float32 (--save-dtype), or choose another --dtype."
    )
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--save-dtype", "float32").code == 0


def test_biases_that_the_config_does_not_announce_are_refused(cli, float_model, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(float_model, lambda tensors: tensors.update({name: torch.ones(64)}))
    message = refused(cli, "quantize", float_model, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith(
        f"1 tensor is unknown in {float_model}: got {name}, expected only those of LlamaForCausalLM"
    )
    assert message.endswith("config.json may lack a setting such as attention_bias.")


def with_extra(cli, source, out, name, tensor, tag):
    """Quantize, then add a tensor and its entry to the result."""
    assert cli("quantize", source, out, "--scheme", "w8a16").code == 0
    edit(out, lambda tensors: tensors.update({name: tensor}), "quant_model_weight_w8a16.safetensors")
    path = out / "quant_model_description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: tag}))


def test_a_cache_scale_without_its_partner_is_refused(cli, float_model, tmp_path):
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    with_extra(cli, float_model, tmp_path / "out", name, torch.ones(32), "C8")
    assert error_line(cli("inspect", tmp_path / "out")).startswith(
        f"1 tensor is missing in {tmp_path}/out: got no model.layers.0.self_attn.v_proj.kv_cache_scale"
    )


def with_attention(cli, source, out, dtype):
    """Quantize, then add FAQuant's tensors to every layer of the result, offsets of zero in a dtype."""
    assert cli("quantize", source, out, "--scheme", "w8a16").code == 0
    heads = {f"model.layers.{i}.self_attn.fa_{p}": n for i in range(2) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    scales = {f"{name}.scale": torch.full((n, 1), 0.02) for name, n in heads.items()}
    offsets = {f"{name}.offset": torch.zeros(n, 1, dtype=dtype) for name, n in heads.items()}
    edit(out, lambda tensors: tensors.update({**scales, **offsets}), "quant_model_weight_w8a16.safetensors")
    path = out / "quant_model_description.json"
    tags = {**dict.fromkeys([*scales, *offsets], "FAQuant"), "fa_quant_type": "FAQuant"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **tags}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])
def test_an_offset_of_quantized_attention_is_refused(cli, float_model, tmp_path, dtype):
    out, weights = tmp_path / "out", "quant_model_weight_w8a16.safetensors"
    with_attention(cli, float_model, out, dtype)
    commands = (["run", out, "--prompt", "hello"], ["eval", out, "--chunks", "1", "--chunk-len", "16"])
    assert [cli(*command).code for command in commands] == [0, 0]
    for part, layer, values, got in (
        ("q", 0, [0, 0, 0, -3], "-3 to 0"),
        ("k", 1, [5, 5], "5 to 5"),
        ("v", 0, [1, 0], "0 to 1"),
    ):
        name = f"model.layers.{layer}.self_attn.fa_{part}.offset"
        edit(out, lambda tensors, name=name, values=values: tensors[name].copy_(torch.tensor(values)[:, None]), weights)
        for command in commands:
            assert error_line(cli(*command)) == (
                f"values of {name} in {out}/{weights}: got {got}, expected zeros. "
                "Attention is computed without offsets; quantize it symmetrically."
            )
        edit(out, lambda tensors, name=name: tensors[name].zero_(), weights)


# What is damaged in which scheme: the tensor, and what its numbers have to be.
SCALE, OFFSET = "a number above 0, from 1e-37 to 1e+15", "an int8 number, from -128 to 127"
PARAMETERS = {
    "self_attn.q_proj.weight_scale": ("w8a16", SCALE),
    "mlp.up_proj.weight_offset": ("w8a16", OFFSET),
    "self_attn.o_proj.input_scale": ("w8a8", SCALE),
    "self_attn.o_proj.input_offset": ("w8a8", OFFSET),
    "mlp.down_proj.deq_scale": ("w8a8", SCALE),
    "mlp.gate_proj.weight_scale": ("w8a8-dynamic", SCALE),
    "self_attn.k_proj.kv_cache_scale": ("w8a16", SCALE),
    "self_attn.v_proj.kv_cache_offset": ("w8a16", OFFSET),
}


@pytest.fixture(scope="module")
def quantized_by(tmp_path_factory):
    """Return a function that makes a model of a scheme, once; in float16, so that deq_scale is packed."""
    from eightfold.quant.recipe import Recipe
    from tests.native.models import DYNAMIC, W8A8, W8A16, Variant, write_variant

    config, kinds = tiny_config(torch_dtype="float16"), {"w8a16": W8A16, "w8a8": W8A8, "w8a8-dynamic": DYNAMIC}

    @functools.cache
    def make(scheme):
        recipe = Recipe(kinds[scheme], weight_symmetric=scheme != "w8a16", kv_int8=scheme == "w8a16")
        return write_variant(tmp_path_factory.mktemp(scheme), Variant(recipe, config)).directory

    return make


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-40, 1e30, 127.5, -129.0])
@pytest.mark.parametrize("place", PARAMETERS)
def test_scales_and_offsets_that_cannot_be_are_refused_by_name(quantized_by, tmp_path, place, bad):
    scheme, expected = PARAMETERS[place]
    shutil.copytree(quantized_by(scheme), tmp_path / "m")
    (weights,) = (tmp_path / "m").glob("*.safetensors")
    name = f"model.layers.1.{place}"
    tensors = load_file(weights)
    values = tensors[name].float() if tensors[name].dtype != torch.int64 else None
    if values is not None:
        values.view(-1)[-1] = bad
        tensors[name] = values
    else:
        tensors[name][-1] = int(np.float32(bad).view(np.int32)) & 0xFFFFFFFF
    weights.chmod(0o600)
    save_file(tensors, weights)
    checkpoint = Checkpoint.open(tmp_path / "m")
    is_fine = -128 <= bad <= 127 if expected is OFFSET else bad == 127.5
    for load in (lambda: load_model(checkpoint, threads=1), lambda: Decoder(checkpoint).logits([1, 2])):
        if is_fine:
            load()
            continue
        with pytest.raises(CheckpointError) as error:
            load()
        assert str(error.value).startswith(f"{name}[")
        assert f" in {weights}: got {np.float32(bad):g}, expected " in str(error.value)
        assert expected in str(error.value) or "a finite number" in str(error.value)


def test_norm_biases_are_added(cli, float_model, tmp_path):
    name = "model.layers.0.input_layernorm.bias"
    with_extra(cli, float_model, tmp_path / "out", name, torch.zeros(48), "FLOAT")
    command = ["run", tmp_path / "out", "--prompt", "hello", "--max-new-tokens", "2"]
    plain = cli(*command)
    assert plain.code == 0
    edit(tmp_path / "out", lambda tensors: tensors[name].fill_(5), "quant_model_weight_w8a16.safetensors")
    assert cli(*command).out != plain.out


def test_an_int8_head_is_read_as_what_it_is(cli, float_model, tmp_path):
    from eightfold.quant.qparams import quantize_weight

    out = tmp_path / "out"
    assert cli("quantize", float_model, out, "--scheme", "w8a16").code == 0
    evaluate = ["eval", out, "--chunks", "2", "--chunk-len", "64", "--json"]
    before = cli(*evaluate).json()["nll"]

    def quantize_head(tensors):
        stored = quantize_weight(tensors["lm_head.weight"].float(), is_symmetric=True)
        tensors["lm_head.weight"] = stored.values
        tensors["lm_head.weight_scale"], tensors["lm_head.weight_offset"] = stored.scale, stored.offset

    edit(out, quantize_head, "quant_model_weight_w8a16.safetensors")
    path = out / "quant_model_description.json"
    tags = {f"lm_head.{suffix}": "W8A16" for suffix in ("weight", "weight_scale", "weight_offset")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **tags}))
    # int8 moves a logit by about 1 % of the logits' deviation, which is about 7 here.
    assert cli(*evaluate).json()["nll"] == pytest.approx(before, abs=0.3)


def test_lack_of_memory_is_one_line(cli, float_model, monkeypatch):
    def exhausted(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr(linear, "float_linear", exhausted)
    message = error_line(cli("run", float_model, "--prompt", "hello", "--backend", "reference"))
    assert message == "out of memory: nothing was left half-written. Close other programs, or use a smaller model."


def test_keeping_everything_float_is_noted(cli, float_model, tmp_path):
    result = cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16", "--keep-float", "*")
    assert "note: every linear is kept float: nothing is quantized.\n" in result.err


@pytest.mark.parametrize(
    ("place", "factor", "options", "message"),
    [
        ("0.mlp.up_proj", 1e20, (), "model.layers.0.mlp.up_proj.weight_scale[0] in {}: got "),
        ("0.self_attn.k_proj", 1e20, ("--kv-int8",), "model.layers.0.self_attn.k_proj."),
        ("1.mlp.down_proj", 1e38, (), "model.layers.1.mlp.down_proj.weight_scale[0] in {}: got inf"),
        ("0.mlp.down_proj", 1e38, ("--kv-int8",), "input of model.layers.1 in calibration sample 0 (counted from 0): "),
        ("1.mlp.down_proj", 1e38, ("--kv-int8",), "input of the final norm in calibration sample 0 (counted from 0): "),
    ],
)
def test_weights_far_too_large_never_become_scales(cli, float_model, place, factor, options, message):
    """The reader would refuse what they lead to, and other loaders would compute with it."""

    def enlarge(tensors):
        name = f"model.layers.{place}.weight"
        tensors[name] = tensors[name].sign() * torch.linspace(factor, 3 * factor, tensors[name].shape[-1]).bfloat16()

    edit(float_model, enlarge)
    found = quantize_refused(cli, float_model, "--no-weight-symmetric", "--anti-outlier", "none", *options)
    assert found.startswith(message.format(float_model))
    assert "expected a number above 0, from 1e-37 to 1e+15" in found or "expected finite numbers" in found
