"""Quantization by the names of tensors: every family's linears, their arithmetic, and what is no plain float matrix."""

from __future__ import annotations

import json
import re

import pytest
import torch

from eightfold.architectures import KNOWN
from eightfold.check import by_name
from eightfold.config import DType
from eightfold.errors import CapacityError
from eightfold.format.named import NamedDirectory
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.qparams import quantize_weight
from eightfold.quant.recipe import Recipe
from tests.conftest import tiny_config, write_model
from tests.quant.families import SIZES, WRAPPED, random_model
from tests.quant.killing import killed_after
from tests.quant.look_up import require_answers
from tests.quant.named import DYNAMIC, W8A16, change, config_of, quantize, refusal, save, tags_of, tensors_of
from tests.refusal import error_line, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


# --- names

LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
EXPERTS = {f"mlp.experts.#.{name}_proj" for name in ("gate", "up", "down")}
SPARSE = {f"block_sparse_moe.experts.#.{name}" for name in ("w1", "w2", "w3")}
QKV = LLAMA - {"self_attn.o_proj"}
MLA = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
DEEPSEEK = MLA | MLP | EXPERTS | SHARED
FALCON = {f"self_attention.{n}" for n in ("query_key_value", "dense")} | {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}

# What msModelSlim's recipe of the family, or the rule of most families, quantizes.
QUANTIZED = {
    **dict.fromkeys(SIZES, LLAMA | MLP),
    "Phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "Starcoder2": LLAMA | {"mlp.c_fc", "mlp.c_proj"},
    "Falcon": FALCON,
    "Qwen3Moe": LLAMA | MLP | EXPERTS,
    "Qwen2Moe": LLAMA | EXPERTS | {name.replace("experts", "expert") for name in SHARED},
    **dict.fromkeys(("Mixtral", "MiniMaxM2", "GraniteMoe", "Phimoe"), LLAMA | SPARSE),
    "Qwen3Next": QKV | EXPERTS | {"linear_attn.in_proj_qkvz"},
    "DeepseekV2": DEEPSEEK - {"self_attn.q_a_proj", "self_attn.q_b_proj"} | {"self_attn.q_proj"},
    **dict.fromkeys(("DeepseekV3", "DeepseekV32", "Glm4MoeLite"), DEEPSEEK),
    "GlmMoeDsa": DEEPSEEK | {"self_attn.indexer.wq_b"},
    "Glm4Moe": LLAMA | EXPERTS,
    "HunYuanMoEV1": LLAMA | EXPERTS | {name.replace("shared_experts", "shared_mlp") for name in SHARED},
    "Ernie4_5_Moe": LLAMA | MLP | EXPERTS | SHARED,
    "GptOss": LLAMA | EXPERTS,
    "Qwen3_5": LLAMA | MLP,
    "Qwen3_5Moe": QKV | EXPERTS,
}

# Families that vllm-ascend has no row for: it looks this up.
WITH_ENTRY = {"Qwen2Moe", "Mixtral", "HunYuanMoEV1", "Ernie4_5_Moe", "Qwen3_5Moe", "GptOss", "GraniteMoe", "Phimoe"}


