"""The float pass: what has to be known of a layer before it is quantized.

All calibration samples run through the float model, one layer at a time. Smoothing does not change what a layer
computes, so the inputs of the smoothed model are these inputs divided by the scales found here.

For `smooth`, "float" means less: linears compute with int8 weights and inputs quantized by token (W8A8_DYNAMIC), which
takes a third of the time. What is seen is as good: SmolLM2 w8a8 has KL 0.0061 to float so, and 0.0065 with float
linears. Training compares with what leaves the layer, so for that linears are float.

Letters: T tokens of all samples, E hidden size, K inputs, C = G * D key/value channels, N experts, J of them for
each token.
"""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.families import (
    DOWN,
    InputGroup,
    LinearShape,
    SmoothPair,
    dense_groups,
    input_groups,
    layer_linears,
    slides,
    sliding_window,
    smooth_pairs,
)
from eightfold.model.reference.attention import FloatAttention, Rotation
from eightfold.model.reference.decoder import Batch, GroupCall, LinearGroup, spans_of
from eightfold.model.reference.linear import FloatLinear, Linear, W8A8DynamicLinear, asymmetric
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32, load_rows_float32
from eightfold.parallel.ranks import Ranks, in_turn
from eightfold.quant.analysis import InputRange
from eightfold.quant.attention import KVObserver, KVParams, StretchObserver, WatchedAttention, Watcher
from eightfold.quant.experts import RouterWatch, passing_experts
from eightfold.quant.head_balance import HeadBalance, HeadObserver
from eightfold.quant.hidden import HiddenStates
from eightfold.quant.qparams import quantize_rows
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.quant.smooth import SMOOTHED, HeadSharing, SmoothScale, smooth_scale, source_scale, takes_rms
from eightfold.quant.statistics import InputWatcher, loud_tokens
from eightfold.scheme import NEEDS_CALIBRATION, QuantType, bias_name, weight_name

