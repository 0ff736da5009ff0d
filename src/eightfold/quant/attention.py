"""Watching attention: FAQuant's range of each head, C8's range of each channel.

    FAQuant, for each head of q and k after RoPE and of v:
        lo, hi = ends of the narrowest window that holds floor(p N) of a sample's N values     p = 0.9999 for q and k
        scale  = max(|lo|, |hi|) / 127 over the samples' extremes, offset 0                    p = 1 for v

    C8, for each channel of v, and of k before RoPE: extremes over all tokens and samples

    C8, for each channel of k after RoPE: the wider of
        turned     extremes over all tokens, each at every position p of the context: r cos(a + p w), r sin(a + p w)
        headroom   HEADROOM times the extremes where the tokens stood

A text of a few hundred tokens shows hardly anything of a pair of channels that RoPE turns once in 20,000 positions: one
of the two may stay near zero there and be as long as the pair, r, further on. So such a key is turned to where it will
stand. Headroom is for texts unlike the calibration set; where turning widens a range already, none is added.

Letters: S tokens of one sample, H query heads, G kv heads, D head_dim, C = G * D channels, I = D / 2 rotary pairs,
w angle per position, r and a radius and angle of a key's pair.

Source: attention quantization as msModelSlim computes it, checked against its output. Turned ranges are our own; the
figures are in docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.model.reference.attention import Attention, KVCache, Rotation
from eightfold.model.reference.linear import Q_MAX, Q_MIN, asymmetric, symmetric
from eightfold.quant.recipe import KVObserve

# The share of a sample's values that the range of queries and keys has to hold; of values all.
QK_SHARE, VALUE_SHARE = 0.9999, 1.0

# How much further than the calibration keys reached, at their own positions, the keys of other texts may reach.
HEADROOM = 1.25

Watcher = Callable[[Tensor, Tensor, Tensor], None]  # sees q (S, H, D), k and v (S, G, D)


@dataclass(frozen=True)
class WatchedAttention:
    """Attention whose inputs are shown to watchers first."""

    inner: Attention
    watchers: tuple[Watcher, ...]
    cache_dtype = torch.float32

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cache: KVCache | None, prompt_len: int) -> Tensor:
        for watch in self.watchers:
            watch(q_SHD, k_SGD, v_SGD)
        return self.inner(q_SHD, k_SGD, v_SGD, cache, prompt_len)


def recall_window(values_HN: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the ends, (H,) each, of the narrowest window that holds floor(share * N) of each row's N values."""
    count = values_HN.shape[1]
    held = int(share * count)
    if held >= count or held < 1:
        return torch.aminmax(values_HN, dim=1)
    # Only windows that begin among the smallest values and end among the largest come into question.
    windows = count - held + 1
    lows = values_HN.topk(windows, dim=1, largest=False).values
    highs = values_HN.topk(windows, dim=1).values.flip(1)
    best = (highs - lows).argmin(1, keepdim=True)
    return lows.gather(1, best)[:, 0], highs.gather(1, best)[:, 0]


class FAQuantObserver:
    """The ranges of the heads of one attention's q, k and v."""

    def __init__(self) -> None:
        self._absmax = [torch.zeros(())] * 3  # of q, k and v, (heads,) each once something has been seen

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        shares = ((q_SHD, QK_SHARE), (k_SGD, QK_SHARE), (v_SGD, VALUE_SHARE))
        self._take([_head_absmax(x_SHD, share) for x_SHD, share in shares])

    def merge(self, other: FAQuantObserver) -> None:
        self._take(other._absmax)

    def _take(self, absmax: list[Tensor]) -> None:
        self._absmax = [torch.maximum(*pair) for pair in zip(self._absmax, absmax, strict=True)]

    def scales(self) -> list[Tensor]:
        """Return the symmetric scales of q, k and v, (heads, 1) float32 each."""
        return [symmetric(absmax)[:, None] for absmax in self._absmax]


def _head_absmax(x_SHD: Tensor, share: float) -> Tensor:
    lo, hi = recall_window(x_SHD.transpose(0, 1).flatten(1), share)
    return torch.maximum(lo.abs(), hi.abs())


