"""Every tensor of the output, before a weight is read: name, dtype, shape, entry in the description."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from eightfold.config import DType
from eightfold.families import (
    ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    KEY,
    LM_HEAD,
    VALUE,
    all_linears,
    all_norms,
    input_groups,
    layer_norms,
    layer_prefix,
)
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.shards import PlannedTensor
from eightfold.quant.recipe import Recipe
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
        self._add(EMBEDDING, embedding, embedding.shape_for(N=config.vocab_size, K=config.hidden_size))
        for layer_idx in range(config.num_layers):
            self._add_layer(layer_idx)
        self._add_norm(FINAL_NORM)
        self._add_linear(LM_HEAD)

    def _add_layer(self, layer_idx: int) -> None:
        config, prefix = self.checkpoint.config, layer_prefix(layer_idx)
        if layer_idx in self.fa_layers:
            for spec in FA_TENSORS:
                self._add(prefix + ATTENTION, spec, spec.shape_for(H=config.num_heads, G=config.num_kv_heads))
        for group in input_groups(config):
            for linear in group.linears:
                if self.recipe.kv_int8 and linear.name in (KEY, VALUE):
                    for spec in KV_TENSORS:
                        self._add(prefix + linear.name, spec, spec.shape_for(C=config.kv_size))
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
            self.checkpoint.head_weight() if source == weight_name(LM_HEAD) else source
        )
        return rule.resolve(self.checkpoint.dtype, DType(stored.dtype) if stored else None, self.recipe.save_float32)
