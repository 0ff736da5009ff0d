"""config.json: the two dialects in which it is written, and what this program needs of it.

transformers 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and
`rope_parameters`. Readers of our checkpoints know one or the other, so we read either, refuse a file that says
both and differently, and write both.

Letters: H query heads, G key/value heads, D head_dim, E hidden size, F intermediate size, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from eightfold.architectures import FAMILIES, KNOWN, Experts, Family, Names, NormPlaces, QkNorm
from eightfold.errors import ConfigError, InputError, UnsupportedError, one_of
from eightfold.files import read_json as load_json_object  # noqa: F401  (the name by which programs know it)
from eightfold.rope import (
    LOCAL_BASE,
    MAX_SIZE,
    RopeParameters,
    by_layer_type,
    fit_rope,
    read_rope,
    read_rotary_part,
)
from eightfold.text_part import text_part, without_sections
from eightfold.values import COUNT, FLAG, INTEGER, INTEGERS, POSITIVE, TEXT, TEXTS, optional, require, shorten


class DType(str, Enum):
    """Element types by their safetensors names."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    I64 = "I64"
    I32 = "I32"
    I8 = "I8"
    F8_E4M3 = "F8_E4M3"  # of weights that come with a scale for each block, which only quantize reads

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "F8_E4M3": 1}[self.value]

    @property
    def is_float(self) -> bool:
        """Whether this is one of the three floating types a Llama comes in."""
        return self in (DType.F32, DType.F16, DType.BF16)


# The names under which config.json knows the float types.
CONFIG_DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

LAYER_TYPES = ("full_attention", "sliding_attention")


MAX_LAYERS = 10_000  # tensor names are listed for each

MAX_EXPERTS = 10_000  # of a layer: their names are listed too

# Under which config.json says how many experts a layer has.
EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


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
    qkv_bias: bool = True
    hidden_act: str = "silu"
    rope: RopeParameters = RopeParameters()
    sliding_window: int | None = 4096  # defaults as transformers has them for Mistral and Qwen; null is none
    use_sliding_window: bool | None = None  # None: the family decides
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    experts: Experts | None = None  # None: a dense model
    names: Names = Names()
    rotary_part: float = 1.0  # of a head, which is turned
    local_rope: RopeParameters | None = None  # of the layers that slide; None: as in the others
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add
    score_multiplier: float | None = None  # None: 1 / sqrt(D)
    logits_multiplier: float = 1.0
    attention_softcap: float | None = None  # c: a score x becomes c tanh(x / c); None: it stays
    logits_softcap: float | None = None  # the same of logits

    @property
    def activation(self) -> Activation:
        """What gates the MLP."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def norm_places(self) -> NormPlaces:
        """Where the norms of a layer stand."""
        return self.names.norm_places

    @property
    def norm_offset(self) -> float:
        """What is added to the gains of norms as they are stored; layers.read_norm does."""
        return FAMILIES[self.architecture].norm_offset

    @property
    def qk_norm(self) -> QkNorm:
        """Over what queries and keys are normalized before they are turned."""
        return FAMILIES[self.architecture].qk_norm

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are turned, its first."""
        return int(self.head_dim * self.rotary_part)

    @property
    def rotary_interleaved(self) -> bool:
        """Whether channels 2 i and 2 i + 1 are turned together, and not i and i + rotary_dim / 2."""
        return FAMILIES[self.architecture].is_interleaved

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.score_multiplier is None else self.score_multiplier

    def is_sparse(self, layer_idx: int) -> bool:
        """Return whether a layer has experts; the others have one MLP of the intermediate size."""
        experts = self.experts
        if experts is None or layer_idx in experts.dense_layers:
            return False
        return (layer_idx + 1) % experts.every == 0

    @property
    def q_size(self) -> int:
        """Columns of all query heads, H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads, G * D."""
        return self.num_kv_heads * self.head_dim

    @property
    def context(self) -> int:
        """Positions of a sequence unless more are asked for."""
        return self.rope.context(self.max_position_embeddings)

    @property
    def reach(self) -> int:
        """Positions of a sequence at most: with YaRN and dynamic scaling, its factor times the original context."""
        return self.rope.reach(self.max_position_embeddings)

    def require_ids(self, token_ids: Sequence[int]) -> None:
        """Check token ids against the vocabulary.

        Raises:
            InputError: one is outside.
        """
        outside = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise InputError("token id", got=outside[0], expected=f"0 to {self.vocab_size - 1}")


