"""Small random models of the dense families that differ from Llama, as transformers' classes make and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from eightfold.files import read_json, write_json

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
WIDE = {"head_dim": 16}  # not hidden / heads
FACTORS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PHI3 = {"original_max_position_embeddings": 64}
_GEMMA3 = {**WIDE, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA3 |= {"query_pre_attn_scalar": 20}

# Each as: prefix of the classes' names, what is set beside SIZES.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", _PHI3),
    "phi3-window": ("Phi3", {**_PHI3, "sliding_window": 7}),
    "phi4-mini": (
        "Phi3",
        {
            **_PHI3,
            "partial_rotary_factor": 0.34,
            "rope_parameters": {**FACTORS, "partial_rotary_factor": 0.34},
            "tie_word_embeddings": True,
        },
    ),
    "glm": ("Glm", WIDE),
    "glm4": ("Glm4", {**WIDE, "attention_bias": False}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 8.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", {**WIDE, "sliding_window": 7, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", _GEMMA3),
    "gemma3-softcap": ("Gemma3", {**_GEMMA3, "final_logit_softcapping": 3.0}),
    "gemma3-wrapped": ("Gemma3", _GEMMA3),
    "qwen2_5_vl": ("Qwen2_5_VL", {"rope_parameters": SECTIONS}),
    "qwen3_vl": ("Qwen3VL", {**WIDE, "rope_parameters": {**SECTIONS, "mrope_section": [2, 3, 3]}}),
    "mistral3": ("Mistral3", WIDE),
}
WRAPPED = {"gemma3-wrapped": "siglip_vision_model", "mistral3": "pixtral", "qwen2_5_vl": "", "qwen3_vl": ""}


def make(name: str, **changes: Any) -> Any:
    """Return a model of transformers with weights that show every part: gains and biases are random too."""
    prefix, settings = MODELS[name]
    text = {**SIZES, **settings, **changes}
    torch.manual_seed(0)
    if name in WRAPPED:
        model = _wrapped(name, prefix, text)
    else:
        kind = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
        config = getattr(transformers, kind)(**text, attn_implementation="eager")
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                offset = 0.0 if "bias" in key or prefix.startswith("Gemma") else 1.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.eval()


def _wrapped(name: str, prefix: str, text: dict[str, Any]) -> Any:
    vision: dict[str, Any] = {"model_type": WRAPPED[name], **VISION}
    if name == "mistral3":
        text, vision = {"model_type": "mistral", "sliding_window": None, **text}, {**vision, "head_dim": 8}
    if name.startswith("qwen"):
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
        vision |= {"fullatt_block_indexes": [0]} if name == "qwen2_5_vl" else {"deepstack_visual_indexes": [0]}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=name == "gemma3-wrapped",
        attn_implementation="eager",
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)


@torch.inference_mode()
def logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Return what transformers computes for one text, (T, V)."""
    found: torch.Tensor = model(input_ids=torch.tensor([token_ids])).logits[0]
    return found


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def relaid_as_internlm2(source: Path, directory: Path) -> Path:
    """Write a Llama's weights under InternLM2's names, with queries, keys and values by key head in one tensor."""
    raw, tensors, made = read_json(source / "config.json"), load_file(source / "model.safetensors"), {}
    ends = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "model.norm": "model.norm"}
    inner = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    made = {
        f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in ends.items() if f"{ours}.weight" in tensors
    }
    groups, dim = raw["num_key_value_heads"], raw["head_dim"]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        made |= {f"{at}{theirs}.weight": tensors[f"{at}{ours}.weight"] for ours, theirs in inner.items()}
        parts = [
            tensors[f"{at}self_attn.{name}_proj.weight"].view(groups, -1, dim, raw["hidden_size"]) for name in "qkv"
        ]
        made[f"{at}attention.wqkv.weight"] = torch.cat(parts, 1).flatten(0, 2).contiguous()
    directory.mkdir()
    save_file(made, directory / "model.safetensors")
    changes = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    write_json(directory / "config.json", {**raw, **changes})
    return directory


def relaid_as_internlm3(source: Path, directory: Path) -> Path:
    """Write a Llama with biases as InternLM3, whose biases have other switches."""
    raw = read_json(source / "config.json")
    directory.mkdir()
    save_file(load_file(source / "model.safetensors"), directory / "model.safetensors")
    changes = {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "qkv_bias": True, "bias": True}
    kept = {key: value for key, value in raw.items() if key not in ("attention_bias", "mlp_bias")}
    write_json(directory / "config.json", {**kept, **changes})
    return directory
