"""config.json: the two dialects in which it is written, and what this program needs of it.

transformers 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and
`rope_parameters`. Readers of our checkpoints know one or the other, so we read either, refuse a file that says
both and differently, and write both.

Letters: H query heads, G key/value heads, D head_dim, E hidden size, F intermediate size, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from eightfold.errors import ConfigError, InputError, UnsupportedError, one_of
from eightfold.files import read_json as load_json_object  # noqa: F401  (the name by which programs know it)
from eightfold.values import COUNT, FLAG, INTEGER, POSITIVE, TEXT, TEXTS, checked, require


class DType(str, Enum):
    """Element types by their safetensors names."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    I64 = "I64"
    I32 = "I32"
    I8 = "I8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1}[self.value]

    @property
    def is_float(self) -> bool:
        """Whether this is one of the three floating types a Llama comes in."""
        return self in (DType.F32, DType.F16, DType.BF16)


# The names under which config.json knows the float types.
CONFIG_DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}

ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

MAX_LAYERS = 10_000  # tensor names are listed for each


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding: base and, for long contexts, how frequencies are stretched."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about a Llama-family decoder, with every default filled in."""

    architecture: str
    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # D
    dtype: DType | None = None  # None: the file does not say
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    rope: RopeParameters = RopeParameters()
    sliding_window: int | None = 4096  # defaults as transformers has them for Mistral and Qwen; null is none
    use_sliding_window: bool | None = None  # None: the family decides
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    @property
    def q_size(self) -> int:
        """Columns of all query heads, H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads, G * D."""
        return self.num_kv_heads * self.head_dim

    def require_ids(self, token_ids: Sequence[int]) -> None:
        """Check token ids against the vocabulary.

        Raises:
            InputError: one is outside.
        """
        outside = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise InputError("token id", got=outside[0], expected=f"0 to {self.vocab_size - 1}")