def has_engine(raw: Mapping[str, Any]) -> bool:
    """Whether this program can run the architecture that a config.json names."""
    named = raw.get("architectures")
    return isinstance(named, list) and bool(named) and isinstance(named[0], str) and named[0] in FAMILIES


def has_experts(raw: Mapping[str, Any]) -> bool:
    """Whether this program can run the architecture that a config.json names, and it is a mixture of experts."""
    return has_engine(raw) and FAMILIES[raw["architectures"][0]].experts is not None


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
            expected=f"a list with {KNOWN}",
        )
    names = [str(require(TEXT, name, "architectures", where)) for name in named]
    family = FAMILIES.get(names[0]) if len(names) == 1 else None
    if family is None:
        got = shorten(" and ".join(names), 300)
        raise UnsupportedError("architecture", where=where, got=got, expected=KNOWN)
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
    raw = text_part(raw, family, where)
    said = _with_defaults(raw, family, where)
    if _has_no_window(raw, family):
        said["sliding_window"] = None
    sizes = {ours: require(kind, said.get(theirs), theirs, where) for ours, (theirs, kind) in _SIZES.items()}
    options = {
        ours: require(kind, said[ours], family.keys.get(ours, ours), where)
        for ours, kind in _OPTIONS.items()
        if ours in said
    }
    config = ModelConfig(
        architecture=family.architecture,
        dtype=_dtype(raw, where),
        experts=_read_experts(said, family, where),
        names=family.names,
        rotary_part=read_rotary_part(raw, family.rotary_part, where),
        **sizes,
        **options,
        **_read_factors(said, family, where),
    )
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
    if config.hidden_act not in ACTIVATIONS:
        key = family.keys.get("hidden_act", "hidden_act")
        raise UnsupportedError(f'"{key}"', where=where, got=shorten(config.hidden_act), expected=one_of(ACTIVATIONS))
    if said.get("use_bidirectional_attention"):
        raise UnsupportedError('"use_bidirectional_attention"', where=where, got="true", expected="false")
    if family.window == "pattern" and config.layer_types is None:
        config = replace(config, layer_types=_pattern(said, config.num_layers, where))
    _require_layer_types(config, family, where)
    return _with_rope(config, raw, said, where)


def _with_rope(config: ModelConfig, raw: Mapping[str, Any], said: Mapping[str, Any], where: Path) -> ModelConfig:
    """Return the settings with how positions turn queries and keys.

    Raises:
        ConfigError: the settings make no sense, or do not fit the rest.
        UnsupportedError: some that are not implemented.
    """
    if config.rotary_dim % 2 or not config.rotary_dim:
        got = f"{config.rotary_part:g} of {config.head_dim} channels"
        raise ConfigError('"partial_rotary_factor"', where=where, got=got, expected="an even number of channels")
    family, context = FAMILIES[config.architecture], config.max_position_embeddings
    theta = family.defaults.get("rope_theta", RopeParameters.rope_theta)
    full, local = without_sections(raw, family), None
    if LOCAL_BASE in family.defaults:
        full, local = by_layer_type(full)
    rope = fit_rope(read_rope(full, where, theta), config.rotary_dim, context, where)
    if local is None:
        return replace(config, rope=rope)
    local_rope = read_rope(local, where, family.defaults[LOCAL_BASE])
    return replace(config, rope=rope, local_rope=fit_rope(local_rope, config.rotary_dim, context, where))


def _pattern(said: Mapping[str, Any], num_layers: int, where: Path) -> tuple[str, ...]:
    """Return the types of layers of which each nth sees everything, and the others slide."""
    every = require(COUNT, said.get("sliding_window_pattern"), "sliding_window_pattern", where)
    return tuple(LAYER_TYPES[(layer_idx + 1) % every != 0] for layer_idx in range(num_layers))


