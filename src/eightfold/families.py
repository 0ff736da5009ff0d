"""The Llama family: the tensors that follow from a config.

    layer:  x += o_proj(attention(rope(q_proj(n), k_proj(n)), v_proj(n)))     n = input_layernorm(x)
            x += down_proj(silu(gate_proj(m)) * up_proj(m))                   m = post_attention_layernorm(x)

In a layer with experts the last line has several of them in place of one (model/reference/experts.py); what their
modules are called, the family's row of layouts.py says.

Letters: E hidden size, F intermediate size, H query heads, G key/value heads, D head_dim. A linear is (N, K).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from eightfold.config import FAMILIES, LAYER_TYPES, ModelConfig
from eightfold.layouts import ROWS, Layout

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"
DOWN = "down"  # title of the group that reads products of gate and up


@dataclass(frozen=True)
class LinearShape:
    """One linear of a decoder layer."""

    name: str  # inside the layer, such as self_attn.q_proj
    n: int
    k: int
    has_bias: bool = False
    is_router: bool = False  # a router or the gate of a shared expert, which stay float


@dataclass(frozen=True)
class InputGroup:
    """The linears of a layer that read the same input; they share its activation parameters."""

    title: str
    linears: tuple[LinearShape, ...]


def input_groups(config: ModelConfig, layer_idx: int) -> tuple[InputGroup, ...]:
    """Return the groups of linears of one layer, in the order in which data flows: four, or two before experts."""
    groups = dense_groups(config)
    return groups[:2] if config.is_sparse(layer_idx) else groups


def dense_groups(config: ModelConfig) -> tuple[InputGroup, ...]:
    """Return the four groups of linears of a layer without experts."""
    family = FAMILIES[config.architecture]
    hidden, wide = config.hidden_size, config.intermediate_size
    from_config = family.attention_bias == "config" and config.attention_bias
    flagged = family.attention_bias == "flagged" and config.qkv_bias
    qkv_bias = from_config or flagged or family.attention_bias == "qkv"
    mlp_bias = family.mlp_bias and config.mlp_bias
    return (
        InputGroup(
            "qkv",
            (
                LinearShape("self_attn.q_proj", config.q_size, hidden, qkv_bias),
                LinearShape("self_attn.k_proj", config.kv_size, hidden, qkv_bias),
                LinearShape("self_attn.v_proj", config.kv_size, hidden, qkv_bias),
            ),
        ),
        InputGroup("o", (LinearShape("self_attn.o_proj", hidden, config.q_size, from_config),)),
        InputGroup(
            "gate_up",
            (
                LinearShape("mlp.gate_proj", wide, hidden, mlp_bias),
                LinearShape("mlp.up_proj", wide, hidden, mlp_bias),
            ),
        ),
        InputGroup(DOWN, (LinearShape("mlp.down_proj", hidden, wide, mlp_bias),)),
    )


class ExpertShapes(NamedTuple):
    """The linears of one expert."""

    gate: LinearShape
    up: LinearShape
    down: LinearShape


@dataclass(frozen=True)
class ExpertBlock:
    """What stands in a layer with experts in place of gate_up and down; there are no biases.

    Attributes:
        module: what the names of the experts begin with.
        router: (experts, E), float: which of them a token passes through.
        experts: by their index.
        shared: the expert that all tokens pass through; None where there is none.
        shared_gate: (1, E), float: how much of its output counts.
    """

    module: str
    router: LinearShape
    experts: tuple[ExpertShapes, ...]
    shared: ExpertShapes | None = None
    shared_gate: LinearShape | None = None

    @property
    def linears(self) -> Iterator[LinearShape]:
        """All of them."""
        yield self.router
        for expert in self.experts:
            yield from expert
        yield from self.shared or ()
        if self.shared_gate is not None:
            yield self.shared_gate


def expert_block(config: ModelConfig, layer_idx: int) -> ExpertBlock | None:
    """Return names and shapes of a layer's experts; None for a layer without."""
    return _expert_block(config) if config.is_sparse(layer_idx) else None


