"""A GGUF file becomes the model directory that it was made from: tensors, configuration and tokenizer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eightfold.config import DType, ModelConfig
from eightfold.errors import CheckpointError, ConfigError, EightfoldError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.layers import inverse_frequencies
from eightfold.model.reference.load import Decoder
from eightfold.rope import RopeParameters
from eightfold.tokenizer import Tokenizer, stop_token_ids
from tests.conftest import random_tensors, write_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from eightfold.importers.gguf import import_gguf  # noqa: E402
from tests.importers.gguf_source import (  # noqa: E402
    ARCHITECTURES,
    F16,
    F32,
    Q8_0,
    Source,
    byte_level_vocabulary,
    float_config,
    gguf_name,
    paired_rows,
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def assert_same_tensors(directory: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    found = load_file(directory / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor.to(dtype))), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [(F32, DType.BF16), (F32, DType.F16), (F16, DType.BF16), (Q8_0, DType.F16)], ids=str
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_are_the_stored_ones_bit_for_bit(tmp_path, architecture, kind, dtype):
    made = Source(float_config(architecture), architecture, kind)
    import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", dtype)
    assert_same_tensors(tmp_path / "out", made.expected, {DType.BF16: torch.bfloat16, DType.F16: torch.float16}[dtype])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_imported_model_is_the_one_that_the_file_was_made_from(tmp_path, architecture, tied):
    # Values that bfloat16 holds come through unchanged, and so do all logits, to the last bit.
    config = float_config(architecture, tie_word_embeddings=tied, torch_dtype="bfloat16")
    made = Source(config, architecture)
    original = write_model(tmp_path / "original", config, tokenizer=False)
    import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert_same_tensors(tmp_path / "out", load_file(original / "model.safetensors"), torch.bfloat16)
    ours, theirs = (Checkpoint.open(path) for path in (tmp_path / "out", original))
    assert ours.config.tie_word_embeddings is tied
    assert torch.equal(Decoder(ours).logits([1, 2, 3, 250]), Decoder(theirs).logits([1, 2, 3, 250]))
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=2**-24)  # float32 in the file
    same: dict[str, Any] = {"rms_norm_eps": 1.0, "sliding_window": None}
    assert replace(ours.config, **same) == replace(theirs.config, **same)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_of_llama_are_found_and_those_of_q_and_k_unpaired(tmp_path, biases):
    made = Source(float_config(**biases))
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert (config.attention_bias, config.mlp_bias) == ("attention_bias" in biases, "mlp_bias" in biases)
    assert any(name.endswith(".bias") for name in made.expected)
    assert_same_tensors(tmp_path / "out", made.expected, torch.bfloat16)


def test_rows_of_q_and_k_are_paired_only_in_llama_files():
    # The test's own rule, so that the tests above cannot be right by making the same mistake twice.
    rows = np.arange(8)
    assert paired_rows(rows, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert paired_rows(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    config = float_config("qwen2")
    made = Source(config, "qwen2")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(made.tensors[gguf_name(name)][0], random_tensors(config)[name].numpy())


# --- configuration


def test_configuration_is_the_files(tmp_path, source):
    import_gguf(source, tmp_path / "out", DType.F16)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "dtype": "float16",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    assert {key: raw.get(key) for key in expected} == expected


def test_fields_that_a_file_may_leave_out_have_their_defaults(tmp_path):
    made = Source(float_config(num_key_value_heads=4, head_dim=16))
    made.left_out = {"add_head_count_kv", "add_key_length", "add_value_length", "add_rope_freq_base"}
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert (config.num_kv_heads, config.head_dim, config.rope.rope_theta) == (4, 16, 10000.0)
    assert_same_tensors(tmp_path / "out", made.expected, torch.bfloat16)


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("add_block_count", "block_count"),
        ("add_embedding_length", "embedding_length"),
        ("add_feed_forward_length", "feed_forward_length"),
        ("add_head_count", "attention.head_count"),
        ("add_context_length", "context_length"),
        ("add_layer_norm_rms_eps", "attention.layer_norm_rms_epsilon"),
    ],
)
def test_a_field_that_must_be_there_is_named(tmp_path, field, key):
    made = Source(float_config())
    made.left_out = {field}
    with pytest.raises(ConfigError, match=rf'"{key}" in .*tiny\.gguf: got nothing, expected a value'):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_length", "many"),
        ("attention.head_count", 0),
        ("attention.head_count", [4, 2]),
        ("attention.head_count", 3),
        ("block_count", 0),
        ("rope.freq_base", "big"),
        ("feed_forward_length", True),
        ("context_length", -1),
        ("attention.key_length", 7),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(tmp_path, key, value):
    methods = {"embedding_length": "add_embedding_length", "attention.head_count": "add_head_count"}
    methods.update({"block_count": "add_block_count", "rope.freq_base": "add_rope_freq_base"})
    methods.update({"feed_forward_length": "add_feed_forward_length", "context_length": "add_context_length"})
    methods["attention.key_length"] = "add_key_length"
    made = Source(float_config())
    made.left_out = {methods[key]}
    kinds = {str: "add_string", int: "add_int32", list: "add_array", bool: "add_bool"}
    made.metadata = [lambda writer: getattr(writer, kinds[type(value)])(f"llama.{key}", value)]
    with pytest.raises(EightfoldError, match=r"tiny\.gguf: got "):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


# --- rotary settings


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Return each frequency's divisor by Llama 3.1's rule, as llama.cpp writes it into rope_freqs."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_rope_freqs_become_llama3_parameters(tmp_path, head_dim, factor):
    made = Source(float_config(head_dim=head_dim, rope_theta=500000.0, max_position_embeddings=131072))
    factors = llama3_factors(500000.0, head_dim, factor)
    assert 1 < np.median(factors) <= factor or head_dim == 32  # kept, blended and stretched ones
    made.extra["rope_freqs.weight"] = (factors, F32)
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert raw["rope_scaling"] == scaling
    assert raw["rope_parameters"] == {"rope_theta": 500000.0, **scaling}
    # The rule gives the file's divisors back: both are float32, each with a few roundings.
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    stretched = torch.from_numpy(inverse_frequencies(config.rope, head_dim, 0)).double()
    torch.testing.assert_close(plain / torch.from_numpy(factors).double(), stretched, rtol=2**-20, atol=0)
    assert_same_tensors(tmp_path / "out", made.expected, torch.bfloat16)  # rope_freqs is no weight


@pytest.mark.parametrize(
    "factors",
    [
        np.linspace(1, 8, 16),  # another rule
        llama3_factors(10000.0, 32, 8.0),  # of another base
        llama3_factors(500000.0, 32, 8.0)[::-1],
        np.ones(8),  # of another head_dim
        np.full(16, 0.0),
        np.full(16, np.nan),
    ],
)
def test_rope_freqs_of_another_rule_are_refused(tmp_path, factors):
    made = Source(float_config(rope_theta=500000.0))
    made.extra["rope_freqs.weight"] = (np.asarray(factors, dtype=np.float32), F32)
    with pytest.raises(UnsupportedError, match=r"rotary factors rope_freqs\.weight in .*not Llama 3's"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


def test_linear_scaling(tmp_path):
    made = Source(float_config())
    made.metadata = [
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda writer: writer.add_rope_scaling_factor(4.0),
    ]
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 4.0)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert raw["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}


def test_no_scaling_may_be_said_too(tmp_path):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)]
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert config.rope.rope_type == "default"


def scaled(tmp_path, metadata: dict[str, Any], divisors: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Import a file with `rope.scaling` settings, by the names of gguf's writer, and tensors."""
    made = Source(float_config(**changes))

    def add(writer: Any) -> None:
        for name, value in metadata.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    made.metadata = [add]
    for name, values in (divisors or {}).items():
        made.extra[f"rope_factors_{name}.weight"] = (np.asarray(values, dtype=np.float32), F32)
    return import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


