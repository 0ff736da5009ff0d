"""GGUF files of small random models, and what their importing should give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import CHAT_TEMPLATE, random_tensors, tiny_config

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

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

    def write(self, path: Path, tokenizer: bool = True, part_tensors: int = 0) -> Path:
        config = self.config
        writer = gguf.GGUFWriter(path, self.architecture, split_max_tensors=part_tensors)
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