@pytest.mark.parametrize("name", [*SIZES, *WRAPPED])
def test_every_family_has_the_linears_of_its_recipe_and_a_key_for_every_tensor(tmp_path, saved, name):
    source, out = saved(name), tmp_path / "out"
    quantize(source, out)
    tensors, tags = tensors_of(out), tags_of(out)
    int8 = {key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dtype == torch.int8}
    inner = {re.sub(r"\.\d+\.", ".#.", re.sub(r"^.*?\.\d+\.", "", module)) for module in int8}
    assert inner == QUANTIZED[name]
    for module in int8:
        n = len(tensors[f"{module}.weight"])
        for suffix in ("weight_scale", "weight_offset"):
            parameter = tensors[f"{module}.{suffix}"]
            assert (parameter.dtype, tuple(parameter.shape)) == (torch.float32, (n, 1))
        assert {tags[f"{module}.{s}"] for s in ("weight", "weight_scale", "weight_offset")} == {"W8A8_DYNAMIC"}
    entries = tags.keys() - tensors.keys()
    assert tensors.keys() <= tags.keys()
    ends = ("experts.weight",) if name in WITH_ENTRY else ("qkv_proj.weight",) if name == "Starcoder2" else ()
    assert {tags[key] for key in entries if key.endswith(ends)} == ({"W8A8_DYNAMIC"} if ends else set())
    assert all(key.endswith((*ends, "lm_head.weight")) for key in entries)
    assert tags["lm_head.weight"] == "FLOAT"
    directory = NamedDirectory.open(out)
    refused = {loader: by_name.check(directory, loader).findings for loader in directory.layout.engines}
    assert {f.rule for findings in refused.values() for f in findings if not f.verdict.is_harmless} == set()
    require_answers(out)
    floats = {key for key, tensor in tensors.items() if tensor.dtype != torch.int8 and key.endswith(".weight")}
    assert {tags[key] for key in floats} == {"FLOAT"}


@pytest.mark.parametrize(
    ("end", "kind", "error"), [("experts.weight", None, KeyError), ("q_proj.weight", "W8A16", ValueError)]
)
def test_the_look_up_sees_what_is_not_right(tmp_path, saved, end, kind, error):
    quantize(saved("Mixtral"), tmp_path / "out")
    file = tmp_path / "out" / "quant_model_description.json"
    tags = {key: (kind if key.endswith(end) else tag) for key, tag in json.loads(file.read_text()).items()}
    file.write_text(json.dumps({key: tag for key, tag in tags.items() if tag is not None}))
    with pytest.raises(error):
        require_answers(tmp_path / "out")


# Families without a class in transformers here, or whose class has other names than the published files: a layer's
# linears that are quantized, and some that stay float; the prefix of the layers is that of the published files.
NAMED = {
    "InternLM2ForCausalLM internlm2 model.layers.": (
        ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
        [],
    ),
    "InternLM3ForCausalLM internlm3 model.layers.": (sorted(LLAMA | MLP), []),
    "BaichuanForCausalLM baichuan model.layers.": (["self_attn.W_pack", "self_attn.o_proj", *sorted(MLP)], []),
    "ChatGLMModel chatglm transformer.encoder.layers.": (
        [
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        [],
    ),
    "Gemma3ForConditionalGeneration gemma3 model.language_model.layers.": (sorted(LLAMA | MLP), []),
    "Gemma3ForConditionalGeneration gemma3 language_model.model.layers.": (sorted(LLAMA | MLP), []),
    "Mistral3ForConditionalGeneration mistral3 language_model.model.layers.": (sorted(LLAMA | MLP), []),
    "Qwen2_5_VLForConditionalGeneration qwen2_5_vl model.layers.": (sorted(LLAMA | MLP), []),
    "KimiK25ForConditionalGeneration kimi_k25 language_model.model.layers.": (
        [
            *sorted(DEEPSEEK - EXPERTS),
            *(f"mlp.experts.{i}.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")),
        ],
        ["self_attn.kv_b_proj", "mlp.gate"],
    ),
    "DeepseekV3ForCausalLM kimi_k2 model.layers.": (
        [
            *sorted(DEEPSEEK - EXPERTS),
            *(f"mlp.experts.{i}.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")),
        ],
        ["self_attn.kv_b_proj", "mlp.gate"],
    ),
    "DeepseekV4ForCausalLM deepseek_v4 layers.": (
        [
            *(f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "indexer.wq_b")),
            *(f"ffn.experts.{i}.{name}" for i in (0, 1) for name in ("w1", "w2", "w3")),
            *(f"ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")),
        ],
        ["attn.wo_a", "attn.wo_b", "attn.compressor.wkv", "attn.indexer.weights_proj", "ffn.gate"],
    ),
    "Llama4ForConditionalGeneration llama4 language_model.model.layers.": (
        [*sorted(LLAMA), *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down"))],
        ["feed_forward.router"],
    ),
}


