"""A GGUF file becomes the model directory that it was made from: tensors, configuration and tokenizer."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eightfold.config import DType
from eightfold.errors import CheckpointError, EightfoldError, OutputError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.reference.attention import inverse_frequencies
from eightfold.reference.load import Decoder
from eightfold.tokenizer import Tokenizer, stop_token_ids
from tests.conftest import CHAT_TEMPLATE, random_tensors, tiny_config, write_model

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from eightfold.importers.gguf import import_gguf  # noqa: E402

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))


def float_config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Sizes are whole blocks of 32, and head_dim is not hidden / heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "torch_dtype": "float32"}
    return tiny_config(ARCHITECTURES[architecture], **{**sizes, **changes})


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def paired_rows(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Return q or k as llama.cpp stores it: row 2i + h of a head is row h D/2 + i of the model directory's."""
    dim = tensor.shape[0] // heads
    out = np.empty_like(tensor)
    for head in range(heads):
        for half in range(2):
            for i in range(dim // 2):
                out[head * dim + 2 * i + half] = tensor[head * dim + half * (dim // 2) + i]
    return out


def q8_0_blocks(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of Q8_0 rows and what they stand for: 32 int8 times one float16."""
    blocks = tensor.reshape(tensor.shape[0], -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    values = np.clip(np.rint(blocks / scale.astype(np.float32)), -127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), values.view(np.uint8)], axis=-1)
    real = values.astype(np.float32) * scale.astype(np.float32)
    return raw.reshape(tensor.shape[0], -1), real.reshape(tensor.shape)


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Return the tokens of a small gpt2-style tokenizer, their types and the merges; 320 ids."""
    from tokenizers import pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ a"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*tokens, *special, *merged]
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    unused = [f"[unused{i}]" for i in range(320 - len(tokens))]
    return [*tokens, *unused], [*types, *(gguf.TokenType.UNUSED for _ in unused)], merges


class Source:
    """A GGUF file under construction, with what its importing should give."""

    def __init__(self, config: dict[str, Any], architecture: str = "llama", kind: Any = F32, seed: int = 0) -> None:
        self.config, self.architecture = config, architecture
        self.metadata: list[Callable[[Any], None]] = []
        self.left_out: set[str] = set()  # metadata methods and tensors
        self.extra: dict[str, tuple[np.ndarray, Any]] = {}  # name -> data and type
        self.expected: dict[str, torch.Tensor] = {}  # float32, by directory name
        self.tensors: dict[str, tuple[np.ndarray, Any]] = {}
        for name, tensor in random_tensors(config, seed).items():
            self._add(name, tensor.float().numpy(), kind if tensor.dim() == 2 else F32)

    def _add(self, name: str, values: np.ndarray, kind: Any) -> None:
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        paired = self.architecture == "llama" and heads is not None
        stored = paired_rows(values, self.config[heads]) if paired else values
        raw, real = stored, stored
        if kind is F16:
            raw = stored.astype(np.float16)
            real = raw.astype(np.float32)
        elif kind is Q8_0:
            raw, real = q8_0_blocks(stored)
        self.tensors[gguf_name(name)] = (raw, kind)
        if paired:  # back again, by the same rule read the other way
            back = np.empty_like(real)
            order = paired_rows(np.arange(len(real)), self.config[heads])
            back[order] = real
            real = back
        self.expected[name] = torch.from_numpy(real.copy())

    def write(self, path: Path, tokenizer: bool = True) -> Path:
        config = self.config
        writer = gguf.GGUFWriter(path, self.architecture)
        fields = {
            "add_block_count": config["num_hidden_layers"],
            "add_context_length": config["max_position_embeddings"],
            "add_embedding_length": config["hidden_size"],
            "add_feed_forward_length": config["intermediate_size"],
            "add_head_count": config["num_attention_heads"],
            "add_head_count_kv": config["num_key_value_heads"],
            "add_key_length": config["head_dim"],
            "add_value_length": config["head_dim"],
            "add_rope_dimension_count": config["head_dim"],
            "add_rope_freq_base": config["rope_theta"],
            "add_layer_norm_rms_eps": config["rms_norm_eps"],
        }
        for method, value in fields.items():
            if method not in self.left_out:
                getattr(writer, method)(value)
        for add in self.metadata:
            add(writer)
        if tokenizer:
            self._add_tokenizer(writer)
        for name, (data, kind) in {**self.tensors, **self.extra}.items():
            if name not in self.left_out:
                writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_tokenizer(self, writer: Any) -> None:
        tokens, types, merges = byte_level_vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_pad_token_id(258)
        writer.add_chat_template(CHAT_TEMPLATE)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def assert_same_tensors(directory: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    found = load_file(directory / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor.to(dtype))), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A whole llama file."""
    return Source(float_config()).write(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("kind", [F32, F16, Q8_0], ids=["F32", "F16", "Q8_0"])
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
    same = {"rms_norm_eps": 1.0, "sliding_window": None}
    assert ours.config.model_copy(update=same) == theirs.config.model_copy(update=same)


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
    with pytest.raises(CheckpointError, match=rf'"{key}" in .*tiny\.gguf: got nothing, expected a value'):
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
    stretched = inverse_frequencies(config.rope, head_dim).double()
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
    assert raw["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}


def test_no_scaling_may_be_said_too(tmp_path):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)]
    config = import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert config.rope.rope_type == "default"


@pytest.mark.parametrize("kind", ["YARN", "LONGROPE"])
def test_other_scalings_are_refused(tmp_path, kind):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType[kind])]
    with pytest.raises(UnsupportedError, match=rf"rope scaling in .*got {kind.lower()}, expected none or linear"):
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
    original = FastTokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
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


# --- what cannot be imported


def test_another_architecture_is_refused(tmp_path):
    path = Source(float_config(), "gemma").write(tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedError, match=r"got gemma, expected a dense model of llama, qwen2 or qwen3"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_file_that_names_no_architecture_is_refused(tmp_path):
    path = Source(float_config()).write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architextur_"))
    with pytest.raises(EightfoldError, match=r"architecture in .*tiny\.gguf"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_an_architecture_that_is_no_name_is_refused(tmp_path):
    kinds = gguf.GGUFValueType
    key = b"general.architecture"
    field = struct.pack("<Q20sIIQB", len(key), key, kinds.ARRAY, kinds.UINT8, 1, 7)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(UnsupportedError, match=r"architecture in .*got \[7\], expected a dense model"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_mixture_of_experts_is_refused(tmp_path):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_expert_count(8)]
    with pytest.raises(UnsupportedError, match=r"expected a dense model"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    dense = Source(float_config())
    dense.metadata = [lambda writer: writer.add_expert_count(0)]
    import_gguf(dense.write(tmp_path / "dense.gguf"), tmp_path / "dense", DType.BF16)


def test_missing_tensors_are_named(tmp_path):
    made = Source(float_config())
    made.left_out = {"blk.1.attn_q.weight", "output_norm.weight"}
    with pytest.raises(CheckpointError) as failure:
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    message = str(failure.value)
    assert "no model.layers.1.self_attn.q_proj.weight, model.norm.weight" in message
    assert "expected 21 known ones" in message


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0.attn_rot_embd.weight", "blk.0.attn_rot_embd.weight"),
        ("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("blk.0.attn_v.scale", "blk.0.attn_v.scale"),
        ("v.patch.weight", "v.patch.weight"),
        ("output_norm.bias", "output_norm.bias"),
    ],
)
def test_unknown_tensors_are_named(tmp_path, name, shown):
    made = Source(float_config())
    made.extra[name] = (np.ones((64, 64), dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=rf"LlamaForCausalLM in .*got also {re.escape(shown)}, expected 21 known"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


def test_a_family_without_q_and_k_norms_does_not_lose_them_silently(tmp_path):
    made = Source(float_config())
    made.extra["blk.0.attn_q_norm.weight"] = (np.ones(32, dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=r"also model\.layers\.0\.self_attn\.q_norm\.weight"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", (96, 64)),
        ("blk.0.attn_k.weight", (64, 32)),
        ("blk.1.ffn_down.weight", (96, 64)),
        ("blk.1.attn_v.weight", (65, 64)),
        ("output_norm.weight", (65,)),
        ("output.weight", (300, 64)),
        ("token_embd.weight", (320, 65)),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape):
    made = Source(float_config())
    made.tensors[name] = (np.ones(shape, dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=r"shape of .* in .*tiny\.gguf: got \["):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


def test_a_tensor_type_without_a_rule_is_named(tmp_path):
    made = Source(float_config())
    kind = gguf.GGMLQuantizationType.I32
    made.tensors["blk.0.attn_v.weight"] = (np.ones((64, 64), dtype=np.int32), kind)
    with pytest.raises(UnsupportedError, match=r"tensor type of blk\.0\.attn_v\.weight in .*got I32"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "action"),
    [(1e5, DType.F16, "Import as bf16"), (math.inf, DType.BF16, "fetch"), (math.nan, DType.BF16, "fetch")],
)
def test_values_that_the_type_cannot_hold_are_refused(tmp_path, value, dtype, action):
    made = Source(float_config())
    made.tensors["blk.1.attn_k.weight"][0][3, 4] = value
    with pytest.raises(CheckpointError, match=rf"values of blk\.1\.attn_k\.weight in .*expected finite ones.*{action}"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_the_largest_float16_is_held(tmp_path):
    made = Source(float_config())
    made.tensors["blk.1.attn_v.weight"][0][3, 4] = -65504
    import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.F16)
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    assert float(found[3, 4]) == -65504


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, source):
    content, path = source.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"container in .*cut\.gguf: .*expected a whole GGUF file"):
            import_gguf(path, tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"no gguf file at all", b"GGUF", b"GGUF\x63\0\0\0" + bytes(64), bytes(100)]
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"container in .*x\.gguf: .*expected a whole GGUF file"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_damaged_count_does_not_read_on_past_the_end(tmp_path):
    # One metadata field: an array that says it has 100,000 bytes, and has 3. Read on, each would be an empty value.
    field = struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 100_000) + bytes(3)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(
        CheckpointError, match=rf"container in .*: got it ends before byte {path.stat().st_size}, expected"
    ):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_damaged_metadata_never_ends_in_a_traceback(tmp_path, source):
    # Each byte of the header in turn is changed; what can still be imported is, and the rest is refused in words.
    content, path = source.read_bytes(), tmp_path / "bad.gguf"
    refused = 0
    for at in range(4, 1200, 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            import_gguf(path, tmp_path / "out", DType.BF16, overwrite=True)
        except EightfoldError:
            refused += 1
    assert refused > 100


def test_a_missing_file_and_a_directory_are_no_files(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"^no file .*expected a \.gguf file\. Check the path\.$"):
            import_gguf(path, tmp_path / "out", DType.BF16)


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path, source):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        import_gguf(source, target, DType.BF16)
    with pytest.raises(OutputError, match="no model"):
        import_gguf(source, target, DType.BF16, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["precious"]
    import_gguf(source, tmp_path / "model", DType.BF16)
    with pytest.raises(OutputError, match="not empty"):
        import_gguf(source, tmp_path / "model", DType.F16)
    import_gguf(source, tmp_path / "model", DType.F16, overwrite=True)
    assert Checkpoint.open(tmp_path / "model").dtype is DType.F16
    with pytest.raises(OutputError):
        import_gguf(source, tmp_path, DType.BF16, overwrite=True)


def test_the_source_is_only_read_and_nothing_is_left_over(tmp_path, source):
    before = source.read_bytes()
    import_gguf(source, tmp_path / "out", DType.BF16)
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert needed <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_command_line(cli, tmp_path, source):
    made = cli("import-gguf", source, tmp_path / "out", "--dtype", "fp16")
    assert made.code == 0, made.err
    assert "LlamaForCausalLM, 2 layers, fp16" in made.out
    assert Checkpoint.open(tmp_path / "out").dtype is DType.F16
    assert cli("import-gguf", source, tmp_path / "bf16").code == 0
    assert Checkpoint.open(tmp_path / "bf16").dtype is DType.BF16
    ran = cli("run", tmp_path / "bf16", "--prompt", "the", "--max-new-tokens", 3, "--json")
    assert ran.code == 0, ran.err
    failed = cli("import-gguf", tmp_path / "absent.gguf", tmp_path / "x")
    assert failed.code == 2
    assert failed.err.startswith("eightfold: no file ")


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
