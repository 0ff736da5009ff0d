"""The float pass: what has to be known of a layer before it is quantized.

All calibration samples run through the float model, one layer at a time. Smoothing does not change what a layer
computes, so the inputs of the smoothed model are these inputs divided by the scales found here.

Letters: T tokens of all samples, E hidden size, K inputs, C = G * D key/value channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.families import (
    SMOOTH_PAIRS,
    InputGroup,
    LinearShape,
    SmoothPair,
    input_groups,
    layer_prefix,
    sliding_window,
)
from eightfold.model.reference.decoder import Batch, GroupCall, LinearGroup, spans_of
from eightfold.model.reference.kvcache import FloatAttention
from eightfold.model.reference.linear import FloatLinear, Linear
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32
from eightfold.parallel.ranks import Ranks, in_turn
from eightfold.quant.attention import KVObserver, KVParams, StretchObserver, WatchedAttention, Watcher
from eightfold.quant.hidden import HiddenStates
from eightfold.quant.methods import ActMethod, AntiOutlier
from eightfold.quant.recipe import Recipe
from eightfold.quant.smooth import HeadSharing, SmoothScale, smooth_scale, source_scale
from eightfold.quant.statistics import InputWatcher
from eightfold.scheme import QuantType, bias_name, weight_name

# So many samples decide what is rolled back and which activation method an input gets.
FEATURE_SAMPLES = 5

# So much of a layer may be in float32 while samples pass: little, beside all else.
_WIDENED_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerSurvey:
    """What was found about one layer."""

    scales: Mapping[str, SmoothScale] = field(default_factory=dict)  # by title of the group that reads the input
    range_params: Mapping[str, float] = field(default_factory=dict)  # of the smoothed input, by title
    kv: KVParams | None = None
    stretch: float | None = None  # how far attention's inputs are from using their range; 1 is best


@dataclass(frozen=True)
class WatchedGroup:
    """Linears whose input, and perhaps outputs, are shown to somebody."""

    inner: LinearGroup
    watcher: InputWatcher | None
    outputs: Callable[[Tensor, Tensor], None] | None = None  # sees k and v, each (T, C)

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return every linear's output."""
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


def smoothed_pairs(method: AntiOutlier | None) -> tuple[SmoothPair, ...]:
    """Return what a method smooths."""
    if method is None:
        return ()
    return tuple(pair for pair in SMOOTH_PAIRS if pair.source_is_norm or method.smooths_linear_pairs)


def needs_features(recipe: Recipe) -> bool:
    """Whether the ratio of largest value to standard deviation decides something."""
    return recipe.disable_level > 0 or (recipe.has_static_inputs and recipe.act_method is ActMethod.AUTO)


def needs_survey(recipe: Recipe) -> bool:
    """Whether anything is taken from the float model."""
    return recipe.anti_outlier is not None or recipe.kv_int8 or recipe.fa_amp > 0 or needs_features(recipe)