GEOMETRY = {"vocab_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}


@pytest.mark.parametrize("name", NAMED)
def test_families_by_their_published_names(tmp_path, name):
    architecture, model_type, prefix = name.split()
    quantized, floats = NAMED[name]
    tensors = {
        f"{prefix}{layer}.{module}.weight": torch.randn(2 if module.endswith(("gate", "router")) else 8, 8)
        for layer in (0, 1)
        for module in (*quantized, *floats)
    }
    outside = {"vision_tower.x.weight": torch.randn(4, 4), f"{prefix}0.input_norm.weight": torch.ones(8)}
    text = {"num_hidden_layers": 2, "hidden_size": 8, "num_local_experts": 2, "dtype": "float32", **GEOMETRY}
    if model_type == "llama4":
        for layer in (0, 1):
            at = f"{prefix}{layer}.feed_forward.experts"
            outside[f"{at}.gate_up_proj"], outside[f"{at}.down_proj"] = torch.randn(2, 8, 12), torch.randn(2, 6, 8)
    config = {"architectures": [architecture], "model_type": model_type, **text, "text_config": text}
    source = save(tmp_path / "m", {**tensors, **outside}, config)
    outcome = quantize(source, tmp_path / "out")
    made, tags = tensors_of(tmp_path / "out"), tags_of(tmp_path / "out")
    int8 = {key.removesuffix(".weight") for key, tensor in made.items() if tensor.dtype == torch.int8}
    experts = {f"feed_forward.experts.{i}.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    expected = {*quantized, *(experts if model_type == "llama4" else ())}
    assert int8 == {f"{prefix}{layer}.{module}" for layer in (0, 1) for module in expected}
    assert made["vision_tower.x.weight"].equal(outside["vision_tower.x.weight"])
    assert made.keys() <= tags.keys()
    assert not [note for note in outcome.notes if "not known" in note]
    if model_type == "llama4":
        joined = outside[f"{prefix}1.feed_forward.experts.gate_up_proj"][1].T
        values = quantize_weight(joined.contiguous(), is_symmetric=True).values
        at = f"{prefix}1.feed_forward.experts.1"
        assert torch.cat([made[f"{at}.gate_proj.weight"], made[f"{at}.up_proj.weight"]]).equal(values)


def test_the_engine_s_families_become_the_same_bytes_by_name(tmp_path):
    for architecture, scheme in (("LlamaForCausalLM", DYNAMIC), ("Qwen2ForCausalLM", W8A16)):
        config = tiny_config(architecture, tie_word_embeddings=scheme is W8A16)
        source = write_model(tmp_path / architecture, config)
        quantize_checkpoint(source, tmp_path / "engine", Recipe(scheme), overwrite=True)
        quantize(source, tmp_path / "names", scheme, overwrite=True)
        ours, theirs = tensors_of(tmp_path / "names"), tensors_of(tmp_path / "engine")
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        assert tags_of(tmp_path / "names") == tags_of(tmp_path / "engine")
        assert config_of(tmp_path / "names") == config_of(tmp_path / "engine")


# --- experts in one tensor

STACKED = [
    "Qwen3Moe",
    "Mixtral",
    "Qwen2Moe",
    "MiniMaxM2",
    "Qwen3_5Moe",
    "DeepseekV3",
    "Ernie4_5_Moe",
    "Glm4Moe",
    "GraniteMoe",
    "Phimoe",
]


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_become_what_single_ones_do(tmp_path, saved, name):
    source = saved(name)
    raw = dict(random_model(name).state_dict())
    assert any(tensor.dim() == 3 and "experts" in key for key, tensor in raw.items())
    stacked = save(tmp_path / "stacked", raw, config_of(source))
    quantize(source, tmp_path / "a")
    quantize(stacked, tmp_path / "b")
    single, split = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert {k for k in single if "experts" in k} == {k for k in split if "experts" in k}
    assert all(single[key].equal(split[key]) for key in single)


def test_gate_and_up_in_turn_and_input_major(tmp_path, saved):
    source = saved("GptOss")
    quantize(source, tmp_path / "out")
    stored, made = tensors_of(source), tensors_of(tmp_path / "out")
    at = "model.layers.1.mlp.experts"
    joined, bias = stored[f"{at}.gate_up_proj"], stored[f"{at}.gate_up_proj_bias"]
    for first, last in ((0, "gate_proj"), (1, "up_proj")):
        expected = quantize_weight(joined[2].T[first::2].float(), is_symmetric=True)
        assert made[f"{at}.2.{last}.weight"].equal(expected.values)
        assert made[f"{at}.2.{last}.weight_scale"].equal(expected.scale)
        assert made[f"{at}.2.{last}.bias"].equal(bias[2][first::2])
    expected = quantize_weight(stored[f"{at}.down_proj"][3].T.float(), is_symmetric=True)
    assert made[f"{at}.3.down_proj.weight"].equal(expected.values)


def test_a_joined_gate_and_up_are_two_linears_for_loaders_of_glm4(tmp_path, saved):
    source = saved("Glm4")
    quantize(source, tmp_path / "out")
    at = "model.layers.0.mlp"
    joined, made = tensors_of(source)[f"{at}.gate_up_proj.weight"], tensors_of(tmp_path / "out")
    halves = torch.cat([made[f"{at}.gate_proj.weight"], made[f"{at}.up_proj.weight"]])
    assert halves.equal(quantize_weight(joined.float(), is_symmetric=True).values)


# --- what is not a linear of a layer


def test_layers_behind_the_last_and_pictures_are_copied_with_keys(tmp_path, saved):
    source, extra = saved("DeepseekV3"), {}
    for name, tensor in tensors_of(source).items():
        if name.startswith("model.layers.1."):
            extra[name.replace("layers.1.", "layers.2.")] = tensor
    extra["model.layers.2.eh_proj.weight"] = torch.randn(32, 64).to(torch.bfloat16)
    extra["model.layers.2.shared_head.head.weight"] = torch.randn(64, 32).to(torch.bfloat16)
    extra["visual.blocks.0.attn.qkv.weight"] = torch.randn(96, 32).to(torch.bfloat16)
    save(tmp_path / "m", {**tensors_of(source), **extra}, config_of(source))
    outcome = quantize(tmp_path / "m", tmp_path / "out")
    assert outcome.notes[0].startswith("behind the 2 layers of config.json lie others (2): they ")
    made, tags = tensors_of(tmp_path / "out"), tags_of(tmp_path / "out")
    assert all(made[name].equal(tensor) and tags[name] == "FLOAT" for name, tensor in extra.items())


def test_nested_parts_of_the_config_survive_without_the_source_s_quantization(tmp_path, saved):
    flat = config_of(saved("Qwen3_5Moe"))
    text = {**flat, "quantization_config": {"quant_method": "fp8"}}
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": {"depth": 2},
        "quantization_config": {"quant_method": "fp8"},
    }
    tensors = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors_of(saved("Qwen3_5Moe")).items()}
    save(tmp_path / "m", tensors, config)
    quantize(tmp_path / "m", tmp_path / "out")
    made = config_of(tmp_path / "out")
    assert made["vision_config"] == {"depth": 2}
    assert "quantization_config" not in made
    inner = made["text_config"]
    assert isinstance(inner, dict)
    assert "quantization_config" not in inner
    assert inner["num_experts"] == 4
    assert inner["hidden_size"] == 32
    name = "model.language_model.layers.0.mlp.experts.3.up_proj.weight"
    assert tags_of(tmp_path / "out")[name] == "W8A8_DYNAMIC"


