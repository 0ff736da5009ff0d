"""Random weights in the shape of Llama-3.2-1B, for speed only: a float directory, and the same as a Q8_0 GGUF file.

Norm gains are 1 and linears keep the size of what goes through them, so activations stay finite.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

from eightfold.architectures import Names
from eightfold.config import parse_config
from eightfold.families import all_linears, all_norms
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.tensors import load_tensor

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
    "post_attention_layernorm": "ffn_norm",
}
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
    """Write a float directory as a Q8_0 GGUF file if it is not there.

    Queries and keys keep the order of their channels, which GGUF would have otherwise: their values do not matter here.

    Args:
        source: as write_float_model leaves it.
        target: the file.
        vocabulary: a GGUF file whose vocabulary is taken over, filled up to the model's; some readers need one.
    """
    if target.exists():
        return
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    checkpoint = Checkpoint.open(source)
    _add_settings(writer, checkpoint)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, gguf.GGUFReader(vocabulary), checkpoint.config.vocab_size)
    for name in checkpoint.tensors:
        values = load_tensor(checkpoint, name).float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in (Names().embedding, Names().final_norm):
        return {Names().embedding: "token_embd", Names().final_norm: "output_norm"}[module] + ".weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


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
