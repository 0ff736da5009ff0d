"""Families as data: what each weight of a checkpoint is, by its name alone.

A row says where the layers are, which of their linears are quantized, which stay float as in msModelSlim's recipe for
that family, how its experts lie, and what its loaders want beside that. Data-free schemes need no more. The families
with an engine (config.FAMILIES) are rows too.

    {a,b}    either of them            #    an index
    halves   a matrix that is stored as two on top of each other: gate first

A stacked tensor of experts has one of three layouts: (E, 2I, H) with the halves of gate and up, the same with
`is_input_major` (E, H, 2I), or that with gate and up in turn (`is_interleaved`).

Letters: E experts, H hidden size, I width of an expert.

Sources: transformers 5.24 (save_pretrained of every class), msModelSlim 26.1.0 lab_practice, vLLM 0.33, vllm-ascend
0.18 and main, MindIE-LLM.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from eightfold.config import EXPERT_KEYS, MAX_LAYERS
from eightfold.errors import ConfigError, UnsupportedError
from eightfold.values import COUNT, require, shorten


class Part(str, Enum):
    """What a linear of a layer is."""

    ATTENTION = "attention"
    MLA = "latent attention"
    INDEXER = "indexer"
    LINEAR_ATTENTION = "linear attention"
    FFN = "dense FFN"
    EXPERT = "expert"
    SHARED = "shared expert"
    ROUTER = "router"
    OTHER = "other"


@dataclass(frozen=True)
class Rule:
    """The linears of a layer that are of one kind."""

    pattern: str  # of a module's name inside its layer
    part: Part
    stays_float: bool = False

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern, compiled."""
        return compiled(self.pattern)


def compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern of names as a regular expression for the whole name."""
    text = re.escape(pattern).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|").replace(r"\#", r"\d+")
    return re.compile(text)


@dataclass(frozen=True)
class Experts:
    """How the experts of a layer lie, and what else there is about them."""

    module: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "mlp.gate"
    shared: str = "mlp.shared_expert"  # where the family has one with a gate, which families.py names by this
    shared_gate: str = "mlp.shared_expert_gate"
    stacked: tuple[tuple[str, str], ...] = (("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),)
    is_input_major: bool = False  # what a stacked tensor is where its shape leaves both
    is_interleaved: bool = False
    needs_entry: bool = False  # `<module>.weight` in the description: vllm-ascend has no row for the family

    @property
    def names(self) -> tuple[str, str, str]:
        """The linears of one expert."""
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class Layout:
    """One family."""

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    experts: Experts | None = None
    layers: tuple[str, ...] = ("model.layers.",)  # before a layer's index; the first that occurs is meant
    halves: Mapping[str, tuple[str, str]] | None = None  # stored as one here, read as two by the loaders
    joined: Mapping[str, str] | None = None  # looked up as one by loaders: its name -> the first of its stored parts
    renames: Mapping[str, str] | None = None  # begins of names inside a layer, as dumped from memory -> as published
    published: str = ""  # the architecture by the name that loaders know, where transformers has another
    expert_key: str = "num_experts"  # in config.json, by the family's own name
    # Keys of config.json, and whose type each says: without them MindIE takes attention or experts for another one.
    mindie_keys: Mapping[str, Part] = field(default_factory=dict)
    engines: tuple[str, ...] = ("vllm-ascend", "sglang")
    takes_any: bool = False  # every matrix in a layer but routers: of a family that is not known

    def rule_of(self, name: str) -> Rule | None:
        """Return what a module's name inside its layer says that it is."""
        for rule in self.rules:
            if rule.regex.fullmatch(name):
                return rule
        return None

    def entry_of(self, module: str) -> str:
        """Return the module under which loaders look a linear up that is stored in parts; empty for none."""
        match = EXPERT.fullmatch(module)
        if match and self.experts is not None and self.experts.needs_entry:
            return match[1]
        for whole, first in (self.joined or {}).items():
            if module.endswith(f".{first}"):
                return module.removesuffix(first) + whole
        return ""


# Linears of a layer that loaders join and that must be stored alike, by the last part of their names.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

EXPERTS_PART = "experts"  # of the names of all of them, stacked or not

# A linear of one expert, by its full name: the module of all, the index, and the linear.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")

_LAYERS = COUNT._replace(most=MAX_LAYERS)

_A, _F = Part.ATTENTION, Part.FFN


def _rules(*rules: Rule) -> tuple[Rule, ...]:
    return rules


