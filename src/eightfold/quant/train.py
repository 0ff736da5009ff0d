"""Training of what smoothing and static ranges leave open, against the float layer (`--train-steps`).

    x'    Q(x / s) s                                  what a group's linears read, in place of x
    Q     to 256 levels over [a min(lo / s), b max(hi / s)], or, by token, over what it holds;  lo, hi: a channel's ends
    loss  mean_t |y'_t - y_t|**2 / |y_t|**2           y' of the layer, from what the quantized layers before it give;
                                                      y of the float layer, from what the float layers before it give

log s begins where smoothing has put it, a and b at 1. Adam (Kingma and Ba 2015, arXiv:1412.6980) moves them; rounding
passes gradients on as if it were not there, which makes the gradient of a scale that of its rounding errors (LSQ, Esser
et al. 2020, arXiv:1902.08153). Weights stay as they are: their own rounding is a small part of the loss, and neither
training them nor biases gained anything (docs/log.md). A loss that is relative to a token's own size keeps sinks from
counting for more than all other tokens together, and from being clipped away.

A layer is trained by itself, when all before it are quantized, so that it can make up for their errors (BRECQ, Li et
al. 2021, arXiv:2102.05426; OmniQuant, Shao et al. 2023, arXiv:2308.13137). In memory are one layer in float32 and a
bounded number of tokens. Layers with experts are left alone.

Letters: T tokens, E hidden size, K inputs of a group, C of its channels that have scales of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eightfold.families import InputGroup, LinearShape, input_groups, sliding_window
from eightfold.model.reference.attention import FloatAttention
from eightfold.model.reference.decoder import Batch, Block, in_parts, token_batches
from eightfold.model.reference.linear import EPS, Q_MAX, Q_MIN, float_linear
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32
from eightfold.quant.float_pass import LayerStatistics, group_kind, head_sharing
from eightfold.quant.hidden import HiddenStates
from eightfold.quant.smooth import SCALE_MIN, HeadSharing, SmoothScale, source_scale
from eightfold.scheme import NEEDS_CALIBRATION, QuantType, bias_name, weight_name

# Tokens on which a layer is trained, those of one sample, and those of one step, at most.
TRAINED_TOKENS, _SAMPLE_TOKENS, STEP_TOKENS = 8192, 256, 512

# Step sizes of log s, and of the logarithms of a and b. They rise for some steps and then fall along a cosine.
_SCALE_RATE, _RANGE_RATE, _WARM_STEPS = 0.01, 0.005, 10

_BETAS = 0.9, 0.99  # of Adam: how much of its means of gradients and of their squares stays

_TINY = 1e-8


def train_layer(
    decoder: Decoder,
    layer_idx: int,
    steps: int,
    types: Mapping[str, QuantType],
    statistics: LayerStatistics,
    streams: tuple[HiddenStates, HiddenStates],
    on_step: Callable[[int], None] = lambda _: None,
) -> LayerStatistics:
    """Return a layer's statistics with trained scales and with ends of ranges that are as much nearer as they should.

    The same samples give the same bits; if the loss does not fall, all is as it was.

    Args:
        decoder: the float model.
        layer_idx: which layer.
        steps: how often Adam moves.
        types: of the linears.
        statistics: with what smoothing has found, and the extremes of static inputs.
        streams: the same samples where they enter the quantized layer, and where they leave the float layer.
        on_step: called before each step with its number.
    """
    if decoder.checkpoint.config.is_sparse(layer_idx):
        return statistics
    with torch.inference_mode(False), torch.enable_grad():
        layer = _TrainedLayer(decoder, layer_idx, types, statistics)
        inputs, outputs = (_excerpts(stream) for stream in streams)
        batches = [
            _Batch.of(decoder, [inputs[i] for i in part], [outputs[i] for i in part])
            for part in token_batches(list(map(len, inputs)), STEP_TOKENS)
        ]
        before = layer.loss_of_all(batches)
        layer.train(batches, steps, seed=layer_idx, on_step=on_step)
        return layer.statistics() if layer.loss_of_all(batches) < before else statistics


def _excerpts(stream: HiddenStates) -> list[Tensor]:
    """Return the beginnings of evenly spaced samples, (T, E) each, of the states of a stream."""
    lengths = [min(length, _SAMPLE_TOKENS) for length in stream.lengths]
    stride, found, at = max(1, math.ceil(sum(lengths) / TRAINED_TOKENS)), list[Tensor](), 0
    for sizes, states_TE in stream.pieces():
        begin = 0
        for size in sizes:
            if at % stride == 0:
                found.append(states_TE[begin : begin + min(size, _SAMPLE_TOKENS)].clone())
            begin, at = begin + size, at + 1
    return found


@dataclass(frozen=True)
class _Batch:
    """Samples of one step."""

    work: Batch
    inputs: Tensor  # (T, E)
    outputs: Tensor  # (T, E) what the layer should make of them
    weights: Tensor  # (T, 1) one through the square of an output's length

    @classmethod
    def of(cls, decoder: Decoder, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> _Batch:
        wanted_TE = torch.cat(list(outputs))
        weights = 1 / (wanted_TE.square().sum(-1, keepdim=True) + _TINY)
        return cls(Batch.of(list(map(len, inputs)), decoder.turns()), torch.cat(list(inputs)), wanted_TE, weights)

    def loss(self, block: Block) -> Tensor:
        """Return the sum over tokens, ()."""
        return ((block(self.inputs, self.work) - self.outputs).square() * self.weights).sum()


class _Product(torch.autograd.Function):
    """float_linear() with a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.weight_NK = weight_NK
        return float_linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_TN,) = gradients
        return float_linear(gradient_TN.contiguous(), ctx.weight_NK.T.contiguous(), None), None, None


