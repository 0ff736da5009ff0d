"""Damaged mixtures of experts: one line that says what is wrong, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.architectures import KNOWN
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import SPARSE, tiny_config, write_model
from tests.refusal import quantize_refused, refused

QWEN3, QWEN2, MIXTRAL = SPARSE
AT = "model.layers.1.mlp"
OTHER = "config.json and the weights belong to different models."
Refusal = Callable[..., str]


@pytest.fixture
def source(tmp_path) -> Path:
    return write_model(tmp_path / "float", tiny_config(QWEN2), tokenizer=False)


@pytest.fixture
def message(cli, source) -> Refusal:
    """Change tensors (None removes one) and config.json, and inspect the model; its path is DIR."""

    def change(tensors: dict[str, torch.Tensor | None] | None = None, **fields: Any) -> str:
        path = source / "model.safetensors"
        merged = {**load_file(str(path)), **(tensors or {})}
        save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, str(path))
        config = {key: value for key, value in tiny_config(QWEN2, **fields).items() if value is not ...}
        (source / "config.json").write_text(json.dumps(config))
        return refused(cli, "inspect", source, within=source.parent).replace(str(source), "DIR")

    return change


# --- tensors


@pytest.mark.parametrize(
    "name", [f"{AT}.experts.3.up_proj", f"{AT}.gate", f"{AT}.shared_expert.down_proj", f"{AT}.shared_expert_gate"]
)
def test_a_part_that_is_missing(message, name):
    assert message({f"{name}.weight": None}) == (
        f"1 tensor is missing in DIR: got no {name}.weight, expected all 61 of {QWEN2}. "
        "Fetch or write the directory again."
    )


def test_a_whole_expert_that_is_missing(message):
    names = [f"{AT}.experts.4.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert message(dict.fromkeys(names)) == (
        f"3 tensors are missing in DIR: got no {', '.join(names)}, expected all 61 of {QWEN2}. "
        "Fetch or write the directory again."
    )


def test_an_expert_more_than_config_json_says(message):
    names = [f"{AT}.experts.5.{part}_proj.weight" for part in ("down", "gate", "up")]
    found = message({name: torch.zeros(1, 1, dtype=torch.bfloat16) for name in names})
    assert found.startswith(f"3 tensors are unknown in DIR: got {', '.join(names)}, expected only those of {QWEN2} in ")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{AT}.experts.2.gate_proj", (31, 48), [32, 48]),
        (f"{AT}.experts.2.down_proj", (32, 48), [48, 32]),
        (f"{AT}.gate", (4, 48), [5, 48]),
        (f"{AT}.gate", (5, 40), [5, 48]),
        (f"{AT}.shared_expert.up_proj", (32, 48), [24, 48]),
        (f"{AT}.shared_expert_gate", (2, 48), [1, 48]),
        (f"{AT}.shared_expert_gate", (48,), [1, 48]),
    ],
)
def test_a_part_of_another_shape(message, name, shape, expected):
    assert message({f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16)}) == (
        f"shape of {name}.weight in DIR/model.safetensors: got {list(shape)}, expected {expected}. {OTHER}"
    )


def test_a_layer_that_config_json_calls_dense(message):
    assert message(mlp_only_layers=[1]) == (
        f"3 tensors are missing in DIR: got no {AT}.gate_proj.weight, {AT}.up_proj.weight, {AT}.down_proj.weight, "
        f"expected all 44 of {QWEN2}. Fetch or write the directory again."
    )


def test_an_expert_in_two_files(cli, source):
    stored = load_file(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    name = f"{AT}.experts.2.up_proj.weight"
    save_file(stored, str(source / "model-00001-of-00002.safetensors"))
    save_file({name: stored[name]}, str(source / "model-00002-of-00002.safetensors"))
    found = refused(cli, "inspect", source, within=source.parent)
    assert found.startswith(f"tensor {name} in {source}: got it in model-00001-of-00002.safetensors and in ")
    assert found.endswith(", expected it in one file. Remove the file that does not belong to this model.")


def test_stacked_experts_and_single_ones(message):
    name = f"{AT}.experts.gate_up_proj"
    found = message({name: torch.zeros(5, 64, 48, dtype=torch.bfloat16)})
    assert found.startswith(f"1 tensor is unknown in DIR: got {name}, expected only those of {QWEN2} in ")


def test_stacked_experts_alone(message):
    singles = [f"{AT}.experts.{i}.{part}_proj.weight" for i in range(5) for part in ("gate", "up", "down")]
    stacked = {
        f"{AT}.experts.gate_up_proj": torch.zeros(5, 64, 48, dtype=torch.bfloat16),
        f"{AT}.experts.down_proj": torch.zeros(5, 48, 32, dtype=torch.bfloat16),
    }
    assert message({**dict.fromkeys(singles), **stacked}) == (
        f"experts in DIR: got all of a layer in one tensor ({AT}.experts.down_proj, {AT}.experts.gate_up_proj), "
        "expected a matrix for each. `eightfold quantize --scheme w8a8-dynamic` takes them apart; so does "
        "transformers' save_pretrained()."
    )


@pytest.mark.parametrize("name", ["gate", "shared_expert_gate"])
def test_a_router_that_is_no_float(cli, source, tmp_path, name):
    out = tmp_path / "out"
    quantize_by_name(plan_by_name(source, Recipe(QuantType.W8A8_DYNAMIC)), out)
    path = out / "quant_model_description.json"
    tags = json.loads(path.read_text())
    path.write_text(json.dumps({**tags, f"{AT}.{name}.weight": "W8A16"}))
    assert refused(cli, "inspect", out, within=tmp_path) == (
        f"type of {AT}.{name}.weight in {path}: got W8A16, expected FLOAT, as routers stay. "
        "Make the model anew with eightfold quantize."
    )


# --- config.json


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_experts": 0}, '"num_experts" in DIR/config.json: got 0, expected greater than 0'),
        ({"num_experts": True}, '"num_experts" in DIR/config.json: got True, expected a valid integer'),
        ({"num_experts": 10**6}, '"num_experts" in DIR/config.json: got 1000000, expected less than or equal to 10000'),
        (
            {"num_local_experts": 4},
            '"num_experts" and "num_local_experts" in DIR/config.json: got 5 and 4, expected the same number. '
            "Remove the wrong one.",
        ),
        (
            {"num_experts": ..., "num_local_experts": "5"},
            "\"num_local_experts\" in DIR/config.json: got '5', expected a valid integer",
        ),
        (
            {"num_experts_per_tok": 6},
            '"num_experts_per_tok" in DIR/config.json: got 6, expected at most 5, as there are no more experts',
        ),
        (
            {"num_experts": 3, "num_experts_per_tok": ...},
            '"num_experts_per_tok" in DIR/config.json: got 4, expected at most 3, as there are no more experts',
        ),
        ({"num_experts_per_tok": 0}, '"num_experts_per_tok" in DIR/config.json: got 0, expected greater than 0'),
        (
            {"moe_intermediate_size": 2.5},
            '"moe_intermediate_size" in DIR/config.json: got 2.5, expected a valid integer',
        ),
        (
            {"shared_expert_intermediate_size": -1},
            '"shared_expert_intermediate_size" in DIR/config.json: got -1, expected greater than 0',
        ),
        ({"norm_topk_prob": 1}, '"norm_topk_prob" in DIR/config.json: got 1, expected a valid boolean'),
        ({"decoder_sparse_step": 0}, '"decoder_sparse_step" in DIR/config.json: got 0, expected greater than 0'),
        ({"mlp_only_layers": 1}, '"mlp_only_layers" in DIR/config.json: got 1, expected a list of integers'),
        ({"mlp_only_layers": [0, "1"]}, "\"mlp_only_layers\" in DIR/config.json: got '1', expected a valid integer"),
        ({"qkv_bias": "yes"}, "\"qkv_bias\" in DIR/config.json: got 'yes', expected a valid boolean"),
    ],
)
def test_settings_of_experts_that_make_no_sense(message, fields, expected):
    assert message(**fields) == expected


def test_settings_that_the_weights_contradict_are_refused_before_anything_is_written(cli, source):
    def configure(**fields: Any) -> None:
        (source / "config.json").write_text(json.dumps(tiny_config(QWEN2, **fields)))

    configure(num_experts_per_tok=6)
    assert quantize_refused(cli, source, scheme="w8a8-dynamic").startswith('"num_experts_per_tok" in ')
    configure(moe_intermediate_size=40)
    assert quantize_refused(cli, source, scheme="w8a8-dynamic") == (
        f"shape of model.layers.0.mlp.experts.0.gate_proj.weight in {source}: got [32, 48], expected [40, 48]. {OTHER}"
    )
    configure(mlp_only_layers=[1])
    assert quantize_refused(cli, source, scheme="w8a8-dynamic") == (
        f"shape of {AT}.gate_proj.weight in {source}: got no such tensor, expected [80, 48]. {OTHER}"
    )


# --- families without an engine


@pytest.mark.parametrize("command", [("run", "--prompt", "x"), ("eval",), ("bench",)])
def test_a_float_model_of_a_family_without_an_engine(cli, tmp_path, command):
    source = tmp_path / "float"
    source.mkdir()
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, str(source / "model.safetensors"))
    name, *options = command
    assert refused(cli, name, source, *options, within=tmp_path) == (
        f"model in {source}: got a DeepseekV3ForCausalLM, which runs in other engines (MindIE, MindIE (aclgraph), "
        f"vllm-ascend, SGLang), expected {KNOWN}. eightfold quantizes it for these, and does not "
        "run it."
    )
