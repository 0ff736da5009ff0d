"""What a recipe means for a model: the type of every linear, and every tensor of the output before a weight is read.

Automatic roll-back keeps the linears with the widest inputs float, and the attention of the layers with the lowest
stretch scores:

    range_param = max(|x|) / std      of a linear's input: the larger, the more of an int8 range a few values take

Source: msModelSlim's `disable_level` and `fa_amp`. No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from eightfold.architectures import FAMILIES
from eightfold.config import DType, ModelConfig
from eightfold.errors import UnsupportedError
from eightfold.families import (
    all_linears,
    all_norms,
    expert_block,
    family_layout,
    input_groups,
    layer_norms,
)
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.shards import PlannedTensor
from eightfold.layouts import Part
from eightfold.quant.mixture import default_type, lookup_entries, require_dynamic_experts, rules_of
from eightfold.quant.recipe import Recipe, require
from eightfold.scheme import (
    FA_TENSORS,
    KV_TENSORS,
    NORM_BIAS,
    NORM_WEIGHT,
    DTypeRule,
    QuantType,
    TensorSpec,
    legacy_norm,
    linear_tensors,
    weight_name,
)
from eightfold.values import shown


def assign_types(config: ModelConfig, recipe: Recipe) -> dict[str, QuantType]:
    """Return how each linear is going to be stored, by full module name; automatic roll-back not included.

    Raises:
        ConfigError: a pattern matches nothing, or gives experts a type that needs calibration.
        UnsupportedError: the model cannot be rotated, and should be.
    """
    if recipe.rotates:
        require_rotatable(config)
    linears, rules, layout = all_linears(config), rules_of(config), family_layout(config.architecture)
    types = dict.fromkeys(linears, recipe.scheme)
    types.update({name: default_type(rule, recipe.scheme, layout) for name, rule in rules.items()})
    if config.experts is None:
        types.update(types_beside(config, recipe))
    routers = {name for name, rule in rules.items() if rule.part is Part.ROUTER}
    for pattern, kind in recipe.modules:
        matches = _matches(pattern, [name for name in linears if name not in routers], "modules", config)
        types.update(dict.fromkeys(matches, kind))
    attentions = attention_modules(config) if recipe.fa_quant else {}
    for pattern in recipe.keep_float:
        matches = _matches(pattern, [*linears, *attentions], "keep_float", config)
        types.update(dict.fromkeys(matches & linears.keys(), QuantType.FLOAT))
    if not recipe.quantize_lm_head:
        types[config.names.head] = QuantType.FLOAT
    require_dynamic_experts(types)
    return types


def require_rotatable(config: ModelConfig) -> None:
    """Refuse models whose residual stream cannot be rotated: it may be read through plain norms before linears alone.

    Raises:
        UnsupportedError: experts, norms behind attention or MLP, or inputs that are no rows of the embedding.
    """
    family = FAMILIES[config.architecture]
    problems = (
        (config.experts is not None, "experts, whose router reads a norm as it is"),
        (config.norm_places != "before", "norms behind attention and MLP"),
        (family.is_wrapper, "inputs beside tokens"),
    )
    for holds, problem in problems:
        if holds:
            raise UnsupportedError(
                "`anti_outlier` rotate",
                got=f"{config.architecture}, which has {problem}",
                expected="a dense text model with norms before attention and MLP only",
                action="Use smooth.",
            )


def types_beside(config: ModelConfig, recipe: Recipe) -> dict[str, QuantType]:
    """Return the types of linears that a target takes beside static ones, by full module name."""
    return {
        config.names.layer(layer_idx) + linear.name: recipe.types_beside[group.title]
        for layer_idx in range(config.num_layers)
        for group in input_groups(config, layer_idx)
        if group.title in recipe.types_beside
        for linear in group.linears
    }


def _matches(pattern: str, names: Iterable[str], option: str, config: ModelConfig) -> set[str]:
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5) if not found else []
    example = near[0] if near else f"*.{input_groups(config, 0)[-1].linears[0].name}"
    got = f"{shown(pattern)}, which matches no linear"
    require(bool(found), option, got, f"a name or pattern such as {example!r}")
    return found


def require_level(config: ModelConfig, recipe: Recipe, types: Mapping[str, QuantType]) -> None:
    """Refuse to roll back more linears than would be quantized.

    Raises:
        ConfigError: the level is larger.
    """
    candidates = len(_candidates(config, types))
    expected = f"at most L{candidates}, as many as there are linears to quantize"
    require(recipe.disable_level <= candidates, "disable_level", f"L{recipe.disable_level}", expected)


def fa_layers(config: ModelConfig, recipe: Recipe) -> frozenset[int]:
    """Return the layers whose attention is quantized by FAQuant; automatic roll-back not included."""
    modules = attention_modules(config) if recipe.fa_quant else {}
    return frozenset(
        layer_idx
        for module, layer_idx in modules.items()
        if not any(fnmatchcase(module, pattern) for pattern in recipe.keep_float)
    )


def attention_modules(config: ModelConfig) -> dict[str, int]:
    """Return every attention module's full name -> its layer."""
    names = config.names
    return {f"{names.layer(layer_idx)}{names.attention}": layer_idx for layer_idx in range(config.num_layers)}


@dataclass(frozen=True)
class RolledBack:
    """One linear that stays float, and why."""

    module: str
    range_param: float
    of_group: bool  # only because a linear with the same input does


