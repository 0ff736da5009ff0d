"""Watching attention: FAQuant's range of each head, C8's range of each channel.

    FAQuant, for each head of q and k after RoPE and of v:
        lo, hi = ends of the narrowest window that holds floor(p N) of a sample's N values     p = 0.9999 for q and k
        scale  = max(|lo|, |hi|) / 127 over the samples' extremes, offset 0                    p = 1 for v

    C8, for each channel of k and v: extremes over all tokens and samples

Letters: S tokens of one sample, H query heads, G kv heads, D head_dim, C = G * D channels.

Source: attention quantization as msModelSlim computes it, checked against its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.quant.methods import KVObserve
from eightfold.reference.kvcache import Attention, KVCache
from eightfold.reference.linear import Q_MAX, Q_MIN, asymmetric, symmetric

# The share of a sample's values that the range of queries and keys has to hold; of values all.
QK_SHARE, VALUE_SHARE = 0.9999, 1.0

Watcher = Callable[[Tensor, Tensor, Tensor], None]  # sees q (S, H, D), k and v (S, G, D)


@dataclass(frozen=True)
class WatchedAttention:
    """Attention whose inputs are shown to watchers first."""

    inner: Attention
    watchers: tuple[Watcher, ...]
    cache_dtype = torch.float32

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cache: KVCache | None, prompt_len: int) -> Tensor:
        """Return the inner attention's result."""
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


class HeadRange:
    """Running range of each head."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._absmax: Tensor | None = None

    def update(self, x_SHD: Tensor) -> None:
        """Take in one sample."""
        lo, hi = recall_window(x_SHD.transpose(0, 1).flatten(1), self._share)
        absmax = torch.maximum(lo.abs(), hi.abs())
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)

    def scale(self) -> Tensor:
        """Return the symmetric scale of each head, (heads, 1) float32."""
        assert self._absmax is not None
        return symmetric(self._absmax)[:, None]


class FAQuantObserver:
    """The three head ranges of one attention."""

    def __init__(self) -> None:
        self.query, self.key, self.value = HeadRange(QK_SHARE), HeadRange(QK_SHARE), HeadRange(VALUE_SHARE)

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        """Take in one sample."""
        self.query.update(q_SHD)
        self.key.update(k_SGD)
        self.value.update(v_SGD)


class ChannelRange:
    """Running extremes of each channel, over all tokens."""

    def __init__(self) -> None:
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def update(self, x_TC: Tensor) -> None:
        """Take in more tokens."""
        lo, hi = torch.aminmax(x_TC, dim=0)
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def params(self, is_symmetric: bool, divisor_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and offset, (C,) float32 each, of the channels after division by `divisor_C`."""
        assert self.lo is not None and self.hi is not None
        lo, hi = (self.lo, self.hi) if divisor_C is None else (self.lo / divisor_C, self.hi / divisor_C)
        if not is_symmetric:
            return asymmetric(lo, hi)
        scale = symmetric(torch.maximum(lo.abs(), hi.abs()))
        return scale, torch.zeros_like(scale)


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
    """The channel ranges of one layer's cache; keys before RoPE, or after it, where they are used."""

    def __init__(self, observe: KVObserve) -> None:
        self._before = observe is KVObserve.PRE_ROPE
        self._key, self._value = ChannelRange(), ChannelRange()
        self._rotated: list[Tensor] = []  # kept only where the range was not taken from them

    def projections(self, k_TC: Tensor, v_TC: Tensor) -> None:
        """Take in the outputs of k_proj and v_proj."""
        self._value.update(v_TC)
        if self._before:
            self._key.update(k_TC)

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        """Take in one sample's rotated keys."""
        if self._before:
            self._rotated.append(k_SGD.flatten(1).clone())
        else:
            self._key.update(k_SGD.flatten(1))

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
        """Take in a sample; only the first counts."""
        if self.score is None:
            self.score = min(stretch_score(x) for x in (q_SHD, k_SGD, v_SGD))
