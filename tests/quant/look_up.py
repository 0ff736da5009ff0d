"""What vllm-ascend asks of a description while vLLM builds a model, and what it makes of the answers.

vLLM builds some linears as one. For those, vllm-ascend asks for all parts, by a table of its own for some model types
and else by what the model's class tells, and takes nothing but one type. For any other it takes FLOAT if any weight
whose name begins like the linear's is FLOAT, and else the linear's own entry, which has to be there. Of experts it asks
for the first, where its table has the model type, and else for an entry of all. Each type has to be registered.

Compared with the look-up of vllm-ascend 0.18.0, 0.23.0 and main on models of all families and the classes of vLLM
0.18, 0.23 and 0.33.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.quant.named import config_of, tags_of, tensors_of

REGISTERED = {"linear": {"W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16"}, "experts": {"W8A8_DYNAMIC"}}

# Model types with experts that its table has; MiniMax's go by other names.
GATED = ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj")
EXPERTS = {
    **dict.fromkeys(("qwen3_moe", "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe", "glm4_moe", "glm4_moe_lite"), GATED),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa"), GATED),
    "minimax_m2": ("experts.0.w1", "experts.0.w2", "experts.0.w3"),
}

# Built as one.
BUILT = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

UNTOLD = {"starcoder2"}  # their classes tell of no parts


def look_up(tags: Mapping[str, str], prefix: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    """Return the type of what vLLM builds at a prefix.

    Raises:
        KeyError: an entry is not there.
        ValueError: parts of different types.
    """
    last = prefix.rpartition(".")[2]
    if last in parts:
        kinds = {tags[prefix.replace(last, part) + ".weight"] for part in parts[last]}
        if len(kinds) != 1:
            raise ValueError(f"{prefix}: {kinds}")
        return kinds.pop()
    if any(key.startswith(prefix) and key.endswith(".weight") and kind == "FLOAT" for key, kind in tags.items()):
        return "FLOAT"
    return tags[f"{prefix}.weight"]


def require_answers(out: Path) -> None:
    """Assert that every answer is what is stored, and registered."""
    config, tags = config_of(out), tags_of(out)
    model_type = str(config["model_type"])
    parts = {"experts": EXPERTS[model_type]} if model_type in EXPERTS else {}
    asked: dict[tuple[str, str], set[bool]] = {("lm_head", "linear"): {False}}
    names = {name.removesuffix(".weight"): t for name, t in tensors_of(out).items() if name.endswith(".weight")}
    for module, tensor in names.items():
        if tensor.dim() != 2:
            continue
        parent, _, last = module.rpartition(".")
        whole = next(
            (name for name, own in BUILT.items() if last in own and {f"{parent}.{n}" for n in own} <= names.keys()), ""
        )
        if whole and model_type not in UNTOLD:
            parts[whole] = BUILT[whole]
        expert = re.fullmatch(r"(.*\.experts)\.\d+\..*", module)
        prefix = expert[1] if expert else f"{parent}.{whole}" if whole else module
        asked.setdefault((prefix, "experts" if expert else "linear"), set()).add(tensor.dtype == torch.int8)
    for (prefix, kind), is_int8 in asked.items():
        answer = look_up(tags, prefix, parts)
        assert is_int8 == {answer != "FLOAT"}, f"{prefix}: {answer}"
        assert answer in {"FLOAT", *REGISTERED[kind]}, f"{prefix}: {answer}"