_ATTENTION = Rule("self_attn.{q,k,v,o}_proj", _A)
_QKV, _O_FLOAT = Rule("self_attn.{q,k,v}_proj", _A), Rule("self_attn.o_proj", _A, stays_float=True)
_MLP = Rule("mlp.{gate,up,down}_proj", _F)
_EXPERTS = Rule("mlp.experts.#.{gate,up,down}_proj", Part.EXPERT)
_SPARSE = Rule("block_sparse_moe.experts.#.{w1,w2,w3}", Part.EXPERT)
_ROUTER = Rule("mlp.gate", Part.ROUTER, stays_float=True)
_SPARSE_ROUTER = Rule("block_sparse_moe.gate", Part.ROUTER, stays_float=True)
_SHARED = Rule("mlp.shared_experts.{gate,up,down}_proj", Part.SHARED)
_ONE_SHARED = Rule("mlp.shared_expert.{gate,up,down}_proj", Part.SHARED)
_SHARED_GATE = Rule("mlp.shared_expert_gate", Part.ROUTER, stays_float=True)
_LINEAR = "linear_attn.{in_proj_qkvz,in_proj_ba,in_proj_qkv,in_proj_z,in_proj_b,in_proj_a,out_proj,conv1d}"
_LINEAR_FLOAT = Rule(_LINEAR, Part.LINEAR_ATTENTION, stays_float=True)

_DENSE = _rules(_ATTENTION, _MLP)
_MLA = _rules(
    Rule("self_attn.{q_proj,q_a_proj,q_b_proj,kv_a_proj_with_mqa,o_proj}", Part.MLA),
    Rule("self_attn.kv_b_proj", Part.MLA, stays_float=True),
)
_INDEXER = Rule("self_attn.indexer.{wq_b,wk,weights_proj}", Part.INDEXER, stays_float=True)
_DEEPSEEK = (*_MLA, _MLP, _EXPERTS, _SHARED, _ROUTER)


