"""Each rule about MindIE fires on what it is about and on nothing else; and what the real loader was seen to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eightfold.check import Report, mindie, mindie_config, vllm_ascend
from eightfold.check.directory import RawDirectory, cast, differ
from eightfold.config import DType
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.check import (
    DOWN,
    GATE,
    LAYERS,
    NORM,
    UP,
    Case,
    Change,
    K,
    O,
    Q,
    Toy,
    V,
    all_of,
    case,
    fill,
    findings,
    leave_float_shard,
    made,
    remove_tokenizer,
    rename_description,
    set_merges,
    store_as,
    times,
    write,
)
from tests.conftest import tiny_config, write_model


def report(path: Path) -> Report:
    return mindie.check(RawDirectory.open(path))


ROW = (48,)
SUFFIXED = "quant_model_description_w8a8.json"
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 8.0}


def fa_by_config(value: str | None) -> Change:
    return lambda toy: toy.add_attention().configure(quantization_config={"fa_quant_type": value})


CONFIG_CASES = [
    case(
        "a suffixed name",
        all_of(rename_description(SUFFIXED), lambda t: t.configure(quantize="w8a8")),
        "description-name warns",
    ),
    case("a suffixed name that nothing points to", rename_description(SUFFIXED), "description misdecodes"),
    case(
        "quantize without a description",
        all_of(lambda t: t.description.unlink(), lambda t: t.configure(quantize="w8a8")),
        "description refuses",
    ),
    case(
        "a mix under its own name",
        all_of(rename_description("quant_model_description_w8a8_mix.json"), lambda t: t.configure(quantize="w8a8_mix")),
        "description refuses",
        scheme="w8a8-mix",
    ),
    case(
        "dynamic under the name of w8a8",
        all_of(rename_description(SUFFIXED), lambda t: t.configure(quantize="w8a8_dynamic")),
        "description-name warns",
        scheme="w8a8-dynamic",
    ),
    case("another description", write(SUFFIXED, "{}"), "description-other ignores"),
    case("the same one twice", lambda t: (t.path / SUFFIXED).write_bytes(t.description.read_bytes())),
    case("a damaged description", write("quant_model_description.json", "{"), "damaged-file refuses"),
    case("a damaged description that is not read", write("quant_model_description_w4a16.json", "[]")),
    case("damaged weights", write("extra.safetensors", "12345678"), "damaged-file refuses"),
    case("no model_quant_type", lambda t: t.describe({"model_quant_type": ...}), "quantize refuses"),
    case(
        "capital letters",
        lambda t: t.configure(quantize="W8A8"),
        "quantize refuses",
    ),
    case("a quantize without rules", lambda t: t.describe({"model_quant_type": "W4A16"}), "unchecked-scheme warns"),
    case("another quantize", lambda t: t.configure(quantize="w8a8s"), "quantize-differs warns"),
    case("a group size", lambda t: t.describe({"group_size": 32}), "settings refuses"),
    case(
        "a kind of attention", lambda t: t.describe({"fa_quant_type": "FP8"}), "settings refuses", "fa-tensor refuses"
    ),
    case("attention off by a null", fa_by_config(None), "fa-switched-off ignores"),
    case("attention by config.json", all_of(fa_by_config("FAQuant"), lambda t: t.describe({"fa_quant_type": ...}))),
    case(
        "attention that nothing enables",
        lambda t: t.add_attention().describe({"fa_quant_type": ...}),
        "fa-not-enabled ignores",
    ),
    case(
        "a cache that only kv_cache_type enables",
        lambda t: t.add_kv_cache(keys=("kv_cache_type",)),
        "kv-not-enabled ignores",
    ),
    case("cache and attention", lambda t: t.add_kv_cache().add_attention(), "kv-and-fa warns"),
    case("no model_type", lambda t: t.configure(model_type=...), "model-type refuses"),
    case("an unknown model_type", lambda t: t.configure(model_type="mymodel"), "model-type refuses"),
    case("another model_type", lambda t: t.configure(model_type="qwen2"), "model-type refuses"),
    case("no tokenizer", remove_tokenizer, "tokenizer refuses"),
    case("a damaged tokenizer", write("tokenizer.json", "[1]"), "tokenizer refuses"),
    case("damaged settings", write("tokenizer_config.json", "{"), "tokenizer refuses"),
    case(
        "a class of transformers 5",
        lambda t: t.set_tokenizer(tokenizer_class="TokenizersBackend"),
        "tokenizer-class refuses",
    ),
    case("tokens as 5 lists them", lambda t: t.set_tokenizer(extra_special_tokens=["<x>"]), "extra-tokens warns"),
    case(
        "BOS as 5 leaves it out",
        lambda t: t.set_tokenizer(tokenizer_class="LlamaTokenizer", backend="tokenizers"),
        "bos misdecodes",
    ),
    case(
        "BOS as 4 leaves it out",
        lambda t: t.set_tokenizer(tokenizer_class="LlamaTokenizer", backend="tokenizers", add_bos_token=False),
    ),
    case("tokens by name", lambda t: t.set_tokenizer(extra_special_tokens={"image_token": "<x>"})),
    case("a template in another file", lambda t: t.set_tokenizer(chat_template=...), "chat-template warns"),
    case(
        "merges as pairs",
        set_merges,
        "tokenizer-merges refuses",
    ),
    case(
        "a part of newer tokenizers",
        lambda t: t.set_tokenizer("tokenizer.json", normalizer={"type": "ByteLevel"}),
        "tokenizer-part refuses",
    ),
    case("only dtype", lambda t: t.configure(torch_dtype=..., dtype="float16"), "torch-dtype refuses"),
    case("dtype auto", lambda t: t.configure(torch_dtype="auto"), "torch-dtype refuses"),
    case("no dtype", lambda t: t.configure(torch_dtype=..., dtype=...), "torch-dtype refuses"),
    case("float32", lambda t: t.configure(torch_dtype="float32", dtype="float32"), "torch-dtype refuses"),
    case(
        "only rope_parameters",
        lambda t: t.configure(rope_theta=..., rope_parameters={"rope_theta": 5e5}),
        "rope-dialect misdecodes",
    ),
    case(
        "only rope_parameters, the default", lambda t: t.configure(rope_theta=..., rope_parameters={"rope_theta": 1e4})
    ),
    case(
        "scaling in rope_parameters only",
        lambda t: t.configure(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        "rope-dialect misdecodes",
    ),
    case("yarn", lambda t: t.configure(rope_scaling=YARN, rope_parameters=...)),
    case("yarn by its newer name", lambda t: t.configure(rope_scaling={**YARN, "type": None, "rope_type": "yarn"})),
    case(
        "a setting of yarn that it does not know",
        lambda t: t.configure(rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        "rope-scaling refuses",
    ),
    case(
        "an attention factor",
        lambda t: t.configure(rope_scaling={**YARN, "attention_factor": 1.5}),
        "rope-attention misdecodes",
    ),
    case("dynamic", lambda t: t.configure(rope_scaling={"type": "dynamic", "factor": 2.0})),
    case("longrope", lambda t: t.configure(rope_scaling={"type": "longrope", **LONGROPE})),
    case(
        "longrope by its newer name",
        lambda t: t.configure(rope_scaling={"rope_type": "longrope", **LONGROPE}),
        "rope-scaling refuses",
    ),
    case("an unknown rope type", lambda t: t.configure(rope_scaling={"rope_type": "ntk"}), "rope-scaling refuses"),
    case("an unknown rope key", lambda t: t.configure(rope_scaling={"stretch": 2.0}), "rope-scaling refuses"),
    case("a rope factor out of range", lambda t: t.configure(rope_scaling=LLAMA3), "rope-scaling refuses"),
    case("no context length", lambda t: t.configure(max_position_embeddings=...), "config-sizes refuses"),
    case("a damaged generation config", write("generation_config.json", "[]"), "generation-config refuses"),
    case("another class", lambda t: None, "model-class warns", architecture="Qwen2ForCausalLM"),
    case(
        "heads of another size",
        lambda t: t.configure(head_dim=6),
        "head-dim misdecodes",
        "shape misdecodes",
    ),
]

LABEL_CASES = [
    case("a float shard left over", leave_float_shard, "duplicate-tensor refuses"),
    case("an index", write("model.safetensors.index.json", '{"weight_map": {}}')),
    case(
        "no entry for k",
        lambda t: t.describe({f"{K}.weight": ...}),
        "label-missing refuses",
        "tensor-without-entry loads",
        "unpacked-group loads",
    ),
    case(
        "labels of another scheme",
        lambda t: t.describe({f"{name}.weight": "W8A16" for name in (Q, K, V)}),
        "label misdecodes",
    ),
    case("a float label", lambda t: t.describe({f"{DOWN}.weight": "FLOAT"}), "label-and-weight misdecodes"),
    case("a float weight", store_as(torch.float16, f"{DOWN}.weight"), "label-and-weight misdecodes"),
    case("a foreign dtype", store_as(torch.uint8, f"{DOWN}.weight"), "label-and-weight misdecodes"),
    case(
        "static under dynamic",
        lambda t: t.describe({"model_quant_type": "W8A8_DYNAMIC"}),
        "mixed-scheme ignores",
    ),
    case("a whole group float", lambda t: t.keep_float(Q, K, V)),
    case("part of a group float", lambda t: t.keep_float(UP), "unpacked-group loads"),
    case("part of a dynamic group float", lambda t: t.keep_float(K), "mixed-group refuses", scheme="w8a8-dynamic"),
]


def mixed(scheme: str, pattern: str, kind: str, *expected: str) -> Case:
    """Return the case of a directory whose recipe gives some linears another scheme."""
    return case(
        f"{kind} for {pattern} in {scheme}", lambda t: None, *expected, scheme=scheme, modules=((pattern, kind),)
    )


DOWN_ONLY, QKV_ONLY = "*.down_proj", "*.self_attn.[qkv]_proj"
MIXED_CASES = [
    mixed("w8a8", DOWN_ONLY, "w8a8-dynamic", "mixed-scheme refuses"),
    mixed("w8a8", DOWN_ONLY, "w8a16", "mixed-scheme refuses"),
    mixed("w8a8", DOWN_ONLY, "w8a8-mix", "mixed-scheme ignores"),
    mixed("w8a8", QKV_ONLY, "w8a8-dynamic", "mixed-scheme refuses", "label misdecodes"),
    mixed("w8a8-mix", DOWN_ONLY, "w8a8-dynamic", "mixed-scheme refuses"),
    mixed("w8a8-mix", DOWN_ONLY, "w8a8", "mixed-scheme ignores"),
    mixed("w8a8-dynamic", DOWN_ONLY, "w8a8", "mixed-scheme ignores"),
    mixed("w8a8-dynamic", DOWN_ONLY, "w8a16", "mixed-scheme misdecodes"),
    mixed("w8a8-dynamic", QKV_ONLY, "w8a16", "label misdecodes"),
    mixed("w8a16", DOWN_ONLY, "w8a8-dynamic", "mixed-scheme ignores"),
    mixed("w8a16", DOWN_ONLY, "w8a8", "mixed-scheme ignores"),
]

TENSOR_CASES = [
    case("no deq_scale", lambda t: t.remove(f"{O}.deq_scale"), "missing-tensor refuses"),
    case(
        "dynamic without offsets",
        lambda t: t.remove(f"{O}.weight_offset"),
        "missing-tensor refuses",
        scheme="w8a8-dynamic",
    ),
    case(
        "a mix without weight scales",
        lambda t: t.remove(f"{O}.weight_scale"),
        "missing-tensor refuses",
        scheme="w8a8-mix",
    ),
    case("no head", lambda t: t.remove("lm_head.weight"), "missing-tensor refuses"),
    case("no head, tied", lambda t: t.remove("lm_head.weight").configure(tie_word_embeddings=True)),
    case(
        "an older norm without its bias",
        lambda t: t.add_norm_biases(older=True).remove(f"{NORM}.module.bias"),
        "missing-tensor refuses",
    ),
    case("older norms", lambda t: t.add_norm_biases(older=True)),
    case("older norms, the last with a bias", fill(1.0, ROW, "model.norm.module.bias"), "norm-bias misdecodes"),
    case("weights of another size", lambda t: t.configure(intermediate_size=96), "shape misdecodes"),
    case("input_scale of k", times(1.5, f"{K}.input_scale"), "qkv-input-scale refuses"),
    case("input_offset of v", fill(100.0, (1,), f"{V}.input_offset"), "qkv-input-offset refuses"),
    case("input_scale of up", times(1.5, f"{UP}.input_scale"), "gate-up-input-scale refuses"),
    case("input_offset of gate", fill(100.0, (1,), f"{GATE}.input_offset"), "gate-up-input-offset refuses"),
    case(
        "input_scale of k in pieces",
        all_of(times(1.5, f"{K}.input_scale"), lambda t: t.keep_float(Q)),
        "unpacked-group loads",
    ),
    case("input_scale of o", times(1.5, f"{O}.input_scale")),
    case("a scalar", lambda t: t.change({f"{O}.input_scale": torch.tensor(0.02)}), "scalar-input refuses"),
    case("an offset beyond int8", fill(200.0, (1,), f"{O}.input_offset"), "input-offset misdecodes"),
    case("an offset with a fraction", fill(0.5, (1,), f"{O}.input_offset"), "input-offset misdecodes"),
    case(
        "packed deq_scale in bfloat16",
        store_as(torch.int64, f"{O}.deq_scale"),
        "deq-scale misdecodes",
        dtype="bfloat16",
    ),
    case("an offset of weights", fill(1.0, (48, 1), f"{O}.weight_offset"), "weight-offset misdecodes"),
    case("an offset of W8A16 weights", lambda t: None, scheme="w8a16", asymmetric=True),
    case("norm biases of zero", lambda t: t.add_norm_biases(0.0)),
    case("norm bias before W8A8", fill(1.0, ROW, f"{NORM}.bias")),
    case("norm bias of the last norm", fill(1.0, ROW, "model.norm.bias"), "norm-bias misdecodes"),
    case("norm bias before W8A16", fill(1.0, ROW, f"{NORM}.bias"), "norm-bias misdecodes", scheme="w8a16"),
    case("norm bias before dynamic", fill(1.0, ROW, f"{NORM}.bias"), "norm-bias misdecodes", scheme="w8a8-dynamic"),
    case(
        "norm bias before float",
        all_of(lambda t: t.keep_float(Q, K, V), fill(1.0, ROW, f"{NORM}.bias")),
        "norm-bias misdecodes",
    ),
    case("bias in quant_bias", lambda t: None, attention_bias=True),
    case("bias of W8A16", lambda t: None, "linear-bias misdecodes", scheme="w8a16", attention_bias=True),
    case("bias of a mix", lambda t: None, "linear-bias misdecodes", scheme="w8a8-mix", attention_bias=True),
    case("bias of zero", fill(0.0, ROW, f"{O}.bias"), scheme="w8a16"),
    case("bias of another class", lambda t: None, "model-class warns", scheme="w8a16", architecture="Qwen2ForCausalLM"),
    case("an int8 head", store_as(torch.int8, "lm_head.weight"), "lm-head misdecodes"),
    case(
        "an int8 head of a tied model",
        all_of(store_as(torch.int8, "lm_head.weight"), lambda t: t.configure(tie_word_embeddings=True)),
        "tied-head ignores",
    ),
    case("an int8 embedding", store_as(torch.int8, "model.embed_tokens.weight"), "embedding misdecodes"),
]

ATTENTION_CASES = [
    case("a cache", lambda t: t.add_kv_cache()),
    case("a cache in part", lambda t: t.add_kv_cache().remove(f"{K}.kv_cache_scale"), "kv-tensor refuses"),
    case(
        "a cache by tensor",
        lambda t: t.add_kv_cache().change({f"{K}.kv_cache_scale": torch.ones(1)}),
        "kv-shape refuses",
    ),
    case("attention", lambda t: t.add_attention()),
    case("attention with offsets", lambda t: t.add_attention(offset=torch.ones(1)), "fa-offset misdecodes"),
    case(
        "attention without the column",
        lambda t: t.add_attention().change({f"{LAYERS[1]}.self_attn.fa_q.scale": torch.ones(4)}),
        "fa-shape refuses",
    ),
    case("a cache beside W8A16", lambda t: t.add_kv_cache(), scheme="w8a16"),
    case("a cache beside dynamic", lambda t: t.add_kv_cache(), "undocumented warns", scheme="w8a8-dynamic"),
    case("attention beside a mix", lambda t: t.add_attention(), "undocumented warns", scheme="w8a8-mix"),
    case(
        "a cache beside W8A16 of a Qwen",
        lambda t: t.add_kv_cache(),
        "undocumented warns",
        "model-class warns",
        scheme="w8a16",
        architecture="Qwen2ForCausalLM",
    ),
    case(
        "a cache beside outlier suppression of a Qwen",
        lambda t: t.add_kv_cache().add_norm_biases(),
        "undocumented warns",
        "model-class warns",
        architecture="Qwen2ForCausalLM",
    ),
    case("communication", lambda t: t.describe({"reduce_quant_type": "per_channel"}), "reduce-tensor refuses"),
    case("a layer too many", fill(1.0, ROW, "model.layers.7.x.weight"), "unread-tensor ignores"),
    case("an entry without tensor", lambda t: t.describe({f"{O}.x": "W8A8"}), "entry-without-tensor ignores"),
    case("a tensor without entry", lambda t: t.describe({f"{O}.deq_scale": ...}), "tensor-without-entry loads"),
]

CASES = [*CONFIG_CASES, *LABEL_CASES, *MIXED_CASES, *TENSOR_CASES, *ATTENTION_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_fires(tmp_path, case: Case):
    toy = Toy(tmp_path, **case.options)
    case.change(toy)
    assert findings(report(toy.path)) == case.expected


# What the real loader did with such directories.
OBSERVED = [
    case("W8A8 fp16 loads", lambda t: None),
    case("W8A8 bf16 loads", lambda t: None, dtype="bfloat16"),
    case("W8A8 with norm biases loads", lambda t: t.add_norm_biases()),
    case("W8A16 asymmetric loads", lambda t: None, scheme="w8a16", asymmetric=True),
    case("W8A8_DYNAMIC loads", lambda t: None, scheme="w8a8-dynamic"),
    case("W8A8 with C8 loads", lambda t: t.add_kv_cache()),
    case(
        "W8A8 without weight_scale and weight_offset loads",
        lambda t: t.remove(*[name for name in t.load() if name.endswith(("weight_scale", "weight_offset"))]),
    ),
    case("W8A8 with q float loads as MIX_W8A8", lambda t: t.keep_float(Q), "unpacked-group loads"),
    case("W8A16 with q float: AssertionError", lambda t: t.keep_float(Q), "mixed-group refuses", scheme="w8a16"),
    case("k input_scale times 1.5: ValueError", times(1.5, f"{K}.input_scale"), "qkv-input-scale refuses"),
    case("FAQuant [heads, 1] with int8 offsets loads", lambda t: t.add_attention()),
    case("FAQuant [heads, 1] with float offsets loads", lambda t: t.add_attention(offset=torch.zeros(1))),
    case("FAQuant [heads, head_dim]: RuntimeError", lambda t: t.add_attention(columns=12), "fa-shape refuses"),
    case(
        "FAQuant missing in one layer: AssertionError",
        lambda t: t.add_attention().remove(*[n for n in t.load() if n.startswith(f"{LAYERS[1]}.self_attn.fa_")]),
        "fa-tensor refuses",
    ),
    case(
        "without kv_quant_type loads without KV quantization",
        lambda t: t.add_kv_cache().describe({"kv_quant_type": ...}),
        "kv-not-enabled ignores",
    ),
    case("KV offset -3.0 loads and is lost", lambda t: t.add_kv_cache(offset=-3.0), "kv-offset misdecodes"),
    case("FAQuant and a null in config.json loads without", fa_by_config(None), "fa-switched-off ignores"),
    case(
        "fp16 W8A8 with float32 deq_scale loads, 1 % off",
        store_as(torch.float32, f"{Q}.deq_scale", f"{K}.deq_scale", f"{V}.deq_scale"),
        "deq-scale misdecodes",
    ),
]


@pytest.mark.parametrize("case", OBSERVED, ids=str)
def test_what_the_real_loader_was_seen_to_do(tmp_path, case: Case):
    test_what_fires(tmp_path, case)


def test_every_rule_has_a_case_in_which_it_fires():
    elsewhere = {"path", "owner", "permission"}  # tests of their own, below
    fired = {expected.partition(" ")[0] for case in (*CASES, *OBSERVED) for expected in case.expected}
    assert fired | elsewhere == mindie.RULES.names | mindie_config.RULES.names


# --- paths and permissions


def test_a_path_with_other_characters_is_refused(tmp_path):
    toy = Toy(tmp_path)
    odd = toy.path.rename(tmp_path / "mein modell")
    found = report(odd)
    assert findings(found) == {"path refuses"}
    assert found.findings[0].where[0] == str(odd)


def test_what_others_may_write_to_is_refused(tmp_path):
    toy = Toy(tmp_path)
    toy.weights.chmod(0o666)
    assert findings(report(toy.path)) == {"permission refuses"}
    assert report(toy.path).findings[0].where == (str(toy.weights),)
    toy.weights.chmod(0o660)
    assert findings(report(toy.path)) == set()


def test_files_of_somebody_else_are_refused(tmp_path, monkeypatch):
    toy = Toy(tmp_path)
    status = toy.path.stat()
    monkeypatch.setattr(os, "geteuid", lambda: status.st_uid + 1)
    monkeypatch.setattr(os, "getegid", lambda: status.st_gid + 1)
    monkeypatch.setattr(os, "getgroups", list)
    assert findings(report(toy.path)) == {"owner refuses"}
    monkeypatch.setattr(os, "getgroups", lambda: [status.st_gid])
    assert findings(report(toy.path)) == set()
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert findings(report(toy.path)) == set()


# --- configurations as quantize writes them


LLAMA3_WITHIN = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
        LLAMA3_WITHIN,
    ],
    ids=["linear", "linear by type", "linear by both", "llama3"],
)
def test_no_loader_objects_to_the_scaling_that_is_written(tmp_path, scaling):
    config = tiny_config(head_dim=12, torch_dtype="float16", rope_scaling=scaling)
    source = write_model(tmp_path / "float", config)
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A16), None)
    assert findings(report(tmp_path / "out")) == set()
    assert vllm_ascend.check(RawDirectory.open(tmp_path / "out")).findings == ()


# --- what it makes of a directory


def test_a_float_model_loads(tmp_path):
    float_model = write_model(tmp_path / "float", tiny_config(head_dim=12))
    assert findings(report(float_model)) == {"chat-template warns"}
    assert report(float_model).summary.linears == {"FLOAT": 14}


def test_the_summary_counts_what_is_stored(tmp_path):
    toy = Toy(tmp_path).keep_float(Q, DOWN).add_attention()
    assert report(toy.path).summary.as_dict() == {
        "dtype": "float16",
        "linears": {"FLOAT": 2, "W8A8": 12},
        "packs": {"qkv": {"MIX_W8A8": 1, "ALL_W8A8": 1}, "gate_up": {"ALL_W8A8": 2}},
        "kv_cache": "int8",
        "attention": "FAQuant",
        "attention_layers": 2,
        "text": "float16: 2 linears FLOAT, 12 linears W8A8 (1 x qkv packed MIX_W8A8, 1 x qkv packed ALL_W8A8, "
        "2 x gate_up packed ALL_W8A8), int8 KV cache, FAQuant attention in 2 layers",
    }


def test_a_message_says_what_it_does_what_there_is_and_what_to_do(tmp_path):
    toy = Toy(tmp_path).describe({"group_size": 32})
    assert report(toy.path).findings[0].message == (
        "raises NotImplementedError for this group_size: got 32, expected 0, 64, 128 or 256"
    )
    names = [*(f"self_attn.{x}" for x in "qkvo"), "mlp.down"]
    toy = Toy(tmp_path / "other").remove(*[f"{layer}.{name}_proj.quant_bias" for layer in LAYERS for name in names])
    found = report(toy.path).findings[0]
    assert (found.count, len(found.where)) == (10, 8)
    assert found.place == f"{Q}.quant_bias, {K}.quant_bias and 8 more"


def test_schemes_that_quantize_does_not_name_are_named_with_their_linears(tmp_path):
    found = report(Toy(tmp_path, modules=((DOWN_ONLY, "w8a8-dynamic"),)).path).findings[0]
    assert found.where == (DOWN, DOWN.replace("layers.0", "layers.1"))
    assert found.message == (
        "picks the tensors of every int8 linear by quantize, whatever its label, and raises AssertionError: weight "
        "does not exist: got W8A8_DYNAMIC under quantize w8a8, expected one scheme. "
        "Write the directory again, in one scheme."
    )


def test_an_int8_head_is_read_without_its_scale(tmp_path):
    found = report(Toy(tmp_path).change({"lm_head.weight": torch.ones(320, 48, dtype=torch.int8)}).path).findings[0]
    assert found.where == ("lm_head.weight",)
    assert found.message == "reads this weight alone, without a scale: got I8, expected float. Keep it float."


def test_the_directory_is_only_read(tmp_path):
    path = made("w8a8", "float16", "LlamaForCausalLM", ())
    before = {file: file.read_bytes() for file in path.iterdir()}
    report(path)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


# --- the arithmetic of the rules


def test_cast_rounds_as_torch_does():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 2).repeat(100)
    for kind, dtype in ((DType.F16, torch.float16), (DType.BF16, torch.bfloat16)):
        assert np.array_equal(cast(values.numpy(), kind), values.to(dtype).double().numpy())


@pytest.mark.parametrize(
    "values", [[1.0, 1.0], [1.0, 1.0 + 5e-6], [1.0, 1.0 + 2e-5], [1e-9, 5e-9], [0.0, 2e-8], [1.0, 2.0]]
)
def test_differ_has_the_tolerance_of_torch(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert differ([np.array([value]) for value in values]) != torch.allclose(tensor, tensor[0])


def test_nothing_does_not_differ():
    assert not differ([])
