"""Damaged and foreign config.json and descriptions: one line that says what is wrong, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.architectures import KNOWN
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, write_model
from tests.hostile import EMBEDDING, NORM, Q_PROJ
from tests.refusal import both_refused, quantize_refused, refused

# --- config.json


def test_a_missing_config_json_is_named(cli, float_model):
    (float_model / "config.json").unlink()
    assert both_refused(cli, float_model) == (
        f"config.json in {float_model}: got no such file, expected a regular file"
    )


def test_a_config_json_that_is_a_directory_is_refused(cli, float_model):
    (float_model / "config.json").unlink()
    (float_model / "config.json").mkdir()
    assert both_refused(cli, float_model) == (f"config.json in {float_model}: got a directory, expected a regular file")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\xff", b'{"a":' * 50_000])
def test_a_config_json_that_is_no_json_is_refused(cli, float_model, content):
    (float_model / "config.json").write_bytes(content)
    message = both_refused(cli, float_model)
    assert message.startswith(f"JSON in {float_model}/config.json: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


def test_a_config_json_that_is_no_object_is_refused(cli, float_model):
    (float_model / "config.json").write_text("[1, 2]")
    assert both_refused(cli, float_model) == (
        f"JSON in {float_model}/config.json: got a list, expected a JSON object. Fetch the file again."
    )


def test_a_key_twice_in_config_json_is_refused(cli, float_model):
    text = (float_model / "config.json").read_text()
    (float_model / "config.json").write_text(text[:-1] + ', "num_hidden_layers": 1}')
    assert both_refused(cli, float_model) == (
        f'key "num_hidden_layers" in {float_model}/config.json: got two values, expected one. Remove one.'
    )


def test_a_boolean_layer_count_does_not_drop_layers(cli, float_model, configure):
    configure(num_hidden_layers=True)
    assert both_refused(cli, float_model) == (
        f'"num_hidden_layers" in {float_model}/config.json: got True, expected a valid integer'
    )


def test_a_billion_layers_are_refused_at_once(cli, float_model, configure):
    configure(num_hidden_layers=10**9)
    assert both_refused(cli, float_model) == (
        f'"num_hidden_layers" in {float_model}/config.json: got 1000000000, expected less than or equal to 10000'
    )


def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(cli, float_model, configure):
    configure(num_hidden_layers=1)
    message = both_refused(cli, float_model)
    assert message.startswith(f"layers beyond config.json's 1 in {float_model}: got model.layers.1.")
    assert message.endswith("as many as config.json says. config.json and the weights belong to different models.")


def test_an_odd_head_dim_is_refused(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config(head_dim=16), tokenizer=False)
    (source / "config.json").write_text(json.dumps(tiny_config(head_dim=15)))
    assert both_refused(cli, source) == (
        f'"head_dim" in {source}/config.json: got 15, expected an even number, as rotary embedding pairs columns'
    )


@pytest.mark.parametrize("name", ["LlamaModel", "llamaforcausallm", "x\ny"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(cli, float_model, configure, name):
    configure(architectures=[name])
    begin = f"architecture in {float_model / 'config.json'}: got {' '.join(name.split())}, expected "
    assert refused(cli, "inspect", float_model, within=float_model.parent) == (f"{begin}{KNOWN}")
    message = quantize_refused(cli, float_model)
    assert message.startswith(f"{begin}one of a known family. Known are llama, mistral, qwen2, qwen3, phi3, glm, ")
    assert message.endswith(", phimoe. --generic takes any other that is shaped like Llama.")


def test_the_name_of_a_family_with_experts_over_weights_without_any(cli, float_model, configure):
    configure(architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert quantize_refused(cli, float_model) == (
        f"experts in {float_model}: got none, expected block_sparse_moe.experts in some layers of mixtral. "
        "config.json and the weights belong to different models."
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_8bit": True}, "unknown"),
        ("fp8", "fp8"),
    ],
)
def test_a_model_that_another_tool_quantized_is_refused(cli, float_model, configure, replace, value, got):
    configure(quantization_config=value)
    replace({Q_PROJ: torch.zeros(64, 48, dtype=torch.int8)})
    assert both_refused(cli, float_model) == (
        f'"quantization_config" in {float_model}/config.json: got {got}, expected a float model. '
        "Start from the model's unquantized weights."
    )


def test_what_is_left_over_of_a_quantization_is_ignored_with_a_note(cli, tmp_path):
    source = write_model(tmp_path / "m", tiny_config(quantization_config={"quant_method": "bitsandbytes"}))
    note = (
        'note: config.json: "quantization_config" (bitsandbytes) is left over: all weights are float, and it is '
        "ignored.\n"
    )
    done = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16")
    assert (done.code, done.err.count(note)) == (0, 1)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert note.removeprefix("note: ").strip() in " ".join(cli("inspect", source).out.split())
    assert cli("run", source, "--prompt", "a", "--max-new-tokens", "1").err.count(note) == 1


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_a_float_model(cli, float_model, configure, value):
    configure(quantization_config=value)
    assert cli("inspect", float_model).code == 0


def test_half_a_surrogate_pair_in_config_json_does_no_harm(cli, tmp_path, float_model, configure):
    configure(_name_or_path="\ud800")
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["_name_or_path"] == "\ud800"


# --- descriptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("quantized")
    quantize_checkpoint(write_model(made / "float", tokenizer=False), made / "out", Recipe(QuantType.W8A16), None)
    return made / "out"


@pytest.fixture
def quantized(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "float")


def describe(directory: Path, **changes: Any) -> Path:
    """Change quant_model_description.json; a key given as ... is left out."""
    path = directory / "quant_model_description.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def test_a_quantized_model_is_not_quantized_again(cli, quantized):
    assert cli("inspect", quantized).code == 0
    assert quantize_refused(cli, quantized) == (
        f"model in {quantized}: got a quantized one, expected float weights. Start from its float original."
    )


def test_a_description_that_names_absent_tensors_is_refused(cli, quantized):
    describe(quantized, **{"model.layers.9.mlp.up_proj.weight": "W8A16", "a.b": "FLOAT"})
    assert both_refused(cli, quantized) == (
        f"tensors that the description names in {quantized}: got 2 missing (a.b, model.layers.9.mlp.up_proj.weight), "
        "expected every one in a safetensors file. Fetch the directory again."
    )


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.mlp.up_proj.weight_scale", NORM, EMBEDDING])
@pytest.mark.parametrize("value", [..., None, 8])
def test_a_description_without_an_entry_for_a_tensor_is_refused(cli, quantized, name, value):
    path = describe(quantized, **{name: value})
    assert both_refused(cli, quantized) == f"entries in {path}: got none for {name}, expected one for each tensor"


def test_a_scheme_that_is_not_known_is_refused_with_the_known_ones(cli, quantized):
    path = describe(quantized, **{Q_PROJ: "W4A16"})
    assert both_refused(cli, quantized) == (
        f"type of {Q_PROJ} in {path}: got W4A16, expected FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX or W8A16. "
        "Make the model anew: eightfold quantize FLOAT_DIR OUT --scheme ..."
    )


@pytest.mark.parametrize(("value", "got"), [(..., "nothing"), (None, "nothing"), (7, "7"), (["W8A8"], "['W8A8']")])
def test_a_description_without_its_type_is_refused(cli, quantized, value, got):
    path = describe(quantized, model_quant_type=value)
    assert both_refused(cli, quantized) == (
        f'"model_quant_type" in {path}: got {got}, expected a type such as FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX or W8A16'
    )


def test_a_description_that_is_no_json_is_refused(cli, quantized):
    path = quantized / "quant_model_description.json"
    path.write_text("{")
    message = both_refused(cli, quantized)
    assert message.startswith(f"JSON in {path}: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


def test_a_description_that_calls_int8_weights_float_is_refused(cli, quantized):
    describe(quantized, **{Q_PROJ: "FLOAT"})
    assert both_refused(cli, quantized) == (
        f"dtype of {Q_PROJ} in {quantized}/quant_model_weight_w8a16.safetensors: got I8, "
        "expected F32, F16 or BF16. Write the directory again."
    )


def test_a_description_that_calls_one_scheme_another_is_refused(cli, quantized):
    describe(quantized, **{Q_PROJ: "W8A8"})
    message = both_refused(cli, quantized)
    prefix = Q_PROJ.removesuffix("weight")
    assert message.startswith(
        f"4 tensors are missing in {quantized}: got no {prefix}input_scale, {prefix}input_offset, "
        f"{prefix}quant_bias, {prefix}deq_scale, expected all "
    )


def test_a_description_beside_float_weights_is_refused(cli, float_model):
    (float_model / "quant_model_description.json").write_text('{"model_quant_type": "W8A8"}')
    message = both_refused(cli, float_model)
    assert message.startswith(f"entries in {float_model}/quant_model_description.json: got none for lm_head.weight, ")
    assert message.endswith(" and 14 more, expected one for each tensor")


@pytest.mark.parametrize(
    "content",
    [
        {"hidden_size": [9] * 100_000},
        {"architectures": ["A" * 100_000]},
        {"x" * 100_000: 1, "architectures": [" B" * 100_000]},
        {"num_hidden_layers": "7 " * 100_000},
    ],
)
def test_a_message_shows_no_more_than_the_beginning_of_a_value(cli, float_model, content):
    path = float_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    for message in (
        refused(cli, "inspect", float_model, within=float_model.parent),
        quantize_refused(cli, float_model),
    ):
        assert len(message) < 1200 + len(str(float_model))
        assert "..." in message
