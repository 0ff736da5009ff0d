"""Random weights in the shape of Llama-3.2-1B, for speed only: a float directory; and any such as a Q8_0 GGUF file.

Norm gains are 1 and linears keep the size of what goes through them, so activations stay finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from eightfold.architectures import Names
from eightfold.config import parse_config
from eightfold.families import all_linears, all_norms, expert_block
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.tensors import load_tensor
from eightfold.scheme import weight_name

_Q8_0 = gguf.GGMLQuantizationType.Q8_0

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Of a layer: our name of a linear or norm, and GGUF's.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
GGUF_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # one tensor of all experts each
FAMILIES = {"LlamaForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3moe"}
VOCABULARY = "tokenizer.ggml."  # how its fields in a GGUF file begin


def write_float_model(directory: Path, layers: int) -> None:
    """Write the float directory if it is not there."""
    if directory.exists():
        return
    config = parse_config({**CONFIG, "num_hidden_layers": layers}, directory / "config.json")
    generator = torch.Generator().manual_seed(0)
    shapes = {Names().embedding: (config.vocab_size, config.hidden_size)}
    shapes |= {name: (linear.n, linear.k) for name, linear in all_linears(config).items() if name != Names().head}
    tensors = {
        f"{name}.weight": (torch.randn(*shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in all_norms(config).items()}
    part = directory.with_name(f".{directory.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    (part / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    save_file(tensors, str(part / "model.safetensors"), metadata={"format": "pt"})
    part.rename(directory)


def write_q8_0(source: Path, target: Path, vocabulary: Path | None) -> None:
    """Write a float directory as a Q8_0 GGUF file if it is not there, a tensor at a time.

    Queries and keys keep the order of their channels, which GGUF would have otherwise: their values do not matter here.

    Args:
        source: a directory with an architecture of FAMILIES.
        target: the file.
        vocabulary: a GGUF file whose vocabulary is taken over, filled up to the model's; some readers need one.
    """
    if target.exists():
        return
    part = target.with_suffix(".part")
    checkpoint = Checkpoint.open(source)
    writer = gguf.GGUFWriter(part, FAMILIES[checkpoint.config.architecture])
    _add_settings(writer, checkpoint)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, gguf.GGUFReader(vocabulary), checkpoint.config.vocab_size)
    tensors = dict(_gguf_tensors(checkpoint))
    for name, stored in tensors.items():
        shape = checkpoint.array(stored[0]).shape
        shape, kind = (len(stored), *shape) if len(stored) > 1 else shape, _kind(name, len(shape))
        size = gguf.quant_shape_to_byte_shape(shape, kind) if kind is _Q8_0 else (*shape[:-1], 4 * shape[-1])
        dtype = np.dtype(np.uint8 if kind is _Q8_0 else np.float32)
        writer.add_tensor_info(name, size if kind is _Q8_0 else shape, dtype, math.prod(size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, stored in tensors.items():
        values = [load_tensor(checkpoint, each).float().numpy() for each in stored]
        written = [gguf.quants.quantize(each, _kind(name, each.ndim)) for each in values]
        writer.write_tensor_data(np.stack(written) if len(written) > 1 else written[0])
        checkpoint.release(stored)
    writer.close()
    part.rename(target)


def _kind(name: str, dims: int) -> gguf.GGMLQuantizationType:
    """Return how a tensor is stored: a router in float32, as in llama.cpp's own files."""
    return _Q8_0 if dims > 1 and "ffn_gate_inp" not in name else gguf.GGMLQuantizationType.F32


def _gguf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each tensor in the GGUF file and the tensors of the checkpoint that it consists of."""
    config, names = checkpoint.config, checkpoint.config.names
    ends = {names.embedding: "token_embd", names.final_norm: "output_norm", names.head: "output"}
    for module, name in ends.items():
        if weight_name(module) in checkpoint.tensors:
            yield weight_name(name), [weight_name(module)]
    for layer in range(config.num_layers):
        prefix, to = names.layer(layer), f"blk.{layer}."
        for module, name in GGUF_NAMES.items():
            if weight_name(prefix + module) in checkpoint.tensors:
                yield weight_name(to + name), [weight_name(prefix + module)]
        block = expert_block(config, layer)
        for name, linears in zip(GGUF_EXPERTS, zip(*block.experts, strict=True) if block else (), strict=False):
            yield weight_name(to + name), [weight_name(prefix + linear.name) for linear in linears]


def _add_settings(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)
    if config.head_dim * config.num_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _add_vocabulary(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, size: int) -> None:
    for key, stored in reader.fields.items():
        if not key.startswith(VOCABULARY):
            continue
        value = stored.contents()
        if key == f"{VOCABULARY}tokens":
            value = [*value, *(f"<unused{i}>" for i in range(size - len(value)))]
        if key in (f"{VOCABULARY}token_type", f"{VOCABULARY}scores"):
            filler = int(gguf.TokenType.UNUSED) if key.endswith("token_type") else 0.0
            value = [*value, *[filler] * (size - len(value))]
        sub_type = stored.types[-1] if isinstance(value, list) else None
        writer.add_key_value(key, value, stored.types[0], sub_type)
