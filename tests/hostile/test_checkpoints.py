"""Tensors that are not those of config.json, and what is no model directory: one line, and nothing written."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES, tiny_config, write_model
from tests.hostile import EMBEDDING, NORM, Q_PROJ, shard
from tests.refusal import both_refused, error_line, quantize_refused, refused

# --- tensors against config.json


@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_missing_tensors_are_listed_together(cli, tmp_path, architecture):
    source = write_model(tmp_path / "float", tiny_config(architecture), tokenizer=False)
    tensors = load_file(str(source / "model.safetensors"))
    gone = ["model.layers.1.input_layernorm.weight", NORM, "model.layers.1.mlp.up_proj.weight"]
    gone += ["model.layers.0.self_attn.k_proj.bias"] if architecture == "Qwen2ForCausalLM" else []
    gone += ["model.layers.0.self_attn.q_norm.weight"] if architecture == "Qwen3ForCausalLM" else []
    save_file({n: t for n, t in tensors.items() if n not in gone}, str(source / "model.safetensors"))
    message = both_refused(cli, source)
    found = re.fullmatch(
        rf"{len(gone)} tensors are missing in {re.escape(str(source))}: got no (.*), "
        rf"expected all {len(tensors)} of {architecture}\. Fetch or write the directory again\.",
        message,
    )
    assert found
    assert sorted(found[1].split(", ")) == sorted(gone)


def test_many_missing_tensors_do_not_flood_the_terminal(cli, float_model, configure):
    configure(num_hidden_layers=100)
    message = both_refused(cli, float_model)
    assert message.startswith(f"882 tensors are missing in {float_model}: got no model.layers.2.input_layernorm.weight")
    assert message.endswith(" and 876 more, expected all 903 of LlamaForCausalLM. Fetch or write the directory again.")
    assert len(message) < 600


def test_an_untied_model_without_a_head_is_refused(cli, float_model, replace):
    replace({"lm_head.weight": None})
    assert both_refused(cli, float_model) == (
        f"1 tensor is missing in {float_model}: got no lm_head.weight, expected all 21 of LlamaForCausalLM. "
        "Fetch or write the directory again."
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q_PROJ, (48, 64)), (Q_PROJ, (64, 49)), (Q_PROJ, (64, 48, 1)), (EMBEDDING, (321, 48)), (NORM, (47,)), (NORM, ())],
)
def test_a_shape_that_config_json_does_not_say_is_refused(cli, float_model, weights, replace, name, shape):
    expected = list(load_file(str(weights))[name].shape)
    replace({name: torch.ones(shape, dtype=torch.bfloat16)})
    assert both_refused(cli, float_model) == (
        f"shape of {name} in {weights}: got {list(shape)}, expected {expected}. "
        "config.json and the weights belong to different models."
    )


def test_a_config_json_of_another_model_is_refused(cli, float_model, weights, configure):
    configure(intermediate_size=96)
    assert both_refused(cli, float_model) == (
        f"shape of model.layers.0.mlp.gate_proj.weight in {weights}: got [80, 48], expected [96, 48]. "
        "config.json and the weights belong to different models."
    )


@pytest.mark.parametrize("name", [Q_PROJ, EMBEDDING])
@pytest.mark.parametrize(
    ("dtype", "called", "said"),
    [
        (torch.int8, "I8", "bfloat16"),
        (torch.int32, "I32", ...),
        (torch.uint8, "U8", "bfloat16"),
        (torch.float64, "F64", ...),
        (torch.bool, "BOOL", ...),
    ],
)
def test_weights_of_a_type_no_float_model_has_are_refused(
    cli, float_model, weights, replace, configure, name, dtype, called, said
):
    replace({name: load_file(str(weights))[name].to(dtype)})
    configure(torch_dtype=said)
    assert both_refused(cli, float_model) == (
        f"dtype of {name} in {weights}: got {called}, expected F32, F16 or BF16. "
        "Start from float weights (F32, F16 or BF16)."
    )


def test_one_tensor_in_two_files_is_refused(cli, float_model, weights):
    save_file({Q_PROJ: torch.zeros(64, 48)}, str(float_model / "extra.safetensors"))
    weights.rename(float_model / "main.safetensors")
    assert both_refused(cli, float_model) == (
        f"tensor {Q_PROJ} in {float_model}: got it in extra.safetensors and in main.safetensors, "
        "expected it in one file. Remove the file that does not belong to this model."
    )


def test_one_tensor_in_two_shards_is_refused(cli, float_model):
    first, second = shard(float_model)
    save_file({**load_file(str(second)), Q_PROJ: torch.zeros(64, 48)}, str(second))
    assert both_refused(cli, float_model) == (
        f"tensor {Q_PROJ} in {float_model}: got it in {first.name} and in {second.name}, "
        "expected it in one file. Remove the file that does not belong to this model."
    )


# --- values


@pytest.mark.parametrize(
    ("name", "at", "place"),
    [
        (Q_PROJ, (5, 7), "[5, 7]"),
        ("model.layers.1.mlp.down_proj.weight", (47, 79), "[47, 79]"),
        (EMBEDDING, (319, 0), "[319, 0]"),
        (NORM, (7,), "[7, 0]"),
        ("model.layers.1.post_attention_layernorm.weight", (0,), "[0, 0]"),
        ("lm_head.weight", (0, 0), "[0, 0]"),
    ],
)
@pytest.mark.parametrize(("value", "scheme"), [("nan", "w8a16"), ("-inf", "w8a8")])
def test_a_weight_that_is_no_finite_number_is_named(cli, float_model, weights, replace, scheme, name, at, place, value):
    tensor = load_file(str(weights))[name]
    tensor[at] = float(value)
    replace({name: tensor})
    assert cli("inspect", float_model).code == 0  # reads no weights
    options = ["--calib-texts", "hello"] if scheme == "w8a8" else []
    assert quantize_refused(cli, float_model, *options, scheme=scheme) == (
        f"{name}{place} in {weights}: got {value}, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


def test_a_bias_that_is_no_finite_number_is_named(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config("Qwen2ForCausalLM"))
    tensors = load_file(str(source / "model.safetensors"))
    name = "model.layers.1.self_attn.v_proj.bias"
    tensors[name][3] = float("inf")
    save_file(tensors, str(source / "model.safetensors"))
    assert quantize_refused(cli, source) == (
        f"{name}[3, 0] in {source}/model.safetensors: got inf, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


# --- what is no model directory


def test_a_hub_id_is_recognized(cli, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = (
        "no directory no-such/Model-1B here, and Hugging Face cannot be asked for it: got HF_HUB_OFFLINE is set, "
        "expected a model that is here, or that was fetched before. Check the name and the network."
    )
    for command in (["inspect", "no-such/Model-1B"], ["quantize", "no-such/Model-1B", "out"]):
        options = ["--scheme", "w8a16"] if command[0] == "quantize" else []
        assert refused(cli, *command, *options, within=tmp_path) == expected


@pytest.mark.parametrize("name", ["gone", "a/b/gone", "./x/gone"])
def test_a_directory_that_does_not_exist_is_named(cli, tmp_path, name):
    assert both_refused(cli, tmp_path / name) == (
        f"no directory {tmp_path / name}: expected a model directory. Check the path."
    )


def test_a_file_in_the_place_of_a_directory_is_refused(cli, float_model, weights):
    assert both_refused(cli, weights) == (
        f"model in {weights}: got a file, expected a directory with config.json and safetensors files"
    )


def test_a_gguf_file_is_sent_to_its_importer(cli, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert both_refused(cli, tmp_path / "m.gguf") == (
        f"model in {tmp_path}/m.gguf: got a file, expected a directory with config.json and safetensors files. "
        "For a .gguf file run: eightfold import-gguf FILE DIR"
    )


# --- what the directory is


def rename(weights, new) -> None:
    save_file({new(name): tensor for name, tensor in load_file(str(weights)).items()}, str(weights))


SAVE_AGAIN = "Load it with transformers' AutoModelForCausalLM and write it with save_pretrained."
MERGE = "Merge the adapter first: load it with peft, call merge_and_unload() and write the result with save_pretrained."


@pytest.mark.parametrize("keeps_config", [False, True])
def test_an_adapter_is_named(cli, float_model, weights, keeps_config):
    weights.rename(float_model / "adapter_model.safetensors")
    (float_model / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    if not keeps_config:
        (float_model / "config.json").unlink()
    assert both_refused(cli, float_model) == (
        f"model in {float_model}: got a LoRA adapter of someone/base without its model, expected a whole model. {MERGE}"
    )


def test_an_adapter_beside_its_model_stays_behind(cli, tmp_path):
    source = write_model(tmp_path / "m")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a.lora_A.weight": torch.zeros(1)}, str(source / "adapter_model.safetensors"))
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a16").code == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("adapter")]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named(cli, float_model, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (float_model / name).write_text(pointer)
    assert both_refused(cli, float_model) == (
        f"{name} in {float_model}: got a Git LFS pointer, expected the file itself. "
        "Fetch what it points to: git lfs pull."
    )


@pytest.mark.parametrize(
    ("new", "got"),
    [
        (lambda name: name.removeprefix("model."), 'names without the prefix "model." (embed_tokens.weight)'),
        (lambda name: f"model.{name}", 'names that begin with "model.model." (model.model.embed_tokens.weight)'),
        (lambda name: f"base_model.model.{name}", 'names that begin with "base_model.model.model." (base_'),
        (lambda name: f"_orig_mod.{name}", 'names that begin with "_orig_mod.model." (_orig_mod.model.embed_tok'),
        (lambda name: name.replace("model.embed_tokens", "tok_embeddings"), "the publisher's own names (tok_emb"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "tensors of a LoRA adapter (model."),
    ],
)
def test_names_that_are_not_a_models_are_explained(cli, float_model, weights, new, got):
    rename(weights, new)
    message = both_refused(cli, float_model)
    assert message.startswith(f"tensor names in {float_model}: got {got}")
    assert message.endswith((SAVE_AGAIN, MERGE, "Fetch the model in transformers' layout."))


def test_left_over_tensors_of_an_adapter_are_named(cli, float_model, replace):
    replace({f"{Q_PROJ.removesuffix('.weight')}.lora_A.default.weight": torch.zeros(4, 48)})
    message = both_refused(cli, float_model)
    assert message.startswith(f"tensor names in {float_model}: got tensors of a LoRA adapter (model.layers.")
    assert message.endswith(MERGE)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "value_head.0.weight"])
def test_a_value_head_is_named(cli, float_model, replace, name):
    replace({name: torch.zeros(1, 48)})
    message = both_refused(cli, float_model)
    assert message.startswith(f"1 tensor is unknown in {float_model}: got a value head or the like ({name}), expected ")
    assert message.endswith(f"Drop it, if the model is to generate text. {SAVE_AGAIN}")


def test_a_directory_with_a_gguf_file_and_one_with_a_cache_are_named(cli, tmp_path):
    folder = tmp_path / "g"
    folder.mkdir()
    (folder / "tiny.gguf").touch()
    assert error_line(cli("inspect", folder)) == (
        f"model in {folder}: got only tiny.gguf, expected config.json and safetensors. "
        f"Run: eightfold import-gguf {folder}/tiny.gguf DIR"
    )
    snapshot = write_model(tmp_path / "models--a--b" / "snapshots" / "01")
    assert error_line(cli("inspect", tmp_path / "models--a--b")) == (
        f"model in {tmp_path}/models--a--b: got a cache of Hugging Face, expected config.json and safetensors. "
        f"The model is in {snapshot}"
    )


def test_a_directory_of_models_is_named(cli, tmp_path):
    made = write_model(tmp_path / "run" / "checkpoint-500")
    assert error_line(cli("inspect", tmp_path / "run")) == (
        f"model in {tmp_path}/run: got models in 1 folders, expected config.json and safetensors. "
        f"Name the one that is meant, such as {made}"
    )


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed"])
def test_weights_of_another_tool_are_named_without_its_config(cli, float_model, weights, suffix):
    rename(weights, lambda name: name.replace("q_proj.weight", f"q_proj.{suffix}"))
    message = both_refused(cli, float_model)
    assert message.startswith(f"tensor names in {float_model}: got weights that another tool has quantized (model.")
    assert message.endswith("Start from the model's unquantized weights.")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "quant_model_description.json"])
def test_what_is_no_regular_file_is_never_waited_for(cli, float_model, name):
    (float_model / name).unlink(missing_ok=True)
    os.mkfifo(float_model / name)
    assert refused(cli, "inspect", float_model, within=float_model) == (
        f"{name} in {float_model}: got a FIFO, expected a regular file"
    )
