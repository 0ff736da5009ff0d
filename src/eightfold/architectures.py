"""The families with an engine, as data: what distinguishes one architecture from another, and what it names its parts.

A row holds what the architecture's class in transformers takes for keys that config.json does not have; what a file
says is read in config.py. layouts.py has a row for each of them too, for what needs names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from eightfold.errors import one_of

# config: `attention_bias` puts one on q, k and v; flagged: `qkv_bias`.
BiasRule = Literal["never", "qkv", "flagged", "config"]
OutputBiasRule = Literal["never", "attention", "mlp"]  # o has one where q, k and v, or the linears of the MLP, do
# Three with `use_sliding_window`: from `max_window_layers` on, all, or every other one up to there. pattern:
# `layer_types`, and where they are absent, all layers but each nth, by `sliding_window_pattern`.
WindowRule = Literal["never", "all", "flagged", "flagged all", "flagged even", "pattern"]
QkNorm = Literal["none", "head", "width"]
NormPlaces = Literal["before", "after", "both"]


@dataclass(frozen=True)
class Names:
    """What a model names its modules: the ends by their full names, the others inside their layer.

    Attributes:
        embedding, final_norm, head: the ends.
        layers: what precedes the index of a layer.
        attention: the module to which scales of attention belong.
        qkv: of queries, keys and values; one name where all three are rows of one tensor.
        qkv_by_head: whether such rows are in turn those of a key's queries, the key, and its value.
        gate_up: one name where gate and up are rows of one tensor, gate first.
        before_attention, after_attention, before_ffn, after_ffn: the norms; empty: there is none.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers."
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_by_head: bool = False
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_ffn: str = "post_attention_layernorm"
    after_ffn: str = ""

    @property
    def key(self) -> str:
        """The module to which the scales of cached keys belong, which need not be a linear."""
        return f"{self.attention}.k_proj"

    @property
    def value(self) -> str:
        """The same of values."""
        return f"{self.attention}.v_proj"

    @property
    def q_norm(self) -> str:
        return f"{self.attention}.q_norm"

    @property
    def k_norm(self) -> str:
        return f"{self.attention}.k_norm"

    @property
    def norm_places(self) -> NormPlaces:
        """Where the norms of a layer stand: before attention and MLP, after them, or both."""
        if not self.before_attention:
            return "after"
        return "both" if self.after_attention else "before"

    def layer(self, layer_idx: int) -> str:
        """Return the name prefix of a decoder layer, with its dot."""
        return f"{self.layers}{layer_idx}."


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
    """What distinguishes one architecture from the others, and what its class in transformers takes for absent keys.

    Attributes:
        architecture, model_type: its names in config.json.
        attention_bias: which of q, k and v have a bias.
        o_bias: when the linear behind attention has one, where attention_bias is `config`; never elsewhere.
        mlp_bias: whether `mlp_bias` in config.json is meant.
        qk_norm: RMS norm over each head's q and k, or over all heads together, before RoPE.
        window: which layers have one.
        context: max_position_embeddings.
        kv_heads: None: as many as query heads, which null means in all of them.
        head_dim: None: hidden size / query heads.
        names: of its modules.
        keys: name in config.json by which this family has what others have by another.
        defaults: what absent keys of config.json stand for, by the names that others have. Multipliers and soft caps
            are read in families that have them here.
        norm_offset: what is added to the gains of its norms: 1 where they are stored as differences from it.
        rotary_part: how much of a head is turned, unless `partial_rotary_factor` says; None: all, and it may not say.
        is_interleaved: whether channels next to each other are turned together, and not those of both halves.
        scales_embedding: whether embeddings are multiplied by sqrt(hidden size).
        text_types: `model_type` of the text model inside a wrapper; empty: it is none.
        experts: those of width 0 are as wide as intermediate_size says, always normalized, and in all layers.
    """

    architecture: str
    model_type: str
    attention_bias: BiasRule = "never"
    mlp_bias: bool = False
    o_bias: OutputBiasRule = "attention"
    qk_norm: QkNorm = "none"
    window: WindowRule = "never"
    context: int = 2048
    kv_heads: int | None = None
    head_dim: int | None = None
    names: Names = Names()
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    norm_offset: float = 0.0
    rotary_part: float | None = None
    is_interleaved: bool = False
    scales_embedding: bool = False
    text_types: tuple[str, ...] = ()
    experts: Experts | None = None

    @property
    def is_wrapper(self) -> bool:
        """Whether the text model is a part of the model."""
        return bool(self.text_types)


