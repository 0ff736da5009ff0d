"""config.json: the two dialects in which it is written, and what this program needs of it.

transformers 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and
`rope_parameters`. Readers of our checkpoints know one or the other, so we read either, refuse a file that says
both and differently, and write both.

Letters: H query heads, G key/value heads, D head_dim, E hidden size, F intermediate size, L layers, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from eightfold.errors import ConfigError, InputError, UnsupportedError, one_of
from eightfold.files import read_json as load_json_object  # noqa: F401  (the name by which programs know it)
from eightfold.values import COUNT, FLAG, INTEGER, POSITIVE, TEXT, TEXTS, checked, optional, require, shorten, shown


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

# What rope types consist of, besides the base.
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LAYER_TYPES = ("full_attention", "sliding_attention")
_LEFT_OUT = ("quantization_config", "quantize", "transformers_weights")

MAX_LAYERS = 10_000  # tensor names are listed for each
MAX_SIZE = 10**9  # of anything that is counted: places in it fit 32 bits

BiasRule = Literal["never", "qkv", "config"]  # config: `attention_bias` puts one on q, k, v and o
WindowRule = Literal["never", "all", "flagged"]  # flagged: `use_sliding_window`, from `max_window_layers` on


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture from the others, and what its class in transformers takes for absent keys."""

    architecture: str
    model_type: str
    attention_bias: BiasRule
    mlp_bias: bool  # whether `mlp_bias` in config.json is meant
    qk_norm: bool  # RMS norm over each head's q and k, before RoPE
    window: WindowRule
    context: int  # max_position_embeddings
    kv_heads: int | None = None  # None: as many as query heads, which null means in all of them
    head_dim: int | None = None  # None: hidden size / query heads


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", "config", mlp_bias=True, qk_norm=False, window="never", context=2048),
        Family(
            "MistralForCausalLM", "mistral", "never", False, qk_norm=False, window="all", context=131072, kv_heads=8
        ),
        Family(
            "Qwen2ForCausalLM", "qwen2", "qkv", False, qk_norm=False, window="flagged", context=32768, kv_heads=32
        ),
        Family(
            "Qwen3ForCausalLM", "qwen3", "config", False, qk_norm=True, window="flagged", context=32768, kv_heads=32,
            head_dim=128,
        ),
    )
}  # fmt: skip


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


def require_architecture(raw: Mapping[str, Any], where: Path) -> Family:
    """Return the row of a config.json's architecture: what is looked at before anything else.

    Raises:
        ConfigError: no architecture is named, or none that goes with the file's `model_type`.
        UnsupportedError: the architecture is not in the table.
    """
    named, model_type = raw.get("architectures"), raw.get("model_type")
    if not named or not isinstance(named, list):
        beside = "" if model_type is None else f" beside model_type {shorten(str(model_type))}"
        raise ConfigError(
            '"architectures"',
            where=where,
            got=f"{shorten(str(named or 'nothing'))}{beside}",
            expected=f"a list with {one_of(FAMILIES)}",
        )
    names = [str(require(TEXT, name, "architectures", where)) for name in named]
    family = FAMILIES.get(names[0]) if len(names) == 1 else None
    if family is None:
        got = shorten(" and ".join(names), 300)
        raise UnsupportedError("architecture", where=where, got=got, expected=one_of(FAMILIES))
    if model_type not in (None, family.model_type):
        raise ConfigError(
            '"model_type"',
            where=where,
            got=shorten(str(model_type)),
            expected=f"{family.model_type}, which is that of {family.architecture}",
            action="Correct the one that is wrong: loaders choose a model's code by either.",
        )
    return family