def _sparse_experts(**others: Any) -> Experts:
    """Return experts as Mixtral names them."""
    named: dict[str, Any] = {"gate": "w1", "up": "w3", "down": "w2", "router": "block_sparse_moe.gate"}
    named["stacked"] = (("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),)
    return Experts("block_sparse_moe.experts", **{**named, **others})


_RENAMED = {
    "mlp.experts.": "block_sparse_moe.experts.",
    "mlp.gate.": "block_sparse_moe.gate.",
    "mlp.router.": "block_sparse_moe.gate.",
    "mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
}

_INNER = ("model.language_model.layers.", "language_model.model.layers.", "model.layers.")
_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}

_ATB = ("mindie", "vllm-ascend", "sglang")
_ALL = ("mindie", "mindie-aclgraph", "vllm-ascend", "sglang")

# MindIE takes attention for static W8A8 beside dynamic experts unless it is told.
_QWEN_KEYS = {"quantize": Part.EXPERT, "attn_quantize": Part.ATTENTION}
_MLA_KEYS = {"quantize": Part.EXPERT, "mla_quantize": Part.MLA}
_MIXTRAL_KEYS = {"quantize": Part.ATTENTION, "moe_quantize": Part.EXPERT}


def _causal(name: str, model_type: str, rules: tuple[Rule, ...] = _DENSE, **others: Any) -> Layout:
    return Layout(f"{name}ForCausalLM", model_type, rules, **others)


def _wrapped(name: str, model_type: str, rules: tuple[Rule, ...] = _DENSE, **others: Any) -> Layout:
    return Layout(f"{name}ForConditionalGeneration", model_type, rules, layers=_INNER, **others)


_QWEN35_DENSE = (*_DENSE, _LINEAR_FLOAT)
_QWEN35_MOE = (_QKV, _O_FLOAT, _LINEAR_FLOAT, _EXPERTS, Rule(_ONE_SHARED.pattern, Part.SHARED, True), _ROUTER,
               _SHARED_GATE)  # fmt: skip
_NEXT = (
    _QKV,
    _O_FLOAT,
    Rule("linear_attn.in_proj_qkvz", Part.LINEAR_ATTENTION),
    *_QWEN35_MOE[2:],
    _MLP,
)

_LLAMA4 = _rules(
    _ATTENTION,
    Rule("feed_forward.{gate,up,down}_proj", _F),
    Rule("feed_forward.experts.#.{gate,up,down}_proj", Part.EXPERT),
    Rule("feed_forward.shared_expert.{gate,up,down}_proj", Part.SHARED),
    Rule("feed_forward.router", Part.ROUTER, stays_float=True),
)
_LLAMA4_EXPERTS = Experts(
    "feed_forward.experts",
    router="feed_forward.router",
    stacked=(("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),),
    is_input_major=True,
    needs_entry=True,
)

ROWS: tuple[Layout, ...] = (
    # dense, with an engine here
    _causal("Llama", "llama", engines=_ATB),
    _causal("Mistral", "mistral", engines=_ATB),
    _causal("Qwen2", "qwen2", engines=_ATB),
    _causal("Qwen3", "qwen3", engines=_ALL),
    # dense
    _causal("Phi3", "phi3", _rules(Rule("self_attn.{qkv_proj,o_proj}", _A), Rule("mlp.{gate_up_proj,down_proj}", _F))),
    _causal("Glm", "glm", halves=_GATE_UP),
    _causal("Glm4", "glm4", halves=_GATE_UP),
    Layout(
        "ChatGLMModel",
        "chatglm",
        _rules(Rule("self_attention.{query_key_value,dense}", _A), Rule("mlp.{dense_h_to_4h,dense_4h_to_h}", _F)),
        layers=("transformer.encoder.layers.",),
        engines=_ATB,
    ),
    _causal("InternLM2", "internlm2", _rules(Rule("attention.{wqkv,wo}", _A), Rule("feed_forward.{w1,w2,w3}", _F))),
    _causal("InternLM3", "internlm3"),
    _causal("Baichuan", "baichuan", _rules(Rule("self_attn.{W_pack,o_proj}", _A), _MLP), engines=("mindie",)),
    _causal("Gemma2", "gemma2"),
    _causal("Gemma3", "gemma3_text"),
    _wrapped("Gemma3", "gemma3"),
    _causal("Cohere", "cohere"),
    _causal("Cohere2", "cohere2"),
    _causal("Olmo2", "olmo2"),
    _causal("Granite", "granite"),
    _causal(
        "Starcoder2",
        "starcoder2",
        _rules(_ATTENTION, Rule("mlp.{c_fc,c_proj}", _F)),
        joined={"self_attn.qkv_proj": "self_attn.q_proj"},
    ),
    _causal(
        "Falcon",
        "falcon",
        _rules(Rule("self_attention.{query_key_value,dense}", _A), Rule("mlp.{dense_h_to_4h,dense_4h_to_h}", _F)),
        layers=("transformer.h.",),
    ),
    _causal("HunYuanDenseV1", "hunyuan_v1_dense"),
    _causal("Ernie4_5", "ernie4_5"),
    _causal("Qwen3_5", "qwen3_5_text", _QWEN35_DENSE, layers=_INNER),
    _wrapped("Qwen3_5", "qwen3_5", _QWEN35_DENSE),
    _wrapped("Qwen2_5_VL", "qwen2_5_vl"),
    _wrapped("Qwen3VL", "qwen3_vl"),
    _wrapped("Mistral3", "mistral3"),
    # mixtures of experts
    _causal("Qwen3Moe", "qwen3_moe", (*_DENSE, _EXPERTS, _ROUTER), experts=Experts(), mindie_keys=_QWEN_KEYS,
            engines=_ALL),
    _causal("Qwen2Moe", "qwen2_moe", (*_DENSE, _EXPERTS, _ONE_SHARED, _SHARED_GATE, _ROUTER),
            experts=Experts(needs_entry=True), mindie_keys=_QWEN_KEYS, engines=_ATB),
    _causal("Mixtral", "mixtral", _rules(_ATTENTION, _SPARSE, _SPARSE_ROUTER),
            experts=_sparse_experts(needs_entry=True), renames=_RENAMED, expert_key="num_local_experts",
            mindie_keys=_MIXTRAL_KEYS, engines=_ATB),
    _causal("Qwen3Next", "qwen3_next", _NEXT, experts=Experts()),
    _causal("Qwen3_5Moe", "qwen3_5_moe_text", _QWEN35_MOE, experts=Experts(needs_entry=True), layers=_INNER),
    _wrapped("Qwen3_5Moe", "qwen3_5_moe", _QWEN35_MOE, experts=Experts()),
    _wrapped("Qwen3VLMoe", "qwen3_vl_moe", (*_DENSE, _EXPERTS, _ROUTER), experts=Experts(is_input_major=True)),
    _causal("DeepseekV2", "deepseek_v2", _DEEPSEEK, experts=Experts(), expert_key="n_routed_experts",
            mindie_keys=_MLA_KEYS, engines=_ATB),
    _causal("DeepseekV3", "deepseek_v3", _DEEPSEEK, experts=Experts(), expert_key="n_routed_experts",
            mindie_keys=_MLA_KEYS, engines=_ALL),
    _causal("DeepseekV3", "kimi_k2", _DEEPSEEK, experts=Experts(), expert_key="n_routed_experts",
            mindie_keys=_MLA_KEYS, engines=_ATB),
    _causal("DeepseekV32", "deepseek_v32", (*_DEEPSEEK, _INDEXER), experts=Experts(), expert_key="n_routed_experts",
            mindie_keys=_MLA_KEYS, engines=("mindie-aclgraph", "vllm-ascend", "sglang")),
    _causal("GlmMoeDsa", "glm_moe_dsa",
            (*_DEEPSEEK, Rule("self_attn.indexer.wq_b", Part.INDEXER), _INDEXER), experts=Experts(),
            expert_key="n_routed_experts"),
    _wrapped("KimiK25", "kimi_k25", _DEEPSEEK, experts=Experts(), expert_key="n_routed_experts"),
    _causal(
        "DeepseekV4",
        "deepseek_v4",
        _rules(
            Rule("attn.{wq_a,wq_b,wkv}", Part.MLA),
            Rule("attn.{wo_a,wo_b,compressor.wgate,compressor.wkv}", Part.MLA, stays_float=True),
            Rule("attn.indexer.wq_b", Part.INDEXER),
            Rule("attn.indexer.{weights_proj,compressor.wgate,compressor.wkv}", Part.INDEXER, stays_float=True),
            Rule("ffn.experts.#.{w1,w2,w3}", Part.EXPERT),
            Rule("ffn.shared_experts.{w1,w2,w3}", Part.SHARED),
            Rule("ffn.gate", Part.ROUTER, stays_float=True),
        ),
        experts=Experts("ffn.experts", "w1", "w3", "w2", "ffn.gate", stacked=()),
        layers=("layers.", "model.layers."),
        expert_key="n_routed_experts",
    ),
    _causal("Glm4Moe", "glm4_moe",
            (_ATTENTION, _EXPERTS, Rule(_MLP.pattern, _F, True), Rule(_SHARED.pattern, Part.SHARED, True), _ROUTER),
            experts=Experts(), expert_key="n_routed_experts"),
    _causal("Glm4MoeLite", "glm4_moe_lite", _DEEPSEEK, experts=Experts(), expert_key="n_routed_experts"),
    _causal("MiniMaxM2", "minimax_m2", _rules(_ATTENTION, _SPARSE, _SPARSE_ROUTER), experts=_sparse_experts(),
            renames=_RENAMED, expert_key="num_local_experts"),
    _causal("HunYuanMoEV1", "hunyuan_v1_moe",
            (*_DENSE, _EXPERTS, Rule("mlp.shared_mlp.{gate,up,down}_proj", Part.SHARED),
             Rule("mlp.gate.wg", Part.ROUTER, stays_float=True)),
            experts=Experts(router="mlp.gate.wg", needs_entry=True)),
    _causal("Ernie4_5_Moe", "ernie4_5_moe", (*_DENSE, _EXPERTS, _SHARED, _ROUTER),
            experts=Experts(needs_entry=True), expert_key="moe_num_experts",
            renames={"mlp.gate.moe_statics.": "mlp.moe_statics."}),
    _causal("Llama4", "llama4_text", _LLAMA4, experts=_LLAMA4_EXPERTS, expert_key="num_local_experts"),
    _wrapped("Llama4", "llama4", _LLAMA4, experts=_LLAMA4_EXPERTS, expert_key="num_local_experts"),
    _causal("GptOss", "gpt_oss", (_ATTENTION, _EXPERTS, Rule("mlp.router", Part.ROUTER, stays_float=True)),
            experts=Experts(router="mlp.router", is_input_major=True, is_interleaved=True, needs_entry=True),
            expert_key="num_local_experts"),
    _causal("GraniteMoe", "granitemoe",
            _rules(_ATTENTION, _SPARSE, Rule("block_sparse_moe.router.layer", Part.ROUTER, stays_float=True)),
            experts=_sparse_experts(
                router="block_sparse_moe.router.layer",
                stacked=(
                    ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
                    ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
                ),
                needs_entry=True,
            ),
            renames={"block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight"},
            expert_key="num_local_experts"),
    *(
        _causal(name, "phimoe", _rules(_ATTENTION, _SPARSE, _SPARSE_ROUTER),
                experts=_sparse_experts(needs_entry=True), renames=_RENAMED, expert_key="num_local_experts",
                published="PhiMoEForCausalLM")
        for name in ("PhiMoE", "Phimoe")
    ),
)  # fmt: skip


_GENERIC = Layout(
    "", "", (), Experts(needs_entry=True), layers=(*_INNER, "layers.", "transformer.h.", "h."), takes_any=True
)

# Of a module's name, where the family is not known: routers and gates, and what MLA and indexers keep float.
_GATES = frozenset({"gate", "wg", "router", "shared_expert_gate", "gate_weight"})
_FLOAT_ANYWHERE = frozenset({"kv_b_proj", "conv1d", "embed_tokens", "eh_proj", "in_proj_ba", "in_proj_b", "in_proj_a"})


def generic_rule(name: str) -> Rule:
    """Return what a matrix of a layer counts as in a family that is not known, by its name inside the layer."""
    parts = name.split(".")
    if parts[-1] in _GATES or "router" in parts:
        return Rule(name, Part.ROUTER, stays_float=True)
    if parts[-1] in _FLOAT_ANYWHERE or "indexer" in parts or "norm" in parts[-1]:
        return Rule(name, Part.OTHER, stays_float=True)
    if "experts" in parts:
        return Rule(name, Part.EXPERT)
    return Rule(name, Part.SHARED if any(part.startswith("shared_") for part in parts) else Part.OTHER)


def known(raw: Mapping[str, Any]) -> Layout | None:
    """Return the row of a config.json's architecture; of several for one, that of its `model_type`."""
    named, model_type = raw.get("architectures"), raw.get("model_type")
    name = named[0] if isinstance(named, list) and named else None
    rows = [row for row in ROWS if row.architecture == name]
    return next((row for row in rows if row.model_type == model_type), rows[0] if rows else None)


def layout_of(raw: Mapping[str, Any], where: Path, *, is_generic: bool = False) -> Layout:
    """Return the row of a model, or that of a family that is not known.

    Args:
        raw: config.json.
        where: the file, for messages.
        is_generic: take an architecture without a row for one shaped like Llama.

    Raises:
        ConfigError: config.json names no architecture.
        UnsupportedError: the architecture has no row.
    """
    named = raw.get("architectures")
    if not (isinstance(named, list) and len(named) == 1 and isinstance(named[0], str)):
        raise ConfigError(
            '"architectures"', where=where, got=shorten(str(named or "nothing")), expected="a list with one"
        )
    row = known(raw)
    if row is not None:
        return row
    if is_generic:
        return _GENERIC
    raise UnsupportedError(
        "architecture",
        where=where,
        got=shorten(named[0], 200),
        expected="one of a known family",
        action=f"Known are {', '.join(dict.fromkeys(row.model_type for row in ROWS))}. "
        "`generic` takes any other that is shaped like Llama.",
    )


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that says how large the text model is."""
    inner = raw.get("text_config")
    return inner if isinstance(inner, dict) else raw


def layer_count(raw: Mapping[str, Any], where: Path) -> int:
    """Return how many layers the text model has; those behind them predict further tokens.

    Raises:
        ConfigError: config.json does not say.
    """
    text = text_config(raw)
    key = next((key for key in ("num_hidden_layers", "num_layers", "n_layer") if key in text), "num_hidden_layers")
    count: int = require(_LAYERS, text.get(key), key, where)
    return count


def expert_count(raw: Mapping[str, Any], layer_idx: int) -> int | None:
    """Return how many experts a layer has by config.json; None where it does not say."""
    text = text_config(raw)
    for key in EXPERT_KEYS:
        count = text.get(key)
        if isinstance(count, list) and layer_idx < len(count):
            count = count[layer_idx]
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return None


def engine_names(layout: Layout) -> str:
    """Return the engines that load a family's 8-bit checkpoints, as a text."""
    if layout.takes_any:
        return "loaders of Llama-shaped models"
    titles = {
        "mindie": "MindIE",
        "mindie-aclgraph": "MindIE (aclgraph)",
        "vllm-ascend": "vllm-ascend",
        "sglang": "SGLang",
    }
    return ", ".join(titles[name] for name in layout.engines)