def _product(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    found: Tensor = _Product.apply(x_TK, weight_NK, bias_N)  # type: ignore[no-untyped-call]
    return found


def through_levels(x_TK: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return x at the nearest of 256 levels over [min(lo, 0), max(hi, 0)]; gradients pass where it is inside.

    Args:
        x_TK: (T, K) float32.
        lo, hi: () or (T, 1) float32.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (Q_MAX - Q_MIN)).clamp(min=EPS)
    scaled = x_TK / scale
    with torch.no_grad():
        offset = torch.round(-lo / scale) + Q_MIN
        error = torch.round(scaled + offset) - offset - scaled
    return (scaled + error).clamp(Q_MIN - offset, Q_MAX - offset) * scale


class _Adam:
    """What Adam keeps of some values. torch.optim's takes 4 s and 90 MB to import."""

    def __init__(self, values: Tensor, rate: float) -> None:
        self.values, self._rate = values, rate
        self._mean, self._square = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def move(self, gradient: Tensor, step: int, pace: float) -> None:
        """Take a step; they are counted from 0."""
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        mean, square = (
            x / (1 - beta ** (step + 1)) for x, beta in zip((self._mean, self._square), _BETAS, strict=True)
        )
        self.values -= self._rate * pace * mean / (square.sqrt() + _TINY)


class _TrainedGroup:
    """Linears whose common input is quantized, with what is trained of that."""

    def __init__(
        self,
        group: InputGroup,
        linears: Sequence[tuple[Tensor, Tensor | None]],
        ends: tuple[Tensor, Tensor] | None,
        scale: Tensor | None,
        sharing: HeadSharing | None,
    ) -> None:
        """Begin with a scale for each channel, (C,), and the ends that a static input's channels have, (K,) each."""
        self._group, self._linears, self._ends, self._sharing = group, linears, ends, sharing
        self.log_scale_C = None if scale is None else scale.log().requires_grad_()
        self.log_kept = None if ends is None else torch.zeros(2).requires_grad_()  # of a and b

    def scale(self) -> Tensor:
        """Return what the input is divided by, (K,), or 1, ()."""
        if self.log_scale_C is None:
            return torch.ones(())
        scale = self.log_scale_C.exp().clamp(min=SCALE_MIN)
        return scale if self._sharing is None else self._sharing.expand(scale.view(-1, self._sharing.head_dim))

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Return the ends of a static input's channels before division, (K,) each."""
        if self._ends is None or self.log_kept is None:
            return None
        kept, (lo_K, hi_K) = self.log_kept.exp(), self._ends
        return lo_K * kept[0], hi_K * kept[1]

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        scale = self.scale()
        divided, ends = x_TK / scale, self.ends()
        if ends is None:
            lo, hi = divided.amin(1, keepdim=True), divided.amax(1, keepdim=True)
        else:
            lo, hi = (ends[0] / scale).amin(), (ends[1] / scale).amax()
        read_TK = through_levels(divided, lo, hi) * scale
        return self.multiply(read_TK)

    def multiply(self, read_TK: Tensor) -> tuple[Tensor, ...]:
        found = tuple(_product(read_TK, *linear) for linear in self._linears)
        return in_parts(found, self._group.parts)


class _PlainGroup(_TrainedGroup):
    """Linears that read floats."""

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return self.multiply(x_TK)


class _TrainedLayer:
    """A float layer whose inputs are quantized as it is going to be, and what is trained of that."""

    def __init__(
        self, decoder: Decoder, layer_idx: int, types: Mapping[str, QuantType], statistics: LayerStatistics
    ) -> None:
        config = decoder.checkpoint.config
        self._decoder, self._prefix, self._types = decoder, config.names.layer(layer_idx), types
        self._found = statistics
        self._groups = {group.title: self._trained(group) for group in input_groups(config, layer_idx)}
        attention = FloatAttention(sliding_window(config, layer_idx), decoder.scoring)
        self._block = decoder.block(layer_idx, list(self._groups.values()), attention)

    def _trained(self, group: InputGroup) -> _TrainedGroup:
        linears = [self._linear(linear) for linear in group.linears]
        kind = group_kind(self._types, self._prefix, group)
        if kind in (QuantType.W8A16, QuantType.FLOAT):
            return _PlainGroup(group, linears, None, None, None)
        ends = self._found.extremes[group.title] if kind in NEEDS_CALIBRATION else None
        sharing, scale = head_sharing(self._decoder.checkpoint.config, group.title), None
        if group.title in self._found.scales:
            scale = self._found.scales[group.title].scale.clone()
            scale = scale if sharing is None else source_scale(scale, sharing)
        copies = None if ends is None else (ends[0].clone(), ends[1].clone())
        return _TrainedGroup(group, linears, copies, scale, sharing)

    def _linear(self, linear: LinearShape) -> tuple[Tensor, Tensor | None]:
        checkpoint, module = self._decoder.checkpoint, self._prefix + linear.name
        bias = load_float32(checkpoint, bias_name(module)) if linear.has_bias else None
        return load_float32(checkpoint, weight_name(module)), bias

    def train(self, batches: Sequence[_Batch], steps: int, *, seed: int, on_step: Callable[[int], None]) -> None:
        """Move what is trained; each of the steps looks at one of the batches, in an order that the seed gives."""
        groups, order = self._groups.values(), list[int]()
        movers = [_Adam(group.log_scale_C, _SCALE_RATE) for group in groups if group.log_scale_C is not None]
        movers += [_Adam(group.log_kept, _RANGE_RATE) for group in groups if group.log_kept is not None]
        chance = torch.Generator(device="cpu").manual_seed(seed)
        for step in range(steps):
            on_step(step)
            order = order or torch.randperm(len(batches), generator=chance, device="cpu").tolist()
            batch = batches[order.pop()]
            values = [mover.values for mover in movers]
            gradients = torch.autograd.grad(batch.loss(self._block) / len(batch.inputs), values)
            for mover, gradient in zip(movers, gradients, strict=True):
                mover.move(gradient, step, _pace(step, steps))

    @torch.no_grad()
    def loss_of_all(self, batches: Sequence[_Batch]) -> float:
        return math.fsum(float(batch.loss(self._block)) for batch in batches)

    @torch.no_grad()
    def statistics(self) -> LayerStatistics:
        """Return the statistics with what has been trained."""
        scales, extremes = dict(self._found.scales), dict(self._found.extremes)
        for title, group in self._groups.items():
            kept = ""
            if group.log_kept is not None and (ends := group.ends()) is not None:
                extremes[title], kept = ends, f" and {float(group.log_kept.exp().mean()):.3f} of the range"
            if group.log_scale_C is not None:
                scales[title] = SmoothScale(group.scale(), f"{scales[title].note}, trained{kept}")
        return replace(self._found, scales=scales, extremes=extremes)


def _pace(step: int, steps: int) -> float:
    """Return which part of its full size a step has."""
    return min(1.0, (step + 1) / _WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