# So much of a layer may be in float32 while samples pass: little, beside all else.
_WIDENED_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerStatistics:
    """What the float pass has found about one layer."""

    scales: Mapping[str, SmoothScale] = field(default_factory=dict)  # by title of the group that reads the input
    range_params: Mapping[str, float] = field(default_factory=dict)  # of the smoothed input, by title
    # lo and hi of each channel of the input as it was, by title
    extremes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kv: KVParams | None = None
    stretch: float | None = None  # how far attention's inputs are from using their range; 1 is best
    tokens: Tensor | None = None  # of each expert, (N,) int64
    chosen: Tensor | None = None  # for the first sample from which scales are taken, (T0, J) int64
    heads: HeadBalance | None = None  # what becomes of queries and keys

    def save(self, path: Path) -> int:
        """Write a file, which is then safely on disk; return its CRC-32."""
        content = io.BytesIO()
        kv, heads = (None if part is None else vars(part) for part in (self.kv, self.heads))
        scales = {title: (scale.scale, scale.note) for title, scale in self.scales.items()}
        extremes = dict(self.extremes)
        found = (scales, dict(self.range_params), extremes, kv, self.stretch, self.tokens, self.chosen, heads)
        torch.save(found, content)
        with path.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        return zlib.crc32(content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        found = torch.load(path, map_location=torch.get_default_device(), weights_only=True)
        scales, range_params, extremes, kv, stretch, tokens, chosen, heads = found
        scales = {title: SmoothScale(*scale) for title, scale in scales.items()}
        kv, heads = None if kv is None else KVParams(**kv), None if heads is None else HeadBalance(**heads)
        return cls(scales, range_params, extremes, kv, stretch, tokens, chosen, heads)


@dataclass(frozen=True)
class WatchedGroup:
    """Linears whose input, and perhaps outputs, are shown to somebody."""

    inner: LinearGroup
    watcher: InputWatcher | None
    outputs: Callable[[Tensor, Tensor], None] | None = None  # sees k and v, each (T, C)

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        if self.watcher is not None:
            self.watcher.update(x_TK, batch.spans)
        outputs = self.inner(x_TK, batch)
        if self.outputs is not None:
            self.outputs(*outputs[1:])
        return outputs


def head_sharing(config: ModelConfig, group: str) -> HeadSharing | None:
    """Return how o_proj's inputs share v_proj's outputs; None for other groups."""
    if group != "o":
        return None
    return HeadSharing(config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)


def source_rows(config: ModelConfig, pair: SmoothPair, scale: Tensor) -> Tensor:
    """Return what the rows of a pair's linear source are divided by, (N,): ones where it is other linears too."""
    linears = [linear for group in dense_groups(config) for linear in group.linears]
    source = next(linear for linear in linears if linear.name == pair.source)
    if not source.parts:
        return scale
    rows = torch.ones(source.n)
    rows[source.parts[pair.part].indices()] = scale
    return rows


def smoothed_groups(config: ModelConfig, method: AntiOutlier | None) -> set[str]:
    """Return the titles of the groups of a model whose input a method smooths."""
    if method is None:
        return set()
    return {pair.group for pair in smooth_pairs(config) if pair.source_is_norm or method.smooths_linear_pairs}


def group_kind(types: Mapping[str, QuantType], prefix: str, group: InputGroup) -> QuantType:
    """Return how a group's input is quantized, where linears differ in the way that asks for more."""
    kinds = {types[prefix + linear.name] for linear in group.linears}
    return next((kind for kind in SMOOTHED if kind in kinds), QuantType.FLOAT)


class FloatPass:
    """The samples on their way through the float model."""

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        types: Mapping[str, QuantType],
        hidden: HiddenStates,
        ranks: Ranks | None = None,
        anti: HiddenStates | None = None,
        *,
        tells_ranges: bool = False,
        other_kinds: Sequence[QuantType] = (),
    ) -> None:
        """Start where the samples of recipe.float_samples() are, and those of `anti`, from which scales are taken.

        With `tells_ranges` the input of every group is watched, and `ranges` has what was seen, in rank 0; this
        changes nothing else. `other_kinds` are those that scales() is going to be asked for.
        """
        self._other_kinds = other_kinds
        self.ranges: list[InputRange] = []
        self._tells_ranges = tells_ranges
        self._ranks = ranks or Ranks()
        self._decoder, self._recipe, self.hidden, self.anti = decoder, recipe, hidden, anti or hidden
        self._types = types
        self._config = decoder.checkpoint.config

    @torch.inference_mode()
    def layer(self, layer_idx: int) -> LayerStatistics:
        """Move all samples through one layer and return what was seen, the same in all ranks."""
        recipe, prefix, context_len = self._recipe, self._config.names.layer(layer_idx), self._config.context
        self._groups = input_groups(self._config, layer_idx)
        self._kinds = {group.title: group_kind(self._types, prefix, group) for group in self._groups}
        self._smoothed = smoothed_groups(self._config, recipe.anti_outlier) & self._kinds.keys()
        if recipe.smooths_by_use:
            self._smoothed = {title for title in self._smoothed if self._kinds[title] in SMOOTHED}
        kv = KVObserver(recipe.kv_observe, self._turns(layer_idx), context_len) if recipe.kv_int8 else None
        stretch = StretchObserver() if recipe.fa_amp else None
        heads = HeadObserver(self._config) if recipe.fa_quant and recipe.smooths_by_use else None
        watchers, routing = self._pass(self.hidden, layer_idx, kv, stretch, heads)
        is_one = self.anti is self.hidden
        smoothing, for_proof = (watchers, routing) if is_one else self._pass(self.anti, layer_idx)
        self._seen = smoothing
        if not self._ranks.is_first:
            return self._ranks.share(LayerStatistics())
        if self._tells_ranges:
            seen = {**watchers, **smoothing}
            self.ranges += [seen[each].stats().range(layer_idx, each) for each in self._kinds if each in seen]
        found = self._statistics(prefix, watchers, smoothing, kv, stretch)
        if routing is not None and for_proof is not None and for_proof.first_TJ is not None:
            chosen = for_proof.first_TJ[: self.anti.lengths[0]] if recipe.anti_outlier is not None else None
            found = replace(found, tokens=routing.tokens_N, chosen=chosen)
        if heads is not None:
            found = replace(found, heads=self._balance(prefix, heads, found.scales, smoothing))
        return self._ranks.share(found)

    def scales(self, layer_idx: int, kind: QuantType) -> dict[str, SmoothScale]:
        """Return the scales that the layer which layer() has just passed would have if all its groups had one type."""
        self._kinds = dict.fromkeys(self._kinds, kind)
        return self._scales(self._config.names.layer(layer_idx), self._seen)

    @property
    def streams(self) -> list[HiddenStates]:
        """The samples: one stream or two."""
        return [self.hidden] if self.anti is self.hidden else [self.hidden, self.anti]

    def _pass(
        self,
        stream: HiddenStates,
        layer_idx: int,
        kv: KVObserver | None = None,
        stretch: StretchObserver | None = None,
        heads: HeadObserver | None = None,
    ) -> tuple[dict[str, InputWatcher], RouterWatch | None]:
        """Move the samples of one stream through a layer; return what was seen of inputs and routers: rank 0 knows."""
        assert stream.layer_idx == layer_idx
        prefix, experts = self._config.names.layer(layer_idx), self._config.experts
        titles = set(self._smoothed) if stream is self.anti else set()
        if stream is self.hidden and (self._recipe.needs_range_params or self._tells_ranges):
            titles.update(self._kinds)
        if stream is self.hidden and self._recipe.takes_extremes:
            titles.update(title for title, kind in self._kinds.items() if kind in NEEDS_CALIBRATION)
        watchers = {
            group.title: self._watcher(stream, prefix, group.title) for group in self._groups if group.title in titles
        }
        calls: list[GroupCall] = [
            WatchedGroup(
                LinearGroup(tuple(self._linear(layer_idx, linear) for linear in group.linears), group.parts),
                watchers.get(group.title),
                kv.projections if kv is not None and group.title == "qkv" else None,
            )
            for group in self._groups
        ]
        seen: tuple[Watcher, ...] = tuple(observer for observer in (kv, stretch, heads) if observer is not None)
        attention = WatchedAttention(
            FloatAttention(sliding_window(self._config, layer_idx), self._decoder.scoring), seen
        )
        routing = RouterWatch(experts.count) if experts and self._config.is_sparse(layer_idx) else None
        expert_linear = functools.cache(functools.partial(self._float_linear, layer_idx))
        mlp = passing_experts(self._decoder, layer_idx, expert_linear, watch=routing)
        stream.advance(self._decoder.block(layer_idx, calls, attention, mlp=mlp))
        self._merge(watchers, kv, heads, routing)
        return watchers, routing

    def _watcher(self, stream: HiddenStates, prefix: str, title: str) -> InputWatcher:
        method = self._recipe.anti_outlier if stream is self.anti and title in self._smoothed else None
        has_loud = self._tells_ranges or (method is not None and method.is_ours and title == DOWN)
        kinds = (self._kinds[title], *self._other_kinds)
        return InputWatcher(
            prefix + title,
            sum(stream.lengths),
            keep_first=method in (AntiOutlier.M2, AntiOutlier.M3),
            keep_tokens=method is not None and method.searches_exponents,
            keep_features=stream is self.hidden and self._recipe.needs_range_params,
            keep_spread=method is AntiOutlier.M2,
            num_loud=loud_tokens(stream.lengths) if has_loud else 0,
            keep_rms=method is not None and method.is_ours and any(takes_rms(kind, title == DOWN) for kind in kinds),
            place=stream.place if self._ranks.size > 1 else None,
        )

    def _linear(self, layer_idx: int, shape: LinearShape) -> Linear:
        """Return a linear as samples meet it here: float, or for `smooth` in int8."""
        if self._recipe.smooths_by_use and not self._recipe.train_steps:
            return self._by_token(self._config.names.layer(layer_idx) + shape.name, shape)
        return self._float_linear(layer_idx, shape)

    def _float_linear(self, layer_idx: int, shape: LinearShape) -> Linear:
        """Return a float linear, widened once for all batches where a layer is small."""
        linear = self._decoder.linear(self._config.names.layer(layer_idx), shape)
        elements = sum(each.n * each.k for each in layer_linears(self._config, layer_idx))
        if isinstance(linear, FloatLinear) and 4 * elements <= _WIDENED_BYTES:
            return FloatLinear(linear.weight.to(torch.float32), linear.bias)
        return linear

    def _by_token(self, module: str, shape: LinearShape) -> Linear:
        checkpoint, name = self._decoder.checkpoint, weight_name(module)
        weight = quantize_rows(
            shape.n, shape.k, lambda begin, end: load_rows_float32(checkpoint, name, begin, end), is_symmetric=True
        )
        bias = load_float32(checkpoint, bias_name(module)) if shape.has_bias else None
        return W8A8DynamicLinear(weight.values, weight.scale[:, 0], weight.sum(), bias)

    def _merge(
        self,
        watchers: Mapping[str, InputWatcher],
        kv: KVObserver | None,
        heads: HeadObserver | None,
        routing: RouterWatch | None,
    ) -> None:
        """Let rank 0 take in what the other ranks have seen; its own sample is the one that `stretch` looks at."""
        if self._ranks.size == 1:
            return
        tokens = None if routing is None else routing.tokens_N
        parts = self._ranks.gather(({title: watcher.kept for title, watcher in watchers.items()}, kv, heads, tokens))
        for title, watcher in watchers.items() if self._ranks.is_first else ():
            for seen in in_turn([kept[title] for kept, *_ in parts]):
                watcher.take(seen)
        for _, other, their_heads, their_tokens in parts[1:]:
            if routing is not None and their_tokens is not None:
                routing.tokens_N += their_tokens
            if kv is not None and other is not None:
                kv.merge(other)
            if heads is not None and their_heads is not None:
                heads.merge(their_heads)

    def _statistics(
        self,
        prefix: str,
        watchers: Mapping[str, InputWatcher],
        smoothing: Mapping[str, InputWatcher],
        kv: KVObserver | None,
        stretch: StretchObserver | None,
    ) -> LayerStatistics:
        scales = self._scales(prefix, smoothing)
        range_params: dict[str, float] = {}
        for title, watcher in watchers.items() if self._recipe.needs_range_params else ():
            range_params[title] = watcher.stats().range_param(scales[title].scale if title in scales else None)
        takes_extremes, score = self._recipe.takes_extremes, None if stretch is None else stretch.score
        seen = {title: watcher.stats() for title, watcher in watchers.items() if takes_extremes}
        extremes = {title: (stats.lo, stats.hi) for title, stats in seen.items()}
        return LayerStatistics(scales, range_params, extremes, self._kv(kv, scales), score)

    def _scales(self, prefix: str, smoothing: Mapping[str, InputWatcher]) -> dict[str, SmoothScale]:
        """Return the scale of each group; some methods take v_proj and up_proj as those of o and down leave them."""
        found: dict[str, SmoothScale] = {}
        method = self._recipe.anti_outlier
        goes_backwards = method is not None and method.goes_backwards
        groups = [group for group in self._groups if group.title in self._smoothed]
        pairs = [pair for pair in smooth_pairs(self._config) if goes_backwards and not pair.source_is_norm]
        sources = {pair.source: pair for pair in pairs}
        for group in sorted(groups, key=lambda group: group.title not in [pair.group for pair in pairs]):
            rows = {
                linear.name: source_rows(self._config, pair, self._source_scale(pair.group, found[pair.group]))
                for linear in group.linears
                if (pair := sources.get(linear.name)) is not None and pair.group in found
            }
            found[group.title] = self._scale(prefix, group, smoothing[group.title], rows)
        return found

    def _balance(
        self,
        prefix: str,
        heads: HeadObserver,
        scales: Mapping[str, SmoothScale],
        smoothing: Mapping[str, InputWatcher],
    ) -> HeadBalance:
        (linear,), sharing = self._groups[1].linears, head_sharing(self._config, "o")
        assert sharing is not None
        scale_K, noise = torch.ones(linear.k), 0.0
        if "o" in scales:
            scale_K, stats = scales["o"].scale, smoothing["o"].stats()
            step, _ = asymmetric((stats.lo / scale_K).amin(), (stats.hi / scale_K).amax())
            noise = float(step.square() / 12)
        squares_K = (
            load_float32(self._decoder.checkpoint, weight_name(prefix + linear.name)).mul_(scale_K).square_().sum(0)
        )
        return heads.balance(sharing.split(squares_K).sum(1), sharing.split(scale_K)[:, 0], noise)

    def _turns(self, layer_idx: int) -> Rotation:
        turns = self._decoder.turns()
        return turns.local if turns.local is not None and slides(self._config, layer_idx) else turns.all

    def _source_scale(self, title: str, scale: SmoothScale) -> Tensor:
        sharing = head_sharing(self._config, title)
        return scale.scale if sharing is None else source_scale(scale.scale, sharing)

    def _scale(self, prefix: str, group: InputGroup, watcher: InputWatcher, rows: Mapping[str, Tensor]) -> SmoothScale:
        """Return a group's scale; `rows` of its linears, (N,) by name, are divided before."""
        assert self._recipe.anti_outlier is not None
        checkpoint, linears = self._decoder.checkpoint, group.linears
        weights = [load_float32(checkpoint, weight_name(prefix + linear.name)) for linear in linears]
        for linear, weight in zip(linears, weights, strict=True):
            if linear.name in rows:
                weight.div_(rows[linear.name][:, None])
        biases = [
            load_float32(checkpoint, bias_name(prefix + each.name)) if each.has_bias else None for each in linears
        ]
        return smooth_scale(
            self._recipe.anti_outlier,
            watcher.stats(),
            weights,
            head_sharing(self._config, group.title),
            biases=biases,
            weight_symmetric=self._recipe.weight_symmetric or self._recipe.scheme is not QuantType.W8A16,
            kind=self._kinds[group.title],
            is_product=group.title == DOWN,
        )

    def _kv(self, observer: KVObserver | None, scales: Mapping[str, SmoothScale]) -> KVParams | None:
        if observer is None:
            return None
        divisor = self._source_scale("o", scales["o"]) if "o" in scales else None
        return observer.params(self._recipe.kv_symmetric, divisor)

    def head_range_param(self) -> float:
        """Return the range parameter of the output head's input, after the last layer."""
        tokens = sum(self.hidden.lengths)
        watcher = InputWatcher("the output head", tokens, keep_first=False, keep_tokens=False, keep_spread=False)
        norm = self._decoder.final_norm()
        for sizes, states_TE in self.hidden.pieces():
            watcher.update(norm(states_TE), spans_of(sizes))
        return watcher.stats().range_param()
