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

from eightfold.errors import ConfigError, InputError, UnsupportedError, one_of
from eightfold.files import read_json as load_json_object  # noqa: F401  (the name by which programs know it)
from eightfold.rope import MAX_SIZE, RopeParameters, fit_rope, in_both_dialects, read_rope
from eightfold.values import COUNT, FLAG, INTEGER, INTEGERS, POSITIVE, TEXT, TEXTS, checked, optional, require, shorten


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

LAYER_TYPES = ("full_attention", "sliding_attention")
_LEFT_OUT = ("quantization_config", "quantize", "transformers_weights")

MAX_LAYERS = 10_000  # tensor names are listed for each

MAX_EXPERTS = 10_000  # of a layer: their names are listed too

# Under which config.json says how many experts a layer has.
EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

# config: `attention_bias` puts one on q, k, v and o; flagged: `qkv_bias` on q, k and v.
BiasRule = Literal["never", "qkv", "flagged", "config"]
# The last three with `use_sliding_window`: from `max_window_layers` on, all, or every other one up to there.
WindowRule = Literal["never", "all", "flagged", "flagged all", "flagged even"]


@dataclass(frozen=True)
class Experts:
    """The experts of a layer that has them, and which layers do."""

    count: int
    per_token: int  # how many of them a token passes through
    intermediate_size: int  # of one expert
    normalizes: bool  # whether the weights of a token's experts are divided by their sum
    shared_size: int = 0  # intermediate size of the expert of all tokens, with a sigmoid gate; 0: there is none
    every: int = 1  # layers `every - 1`, `2 * every - 1` ... have experts
    dense_layers: tuple[int, ...] = ()  # but for these


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
    sliding_window: int | None = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    experts: Experts | None = None  # of width 0: as wide as intermediate_size says, always normalized, in all layers


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
        Family(
            "Qwen3MoeForCausalLM", "qwen3_moe", "config", False, qk_norm=True, window="flagged all", context=32768,
            kv_heads=4, experts=Experts(128, 8, 768, normalizes=False),
        ),
        Family(
            "Qwen2MoeForCausalLM", "qwen2_moe", "flagged", False, qk_norm=False, window="flagged even", context=32768,
            kv_heads=16, experts=Experts(60, 4, 1408, normalizes=False, shared_size=5632),
        ),
        Family(
            "MixtralForCausalLM", "mixtral", "never", False, qk_norm=False, window="all", context=131072, kv_heads=8,
            sliding_window=None, rope_theta=1e6, rms_norm_eps=1e-5, experts=Experts(8, 2, 0, normalizes=True),
        ),
    )
}  # fmt: skip


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
    rope, dtype = read_rope(raw, where, family.rope_theta), _dtype(raw, where)
    sizes = {ours: require(kind, said.get(theirs), theirs, where) for ours, (theirs, kind) in _SIZES.items()}
    options = checked(said, _OPTIONS, where)
    experts = _read_experts(said, family, where)
    config = ModelConfig(architecture=family.architecture, dtype=dtype, rope=rope, experts=experts, **sizes, **options)
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
    return replace(config, rope=fit_rope(rope, config.head_dim, config.max_position_embeddings, where))


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

# What may be absent, by the same name in both.
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
    said.setdefault("rms_norm_eps", family.rms_norm_eps)
    return said


def _has_no_window(raw: Mapping[str, Any], family: Family) -> bool:
    """Return whether `sliding_window` says that there is none: by null, and by 0 where the model would not use one."""
    slides = family.window == "all" or (family.window != "never" and raw.get("use_sliding_window"))
    return raw.get("sliding_window", family.sliding_window) in ((None,) if slides else (None, 0))


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


def both_dialects(raw: Mapping[str, Any], config: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return config.json's object with dtype and rope in both dialects, and with what loaders cannot guess.

    Other keys are kept as they are, except `quantization_config` and `quantize`: present, they would hide the
    description file from the loaders, or contradict it. And except `transformers_weights`, a name of the source's file.
    """
    out = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    out["model_type"] = FAMILIES[config.architecture].model_type
    out["torch_dtype"] = out["dtype"] = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    family = FAMILIES[config.architecture]
    # Loaders do not agree on what an absent one means in these families.
    if family.kv_heads is not None and raw.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = config.num_kv_heads
    if family.head_dim is not None and raw.get("head_dim") is None:
        out["head_dim"] = config.head_dim
    if config.experts is not None:  # by one name or the other
        out["num_experts"] = out["num_local_experts"] = config.experts.count
    return out | in_both_dialects(raw, config.rope, Path("config.json"))
