"""The Llama family: the tensors that follow from a config.

    layer:  x += o_proj(attention(rope(q_proj(n), k_proj(n)), v_proj(n)))     n = input_layernorm(x)
            x += down_proj(silu(gate_proj(m)) * up_proj(m))                   m = post_attention_layernorm(x)

Others of the family have other names, norms elsewhere, or several of these linears in one tensor: architectures.py.

In a layer with experts the last line has several of them in place of one (model/reference/experts.py); what their
modules are called, the family's row of layouts.py says.

Letters: E hidden size, F intermediate size, H query heads, G key/value heads, D head_dim. A linear is (N, K).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from eightfold.architectures import FAMILIES, Family, Names
from eightfold.config import LAYER_TYPES, ModelConfig
from eightfold.layouts import ROWS, Layout

DOWN = "down"  # title of the group that reads products of gate and up


class Rows(NamedTuple):
    """Which rows of a tensor are those of one linear: `blocks` times `size` of them, `stride` apart."""

    first: int
    size: int
    blocks: int = 1
    stride: int = 0

    @property
    def total(self) -> int:
        return self.size * self.blocks

    def indices(self) -> list[int]:
        """Return them all, in their order in the linear."""
        starts = (self.first + block * self.stride for block in range(self.blocks))
        return [row for start in starts for row in range(start, start + self.size)]


@dataclass(frozen=True)
class LinearShape:
    """One linear of a decoder layer, or several with one input, whose rows lie in one tensor.

    Attributes:
        name: inside the layer, such as self_attn.q_proj.
        n, k: outputs and inputs.
        has_bias: or not.
        is_router: whether it is a router or the gate of a shared expert, which stay float.
        parts: of several, the rows of each, such as those of queries, keys and values; empty: it is one.
    """

    name: str
    n: int
    k: int
    has_bias: bool = False
    is_router: bool = False
    parts: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class InputGroup:
    """The linears of a layer that read the same input; they share its activation parameters."""

    title: str
    linears: tuple[LinearShape, ...]

    @property
    def parts(self) -> tuple[Rows, ...]:
        """Where the group is one tensor, the rows of each of its linears."""
        return self.linears[0].parts


def input_groups(config: ModelConfig, layer_idx: int) -> tuple[InputGroup, ...]:
    """Return the groups of linears of one layer, in the order in which data flows: four, or two before experts."""
    groups = dense_groups(config)
    return groups[:2] if config.is_sparse(layer_idx) else groups


def dense_groups(config: ModelConfig) -> tuple[InputGroup, ...]:
    """Return the four groups of linears of a layer without experts."""
    family, names = FAMILIES[config.architecture], config.names
    hidden, wide = config.hidden_size, config.intermediate_size
    from_config = family.attention_bias == "config" and config.attention_bias
    flagged = family.attention_bias == "flagged" and config.qkv_bias
    qkv_bias = from_config or flagged or family.attention_bias == "qkv"
    mlp_bias = family.mlp_bias and config.mlp_bias
    o_bias = {"never": False, "attention": from_config, "mlp": mlp_bias}[family.o_bias]
    down = LinearShape(names.down, hidden, wide, mlp_bias)
    return (
        InputGroup("qkv", _joined(names.qkv, _qkv_rows(config), hidden, qkv_bias)),
        InputGroup("o", (LinearShape(names.o, hidden, config.q_size, o_bias),)),
        InputGroup("gate_up", _joined(names.gate_up, (Rows(0, wide), Rows(wide, wide)), hidden, mlp_bias)),
        InputGroup(DOWN, (down,)),
    )


def _joined(names: tuple[str, ...], rows: tuple[Rows, ...], k: int, has_bias: bool) -> tuple[LinearShape, ...]:
    """Return linears with one input, each by a name of its own, or all of them by one name."""
    if len(names) == 1:
        return (LinearShape(names[0], sum(part.total for part in rows), k, has_bias, parts=rows),)
    return tuple(LinearShape(name, part.total, k, has_bias) for name, part in zip(names, rows, strict=True))


def _qkv_rows(config: ModelConfig) -> tuple[Rows, ...]:
    """Return the rows of queries, keys and values in one tensor of all three."""
    q, kv, dim, blocks = config.q_size, config.kv_size, config.head_dim, config.num_kv_heads
    if not config.names.qkv_by_head:
        return Rows(0, q), Rows(q, kv), Rows(q + kv, kv)
    own = q // blocks  # rows of the queries that read one key
    return tuple(Rows(at, size, blocks, own + 2 * dim) for at, size in ((0, own), (own, dim), (own + dim, dim)))


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
    sizes, names, hidden = config.experts, family_layout(config.architecture).experts, config.hidden_size
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


def family_layout(architecture: str) -> Layout:
    """Return the row of an architecture with an engine, which says what each linear is."""
    return next(row for row in ROWS if row.architecture == architecture)


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
    part: int = 0  # of a linear that is several, which of them


def smooth_pairs(config: ModelConfig) -> tuple[SmoothPair, ...]:
    """Return the pairs of a layer, in the order in which data flows; no norm can take outliers that stands behind."""
    names = config.names
    pairs = (
        SmoothPair(names.before_attention, "qkv", source_is_norm=True),
        SmoothPair(names.qkv[-1], "o", source_is_norm=False, part=2 * (len(names.qkv) == 1)),
        SmoothPair(names.before_ffn, "gate_up", source_is_norm=True),
        SmoothPair(names.gate_up[-1], DOWN, source_is_norm=False, part=int(len(names.gate_up) == 1)),
    )
    return tuple(pair for pair in pairs if pair.source)


def layer_norms(config: ModelConfig) -> dict[str, int]:
    """Return the norms of one layer: name inside the layer -> length of its gain."""
    names = config.names
    places = (names.before_attention, names.after_attention, names.before_ffn, names.after_ffn)
    norms = {name: config.hidden_size for name in places if name}
    if config.qk_norm == "head":
        norms.update({names.q_norm: config.head_dim, names.k_norm: config.head_dim})
    elif config.qk_norm == "width":
        norms.update({names.q_norm: config.q_size, names.k_norm: config.kv_size})
    return norms


_LAYER = re.compile(r"(?:model\.language_model|language_model\.model|model)\.layers\.(\d+)\.")


def layer_of(tensor: str) -> int | None:
    """Return the index of the decoder layer that a tensor's name puts it in; None outside of them."""
    found = _LAYER.match(tensor)
    return int(found[1]) if found else None