def test_mindie_is_told_how_attention_is_quantized_and_how_many_experts_there_are(tmp_path, saved):
    config = config_of(saved("Qwen3Moe"))
    assert "num_experts" not in config or "num_local_experts" not in config
    quantize(saved("Qwen3Moe"), tmp_path / "out")
    made = config_of(tmp_path / "out")
    assert (made["quantize"], made["attn_quantize"], made["num_experts"]) == ("w8a8_dynamic", "w8a8_dynamic", 4)
    quantize(saved("DeepseekV3"), tmp_path / "deep")
    assert config_of(tmp_path / "deep")["mla_quantize"] == "w8a8_dynamic"


def test_w8a16_keeps_experts_dynamic_and_says_why(tmp_path, saved):
    outcome = quantize(saved("Qwen3Moe"), tmp_path / "out", W8A16)
    assert outcome.notes[0].startswith("experts are W8A8_DYNAMIC: only MindIE's ATB models load W8A16 experts.")
    tags = tags_of(tmp_path / "out")
    assert tags["model.layers.1.self_attn.q_proj.weight"] == "W8A16"
    assert tags["model.layers.1.mlp.experts.0.up_proj.weight"] == "W8A8_DYNAMIC"
    outcome = quantize(saved("Qwen3Moe"), tmp_path / "all", W8A16, modules=(("*.experts.*", W8A16),))
    assert outcome.notes[0].startswith("experts are W8A16, which only MindIE's ATB models load")
    assert tags_of(tmp_path / "all")["model.layers.1.mlp.experts.0.up_proj.weight"] == "W8A16"