def roll_back(
    config: ModelConfig, recipe: Recipe, types: Mapping[str, QuantType], range_params: Mapping[str, float]
) -> list[RolledBack]:
    """Choose `recipe.disable_level` linears with the widest inputs; whole groups, unless recipe.exact_levels.

    A group has a common input: every loader takes the result when its linears are stored alike.

    Args:
        config: of the model.
        recipe: how many, and whether the groups of these are kept float with them.
        types: of every linear; those that are FLOAT already are no candidates.
        range_params: by linear.
    """
    candidates = _candidates(config, types)
    # Stable: linears with a common input have equal values and keep the order of the model.
    chosen = sorted(candidates, key=lambda name: -range_params[name])[: recipe.disable_level]
    found = {name: RolledBack(name, range_params[name], of_group=False) for name in chosen}
    if not recipe.exact_levels:
        groups = _input_group_of(config)
        members = [member for name in chosen for member in groups.get(name, ())]
        for name in members:
            if types[name] is not QuantType.FLOAT and name not in found:
                found[name] = RolledBack(name, range_params[name], of_group=True)
    return list(found.values())


def _candidates(config: ModelConfig, types: Mapping[str, QuantType]) -> list[str]:
    """Return the linears that can be rolled back: quantized ones, but experts, of which loaders take none apart."""
    known = {*_input_group_of(config), config.names.head}
    return [name for name, kind in types.items() if kind is not QuantType.FLOAT and name in known]


def _input_group_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return for every linear of the layers the linears that read the same input, itself included."""
    groups: dict[str, tuple[str, ...]] = {}
    for layer_idx in range(config.num_layers):
        for group in input_groups(config, layer_idx):
            members = tuple(config.names.layer(layer_idx) + linear.name for linear in group.linears)
            groups.update(dict.fromkeys(members, members))
    return groups


def attention_back(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the layers, at most `count`, whose attention has the smallest stretch scores."""
    return sorted(sorted(scores, key=lambda layer_idx: scores[layer_idx])[:count])


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: what is planned for the file, and its entry in the description."""

    planned: PlannedTensor
    tag: QuantType


@dataclass
class OutputPlan:
    """All tensors of the output in the order of the file, which is the reference tool's."""

    checkpoint: Checkpoint
    recipe: Recipe
    types: Mapping[str, QuantType]  # of every linear
    fa_layers: Collection[int]
    legacy_names: bool = False
    tensors: dict[str, OutputTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.checkpoint.config
        self._linears, self._norms = all_linears(config), all_norms(config)
        (embedding,) = linear_tensors(QuantType.FLOAT, has_bias=False)
        self._add(config.names.embedding, embedding, embedding.shape_for(N=config.vocab_size, K=config.hidden_size))
        for layer_idx in range(config.num_layers):
            self._add_layer(layer_idx)
        self._add_norm(config.names.final_norm)
        self._add_linear(config.names.head)
        for name, info in self.checkpoint.beside.items():
            self.tensors[name] = OutputTensor(PlannedTensor(name, DType(info.dtype), info.shape), QuantType.FLOAT)

    @property
    def tags(self) -> dict[str, QuantType]:
        """The entries of the description: those of all tensors, and what loaders look up beside them."""
        entries = lookup_entries(family_layout(self.checkpoint.config.architecture), self.types)
        return {**{name: tensor.tag for name, tensor in self.tensors.items()}, **entries}

    def _add_layer(self, layer_idx: int) -> None:
        config = self.checkpoint.config
        prefix, names = config.names.layer(layer_idx), config.names
        if layer_idx in self.fa_layers:
            for spec in FA_TENSORS:
                self._add(prefix + names.attention, spec, spec.shape_for(H=config.num_heads, G=config.num_kv_heads))
        for group in input_groups(config, layer_idx):
            for linear in group.linears:
                cached = [name for name in (names.key, names.value) if name == linear.name]
                cached = [names.key, names.value] if group.title == "qkv" and group.parts else cached
                for module in cached if self.recipe.kv_int8 else ():
                    for spec in KV_TENSORS:
                        self._add(prefix + module, spec, spec.shape_for(C=config.kv_size))
                self._add_linear(prefix + linear.name)
        block = expert_block(config, layer_idx)
        for linear in () if block is None else block.linears:
            self._add_linear(prefix + linear.name)
        for name in layer_norms(config):
            self._add_norm(prefix + name)

    def _add_linear(self, module: str) -> None:
        linear = self._linears[module]
        for spec in linear_tensors(self.types[module], linear.has_bias):
            self._add(module, spec, spec.shape_for(N=linear.n, K=linear.k))

    def _add_norm(self, module: str) -> None:
        shape = (self._norms[module],)
        self._add(module, NORM_WEIGHT, shape)
        if self.recipe.anti_outlier is None or not self.recipe.anti_outlier.adds_norm_bias:
            return
        if self.legacy_names:
            for spec in (NORM_WEIGHT, NORM_BIAS):
                self._add(legacy_norm(module), spec, shape, self.recipe.scheme, source=module)
        else:
            self._add(module, NORM_BIAS, shape)

    def _add(
        self, module: str, spec: TensorSpec, shape: tuple[int, ...], tag: QuantType | None = None, source: str = ""
    ) -> None:
        name = f"{module}.{spec.suffix}"
        dtype = self._dtype(spec.dtype, f"{source or module}.{spec.suffix}")
        self.tensors[name] = OutputTensor(PlannedTensor(name, dtype, shape), tag or spec.tag)

    def _dtype(self, rule: DTypeRule, source: str) -> DType:
        stored = self.checkpoint.tensors.get(
            self.checkpoint.head_weight() if source == weight_name(self.checkpoint.config.names.head) else source
        )
        own = DType(stored.dtype) if stored and self.recipe.dtype is None else None
        return rule.resolve(self.recipe.dtype_of(self.checkpoint.dtype), own, self.recipe.save_float32)