YARN, LONGROPE = gguf.RopeScalingType.YARN, gguf.RopeScalingType.LONGROPE
SHORT, LONG = [1.0 + i / 16 for i in range(16)], [1.0 + i for i in range(16)]


@pytest.mark.parametrize(
    ("metadata", "more"),
    [
        ({}, {}),
        (
            {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_attn_factor": 1.25, "finetuned": True},
            {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
        ),
        ({"attn_factors": 1.0, "yarn_ext_factor": 1.0, "yarn_log_mul": 0.0}, {}),  # what is done without them
    ],
)
def test_yarn_scaling(tmp_path, metadata, more):
    metadata = {"type": YARN, "factor": 4.0, "orig_ctx_len": 32, **metadata}
    config = scaled(tmp_path, metadata, max_position_embeddings=32)
    settings = {"factor": 4.0, "original_max_position_embeddings": 32, **more}
    assert config.rope == RopeParameters(rope_type="yarn", **settings)
    assert config.context == 128
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", **settings}
    assert raw["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "yarn", **settings}


def test_yarn_without_an_original_context_has_the_files_own(tmp_path):
    rope = scaled(tmp_path, {"type": YARN, "factor": 4.0}, max_position_embeddings=96).rope
    assert rope.original_max_position_embeddings == 96


@pytest.mark.parametrize("kind", [{}, {"type": LONGROPE}])
@pytest.mark.parametrize("attention", [{}, {"attn_factors": 1.25}])
def test_longrope_factors(tmp_path, kind, attention):
    divisors = {"short": SHORT, "long": LONG}
    config = scaled(tmp_path, {"orig_ctx_len": 32, **kind, **attention}, divisors, max_position_embeddings=128)
    assert config.rope == RopeParameters(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=tuple(SHORT),
        long_factor=tuple(LONG),
        attention_factor=attention.get("attn_factors"),
    )
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_parameters"]["long_factor"] == LONG
    assert not any("rope" in name for name in Checkpoint.open(tmp_path / "out").tensors)


@pytest.mark.parametrize(
    ("metadata", "divisors", "message"),
    [
        ({"type": YARN}, {}, r'"rope\.scaling\.factor" in .*: got nothing'),
        ({"type": YARN, "factor": 0.5}, {}, r'"factor" in .*: got 0\.5, expected at least 1, for rope type yarn'),
        (
            {"type": YARN, "factor": 4.0, "attn_factors": 2.0},
            {},
            r"rope\.scaling\.attn_factor in .*got 2\.0, expected 1",
        ),
        ({"type": YARN, "factor": 4.0, "yarn_ext_factor": 0.5}, {}, r"yarn_ext_factor in .*: got 0\.5, expected 1"),
        ({"type": YARN, "factor": 4.0, "yarn_log_mul": 0.5}, {}, r"yarn_log_multiplier in .*: got 0\.5, expected 0"),
        (
            {"type": YARN, "factor": 4.0},
            {"long": LONG},
            r"rope scaling in .*: got yarn beside rope_factors_long\.weight",
        ),
        ({"type": LONGROPE}, {}, r"rope scaling longrope in .*: got no short_factor, long_factor"),
        ({}, {"long": LONG}, r"rope scaling longrope in .*: got no short_factor, expected a list of numbers"),
        (
            {},
            {"long": LONG, "short": SHORT[:8]},
            r'"short_factor" in .*: got 8 numbers, expected 16, one for each pair',
        ),
        ({}, {"long": LONG, "short": [0.0] * 16}, r'"short_factor" in .*: got 0\.0, expected greater than 0'),
    ],
)
def test_scalings_that_are_half_said_or_unknown_are_refused(tmp_path, metadata, divisors, message):
    with pytest.raises(EightfoldError, match=message):
        scaled(tmp_path, metadata, divisors)


def test_a_scaling_beside_rope_freqs_is_refused(tmp_path):
    made = Source(float_config(rope_theta=500000.0))
    made.extra["rope_freqs.weight"] = (llama3_factors(500000.0, 32, 8.0), F32)
    made.metadata = [
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda writer: writer.add_rope_scaling_factor(4.0),
    ]
    with pytest.raises(UnsupportedError, match=r"rope scaling in .*: got rope_freqs\.weight beside linear"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


def test_other_scalings_are_refused(tmp_path):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_string("llama.rope.scaling.type", "su")]
    with pytest.raises(UnsupportedError, match=r"rope scaling in .*got su, expected none, linear, yarn or longrope"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    made = Source(float_config())
    made.left_out = {"add_rope_dimension_count"}
    made.metadata = [lambda writer: writer.add_rope_dimension_count(16)]
    with pytest.raises(UnsupportedError, match=r"rotated dimensions in .*got 16, expected head_dim 32"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


# --- tokenizer


TEXTS = ["the cat in the hat", "<s>hi</s>", "a  b\n\tthe 123", "你好 🙂", ""]


def test_tokenizer_is_rebuilt(tmp_path, source):
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    import_gguf(source, tmp_path / "out", DType.BF16)
    tokens, types, merges = byte_level_vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    original = FastTokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))  # type: ignore[arg-type]
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    original.add_special_tokens([AddedToken(token) for token in control])
    rebuilt = Tokenizer(tmp_path / "out")
    for text in TEXTS:
        ids = rebuilt.encode(text)
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids) == original.decode(ids)
    assert len(rebuilt.encode("the")) == 1  # by its merges
    messages = [{"role": "user", "content": "the"}]
    chat = rebuilt.encode_chat(messages, add_generation_prompt=True)
    assert chat == [tokens.index("<|user|>"), *rebuilt.encode("the"), 257, tokens.index("<|assistant|>")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_tokenizer_that_was_written(tmp_path, architecture):
    path = Source(float_config(architecture), architecture).write(tmp_path / "tiny.gguf")
    import_gguf(path, tmp_path / "out", DType.BF16)
    theirs, ours = (kind(tmp_path / "out") for kind in (transformers.AutoTokenizer.from_pretrained, Tokenizer))
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    # Names of the class that transformers 4 knows too.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")


def test_generation_settings_are_the_files(tmp_path, source):
    import_gguf(source, tmp_path / "out", DType.BF16)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    assert stop_token_ids(tmp_path / "out", {}) == {257}


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    path = Source(float_config()).write(tmp_path / "tiny.gguf", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"tokenizer in .*tiny\.gguf"):
        import_gguf(path, tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


# --- the real file


@pytest.mark.golden
def test_the_real_file_gives_the_real_model(cli, smol, tmp_path):
    made = cli("import-gguf", smol / "smol.gguf", tmp_path / "out", "--dtype", "bf16")
    assert made.code == 0, made.err
    expected = load_file(smol / "smol-bf16" / "model.safetensors")
    assert_same_tensors(tmp_path / "out", expected, torch.bfloat16)
    ours, theirs = (Checkpoint.open(path) for path in (tmp_path / "out", smol / "smol-bf16"))
    assert ours.config == theirs.config
    tokenizers = [Tokenizer(path) for path in (tmp_path / "out", smol / "smol-bf16")]
    text = "The capital of France is Paris. 你好 🙂 def f(): pass"
    ids = tokenizers[0].encode(text)
    assert ids == tokenizers[1].encode(text)
    assert torch.equal(Decoder(ours).logits(ids), Decoder(theirs).logits(ids))
    chat = [{"role": "user", "content": text}]
    rendered = [tokenizer.render_chat(chat, add_generation_prompt=True) for tokenizer in tokenizers]
    assert rendered[0] == rendered[1]