def test_an_unknown_family_by_generic(tmp_path, saved):
    source = tmp_path / "m"
    save(source, tensors_of(saved("Qwen3Moe")), {**config_of(saved("Qwen3Moe")), "architectures": ["NewForCausalLM"]})
    assert refusal(source).endswith("`generic` takes any other that is shaped like Llama.")
    quantize(source, tmp_path / "out", generic=True, keep_float=("*.o_proj",))
    quantize(saved("Qwen3Moe"), tmp_path / "known", keep_float=("*.o_proj",))
    generic, known = tags_of(tmp_path / "out"), tags_of(tmp_path / "known")
    assert {key: generic[key] for key in known} == known
    assert generic.keys() - known.keys() == {"model.layers.1.mlp.experts.weight"}
    assert known["model.layers.0.self_attn.o_proj.weight"] == "FLOAT"


# --- running


@pytest.mark.parametrize("operations", [12, 40, 70])
def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path, saved, monkeypatch, operations):
    source, out = saved("Mixtral"), tmp_path / "out"
    quantize(source, tmp_path / "whole")
    with killed_after(operations, monkeypatch):
        quantize(source, out)
    assert not out.exists()
    quantize(source, out)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_parts_and_budget(tmp_path, saved):
    quantize(saved("Mixtral"), tmp_path / "parts", part_bytes=20_000)
    quantize(saved("Mixtral"), tmp_path / "whole")
    parts, whole = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert all(parts[name].equal(whole[name]) for name in whole)
    with pytest.raises(CapacityError, match="memory budget"):
        quantize(saved("Mixtral"), tmp_path / "small", memory=64 << 20)


def test_the_plan_is_exact_in_bytes_and_leaves_nothing(cli, tmp_path, saved):
    source = tmp_path / "m"
    save(source, tensors_of(saved("DeepseekV3")), config_of(saved("DeepseekV3")))
    before = snapshot(tmp_path)
    done = cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic", "--plan", "--json")
    assert (done.code, snapshot(tmp_path)) == (0, before)
    planned = json.loads(done.out)
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic", "--json")
    assert planned["output_bytes"] == json.loads(made.out)["nbytes"]
    assert planned["fits_memory"]
    assert "tensors of the model, in " in cli("quantize", source, tmp_path / "b", "--scheme", "w8a16", "--plan").out


