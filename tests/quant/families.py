"""Tiny random checkpoints of many families, with the names under which their classes in transformers save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {**_BASE, "head_dim": 8}
_MOE = {**_HEADS, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    **_BASE,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_MLA = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DSA = {**_MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LOCAL = {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}

# Name of a class in transformers, without its ending -> its sizes.
SIZES: dict[str, dict[str, Any]] = {
    "Phi3": _BASE,
    "Glm": _HEADS,
    "Glm4": _HEADS,
    "Gemma2": _HEADS,
    "Cohere": _BASE,
    "Cohere2": _BASE,
    "Olmo2": _BASE,
    "Granite": _BASE,
    "Starcoder2": _BASE,
    "Falcon": {**_BASE, "new_decoder_architecture": True, "num_kv_heads": 2},
    "HunYuanDenseV1": _HEADS,
    "Ernie4_5": _HEADS,
    "Qwen3Moe": {**_MOE, "mlp_only_layers": [0]},
    "Qwen2Moe": {**_MOE, "shared_expert_intermediate_size": 24},
    "Mixtral": _LOCAL,
    "Qwen3Next": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24},
    "DeepseekV2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy"},
    "DeepseekV3": _MLA,
    "DeepseekV32": _DSA,
    "GlmMoeDsa": _DSA,
    "Glm4Moe": {**_ROUTED, "head_dim": 8, "attention_bias": True},
    "Glm4MoeLite": _MLA,
    "MiniMaxM2": _LOCAL,
    "HunYuanMoEV1": {**_HEADS, "num_experts": 4, "moe_topk": [2, 2]},
    "Ernie4_5_Moe": {
        **_HEADS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "GptOss": {**_LOCAL, "layer_types": ["sliding_attention", "full_attention"]},
    "GraniteMoe": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": _LOCAL,
}

# As those, but the sizes are those of the text part.
WRAPPED: dict[str, dict[str, Any]] = {
    "Qwen3_5": {**_HEADS, **_LINEAR},
    "Qwen3_5Moe": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24},
}


def random_model(name: str) -> Any:
    """Return a model of a family in bfloat16, the same one each time."""
    import transformers

    torch.manual_seed(0)
    if name in WRAPPED:
        config = getattr(transformers, f"{name}TextConfig")(**WRAPPED[name])
    else:
        config = getattr(transformers, f"{name}Config")(**SIZES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.to(torch.bfloat16)


def save_random(name: str, path: Path) -> Path:
    """Save such a model as transformers does."""
    random_model(name).save_pretrained(path)
    return path