class ChannelRange:
    """Running extremes of each channel, over all tokens: `lo` and `hi`, (C,) once something has been seen."""

    def __init__(self) -> None:
        self.lo, self.hi = torch.tensor(math.inf), torch.tensor(-math.inf)

    def update(self, x_TC: Tensor) -> None:
        self.take(*torch.aminmax(x_TC, dim=0))

    def take(self, lo: Tensor, hi: Tensor) -> None:
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)

    def params(self, is_symmetric: bool, divisor_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and offset, (C,) float32 each, of the channels after division by `divisor_C`."""
        lo, hi = (self.lo, self.hi) if divisor_C is None else (self.lo / divisor_C, self.hi / divisor_C)
        if not is_symmetric:
            return asymmetric(lo, hi)
        scale = symmetric(torch.maximum(lo.abs(), hi.abs()))
        return scale, torch.zeros_like(scale)


class TurnedRange(ChannelRange):
    """Running range of each channel of the rotated keys, at every position of the context.

    Args:
        turns: how positions turn keys; not all of their channels need to be turned.
        context_len: how many positions the model has.
    """

    def __init__(self, turns: Rotation, context_len: int) -> None:
        super().__init__()
        self._turns, self._context_len = turns, context_len

    def see(self, k_SGD: Tensor) -> None:
        """Take in one sample's rotated keys, which stand at positions 0 to S - 1."""
        position_S = torch.arange(len(k_SGD), dtype=torch.float32)
        inv_freq_I = self._turns.inv_freq
        back_SI = position_S[:, None] * -inv_freq_I
        ahead_SI = (self._context_len - 1 - position_S).clamp(min=0)[:, None] * inv_freq_I
        size = 2 * len(inv_freq_I)
        turned, kept = k_SGD[..., :size], k_SGD[..., size:]
        extremes = [torch.cat((end, kept), dim=-1) for end in self._extremes(turned, back_SI, ahead_SI)]
        self.update(torch.stack(extremes).flatten(0, 1).flatten(1))
        self.update(torch.stack(torch.aminmax(k_SGD.flatten(1), dim=0)) * HEADROOM)

    def _extremes(self, k_SGR: Tensor, back_SI: Tensor, ahead_SI: Tensor) -> tuple[Tensor, Tensor]:
        if not self._turns.is_interleaved:
            return turned_extremes(k_SGR, back_SI, ahead_SI)
        halves = torch.cat((k_SGR[..., ::2], k_SGR[..., 1::2]), dim=-1)
        lo, hi = (torch.stack(end.chunk(2, -1), -1).flatten(-2) for end in turned_extremes(halves, back_SI, ahead_SI))
        return lo, hi


def turned_extremes(k_SGD: Tensor, back_SI: Tensor, ahead_SI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value, (S, G, D) each, of every channel while its pair turns.

    Args:
        k_SGD: keys; channels d and d + D / 2 are a pair.
        back_SI: the angles, at most 0, from which the pairs are turned; 0 is where they stand.
        ahead_SI: the angles, at least 0, up to which.
    """
    x_SGI, y_SGI = k_SGD.chunk(2, dim=-1)
    radius, angle = torch.hypot(x_SGI, y_SGI), torch.atan2(y_SGI, x_SGI)
    begin, end = angle + back_SI[:, None], angle + ahead_SI[:, None]
    ends = [_cosine_extremes(begin - shift, end - shift) for shift in (0.0, math.pi / 2)]
    lo, hi = (torch.cat([radius * cosine for cosine in cosines], dim=-1) for cosines in zip(*ends, strict=True))
    return lo, hi


def _cosine_extremes(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest cosine of the angles from `begin` to `end`."""
    cos_begin, cos_end = begin.cos(), end.cos()
    lo, hi = torch.minimum(cos_begin, cos_end), torch.maximum(cos_begin, cos_end)
    return lo.masked_fill(_passes(begin, end, math.pi), -1.0), hi.masked_fill(_passes(begin, end, 0.0), 1.0)


def _passes(begin: Tensor, end: Tensor, angle: float) -> Tensor:
    """Return whether `angle`, or that and whole turns, lies between `begin` and `end`."""
    turn = 2 * math.pi
    return torch.floor((end - angle) / turn) > torch.floor((begin - angle) / turn)


@dataclass(frozen=True)
class KVParams:
    """What C8 stores for one layer, (C,) float32 each, and the share of keys that its range cuts off."""

    key_scale: Tensor
    key_offset: Tensor
    value_scale: Tensor
    value_offset: Tensor
    clipped_keys: int
    keys: int


class KVObserver:
    """The channel ranges of one layer's cache; keys before RoPE, or after it, where they are used.

    Args:
        observe: which.
        turns: see TurnedRange.
        context_len: see TurnedRange.
    """

    def __init__(self, observe: KVObserve, turns: Rotation, context_len: int) -> None:
        self._before = observe is KVObserve.PRE_ROPE
        self._key, self._value = TurnedRange(turns, context_len), ChannelRange()
        self._rotated: list[Tensor] = []  # kept only where the range was not taken from them

    def projections(self, k_TC: Tensor, v_TC: Tensor) -> None:
        self._value.update(v_TC)
        if self._before:
            self._key.update(k_TC)

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        if self._before:
            self._rotated.append(k_SGD.flatten(1).clone())
        else:
            self._key.see(k_SGD)

    def merge(self, other: KVObserver) -> None:
        self._key.take(other._key.lo, other._key.hi)
        self._value.take(other._value.lo, other._value.hi)
        self._rotated += other._rotated

    def params(self, is_symmetric: bool, value_divisor_C: Tensor | None) -> KVParams:
        """Return the parameters; `value_divisor_C` is what smoothing divides v_proj's outputs by."""
        key_scale, key_offset = self._key.params(is_symmetric)
        clipped = total = 0
        for k_SC in self._rotated:
            q = torch.round(k_SC / key_scale + key_offset)
            clipped += int(((q < Q_MIN) | (q > Q_MAX)).sum())
            total += q.numel()
        return KVParams(key_scale, key_offset, *self._value.params(is_symmetric, value_divisor_C), clipped, total)


def stretch_score(heads: Tensor) -> float:
    """Return how far down from its largest |x| a tensor must be cut to reach 0.2 % of its values, 0 to 1.

    Small: a few extreme values stretch the range. Walks a histogram of 100 bins from the top, two bins at a time.
    Source: msModelSlim's `fa_amp`.
    """
    absolute = heads.abs().flatten()
    top = float(absolute.max())
    if top == 0:
        return 1.0
    counts = torch.histc(absolute, bins=100, min=0, max=top)
    for bins in range(2, 101, 2):
        if float(counts[100 - bins :].sum()) > 0.002 * absolute.numel():
            return (100 - bins) / 100
    return 0.0


class StretchObserver:
    """The smallest stretch score among q, k and v of the first sample."""

    def __init__(self) -> None:
        self.score: float | None = None

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        if self.score is None:
            self.score = min(stretch_score(x) for x in (q_SHD, k_SGD, v_SGD))