def test_the_commands(cli, tmp_path, saved):
    source, out = saved("Glm4Moe"), tmp_path / "out"
    done = cli("quantize", source, out, "--scheme", "w8a8-dynamic", "--json")
    assert done.code == 0
    assert json.loads(done.out)["types"] == {"W8A8_DYNAMIC": 20, "FLOAT": 7}
    assert "OUT is for other engines (vllm-ascend, SGLang)" in done.err
    for command in ("run", "eval"):
        assert error_line(cli(command, out, *(["--prompt", "x"] if command == "run" else []))) == (
            f"model in {out}: got an 8-bit Glm4MoeForCausalLM, which was made for other engines (vllm-ascend, "
            f"SGLang), expected {KNOWN}. eightfold checks it, and does not run it."
        )
    assert error_line(cli("quantize", source, tmp_path / "other", "--scheme", "w8a8")) == (
        "--scheme: got W8A8 for Glm4MoeForCausalLM, expected W8A8_DYNAMIC or W8A16, which need no calibration. "
        "eightfold does not run this model."
    )


def test_an_architecture_that_loaders_know_by_another_name(tmp_path, saved):
    quantize(saved("Phimoe"), tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["PhiMoEForCausalLM"]
    published = {**config_of(saved("Phimoe")), "architectures": ["PhiMoEForCausalLM"]}
    quantize(save(tmp_path / "m", tensors_of(saved("Phimoe")), published), tmp_path / "other")
    assert tags_of(tmp_path / "other") == tags_of(tmp_path / "out")


# --- bad input

MIXTRAL = "model.layers.1.block_sparse_moe"


@pytest.fixture
def mixtral(tmp_path, saved):
    source = saved("Mixtral")
    return save(tmp_path / "m", tensors_of(source), config_of(source))


def test_a_missing_expert(mixtral):
    assert refusal(change(mixtral, {f"{MIXTRAL}.experts.2.w3.weight": None})) == (
        f"experts of {MIXTRAL}.experts in DIR: got no 2.w3, expected 4 experts with w1, w3, w2. "
        "Fetch the model again, with all of its files."
    )


def test_an_expert_twice(mixtral):
    joined = torch.zeros(4, 96, 32, dtype=torch.bfloat16)
    assert refusal(change(mixtral, {f"{MIXTRAL}.experts.gate_up_proj": joined})).startswith(
        f"{MIXTRAL}.experts.0.w1.weight in DIR: got it in "
    )


def test_experts_of_different_shapes(mixtral):
    assert refusal(change(mixtral, {f"{MIXTRAL}.experts.3.w2.weight": torch.zeros(32, 40)})) == (
        f"shape of {MIXTRAL}.experts.3.w2 in DIR: got [32, 40], expected [32, 48], as expert 0 has."
        " Fetch the model again, with all of its files."
    )


def test_a_router_with_the_wrong_width(mixtral):
    assert refusal(change(mixtral, {f"{MIXTRAL}.gate.weight": torch.zeros(5, 32)})) == (
        f"shape of {MIXTRAL}.gate.weight in DIR: got [5, 32], expected [4, 32], one row for each of 4 experts."
        " Fetch the model again, with all of its files."
    )
    assert refusal(change(mixtral, {f"{MIXTRAL}.gate.weight": None})) == (
        f"router in DIR: got no {MIXTRAL}.gate.weight, expected the router of {MIXTRAL}.experts."
        " Fetch the model again, with all of its files."
    )


def test_no_number_in_a_weight(mixtral):
    name = f"{MIXTRAL}.experts.1.w1.weight"
    weight = tensors_of(mixtral)[name]
    weight[5, 7] = torch.nan
    assert refusal(change(mixtral, {name: weight})) == (
        f"{name}[5, 7] in model.safetensors: got nan, expected a finite number. "
        "The weights are damaged; fetch the model again."
    )


def test_a_layer_or_a_linear_that_is_missing(mixtral):
    assert refusal(change(mixtral, {"model.layers.0.self_attn.k_proj.weight": None})).startswith(
        "linears of model.layers.0.self_attn in DIR: got no model.layers.0.self_attn.k_proj, expected "
    )
    (mixtral / "config.json").write_text(json.dumps({**config_of(mixtral), "num_hidden_layers": 3}))
    assert refusal(change(mixtral, {})).startswith("layers in DIR: got no weights of layer 2, expected all 3 of ")


def test_the_dtype_of_the_model(saved):
    assert plan_by_name(saved("Mixtral"), Recipe(DYNAMIC)).dtype is DType.BF16