def parse_config(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """Read the fields of a config.json into a ModelConfig.

    Args:
        raw: the parsed JSON object, either dialect.
        where: the file, for messages.

    Raises:
        ConfigError: a value is missing, of the wrong type, or the two dialects contradict each other.
        UnsupportedError: an activation or rope type that is not implemented.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(
            '"architectures"',
            where=where,
            got=architectures or "nothing",
            expected='a list such as ["LlamaForCausalLM"]',
        )
    said = _with_defaults(raw, where)
    rope, dtype = _rope_parameters(raw, where), _dtype(raw, where)
    architecture = require(TEXT, architectures[0], "architectures", where)
    sizes = {ours: require(kind, said.get(theirs), theirs, where) for ours, (theirs, kind) in _SIZES.items()}
    options = checked(said, _OPTIONS, where)
    if "sliding_window" in raw:
        options.setdefault("sliding_window", None)
    config = ModelConfig(architecture=architecture, dtype=dtype, rope=rope, **sizes, **options)
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            '"num_key_value_heads"',
            where=where,
            got=config.num_kv_heads,
            expected=f"a divisor of {config.num_heads} heads",
        )
    if config.head_dim % 2:
        raise ConfigError(
            '"head_dim"', where=where, got=config.head_dim, expected="an even number, as rotary embedding pairs columns"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedError('"hidden_act"', where=where, got=config.hidden_act, expected="silu")
    return config


# Of ModelConfig: the name in config.json, and what it has to be there.
_SIZES = {
    "vocab_size": ("vocab_size", COUNT),
    "hidden_size": ("hidden_size", COUNT),
    "intermediate_size": ("intermediate_size", COUNT),
    "num_layers": ("num_hidden_layers", COUNT._replace(most=MAX_LAYERS)),
    "num_heads": ("num_attention_heads", COUNT),
    "num_kv_heads": ("num_key_value_heads", COUNT),
    "head_dim": ("head_dim", COUNT),
}

# What may be absent, by the same name in both.
_OPTIONS = {
    "rms_norm_eps": POSITIVE,
    "max_position_embeddings": COUNT,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "hidden_act": TEXT,
    "sliding_window": COUNT,
    "use_sliding_window": FLAG,
    "max_window_layers": INTEGER,
    "layer_types": TEXTS,
}

_ROPE_FIELDS = {
    "rope_theta": POSITIVE,
    "rope_type": TEXT,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": COUNT,
}


def _with_defaults(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return what a file says that is not null, with the head sizes that follow from others."""
    said = {key: value for key, value in raw.items() if value is not None}
    heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
    if "head_dim" not in said and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if hidden % heads:
            raise ConfigError(
                '"hidden_size"',
                where=where,
                got=hidden,
                expected=f"a multiple of num_attention_heads {heads}, or a head_dim",
            )
        said["head_dim"] = hidden // heads
    said.setdefault("num_key_value_heads", heads)
    return said


def _dtype(raw: Mapping[str, Any], where: Path) -> DType | None:
    names = {key: str(raw[key]).removeprefix("torch.") for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    if len(set(names.values())) > 1:
        raise ConfigError(
            '"torch_dtype" and "dtype"',
            where=where,
            got=" and ".join(names.values()),
            expected="the same type",
            action="Remove one.",
        )
    for key, name in names.items():
        if name not in CONFIG_DTYPES:
            raise UnsupportedError(f'"{key}"', where=where, got=name, expected=one_of(CONFIG_DTYPES))
        return CONFIG_DTYPES[name]
    return None


def _rope_parameters(raw: Mapping[str, Any], where: Path) -> RopeParameters:
    old, new = _rope_object(raw, "rope_scaling", where), _rope_object(raw, "rope_parameters", where)
    old_theta = _theta(raw.get("rope_theta", (old or {}).pop("rope_theta", None)), "rope_theta", where)
    new_theta = _theta((new or {}).pop("rope_theta", None), "rope_parameters.rope_theta", where)
    if None not in (old_theta, new_theta) and old_theta != new_theta:
        raise _contradiction("rope_theta", f"{old_theta:g} and {new_theta:g}", "the same base", where)
    if None not in (old, new) and old != new:
        raise _contradiction("rope_scaling", f"{old} and {new}", "the same scaling", where)
    theta = old_theta if new_theta is None else new_theta
    fields = {**(new or old or {}), **({} if theta is None else {"rope_theta": theta})}
    kind = fields.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedError("rope type", where=where, got=kind, expected=one_of(ROPE_TYPES))
    absent = [name for name in _ROPE_NEEDS.get(kind, ()) if name not in fields]
    if absent:
        raise ConfigError(f"rope scaling {kind}", where=where, got=f"no {', '.join(absent)}", expected="a number")
    if raw.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UnsupportedError(
            '"partial_rotary_factor"', where=where, got=raw.get("partial_rotary_factor"), expected="1"
        )
    return RopeParameters(**checked(fields, _ROPE_FIELDS, where))


def _contradiction(key: str, got: str, expected: str, where: Path) -> ConfigError:
    what = f'"{key}" and "rope_parameters"'
    return ConfigError(what, where=where, got=got, expected=expected, action="Remove the wrong one.")


def _theta(value: Any, name: str, where: Path) -> float | None:
    return None if value is None else float(require(POSITIVE._replace(name="a number"), value, name, where))


def _rope_object(raw: Mapping[str, Any], key: str, where: Path) -> dict[str, Any] | None:
    """Return one dialect's rope settings, with a `rope_type`; None where the file does not have them."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f'"{key}"', where=where, got=repr(value), expected="an object or null")
    scaling = dict(value)
    old_name, new_name = scaling.pop("type", None), scaling.get("rope_type")
    if old_name and new_name and old_name != new_name:
        raise ConfigError(
            f'"type" and "rope_type" of {key}', where=where, got=f"{old_name} and {new_name}", expected="one"
        )
    scaling["rope_type"] = new_name or old_name or "default"
    return scaling


def both_dialects(raw: Mapping[str, Any], config: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return config.json's object with dtype and rope said in both dialects.

    Other keys are kept as they are, except `quantization_config` and `quantize`: present, they would hide the
    description file from the loaders, or contradict it.
    """
    name = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    scaling = {key: value for key, value in _scaling_fields(raw).items() if key != "rope_theta"}
    out = {key: value for key, value in raw.items() if key not in ("quantization_config", "quantize")}
    out["torch_dtype"] = out["dtype"] = name
    out["rope_theta"] = config.rope.rope_theta
    out["rope_scaling"] = _old_scaling(scaling)
    out["rope_parameters"] = {"rope_theta": config.rope.rope_theta, **scaling}
    return out


def _old_scaling(scaling: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` by the names that all its readers take.

    Linear scaling is older than `rope_type`: MindIE refuses it by that name, transformers 4 and vLLM take `type` too.
    """
    kind, rest = scaling["rope_type"], {key: value for key, value in scaling.items() if key != "rope_type"}
    if kind == "default":
        return None
    return {"type": kind, **rest} if kind == "linear" else scaling


def _scaling_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    old_name = fields.pop("type", None)
    fields.setdefault("rope_type", old_name or "default")
    return fields