def parse_config(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """Read the fields of a config.json into a ModelConfig.

    Args:
        raw: the parsed JSON object, either dialect.
        where: the file, for messages.

    Raises:
        ConfigError: a value is missing, of the wrong type, or the two dialects contradict each other.
        UnsupportedError: an architecture, an activation or a rope type that is not implemented.
    """
    family = require_architecture(raw, where)
    said = _with_defaults(raw, family, where)
    if _has_no_window(raw, family):
        said["sliding_window"] = None
    rope, dtype = _rope_parameters(raw, where), _dtype(raw, where)
    sizes = {ours: require(kind, said.get(theirs), theirs, where) for ours, (theirs, kind) in _SIZES.items()}
    options = checked(said, _OPTIONS, where)
    config = ModelConfig(architecture=family.architecture, dtype=dtype, rope=rope, **sizes, **options)
    if config.num_heads % config.num_kv_heads:
        absent = "" if "num_key_value_heads" in raw else f", which {family.architecture} has where nothing is said"
        raise ConfigError(
            '"num_key_value_heads"',
            where=where,
            got=f"{config.num_kv_heads}{absent}",
            expected=f"a divisor of {config.num_heads} heads",
        )
    if config.head_dim % 2:
        raise ConfigError(
            '"head_dim"', where=where, got=config.head_dim, expected="an even number, as rotary embedding pairs columns"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedError('"hidden_act"', where=where, got=shorten(config.hidden_act), expected="silu")
    _require_layer_types(config, family, where)
    return config


def _require_layer_types(config: ModelConfig, family: Family, where: Path) -> None:
    types = config.layer_types
    if types is None:
        return
    if len(types) != config.num_layers:
        got, expected = f"{len(types)} of them", f"{config.num_layers}, one for each layer"
        raise ConfigError('"layer_types"', where=where, got=got, expected=expected)
    for name in types:
        if name not in LAYER_TYPES:
            raise UnsupportedError('"layer_types"', where=where, got=shorten(name), expected=one_of(LAYER_TYPES))
    if family.window == "flagged" and not config.use_sliding_window and LAYER_TYPES[1] in types:
        expected = "full_attention alone, as use_sliding_window is not true"
        raise ConfigError('"layer_types"', where=where, got=LAYER_TYPES[1], expected=expected)


_SIZE = COUNT._replace(most=MAX_SIZE)

# Of ModelConfig: the name in config.json, and what it has to be there.
_SIZES = {
    "vocab_size": ("vocab_size", _SIZE),
    "hidden_size": ("hidden_size", _SIZE),
    "intermediate_size": ("intermediate_size", _SIZE),
    "num_layers": ("num_hidden_layers", COUNT._replace(most=MAX_LAYERS)),
    "num_heads": ("num_attention_heads", _SIZE),
    "num_kv_heads": ("num_key_value_heads", _SIZE),
    "head_dim": ("head_dim", _SIZE),
}

# What may be absent, by the same name in both.
_OPTIONS = {
    "rms_norm_eps": POSITIVE._replace(most=1),
    "max_position_embeddings": _SIZE,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "hidden_act": TEXT,
    "sliding_window": optional(_SIZE),
    "use_sliding_window": FLAG,
    "max_window_layers": INTEGER,
    "layer_types": TEXTS,
}

# What float32 can hold, and its reciprocal and square too.
_ROPE_NUMBER = POSITIVE._replace(least=1e-15, most=1e15)

_BASE = _ROPE_NUMBER._replace(name="a number")

_ROPE_FIELDS = {
    "rope_type": TEXT,
    "factor": _ROPE_NUMBER,
    "low_freq_factor": _ROPE_NUMBER,
    "high_freq_factor": _ROPE_NUMBER,
    "original_max_position_embeddings": _SIZE,
}


def _with_defaults(raw: Mapping[str, Any], family: Family, where: Path) -> dict[str, Any]:
    """Return what a file says that is not null, with what follows from the family where it says nothing."""
    said = {key: value for key, value in raw.items() if value is not None}
    heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
    if "head_dim" not in said and family.head_dim is not None:
        said["head_dim"] = family.head_dim
    if "head_dim" not in said and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if hidden % heads:
            raise ConfigError(
                '"hidden_size"',
                where=where,
                got=hidden,
                expected=f"a multiple of num_attention_heads {heads}, or a head_dim",
            )
        said["head_dim"] = hidden // heads
    said.setdefault("num_key_value_heads", heads if "num_key_value_heads" in raw else family.kv_heads or heads)
    said.setdefault("max_position_embeddings", family.context)
    return said


def _has_no_window(raw: Mapping[str, Any], family: Family) -> bool:
    """Return whether `sliding_window` says that there is none: by null, and by 0 where the model would not use one."""
    slides = family.window == "all" or (family.window == "flagged" and raw.get("use_sliding_window"))
    return raw.get("sliding_window", ...) in ((None,) if slides else (None, 0))


def _dtype(raw: Mapping[str, Any], where: Path) -> DType | None:
    """Return the dtype that a file names; None where it names none, or leaves it to the weights with `auto`."""
    names = {key: str(raw[key]).removeprefix("torch.") for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    names = {key: name for key, name in names.items() if name != "auto"}
    if len(set(names.values())) > 1:
        raise ConfigError(
            '"torch_dtype" and "dtype"',
            where=where,
            got=" and ".join(map(shorten, names.values())),
            expected="the same type",
            action="Remove one.",
        )
    for key, name in names.items():
        if name not in CONFIG_DTYPES:
            raise UnsupportedError(f'"{key}"', where=where, got=shorten(name), expected=one_of(CONFIG_DTYPES))
        return CONFIG_DTYPES[name]
    return None


def _rope_parameters(raw: Mapping[str, Any], where: Path) -> RopeParameters:
    """Read the rotary embedding: what a file says of it is obeyed, or refused."""
    dialects = {key: _rope_object(raw, key, where) for key in ("rope_scaling", "rope_parameters")}
    said = {key: rope for key, rope in dialects.items() if rope is not None}
    bases = {"rope_theta": raw.get("rope_theta")}
    bases.update({f"{key}.rope_theta": rope.pop("rope_theta", None) for key, rope in said.items()})
    thetas = {name: require(_BASE, value, name, where) for name, value in bases.items() if value is not None}
    _require_agreement(thetas, "the same base", where)
    _require_agreement(said, "the same scaling", where)
    whole = raw.get("partial_rotary_factor")
    if whole not in (None, 1):
        raise UnsupportedError('"partial_rotary_factor"', where=where, got=shown(whole), expected="1")
    rope = RopeParameters(**next(iter(said.values()), {}))
    return replace(rope, rope_theta=next(iter(thetas.values()), rope.rope_theta))


def _require_agreement(said: Mapping[str, Any], expected: str, where: Path) -> None:
    """Compare what several keys of a file say of one thing.

    Raises:
        ConfigError: they contradict each other.
    """
    for one, other in itertools.pairwise(said):
        if said[one] != said[other]:
            values = [f"{value:g}" if isinstance(value, float) else str(value) for value in (said[one], said[other])]
            got = " and ".join(shorten(value, 140) for value in values)
            what = f'"{one}" and "{other}"'
            raise ConfigError(what, where=where, got=got, expected=expected, action="Remove the wrong one.")


def _rope_object(raw: Mapping[str, Any], key: str, where: Path) -> dict[str, Any] | None:
    """Return one dialect's rope settings, with a `rope_type`; None where the file does not have them.

    Raises:
        ConfigError: something that the type needs is absent, or the type itself.
        UnsupportedError: an unknown type, settings by the type of layer, or some that the type does not have.
    """
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f'"{key}"', where=where, got=shown(value), expected="an object or null")
    rope = {name: setting for name, setting in value.items() if setting is not None}
    nested = [name for name, setting in rope.items() if isinstance(setting, dict)]
    if nested:
        got = f"settings for {shorten(', '.join(nested), 200)}"
        raise UnsupportedError(f'"{key}"', where=where, got=got, expected="the same for all layers")
    old_name, new_name = rope.pop("type", None), rope.get("rope_type")
    if None not in (old_name, new_name) and old_name != new_name:
        got = f"{shown(old_name)} and {shown(new_name)}"
        raise ConfigError(f'"type" and "rope_type" of {key}', where=where, got=got, expected="one")
    kind = old_name if new_name is None else new_name
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    others = [name for name in rope if name not in ("rope_type", "rope_theta")]
    if kind is None and others:
        got = f"{shorten(', '.join(others), 200)} without a rope_type"
        raise ConfigError(f'"{key}"', where=where, got=got, expected=f"one of {one_of(_ROPE_NEEDS)}")
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise UnsupportedError(
            "rope type", where=where, got=shorten(str(kind)) or "an empty text", expected=one_of(_ROPE_NEEDS)
        )
    absent = [name for name in _ROPE_NEEDS[kind] if name not in rope]
    if absent:
        raise ConfigError(f"rope scaling {kind}", where=where, got=f"no {', '.join(absent)}", expected="a number")
    unread = [name for name in others if name not in _ROPE_NEEDS[kind]]
    if unread:
        raise UnsupportedError(
            f'"{key}"',
            where=where,
            got=shorten(", ".join(unread), 200),
            expected=f"{', '.join(('rope_type', 'rope_theta', *_ROPE_NEEDS[kind]))}, which are all that {kind} has",
        )
    rope.update(checked({**rope, "rope_type": kind}, _ROPE_FIELDS, where))
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        expected = f"more than low_freq_factor {rope['low_freq_factor']:g}"
        raise ConfigError('"high_freq_factor"', where=where, got=f"{rope['high_freq_factor']:g}", expected=expected)
    return rope


def both_dialects(raw: Mapping[str, Any], config: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return config.json's object with dtype and rope in both dialects, and with what loaders cannot guess.

    Other keys are kept as they are, except `quantization_config` and `quantize`: present, they would hide the
    description file from the loaders, or contradict it. And except `transformers_weights`, a name of the source's file.
    """
    rope = {name: getattr(config.rope, name) for name in ("rope_type", *_ROPE_NEEDS[config.rope.rope_type])}
    out = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    out["model_type"] = FAMILIES[config.architecture].model_type
    out["torch_dtype"] = out["dtype"] = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    family = FAMILIES[config.architecture]
    # Loaders do not agree on what an absent one means in these families.
    if family.kv_heads is not None and raw.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = config.num_kv_heads
    if family.head_dim is not None and raw.get("head_dim") is None:
        out["head_dim"] = config.head_dim
    out["rope_theta"] = config.rope.rope_theta
    out["rope_scaling"] = _old_scaling(rope)
    out["rope_parameters"] = {"rope_theta": config.rope.rope_theta, **rope}
    return out


def _old_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` by the names that all its readers take.

    Linear scaling is older than `rope_type`: MindIE refuses it by that name, transformers 4 and vLLM take `type` too.
    """
    if rope["rope_type"] == "default":
        return None
    return {"type": "linear", "factor": rope["factor"]} if rope["rope_type"] == "linear" else rope
