"""config.json as it is written: in both dialects, for every loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.architectures import FAMILIES
from eightfold.config import CONFIG_DTYPES, LAYER_TYPES, DType, ModelConfig
from eightfold.rope import LOCAL_BASE, by_layer_type, in_both_dialects
from eightfold.text_part import SECTIONS, without_sections

_LEFT_OUT = ("quantization_config", "quantize", "transformers_weights")


def both_dialects(raw: Mapping[str, Any], config: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return config.json's object with dtype and rope in both dialects, and with what loaders cannot guess.

    Other keys are kept as they are, except `quantization_config` and `quantize`: present, they would hide the
    description file from the loaders, or contradict it. And except `transformers_weights`, a name of the source's file.
    """
    family, where = FAMILIES[config.architecture], Path("config.json")
    inner = raw.get("text_config") if family.is_wrapper else None
    part = raw if inner is None else inner
    out = {key: value for key, value in part.items() if key not in _LEFT_OUT}
    out["torch_dtype"] = out["dtype"] = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    # Loaders do not agree on what an absent one means in these families.
    if family.kv_heads is not None and part.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = config.num_kv_heads
    if family.head_dim is not None and part.get("head_dim") is None:
        out["head_dim"] = config.head_dim
    if config.experts is not None:  # by one name or the other
        out["num_experts"] = out["num_local_experts"] = config.experts.count
    out.update(_rope_in_both(part, config, where))
    if inner is not None:
        outer = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
        out = {**outer, "torch_dtype": out["dtype"], "dtype": out["dtype"], "text_config": out}
    return {**out, "model_type": family.model_type}


def _rope_in_both(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> dict[str, Any]:
    """Return what a file says of the rotary embedding in both dialects."""
    family = FAMILIES[config.architecture]
    full, local = without_sections(raw, family), None
    if config.local_rope is not None:
        full, local = by_layer_type(full)
    out = in_both_dialects(full, config.rope, where)
    said = [raw[key] for key in ("rope_scaling", "rope_parameters") if isinstance(raw.get(key), dict)]
    sections = {name: rope[name] for rope in said for name in SECTIONS if name in rope and family.is_wrapper}
    if sections:
        # Some classes know the type `mrope`, others only `default`: the file's own word stands.
        named = {name: kind for name, kind in (raw.get("rope_scaling") or {}).items() if name in ("type", "rope_type")}
        out["rope_scaling"] = {**(out["rope_scaling"] or named or {"rope_type": "default"}), **sections}
        out["rope_parameters"].update(sections)
    if family.rotary_part is not None:
        out["partial_rotary_factor"] = out["rope_parameters"]["partial_rotary_factor"] = config.rotary_part
    if local is not None and config.local_rope is not None:
        sliding = in_both_dialects(local, config.local_rope, where)
        out[LOCAL_BASE] = sliding["rope_theta"]
        types = dict(zip(LAYER_TYPES, (out["rope_parameters"], sliding["rope_parameters"]), strict=True))
        out["rope_parameters"] = types
    return out