def _read_factors(said: Mapping[str, Any], family: Family, where: Path) -> dict[str, Any]:
    """Read what numbers on their way through the model are multiplied by, and by what they are capped.

    Raises:
        ConfigError: a value is not of its kind.
    """
    found = {key: require(kind, said.get(key), key, where) for key, kind in _FACTORS.items() if key in family.defaults}
    score, scalar = found.get("attention_multiplier"), found.get("query_pre_attn_scalar")
    hidden = require(_SIZE, said.get("hidden_size"), "hidden_size", where)
    return {
        "embedding_multiplier": hidden**0.5 if family.scales_embedding else found.get("embedding_multiplier", 1.0),
        "residual_multiplier": found.get("residual_multiplier", 1.0),
        "score_multiplier": score if scalar is None else scalar**-0.5,
        "logits_multiplier": 1 / found.get("logits_scaling", 1.0),
        "attention_softcap": found.get("attn_logit_softcapping"),
        "logits_softcap": found.get("final_logit_softcapping"),
    }


def _read_experts(said: Mapping[str, Any], family: Family, where: Path) -> Experts | None:
    """Read what a file says about experts; what it leaves out, the family's class knows.

    Raises:
        ConfigError: a value is of the wrong type, or they contradict each other.
    """
    if family.experts is None:
        return None
    counts = {key: require(_EXPERTS, said[key], key, where) for key in EXPERT_KEYS if key in said}
    if len(set(counts.values())) > 1:
        what, got = " and ".join(f'"{key}"' for key in counts), " and ".join(map(str, counts.values()))
        raise ConfigError(what, where=where, got=got, expected="the same number", action="Remove the wrong one.")
    kinds = _EXPERT_OPTIONS if family.experts.intermediate_size else {"per_token": _EXPERT_OPTIONS["per_token"]}
    given = {
        ours: require(kind, said[key], key, where)
        for ours, (key, kind) in kinds.items()
        if key in said and (ours != "shared_size" or family.experts.shared_size)
    }
    if not family.experts.intermediate_size:
        given["intermediate_size"] = said.get("intermediate_size")
    experts = replace(family.experts, count=next(iter(counts.values()), family.experts.count), **given)
    if experts.per_token > experts.count:
        expected = f"at most {experts.count}, as there are no more experts"
        raise ConfigError('"num_experts_per_tok"', where=where, got=experts.per_token, expected=expected)
    return experts


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
    if family.window.startswith("flagged") and not config.use_sliding_window and LAYER_TYPES[1] in types:
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

_EXPERTS = COUNT._replace(most=MAX_EXPERTS)

# Of Experts, likewise; all of them may be absent.
_EXPERT_OPTIONS = {
    "per_token": ("num_experts_per_tok", _EXPERTS),
    "intermediate_size": ("moe_intermediate_size", _SIZE),
    "normalizes": ("norm_topk_prob", FLAG),
    "shared_size": ("shared_expert_intermediate_size", _SIZE),
    "every": ("decoder_sparse_step", COUNT),
    "dense_layers": ("mlp_only_layers", INTEGERS),
}

_FACTOR = POSITIVE._replace(least=1e-6, most=1e6)
_FACTORS = {
    "embedding_multiplier": _FACTOR,
    "residual_multiplier": _FACTOR,
    "attention_multiplier": _FACTOR,
    "logits_scaling": _FACTOR,
    "query_pre_attn_scalar": _FACTOR,
    "attn_logit_softcapping": optional(_FACTOR),
    "final_logit_softcapping": optional(_FACTOR),
}
_NULL_IS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

# What may be absent, by the same name in both, but where a family has another.
_OPTIONS = {
    "rms_norm_eps": POSITIVE._replace(most=1),
    "max_position_embeddings": _SIZE,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "qkv_bias": FLAG,
    "hidden_act": TEXT,
    "sliding_window": optional(_SIZE),
    "use_sliding_window": FLAG,
    "max_window_layers": INTEGER,
    "layer_types": TEXTS,
}


def _with_defaults(raw: Mapping[str, Any], family: Family, where: Path) -> dict[str, Any]:
    """Return what a file says that is not null, with what follows from the family where it says nothing."""
    said = {key: value for key, value in raw.items() if value is not None and key not in family.keys}
    said.update({ours: raw[theirs] for ours, theirs in family.keys.items() if raw.get(theirs) is not None})
    for ours, default in family.defaults.items():
        if ours not in _NULL_IS_NONE or ours not in raw:
            said.setdefault(ours, default)
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
    slides = family.window in ("all", "pattern") or (family.window != "never" and raw.get("use_sliding_window"))
    default = family.defaults.get("sliding_window", ModelConfig.sliding_window)
    return raw.get("sliding_window", default) in ((None,) if slides else (None, 0))


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