def surveyed_samples(recipe: Recipe, samples: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Return the samples that run through the float model."""
    everything = recipe.anti_outlier is not None or recipe.kv_int8
    return samples if everything else samples[:FEATURE_SAMPLES]


class FloatPass:
    """The samples on their way through the float model."""

    def __init__(self, decoder: Decoder, recipe: Recipe, hidden: HiddenStates, ranks: Ranks | None = None) -> None:
        """Start where the samples are.

        Args:
            decoder: the float model.
            recipe: what is going to be done.
            hidden: the samples of surveyed_samples().
            ranks: the processes among which they are shared; None for this one alone.
        """
        self._ranks = ranks or Ranks()
        self._decoder, self._recipe, self.hidden = decoder, recipe, hidden
        self._config = decoder.checkpoint.config
        self._smoothed = {pair.group for pair in smoothed_pairs(recipe.anti_outlier)}

    @torch.inference_mode()
    def survey(self, layer_idx: int) -> LayerSurvey:
        """Move all samples through one layer and return what was seen, the same in all ranks."""
        assert self.hidden.layer_idx == layer_idx
        recipe, prefix = self._recipe, layer_prefix(layer_idx)
        context_len = self._config.max_position_embeddings
        kv = KVObserver(recipe.kv_observe, self._decoder.inv_freq, context_len) if recipe.kv_int8 else None
        stretch = StretchObserver() if recipe.fa_amp else None
        watchers = {group.title: self._watcher(prefix, group) for group in input_groups(self._config)}
        groups: list[GroupCall] = [
            self._watched(prefix, group, watchers[group.title], kv) for group in input_groups(self._config)
        ]
        seen: tuple[Watcher, ...] = tuple(observer for observer in (kv, stretch) if observer is not None)
        attention = WatchedAttention(FloatAttention(sliding_window(self._config, layer_idx)), seen)
        self.hidden.advance(self._decoder.block(layer_idx, groups, attention))
        self._merge(watchers, kv)
        return self._ranks.share(self._found(prefix, watchers, kv, stretch) if self._ranks.is_first else LayerSurvey())

    def _merge(self, watchers: Mapping[str, InputWatcher | None], kv: KVObserver | None) -> None:
        """Let rank 0 take in what the other ranks have seen; its own sample is the one that `stretch` looks at."""
        if self._ranks.size == 1:
            return
        kept = {title: watcher.kept for title, watcher in watchers.items() if watcher is not None}
        parts = self._ranks.gather((kept, kv))
        for title in kept if self._ranks.is_first else ():
            watcher = watchers[title]
            assert watcher is not None
            for seen in in_turn([part[title] for part, _ in parts]):
                watcher.take(seen)
        for _, other in parts[1:]:
            if kv is not None and other is not None:
                kv.merge(other)

    def _found(
        self,
        prefix: str,
        watchers: Mapping[str, InputWatcher | None],
        kv: KVObserver | None,
        stretch: StretchObserver | None,
    ) -> LayerSurvey:
        scales, range_params = dict[str, SmoothScale](), dict[str, float]()
        for group in input_groups(self._config):
            watcher = watchers[group.title]
            if watcher is None:
                continue
            if group.title in self._smoothed:
                scales[group.title] = self._scale(prefix, group, watcher)
            if needs_features(self._recipe):
                scale = scales.get(group.title)
                features = watcher.stats().features
                range_params[group.title] = features.range_param(None if scale is None else scale.scale)
        return LayerSurvey(scales, range_params, self._kv(kv, scales), None if stretch is None else stretch.score)

    def head_range_param(self) -> float:
        """Return the range parameter of the output head's input, after the last layer."""
        watcher = InputWatcher(
            "the output head", sum(self.hidden.lengths), keep_first=False, keep_tokens=False, keep_spread=False
        )
        norm = self._decoder.final_norm()
        for sizes, states_TE in self.hidden.pieces():
            watcher.update(norm(states_TE), spans_of(sizes))
        return watcher.stats().features.range_param(None)

    def _watcher(self, prefix: str, group: InputGroup) -> InputWatcher | None:
        method = self._recipe.anti_outlier if group.title in self._smoothed else None
        if method is None and not needs_features(self._recipe):
            return None
        return InputWatcher(
            prefix + group.title,
            sum(self.hidden.lengths),
            keep_first=method in (AntiOutlier.M2, AntiOutlier.M3),
            keep_tokens=method is AntiOutlier.M6,
            keep_features=needs_features(self._recipe),
            keep_spread=method is AntiOutlier.M2,
            place=self.hidden.place if self._ranks.size > 1 else None,
        )

    def _watched(
        self, prefix: str, group: InputGroup, watcher: InputWatcher | None, kv: KVObserver | None
    ) -> WatchedGroup:
        linears = LinearGroup(tuple(self._linear(prefix, linear) for linear in group.linears))
        return WatchedGroup(linears, watcher, kv.projections if kv is not None and group.title == "qkv" else None)

    def _linear(self, prefix: str, shape: LinearShape) -> Linear:
        """Return a float linear, widened once for all batches where a layer is small."""
        linear = self._decoder.linear(prefix, shape)
        elements = sum(each.n * each.k for group in input_groups(self._config) for each in group.linears)
        if isinstance(linear, FloatLinear) and 4 * elements <= _WIDENED_BYTES:
            return FloatLinear(linear.weight.to(torch.float32), linear.bias)
        return linear

    def _scale(self, prefix: str, group: InputGroup, watcher: InputWatcher) -> SmoothScale:
        assert self._recipe.anti_outlier is not None
        weights = [
            load_float32(self._decoder.checkpoint, weight_name(prefix + linear.name)) for linear in group.linears
        ]
        return smooth_scale(
            self._recipe.anti_outlier,
            watcher.stats(),
            weights,
            head_sharing(self._config, group.title),
            biases=[self._bias(prefix, linear) for linear in group.linears],
            weight_symmetric=self._recipe.weight_symmetric or self._recipe.scheme is not QuantType.W8A16,
        )

    def _bias(self, prefix: str, linear: LinearShape) -> Tensor | None:
        return load_float32(self._decoder.checkpoint, bias_name(prefix + linear.name)) if linear.has_bias else None

    def _kv(self, observer: KVObserver | None, scales: Mapping[str, SmoothScale]) -> KVParams | None:
        if observer is None:
            return None
        sharing = head_sharing(self._config, "o")
        divisor = source_scale(scales["o"].scale, sharing) if "o" in scales and sharing is not None else None
        return observer.params(self._recipe.kv_symmetric, divisor)