@functools.lru_cache(maxsize=8)
def _expert_block(config: ModelConfig) -> ExpertBlock | None:
    sizes, names, hidden = config.experts, _layout(config).experts, config.hidden_size
    if sizes is None or names is None:
        return None

    def expert(module: str, wide: int) -> ExpertShapes:
        return ExpertShapes(
            LinearShape(f"{module}.{names.gate}", wide, hidden),
            LinearShape(f"{module}.{names.up}", wide, hidden),
            LinearShape(f"{module}.{names.down}", hidden, wide),
        )

    return ExpertBlock(
        names.module,
        LinearShape(names.router, sizes.count, hidden, is_router=True),
        tuple(expert(f"{names.module}.{i}", sizes.intermediate_size) for i in range(sizes.count)),
        expert(names.shared, sizes.shared_size) if sizes.shared_size else None,
        LinearShape(names.shared_gate, 1, hidden, is_router=True) if sizes.shared_size else None,
    )


def _layout(config: ModelConfig) -> Layout:
    return next(row for row in ROWS if row.architecture == config.architecture)


def layer_linears(config: ModelConfig, layer_idx: int) -> tuple[LinearShape, ...]:
    """Return every linear of one layer: attention's first, experts and their routers included."""
    block = expert_block(config, layer_idx)
    found = [linear for group in input_groups(config, layer_idx) for linear in group.linears]
    return tuple(found) if block is None else (*found, *block.linears)


@dataclass(frozen=True)
class SmoothPair:
    """A module whose output channels can be divided by what the linears reading them are multiplied by."""

    source: str  # inside the layer
    group: str  # title of the group that reads it
    source_is_norm: bool


SMOOTH_PAIRS = (
    SmoothPair("input_layernorm", "qkv", source_is_norm=True),
    SmoothPair("self_attn.v_proj", "o", source_is_norm=False),
    SmoothPair("post_attention_layernorm", "gate_up", source_is_norm=True),
    SmoothPair("mlp.up_proj", DOWN, source_is_norm=False),
)

ATTENTION = "self_attn"
KEY, VALUE = "self_attn.k_proj", "self_attn.v_proj"


def layer_norms(config: ModelConfig) -> dict[str, int]:
    """Return the norms of one layer: name inside the layer -> length of its gain."""
    norms = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if FAMILIES[config.architecture].qk_norm:
        norms.update({"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim})
    return norms


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_prefix(layer_idx: int) -> str:
    """Return the name prefix of a decoder layer, with its dot."""
    return f"model.layers.{layer_idx}."


def layer_of(tensor: str) -> int | None:
    """Return the index of the decoder layer that a tensor's name puts it in; None outside of them."""
    found = _LAYER.match(tensor)
    return int(found[1]) if found else None


def all_linears(config: ModelConfig) -> dict[str, LinearShape]:
    """Return every linear of the model by full module name, in module order, lm_head last; experts and routers too."""
    linears = {
        layer_prefix(layer_idx) + linear.name: linear
        for layer_idx in range(config.num_layers)
        for linear in layer_linears(config, layer_idx)
    }
    linears[LM_HEAD] = LinearShape(LM_HEAD, config.vocab_size, config.hidden_size, False)
    return linears


def all_norms(config: ModelConfig) -> dict[str, int]:
    """Return every norm by full module name -> length of its gain."""
    layer = layer_norms(config)
    norms = {layer_prefix(idx) + name: size for idx in range(config.num_layers) for name, size in layer.items()}
    norms[FINAL_NORM] = config.hidden_size
    return norms


def sliding_window(config: ModelConfig, layer_idx: int) -> int | None:
    """Return how many positions a query of this layer sees, itself included; None for all of them."""
    rule = FAMILIES[config.architecture].window
    if config.sliding_window is None or rule == "never":
        return None
    if config.layer_types is not None:
        return config.sliding_window if config.layer_types[layer_idx] == LAYER_TYPES[1] else None
    chosen = {
        "all": True,
        "flagged": layer_idx >= config.max_window_layers,
        "flagged all": True,
        "flagged even": layer_idx % 2 == 0 and layer_idx < config.max_window_layers,
    }
    slides = chosen[rule] and (rule == "all" or bool(config.use_sliding_window))
    return config.sliding_window if slides else None
