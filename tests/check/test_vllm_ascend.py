"""Each rule about vllm-ascend fires on what it is about and on nothing else; what the real schemes were seen to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eightfold.check import Report, vllm_ascend
from eightfold.check.directory import RawDirectory
from tests.check import (
    DOWN,
    GATE,
    LAYERS,
    NORM,
    UP,
    Case,
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
    remove_tokenizer,
    rename_description,
    set_merges,
    store_as,
    times,
    write,
)
from tests.conftest import tiny_config, write_model


def report(path: Path) -> Report:
    return vllm_ascend.check(RawDirectory.open(path))


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROW = (48,)
SUFFIXED = "quant_model_description_w8a8.json"
FLOAT_INDEX = '{"weight_map": {"model.norm.weight": "model.safetensors"}}'

DESCRIPTION_CASES = [
    case("no model_type", lambda t: t.configure(model_type=...), "model-type refuses"),
    case("an unknown model_type", lambda t: t.configure(model_type="mymodel"), "model-type refuses"),
    case("another model_type", lambda t: t.configure(model_type="qwen2"), "model-type refuses"),
    case("no tokenizer", remove_tokenizer, "tokenizer refuses"),
    case("a damaged tokenizer", write("tokenizer.json", "[1]"), "tokenizer refuses"),
    case("damaged settings", write("tokenizer_config.json", "{"), "tokenizer refuses"),
    case(
        "a class of transformers 5",
        lambda t: t.set_tokenizer(tokenizer_class="TokenizersBackend"),
        "tokenizer-dialect warns",
    ),
    case("BOS by a switch", lambda t: t.set_tokenizer(tokenizer_class="LlamaTokenizerFast"), "bos warns"),
    case(
        "no BOS by a switch",
        lambda t: t.set_tokenizer(tokenizer_class="LlamaTokenizerFast", add_bos_token=False),
    ),
    case("tokens as 5 lists them", lambda t: t.set_tokenizer(extra_special_tokens=["<x>"]), "tokenizer-dialect warns"),
    case(
        "merges as pairs",
        set_merges,
    ),
    case("a suffixed name", rename_description(SUFFIXED), "description refuses"),
    case("a damaged description", write("quant_model_description.json", "{"), "damaged-file refuses"),
    case("another description", write(SUFFIXED, "{}"), "description-other ignores"),
    case("a damaged description that is not read", write(SUFFIXED, "{")),
    case("damaged weights", write("extra.safetensors", "12345678"), "damaged-file refuses"),
    case(
        "quantization_config",
        lambda t: t.configure(quantization_config={"kv_quant_type": None}),
        "quantization-config refuses",
    ),
    case("an empty quantization_config", lambda t: t.configure(quantization_config={})),
    case(
        "no entry for k",
        lambda t: t.describe({f"{K}.weight": ...}),
        "label-missing refuses",
        "tensor-without-entry loads",
    ),
    case(
        "no entry for the embedding",
        lambda t: t.describe({"model.embed_tokens.weight": ...}),
        "label-missing refuses",
        "tensor-without-entry loads",
    ),
    case(
        "no entry for the head of a tied Llama",
        lambda t: t.remove("lm_head.weight").configure(tie_word_embeddings=True),
        "label-missing refuses",
    ),
    case(
        "no entry for the head of a tied Qwen2",
        lambda t: t.remove("lm_head.weight").configure(tie_word_embeddings=True),
        architecture="Qwen2ForCausalLM",
    ),
    case("a scheme that is not registered", lambda t: t.describe({f"{DOWN}.weight": "W8A8S"}), "scheme refuses"),
    case("a scheme without rules", lambda t: t.describe({f"{DOWN}.weight": "W4A16"}), "unchecked-scheme warns"),
    case(
        "labels of another scheme",
        lambda t: t.describe({f"{UP}.weight": "W8A8_DYNAMIC"}),
        "mixed-group refuses",
        "unknown-tensor refuses",
    ),
    case("float32", lambda t: t.configure(torch_dtype="float32", dtype="float32"), "torch-dtype warns"),
    case("only dtype", lambda t: t.configure(torch_dtype=..., dtype="float16")),
    case(
        "yarn with an attention factor",
        lambda t: t.configure(rope_scaling={**YARN, "attention_factor": 1.5}, rope_parameters=...),
        "rope-attention misdecodes",
    ),
    case(
        "dynamic scaling",
        lambda t: t.configure(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=...),
        "rope-dynamic warns",
    ),
    case("a rope type that is not known", lambda t: t.configure(rope_scaling={"type": "x"}, rope_parameters=...)),
    case("only rope_parameters", lambda t: t.configure(rope_theta=..., rope_parameters={"rope_theta": 5e5})),
]

TENSOR_CASES = [
    case("a float shard before", leave_float_shard, "duplicate-tensor warns"),
    case(
        "a float shard behind",
        all_of(leave_float_shard, lambda t: (t.path / "model.safetensors").rename(t.path / "z.safetensors")),
        "duplicate-tensor warns",
        "label-and-weight misdecodes",
    ),
    case(
        "an index of the float model",
        all_of(leave_float_shard, write("model.safetensors.index.json", FLOAT_INDEX)),
        "index ignores",
        "missing-tensor refuses",
        "empty-parameter misdecodes",
        "label-and-weight misdecodes",
        "entry-without-tensor ignores",
    ),
    case("an index of our own", write("quant_model_weight_w8a8.safetensors.index.json", FLOAT_INDEX)),
    case("linears of another scheme", lambda t: None, modules=(("*.down_proj", "w8a8-dynamic"),)),
    case("no input_scale", lambda t: t.remove(f"{O}.input_scale"), "missing-tensor refuses"),
    case("no norm", lambda t: t.remove(f"{NORM}.weight"), "missing-tensor refuses"),
    case("no deq_scale", lambda t: t.remove(f"{O}.deq_scale"), "empty-parameter misdecodes"),
    case(
        "dynamic without scale",
        lambda t: t.remove(f"{O}.weight_scale"),
        "empty-parameter misdecodes",
        scheme="w8a8-dynamic",
    ),
    case("dynamic without offset", lambda t: t.remove(f"{O}.weight_offset"), scheme="w8a8-dynamic"),
    case(
        "a mix without scale",
        lambda t: t.remove(f"{O}.weight_scale"),
        "empty-parameter misdecodes",
        scheme="w8a8-mix",
    ),
    case(
        "W8A16 without offset", lambda t: t.remove(f"{O}.weight_offset"), "empty-parameter misdecodes", scheme="w8a16"
    ),
    case(
        "a bias that is not there",
        lambda t: t.remove(f"{Q}.bias"),
        "empty-parameter misdecodes",
        scheme="w8a16",
        attention_bias=True,
    ),
    case("a flat column", lambda t: t.change({f"{O}.weight_scale": torch.ones(48)}), "shape refuses"),
    case("another vocabulary", lambda t: t.configure(vocab_size=321), "shape refuses"),
    case(
        "a float label",
        lambda t: t.describe({f"{DOWN}.weight": "FLOAT"}),
        "label-and-weight misdecodes",
        "unknown-tensor refuses",
    ),
    case("a float weight", store_as(torch.float16, f"{DOWN}.weight"), "label-and-weight misdecodes"),
    case("float deq_scale in float16", store_as(torch.float32, f"{O}.deq_scale"), "deq-scale misdecodes"),
    case(
        "packed deq_scale in bfloat16",
        store_as(torch.int64, f"{O}.deq_scale"),
        "deq-scale misdecodes",
        dtype="bfloat16",
    ),
    case("input_scale of k", times(1.5, f"{K}.input_scale"), "qkv-input-scale misdecodes"),
    case("input_offset of v", fill(100.0, (1,), f"{V}.input_offset"), "qkv-input-offset misdecodes"),
    case("input_scale of up", times(1.5, f"{UP}.input_scale"), "gate-up-input-scale misdecodes"),
    case("input_offset of gate", fill(100.0, (1,), f"{GATE}.input_offset"), "gate-up-input-offset misdecodes"),
    case("input_scale of o", times(1.5, f"{O}.input_scale")),
    case("an offset beyond int8", fill(200.0, (1,), f"{O}.input_offset"), "input-offset misdecodes"),
    case("a tiny input_scale", fill(1e-5, (1,), f"{O}.input_scale"), "input-scale-range misdecodes"),
    case("a tiny input_scale in bfloat16", fill(1e-5, (1,), f"{O}.input_scale"), dtype="bfloat16"),
    case("asymmetric W8A16", lambda t: None, "w8a16-offset misdecodes", scheme="w8a16", asymmetric=True),
    case("an offset of W8A8 weights", fill(1.0, (48, 1), f"{O}.weight_offset"), "weight-offset misdecodes"),
    case(
        "an int8 head",
        all_of(
            lambda t: t.describe({"lm_head.weight": "W8A8_DYNAMIC"}),
            store_as(torch.int8, "lm_head.weight"),
            fill(0.1, (320, 1), "lm_head.weight_scale"),
        ),
        "head-scheme warns",
    ),
    case(
        "an int8 head of a tied model",
        lambda t: t.describe({"lm_head.weight": "W8A8_DYNAMIC"}).configure(tie_word_embeddings=True),
        "tied-head ignores",
    ),
]

MODULE_CASES = [
    case("norm biases", lambda t: t.add_norm_biases(0.5)),
    case("some norm biases", fill(0.0, ROW, f"{NORM}.bias"), "norm-bias-missing warns"),
    case(
        "norm biases without entries",
        lambda t: t.change({f"{NORM}.bias": torch.ones(48)}),
        "norm-bias misdecodes",
        "tensor-without-entry loads",
    ),
    case("older norms", lambda t: t.add_norm_biases(0.5, older=True), "unknown-tensor refuses"),
    case("bias of W8A16", lambda t: None, scheme="w8a16", attention_bias=True),
    case("a bias too many", fill(1.0, ROW, f"{O}.bias"), "linear-bias misdecodes", scheme="w8a16"),
    case("a bias in quant_bias", fill(1.0, ROW, f"{O}.bias")),
    case("a cache", lambda t: t.add_kv_cache()),
    case(
        "a cache without v",
        lambda t: t.add_kv_cache().remove(f"{V}.kv_cache_scale"),
        "kv-scale misdecodes",
    ),
    case(
        "a cache in one layer",
        lambda t: t.add_kv_cache().remove(*[n for n in t.load() if n.startswith(LAYERS[1]) and "kv_cache" in n]),
        "kv-layer ignores",
    ),
    case("a cache with offsets", lambda t: t.add_kv_cache(offset=-3.0), "kv-offset misdecodes"),
    case("a cache for the other loader", lambda t: t.add_kv_cache(keys=("kv_quant_type",)), "unknown-tensor refuses"),
    case("FAKQuant", lambda t: t.add_attention(kind="FAKQuant"), "fa-scheme refuses"),
    case("fa_quant_type without layers", lambda t: t.describe({"fa_quant_type": "FAQuant"})),
    case(
        "attention that nothing enables",
        lambda t: t.add_attention().describe({"fa_quant_type": ...}),
        "unknown-tensor refuses",
    ),
    case("a layer too many", fill(1.0, ROW, "model.layers.7.x.weight"), "unknown-tensor refuses"),
    case("an entry without tensor", lambda t: t.describe({f"{O}.x": "W8A8"}), "entry-without-tensor ignores"),
    case("a tensor without entry", lambda t: t.describe({f"{O}.deq_scale": ...}), "tensor-without-entry loads"),
]

CASES = [*DESCRIPTION_CASES, *TENSOR_CASES, *MODULE_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_fires(tmp_path, case: Case):
    toy = Toy(tmp_path, **case.options)
    case.change(toy)
    assert findings(report(toy.path)) == case.expected


# What the real schemes did with such directories; a scheme is looked up and its parameters compared with the files.
OBSERVED = [
    case("W8A8 passes", lambda t: None),
    case("W8A8 in bfloat16 passes", lambda t: None, dtype="bfloat16"),
    case("W8A16 passes", lambda t: None, scheme="w8a16"),
    case("W8A8_DYNAMIC passes", lambda t: None, scheme="w8a8-dynamic"),
    case("W8A8 with C8 passes", lambda t: t.add_kv_cache()),
    case("float32 scales and offsets are cast", store_as(torch.float32, f"{O}.input_scale", f"{O}.input_offset")),
    case(
        "FAQuant passes for its linears, its attention is unsupported", lambda t: t.add_attention(), "fa-scheme refuses"
    ),
    case("mixed q, k, v: ValueError", lambda t: t.keep_float(Q), "mixed-group refuses"),
    case(
        "W8A8 without weight_scale: missing, and allowed",
        lambda t: t.remove(*[name for name in t.load() if name.endswith("weight_scale")]),
    ),
]


@pytest.mark.parametrize("case", OBSERVED, ids=str)
def test_what_the_real_schemes_were_seen_to_do(tmp_path, case: Case):
    test_what_fires(tmp_path, case)


def test_every_rule_has_a_case_in_which_it_fires():
    fired = {expected.partition(" ")[0] for case in (*CASES, *OBSERVED) for expected in case.expected}
    assert fired == vllm_ascend.RULES.names


def test_a_float_model_loads(tmp_path):
    float_model = write_model(tmp_path / "float", tiny_config())
    assert findings(report(float_model)) == set()
    assert report(float_model).summary.linears == {"FLOAT": 14}


def test_the_summary_goes_by_the_labels(tmp_path):
    toy = Toy(tmp_path).keep_float(Q, DOWN).add_kv_cache()
    summary = report(toy.path).summary
    assert summary.packs == {"qkv": {"mixed": 1, "W8A8": 1}, "gate_up": {"W8A8": 2}}
    assert (summary.kv_cache, summary.attention, summary.linears) == ("int8", "float", {"FLOAT": 2, "W8A8": 12})


def test_mixed_labels_are_named(tmp_path):
    toy = Toy(tmp_path).keep_float(K)
    found = report(toy.path).findings[0]
    assert found.where == ("model.layers.0.self_attn",)
    assert found.message == (
        "raises ValueError: q, k, v (or gate, up) have different labels: got FLOAT and W8A8. "
        "Keep all of them float, or none."
    )


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("rope", "found"),
    [
        (YARN, []),
        ({**YARN, "beta_fast": 16, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.0}, []),
        ({**YARN, "attention_factor": 1.5}, ["rope-attention misdecodes"]),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, ["rope-attention misdecodes"]),
        (LONGROPE, []),
        ({**LONGROPE, "factor": 4.0}, []),  # max_position_embeddings / the original ones
        ({**LONGROPE, "factor": 9.0}, ["rope-attention misdecodes"]),
        ({**LONGROPE, "attention_factor": 1.5}, ["rope-attention misdecodes"]),
        ({"type": "dynamic", "factor": 2.0}, ["rope-dynamic warns"]),
        ({"type": "linear", "factor": 2.0}, []),
    ],
)
def test_longer_contexts(tmp_path, rope, found):
    config = tiny_config(head_dim=12, torch_dtype="float16", rope_scaling=rope)
    path = write_model(tmp_path / "m", config)
    assert [name for name in sorted(findings(report(path))) if name.startswith("rope")] == found
