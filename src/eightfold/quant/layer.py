"""One decoder layer on its way from float to int8: smooth -> quantize -> observe -> write.

    norm -> linears      gain / s,   columns of the linears * s
    linear -> linear     rows of the first / s,   columns of the second * s
    q -> k,  v -> o      rows * s,   rows / s,   and rows / r,   columns * r,   for FAQuant (head_balance.py)

A norm's gain is rounded when it is stored. So s is taken as gain / stored gain, and the layer computes what it computed
before however coarse the dtype on disk.

Letters: E hidden size, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eightfold.architectures import Names
from eightfold.families import (
    InputGroup,
    LinearShape,
    Rows,
    SmoothPair,
    expert_block,
    input_groups,
    layer_norms,
    sliding_window,
    smooth_pairs,
)
from eightfold.model.reference.attention import FloatAttention
from eightfold.model.reference.decoder import Block, GroupCall, LinearGroup, Norm, spans_of
from eightfold.model.reference.linear import (
    DynamicMode,
    FloatLinear,
    Linear,
    W8A8DynamicLinear,
    W8A16Linear,
    release_widened,
)
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32, load_rows_float32
from eightfold.quant.attention import FAQuantObserver, KVParams, WatchedAttention
from eightfold.quant.calibrate import Extremes, ObservedGroup, Observer, StaticMember, observer_for
from eightfold.quant.experts import RouterWatch, passing_experts
from eightfold.quant.float_pass import LayerStatistics, head_sharing, source_rows
from eightfold.quant.head_balance import HeadBalance, row_divisors
from eightfold.quant.hidden import HiddenStates
from eightfold.quant.qparams import QuantizedWeight, pack_deq_scale, quantize_rows, quantize_weight, static_params
from eightfold.quant.recipe import Recipe
from eightfold.quant.smooth import SmoothScale, source_scale
from eightfold.quant.statistics import InOrder
from eightfold.scheme import (
    DEQ_SCALE,
    FA_TENSORS,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_OFFSET,
    KV_SCALE,
    NEEDS_CALIBRATION,
    NORM_BIAS,
    QUANT_BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    legacy_norm,
    weight_name,
)


class SmoothedLayer:
    """A layer's float weights as they are going to be quantized; without scales, as they are."""

    def __init__(
        self,
        decoder: Decoder,
        layer_idx: int,
        scales: Mapping[str, SmoothScale],
        stored_dtype: Callable[[str], torch.dtype],
        heads: HeadBalance | None = None,
    ) -> None:
        self._config = decoder.checkpoint.config
        self._decoder, self._idx, self._prefix = decoder, layer_idx, self._config.names.layer(layer_idx)
        self._columns: dict[str, Tensor] = {}  # linear -> what its columns are multiplied by, (K,)
        self._rows: dict[str, Tensor] = {}  # linear -> what its rows are divided by, (N,)
        self.norms = decoder.norms(layer_idx)
        for pair in smooth_pairs(self._config):
            if pair.group in scales:
                self._apply(pair, scales[pair.group].scale, stored_dtype)
        if heads is not None:
            self._apply_heads(heads)

    def _apply(self, pair: SmoothPair, scale_K: Tensor, stored_dtype: Callable[[str], torch.dtype]) -> None:
        if pair.source_is_norm:
            dtype = stored_dtype(weight_name(self._prefix + pair.source))
            gain, scale_K = divide_gain(self.norms[pair.source].gain, scale_K, dtype, self._config.norm_offset)
            self.norms[pair.source] = Norm(gain, self._config.rms_norm_eps)
        else:
            sharing = head_sharing(self._config, pair.group)
            rows = scale_K if sharing is None else source_scale(scale_K, sharing)
            self._rows[pair.source] = source_rows(self._config, pair, rows)
        for group in input_groups(self._config, self._idx):
            if group.title == pair.group:
                self._columns.update({linear.name: scale_K for linear in group.linears})

    def _apply_heads(self, heads: HeadBalance) -> None:
        qkv, o = input_groups(self._config, self._idx)[:2]
        for name, rows in row_divisors(self._config, qkv, heads).items():
            self._rows[name] = rows * self._rows[name] if name in self._rows else rows
        (linear,), sharing = o.linears, head_sharing(self._config, o.title)
        assert sharing is not None
        columns = sharing.expand(heads.values)
        self._columns[linear.name] = columns * self._columns.get(linear.name, torch.ones(()))

    def factors(self, group: InputGroup) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return what a group's input is divided by, (K,), and the outputs of each of its linears, (N,); None: 1."""
        columns = self._columns.get(group.linears[0].name)
        return columns, tuple(self._rows.get(linear.name) for linear in group.linears)

    def changes(self, linear: LinearShape) -> bool:
        return linear.name in self._columns or linear.name in self._rows

    def range(self, group: InputGroup, lo_K: Tensor, hi_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of a group's input, () both, whose channels had these before they were divided."""
        scale_K = self._columns.get(group.linears[0].name, torch.ones_like(lo_K))
        return (lo_K / scale_K).amin(), (hi_K / scale_K).amax()

    def weight(self, linear: LinearShape) -> Tensor:
        return self.rows(linear, 0, linear.n)

    def rows(self, linear: LinearShape, begin: int, end: int) -> Tensor:
        """Return rows `begin` to `end` of a weight, (end - begin, K) float32, made anew."""
        weight = load_rows_float32(self._decoder.checkpoint, weight_name(self._prefix + linear.name), begin, end)
        if linear.name in self._columns:
            weight.mul_(self._columns[linear.name])
        if linear.name in self._rows:
            weight.div_(self._rows[linear.name][begin:end, None])
        return weight

    def bias(self, linear: LinearShape) -> Tensor | None:
        """Return (N,) float32, or None."""
        if not linear.has_bias:
            return None
        bias = load_float32(self._decoder.checkpoint, bias_name(self._prefix + linear.name))
        return bias.div_(self._rows[linear.name]) if linear.name in self._rows else bias

    def linear(self, linear: LinearShape) -> Linear:
        if not self.changes(linear):
            return self._decoder.linear(self._prefix, linear)
        return FloatLinear(self.weight(linear), self.bias(linear))

    def block(self, chosen_TJ: Tensor | None = None) -> Block:
        """Return the whole float layer; its weights are made one at a time, when they are called.

        Args:
            chosen_TJ: of a layer with experts, those that samples pass through; None leaves it to the router.
        """
        groups: list[GroupCall] = [
            LinearGroup(tuple(self._made_when_called(linear) for linear in group.linears), group.parts)
            for group in input_groups(self._config, self._idx)
        ]
        mlp = passing_experts(self._decoder, self._idx, self.linear, chosen_TJ=chosen_TJ)
        return self._decoder.block(self._idx, groups, norms=self.norms, mlp=mlp)

    def _made_when_called(self, linear: LinearShape) -> Linear:
        return lambda x_TK: self.linear(linear)(x_TK)


def divide_gain(gain_E: Tensor, scale_E: Tensor, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a norm's gain after division, as a dtype on disk holds it, and the division that was really made.

    Args:
        gain_E: as it is meant.
        scale_E: what it is divided by.
        dtype: on disk.
        offset: what readers add to a stored gain.
    """
    divided = gain_E / scale_E
    if dtype == torch.float32:
        return divided, scale_E
    stored = (divided - offset).to(dtype).to(torch.float32) + offset
    return stored, torch.where(stored != 0, gain_E / stored, scale_E)


@dataclass
class QuantizedLayer:
    """One layer's integers and, after its samples have passed, its activation parameters.

    Attributes:
        in_order: see statistics.InOrder.
        chosen: which of the quantized linears are made here; `weights` of the others may be put in later.
        passes: whether samples are going to pass, so that all integers of experts are needed at once.
        weights: the quantized linears by name.
        attention: watches attention, where that is going to be quantized.
        routing: watches the router of a layer with experts.
        later: quantized linears of experts that are not among `weights`: each is made when it is written.
        dynamic: how linears that take ranges from each token do so.
    """

    decoder: Decoder
    layer_idx: int
    recipe: Recipe
    types: Mapping[str, QuantType]
    has_fa: bool
    statistics: LayerStatistics
    stored_dtype: Callable[[str], torch.dtype]
    in_order: InOrder
    chosen: slice
    passes: bool
    dynamic: DynamicMode = "asymmetric"
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    _observers: dict[str, Observer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._config = self.decoder.checkpoint.config
        self._prefix = self._config.names.layer(self.layer_idx)
        release_widened()  # the float pass is over
        heads = self.statistics.heads if self.has_fa else None
        self.smoothed = SmoothedLayer(self.decoder, self.layer_idx, self.statistics.scales, self.stored_dtype, heads)
        self.attention = FAQuantObserver() if self.has_fa else None
        self._groups = input_groups(self._config, self.layer_idx)
        self._linears = [linear for group in self._groups for linear in group.linears]
        block, experts = expert_block(self._config, self.layer_idx), self._config.experts
        self.routing = None if block is None or experts is None else RouterWatch(experts.count)
        self.later = [] if block is None else self._quantized(block.linears)
        for linear in self._quantized(self._linears)[self.chosen]:
            self.weights[linear.name] = self.quantize(linear)
        for linear in self.later if self.passes else ():
            self.weights[linear.name] = self.quantize(linear)
            self.decoder.checkpoint.release([weight_name(self._prefix + linear.name)])
        if self.passes:
            self._linears, self.later = [*self._linears, *self.later], []
        for group in self._groups:
            static = [linear.name for linear in group.linears if self._type(linear) in NEEDS_CALIBRATION]
            self._observers.update(dict.fromkeys(static, self._observer(group)) if static else {})

    def _observer(self, group: InputGroup) -> Observer:
        title = self._prefix + group.title
        if not self.recipe.takes_extremes:
            range_param = self.statistics.range_params.get(group.title)
            return observer_for(self.recipe.act_method, title, range_param, self.in_order)
        return Extremes(title, self.smoothed.range(group, *self.statistics.extremes[group.title]))

    def _quantized(self, linears: Iterable[LinearShape]) -> list[LinearShape]:
        return [linear for linear in linears if self._type(linear) is not QuantType.FLOAT]

    def quantize(self, linear: LinearShape) -> QuantizedWeight:
        """Return the integers of a linear."""
        return quantize_rows(
            linear.n,
            linear.k,
            lambda begin, end: self.smoothed.rows(linear, begin, end),
            is_symmetric=self._type(linear) is not QuantType.W8A16 or self.recipe.weight_symmetric,
        )

    def _type(self, linear: LinearShape) -> QuantType:
        return self.types[self._prefix + linear.name]

    def observed_block(self) -> Block:
        """Return the layer with its linears quantized and what they and attention read observed."""
        window = sliding_window(self._config, self.layer_idx)
        attention = WatchedAttention(
            FloatAttention(window, self.decoder.scoring), () if self.attention is None else (self.attention,)
        )
        groups = [self.observed_group(group, group.parts) for group in self._groups]
        experts = passing_experts(self.decoder, self.layer_idx, functools.cache(self._member), watch=self.routing)
        return self.decoder.block(self.layer_idx, groups, attention, self.smoothed.norms, experts)

    def observed_group(self, group: InputGroup, parts: tuple[Rows, ...] = ()) -> GroupCall:
        """Return a group's linears as they are going to be computed; `parts`: see LinearGroup."""
        members = tuple(self._member(linear) for linear in group.linears)
        observer = next((self._observers[each.name] for each in group.linears if each.name in self._observers), None)
        return LinearGroup(members, parts) if observer is None else ObservedGroup(observer, members, parts)

    def _member(self, linear: LinearShape) -> Linear:
        kind = self._type(linear)
        if kind is QuantType.FLOAT:
            return self.smoothed.linear(linear)
        weight, bias = self.weights[linear.name], self.smoothed.bias(linear)
        if kind is QuantType.W8A16:
            return W8A16Linear(weight.values, weight.scale, weight.offset, bias)
        member = W8A8DynamicLinear if kind is QuantType.W8A8_DYNAMIC else StaticMember
        return member(weight.values, weight.scale[:, 0], weight.sum(), bias, self.dynamic)

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen for each group of linears, and for the heads where they are quantized."""
        found = {title: scale.note for title, scale in self.statistics.scales.items()}
        if self.statistics.heads is not None and self.has_fa:
            found["heads"] = self.statistics.heads.note
        return found

    @property
    def observers(self) -> list[Observer]:
        return list(dict.fromkeys(self._observers.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the layer that is not the source's own, by full name, but those made later."""
        found: dict[str, Tensor] = {}
        for linear in self._linears:
            found.update(self._linear_tensors(linear))
        if self.recipe.anti_outlier is not None:
            for name in layer_norms(self._config):
                gain = self.smoothed.norms[name].gain - self._config.norm_offset
                found.update(norm_tensors(self._prefix + name, gain))
        if self.attention is not None:
            scales = self.attention.scales()
            values = [*scales, *(torch.zeros_like(scale, dtype=torch.int8) for scale in scales)]
            names = [f"{self._prefix}{self._config.names.attention}.{spec.suffix}" for spec in FA_TENSORS]
            found.update(zip(names, values, strict=True))
        if self.statistics.kv is not None:
            found.update(_kv_tensors(self._config.names, self._prefix, self.statistics.kv))
        return found

    def expert_tensors(self, linear: LinearShape, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return what a linear of an expert stores, by full name."""
        return _int8_tensors(self._prefix + linear.name, weight, None, None, self.stored_dtype)

    def _linear_tensors(self, linear: LinearShape) -> dict[str, Tensor]:
        """Return what smoothing has changed of a linear's float tensors, and what it stores as int8."""
        module, found = self._prefix + linear.name, dict[str, Tensor]()
        bias, weight = self.smoothed.bias(linear), self.weights.get(linear.name)
        if self.smoothed.changes(linear):
            if bias is not None:
                found[bias_name(module)] = bias
            if weight is None:
                found[weight_name(module)] = self.smoothed.weight(linear)
        if weight is not None:
            observer = self._observers.get(linear.name)
            params = None if observer is None else observer.params()
            found.update(_int8_tensors(module, weight, bias, params, self.stored_dtype))
        return found


def head_tensors(
    decoder: Decoder,
    recipe: Recipe,
    kind: QuantType,
    stored_dtype: Callable[[str], torch.dtype],
    hidden: HiddenStates | None,
    range_param: float | None,
) -> dict[str, Tensor]:
    """Return the tensors of the output head as int8, by full name.

    Args:
        decoder: the float model.
        recipe: how it is quantized.
        kind: its type.
        stored_dtype: of a tensor in the output, by name.
        hidden: the calibration samples after the last layer; only static types look at them.
        range_param: of the head's input, where the activation method needs it.
    """
    checkpoint, params, head = decoder.checkpoint, None, decoder.checkpoint.config.names.head
    is_symmetric = kind is not QuantType.W8A16 or recipe.weight_symmetric
    weight = quantize_weight(load_float32(checkpoint, checkpoint.head_weight()), is_symmetric=is_symmetric)
    if kind in NEEDS_CALIBRATION:
        assert hidden is not None
        norm, observer = decoder.final_norm(), observer_for(recipe.act_method, head, range_param)
        for sizes, states_TE in hidden.pieces():
            observer.update(norm(states_TE), spans_of(sizes))
        params = observer.params()
    return _int8_tensors(head, weight, None, params, stored_dtype)


def _int8_tensors(
    module: str,
    weight: QuantizedWeight,
    bias_N: Tensor | None,
    params: tuple[Tensor, Tensor] | None,
    stored_dtype: Callable[[str], torch.dtype],
) -> dict[str, Tensor]:
    """Return what a quantized linear stores beside its float bias; `params` are a static input's scale and offset."""
    stored = {WEIGHT: weight.values, WEIGHT_SCALE: weight.scale, WEIGHT_OFFSET: weight.offset}
    if params is not None:
        scale, offset = params
        # Deviates: the reference multiplies the float32 scale. A reader quantizes with the scale it finds in the
        # file, rounded to the model's dtype (up to 0.4 % off in bfloat16), so that one belongs into deq_scale.
        scale = scale.to(stored_dtype(f"{module}.{INPUT_SCALE}")).to(torch.float32)
        deq_scale, quant_bias = static_params(weight, bias_N, scale, offset)
        if stored_dtype(f"{module}.{DEQ_SCALE}") is torch.int64:
            deq_scale = pack_deq_scale(deq_scale)
        stored.update({INPUT_SCALE: scale, INPUT_OFFSET: offset, QUANT_BIAS: quant_bias, DEQ_SCALE: deq_scale})
    return {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}


def norm_tensors(module: str, gain: Tensor) -> dict[str, Tensor]:
    """Return all that may be written of a norm after outlier suppression; the plan says which of it is.

    Args:
        module: its name.
        gain: as it is stored.
    """
    zeros = torch.zeros_like(gain)
    return {
        weight_name(module): gain,
        f"{module}.{NORM_BIAS.suffix}": zeros,
        weight_name(legacy_norm(module)): gain,
        f"{legacy_norm(module)}.{NORM_BIAS.suffix}": zeros,
    }


def _kv_tensors(names: Names, prefix: str, kv: KVParams) -> dict[str, Tensor]:
    return {
        f"{prefix}{names.key}.{KV_SCALE}": kv.key_scale,
        f"{prefix}{names.key}.{KV_OFFSET}": kv.key_offset,
        f"{prefix}{names.value}.{KV_SCALE}": kv.value_scale,
        f"{prefix}{names.value}.{KV_OFFSET}": kv.value_offset,
    }