_GLM4 = Names(after_attention="post_self_attn_layernorm", after_ffn="post_mlp_layernorm")
_INTERNLM2 = Names(
    embedding="model.tok_embeddings",
    head="output",
    attention="attention",
    qkv=("attention.wqkv",),
    qkv_by_head=True,
    o="attention.wo",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    before_attention="attention_norm",
    before_ffn="ffn_norm",
)
_GEMMA = Names(
    after_attention="post_attention_layernorm",
    before_ffn="pre_feedforward_layernorm",
    after_ffn="post_feedforward_layernorm",
)
_OLMO2 = Names(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_ffn="",
    after_ffn="post_feedforward_layernorm",
)

_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS: dict[str, Any] = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 256_000,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "sliding_window_pattern": 2,
}
_GEMMA3_DEFAULTS: dict[str, Any] = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 262_208,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}


def _causal(name: str, model_type: str, **others: Any) -> Family:
    return Family(f"{name}ForCausalLM", model_type, **others)


def _gemma(architecture: str, model_type: str, **others: Any) -> Family:
    return Family(
        architecture, model_type, "config", window="pattern", kv_heads=4, head_dim=256, names=_GEMMA,
        keys={"hidden_act": "hidden_activation"}, norm_offset=1.0, scales_embedding=True, **others
    )  # fmt: skip


def _gemma3(architecture: str, model_type: str, **others: Any) -> Family:
    return _gemma(
        architecture, model_type, qk_norm="head", context=131072, defaults=_GEMMA3_DEFAULTS, **others
    )  # fmt: skip


def _glm(name: str, model_type: str, names: Names) -> Family:
    return _causal(
        name, model_type, attention_bias="config", o_bias="never", context=131072, kv_heads=2, head_dim=128,
        names=names, defaults={"attention_bias": True, "rms_norm_eps": 1.5625e-07}, rotary_part=0.5,
        is_interleaved=True,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        _causal("Llama", "llama", attention_bias="config", mlp_bias=True),
        _causal("Mistral", "mistral", window="all", context=131072, kv_heads=8),
        _causal("Qwen2", "qwen2", attention_bias="qkv", window="flagged", context=32768, kv_heads=32),
        _causal("Qwen3", "qwen3", attention_bias="config", qk_norm="head", window="flagged", context=32768,
                kv_heads=32, head_dim=128),
        _causal("Qwen3Moe", "qwen3_moe", attention_bias="config", qk_norm="head", window="flagged all", context=32768,
                kv_heads=4, experts=Experts(128, 8, 768, normalizes=False)),
        _causal("Qwen2Moe", "qwen2_moe", attention_bias="flagged", window="flagged even", context=32768, kv_heads=16,
                experts=Experts(60, 4, 1408, normalizes=False, shared_size=5632)),
        _causal("Mixtral", "mixtral", window="all", context=131072, kv_heads=8,
                defaults={"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
                experts=Experts(8, 2, 0, normalizes=True)),
        _causal("Phi3", "phi3", window="all", context=4096, rotary_part=1.0,
                names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
                defaults={"sliding_window": None, "rms_norm_eps": 1e-5}),
        _glm("Glm", "glm", Names()),
        _glm("Glm4", "glm4", _GLM4),
        _causal("InternLM2", "internlm2", attention_bias="config", names=_INTERNLM2,
                keys={"attention_bias": "bias"}, defaults={"attention_bias": True}),
        _causal("InternLM3", "internlm3", attention_bias="config", mlp_bias=True, o_bias="mlp", context=32768,
                keys={"attention_bias": "qkv_bias", "mlp_bias": "bias"}),
        _causal("Granite", "granite", attention_bias="config", mlp_bias=True,
                defaults={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
                          "logits_scaling": 1.0}),
        _causal("Olmo2", "olmo2", attention_bias="config", qk_norm="width", names=_OLMO2,
                defaults={"rms_norm_eps": 1e-5}),
        _gemma("Gemma2ForCausalLM", "gemma2", context=8192, defaults=_GEMMA2_DEFAULTS),
        _gemma3("Gemma3ForCausalLM", "gemma3_text"),
        _gemma3("Gemma3ForConditionalGeneration", "gemma3", text_types=("gemma3_text",)),
        Family("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qkv", window="flagged", context=32768, kv_heads=8,
               defaults={"rope_theta": 1e6, "max_window_layers": 80, "rms_norm_eps": 1e-5},
               text_types=("qwen2_5_vl_text", "qwen2_5_vl")),
        Family("Qwen3VLForConditionalGeneration", "qwen3_vl", "config", qk_norm="head", context=128000, kv_heads=32,
               head_dim=128, defaults={"rope_theta": 5e5}, text_types=("qwen3_vl_text",)),
        Family("Mistral3ForConditionalGeneration", "mistral3", window="all", context=131072, kv_heads=8,
               text_types=("mistral",)),
    )
}  # fmt: skip

KNOWN = f"an architecture of {one_of(family.model_type for family in FAMILIES.values())}"  # for messages