def all_linears(config: ModelConfig) -> dict[str, LinearShape]:
    """Return every linear of the model by full module name, in module order, the head last; experts and routers too."""
    linears = {
        config.names.layer(layer_idx) + linear.name: linear
        for layer_idx in range(config.num_layers)
        for linear in layer_linears(config, layer_idx)
    }
    linears[config.names.head] = head_shape(config)
    return linears


def head_shape(config: ModelConfig) -> LinearShape:
    """Return the output head by its full name."""
    return LinearShape(config.names.head, config.vocab_size, config.hidden_size, False)


def all_norms(config: ModelConfig) -> dict[str, int]:
    """Return every norm by full module name -> length of its gain."""
    layer = layer_norms(config)
    norms = {config.names.layer(idx) + name: size for idx in range(config.num_layers) for name, size in layer.items()}
    norms[config.names.final_norm] = config.hidden_size
    return norms


def sliding_window(config: ModelConfig, layer_idx: int) -> int | None:
    """Return how many positions a query of this layer sees, itself included; None for all of them."""
    rule = FAMILIES[config.architecture].window
    if config.sliding_window is None or rule == "never":
        return None
    if config.layer_types is not None:
        return config.sliding_window if slides(config, layer_idx) else None
    chosen = {
        "all": True,
        "flagged": layer_idx >= config.max_window_layers,
        "flagged all": True,
        "flagged even": layer_idx % 2 == 0 and layer_idx < config.max_window_layers,
    }
    is_chosen = chosen[rule] and (rule == "all" or bool(config.use_sliding_window))
    return config.sliding_window if is_chosen else None


def slides(config: ModelConfig, layer_idx: int) -> bool:
    """Return whether `layer_types` says that this layer slides, whatever its window is."""
    return config.layer_types is not None and config.layer_types[layer_idx] == LAYER_TYPES[1]


def settle_names(config: ModelConfig, raw: Mapping[str, Any], stored: Collection[str]) -> ModelConfig:
    """Return the settings with what only the names of the stored tensors tell.

    A wrapper has its text model in one of several places, and is tied where no head is stored and config.json does not
    say, or says so of the text model and not of the whole.

    Args:
        config: as config.json has it.
        raw: config.json.
        stored: names of all tensors.
    """
    family = FAMILIES[config.architecture]
    names = stored_names(family, stored)
    if family.is_wrapper:
        said = [part.get("tie_word_embeddings") for part in (raw, raw.get("text_config") or {})]
        if said in ([None, None], [False, True]):
            config = replace(config, tie_word_embeddings=f"{names.head}.weight" not in stored)
    return replace(config, names=names)


def stored_names(family: Family, stored: Collection[str]) -> Names:
    """Return what a model of a family names its modules, given the names of its tensors."""
    names = family.names
    row = family_layout(family.architecture)
    places = [_below(names, layers) for layers in row.layers] if family.is_wrapper else []
    return next((place for place in places if f"{place.embedding}.weight" in stored), names)


_INNER_HEADS = {"language_model.model.": "language_model.lm_head"}  # of a wrapper that holds a whole text model


def _below(names: Names, layers: str) -> Names:
    """Return the names of a text model that has its layers there."""
    inner = layers.removesuffix("layers.")
    embedding, final_norm = (inner + name.rpartition(".")[2] for name in (names.embedding, names.final_norm))
    head = _INNER_HEADS.get(inner, names.head)
    return replace(names, embedding=embedding, final_norm=final_norm, head=head, layers=layers)
