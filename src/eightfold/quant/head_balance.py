"""FAQuant: channels of queries, keys and values, scaled so that one scale for a whole head loses less.

    q' = s q      k' = k / s              for each pair of channels that RoPE turns together
    s             of least  sum_h  Q_h^2 sum_i e_i / s_i^2  +  K^2 sum_i f_hi s_i^2
                  Q_h = max_i q_hi s_i,  K = max_i k_i / s_i

A factor of a pair commutes with its turn, so q' . k' = q . k; factors go into the rows of q_proj and k_proj, where each
row has a scale of its own: they cost nothing. The query heads that share a key share s. Channels that RoPE leaves alone
are pairs too, by halves. To turn pairs by a fixed angle as well makes ranges smaller, but mixes large rows of weights
into small ones, whose rounding then costs more than is gained (docs/log.md).

One scale holds the largest channel, and rounds all others as coarsely. A model whose keys have a large bias in a few
pairs (Qwen2) cannot be quantized so at all; s takes the bias from keys to queries. The sum is the variance of a
product's error, but for a factor: that of rounded queries, of which what is common to all keys of a text does not
count, since softmax does not see it, and that of rounded keys.

s is searched over Q_h = t r_h and K = 1. Given these, each s_i has its best value, unless k_i or a Q_h bounds it:

    s_i^2 = (t^2 sum_h r_h^2 e_i / sum_h f_hi) ** (1/2)     within  k_i <= s_i <= t min_h r_h / q_hi

t is one of STEPS, from the least that leaves every channel room; r_h begins with the largest channel of each head, and
is what the best s makes of it, ROUNDS times.

Values: v' = v / r and W' = W r, rows of v_proj and columns of o_proj, on top of what smoothing does with both. That
makes the channels equal that o_proj reads, after attention has averaged them; those of the values, which are rounded
before, still differ. To make them equal instead costs o_proj's input as much as it gains, so only the channels of a
head that stand out become smaller:

    r_i = max(1, v_i / t)      t of least  (CONCENTRATION t^2 / (12 127^2) + n) sum_i w_i r_i^2

The sum is the variance of o_proj's outputs: that of rounded values, and that of its own rounded input.

Letters: H query heads, G key/value heads, Q query heads sharing one, D head_dim, I = D / 2 pairs, N rows,
S tokens of one sample; q, k largest |x| of a pair; e variance of a key's pair within a text; f square of a query's;
v largest |x| of a smoothed value's channel; w square of all weights that read it; n variance of o_proj's input when it
is rounded.

Ours; SmoothQuant (Xiao et al. 2023, arXiv:2211.10438) moves scales in the same way, QServe (Lin et al. 2024,
arXiv:2405.04532, section 4.2) those of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.families import InputGroup
from eightfold.model.reference.linear import Q_MAX

STEPS, ROUNDS = 64, 3

# Mean of the sum of squares of a row of probabilities: what is left of the variance of a value's rounding error when it
# is averaged. In the heads of SmolLM2 that is 0.03 to 0.9, in those of Qwen2.5-Coder-0.5B 0.1 to 0.3.
CONCENTRATION = 0.25

_TINY = 1e-12


@dataclass(frozen=True)
class HeadBalance:
    """What FAQuant changes of a layer's heads.

    Attributes:
        values: what the channels of values are divided by, and those that o_proj reads multiplied by, (G, D) float32.
        pairs: what the pairs of keys are divided by, and those of their queries multiplied by, (G, I) float32; None
            where they stay.
    """

    values: Tensor
    pairs: Tensor | None = None

    @property
    def note(self) -> str:
        """What was chosen, for a report."""
        note = f"values scaled by up to {self.values.max():.2g}"
        if self.pairs is None:
            return note
        return f"{note}, pairs of queries and keys by {self.pairs.min():.2g} to {self.pairs.max():.2g}"


def can_balance(config: ModelConfig) -> bool:
    """Return whether nothing but RoPE stands between the linears of queries and keys and their product."""
    return config.qk_norm == "none"


def channel_pairs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the two channels of each pair of a head, (I,) int64 each."""
    turned, rest = config.rotary_dim, torch.arange(config.rotary_dim, config.head_dim)
    channels = torch.arange(turned)
    pairs = (channels[::2], channels[1::2]) if config.rotary_interleaved else channels.chunk(2)
    return torch.cat((pairs[0], rest[: len(rest) // 2])), torch.cat((pairs[1], rest[len(rest) // 2 :]))


class HeadObserver:
    """Sees the rotated queries and keys and the values of one layer, and finds how to balance them."""

    def __init__(self, config: ModelConfig) -> None:
        self._has_pairs = can_balance(config)
        self._first, self._second = channel_pairs(config)
        self._absmax = [torch.zeros(())] * 3  # of q and k, (heads, I), and of v, (G, D)
        self._energy: tuple[list[Tensor], list[Tensor]] = ([], [])  # (heads, I) of each sample

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> None:
        energy = q_SHD.square().sum(0), (k_SGD - k_SGD.mean(0)).square().sum(0)
        absmax = [*(self._largest(x.abs().amax(0)) for x in (q_SHD, k_SGD)), v_SGD.abs().amax(0)]
        self._take(absmax, [[self._both(x)] for x in energy])

    def merge(self, other: HeadObserver) -> None:
        self._take(other._absmax, other._energy)

    def _take(self, absmax: Sequence[Tensor], energy: Sequence[list[Tensor]]) -> None:
        self._absmax = [torch.maximum(*pair) for pair in zip(self._absmax, absmax, strict=True)]
        for own, others in zip(self._energy, energy, strict=True):
            own += others

    def _both(self, energy_hD: Tensor) -> Tensor:
        return energy_hD[:, self._first] + energy_hD[:, self._second]

    def _largest(self, absmax_hD: Tensor) -> Tensor:
        return torch.maximum(absmax_hD[:, self._first], absmax_hD[:, self._second])

    def balance(self, weights_GD: Tensor, divisor_GD: Tensor, input_noise: float) -> HeadBalance:
        """Return the best of all; at least one sample must have been seen.

        Args:
            weights_GD: squares of the smoothed weights that read a channel of values, summed.
            divisor_GD: what smoothing divides values by.
            input_noise: variance of o_proj's smoothed input when it is rounded.
        """
        values = value_scale(self._absmax[2] / divisor_GD, weights_GD, input_noise)
        return HeadBalance(values, self._pairs() if self._has_pairs else None)

    def _pairs(self) -> Tensor:
        q_HI, k_GI = self._absmax[:2]
        # Added in the order of their sizes: in whichever order samples came, the same bits.
        f_HI, e_GI = (torch.stack(samples).sort(0).values.sum(0) for samples in self._energy)
        q_GQI, f_GQI = (x.view(len(k_GI), -1, k_GI.shape[1]) for x in (q_HI, f_HI))
        return best_scale(q_GQI, k_GI, f_GQI, e_GI)


def value_noise(scale: Tensor, v: Tensor, w: Tensor, input_noise: float) -> Tensor:
    """Return the sum that `scale`, (..., G, D), should make small, (..., G); v and w: (G, D)."""
    step = (v / scale).amax(-1) / Q_MAX
    return (CONCENTRATION * step.square() / 12 + input_noise) * (w * scale.square()).sum(-1)


def value_scale(v: Tensor, w: Tensor, input_noise: float) -> Tensor:
    """Return the scale of each channel of values, (G, D), at least 1; see value_noise()."""
    largest_G1 = v.amax(-1, keepdim=True).clamp(min=_TINY)
    tried = (v / (largest_G1 * torch.logspace(-2, 0, STEPS)[:, None, None])).clamp(min=1)  # (STEPS, G, D)
    at_G = value_noise(tried, v, w, input_noise).argmin(0)
    return tried[at_G, torch.arange(len(v))]


def product_noise(scale: Tensor, q: Tensor, k: Tensor, f: Tensor, e: Tensor) -> Tensor:
    """Return the sum that `scale` should make small, (..., G).

    Args:
        scale: (..., G, I).
        q, f: (G, Q, I).
        k, e: (G, I).
    """
    of_queries = (q * scale[..., None, :]).amax(-1).square() * (e / scale.square()).sum(-1, keepdim=True)
    of_keys = (k / scale).amax(-1, keepdim=True).square() * (f * scale[..., None, :].square()).sum(-1)
    return (of_queries + of_keys).sum(-1)


def best_scale(q: Tensor, k: Tensor, f: Tensor, e: Tensor) -> Tensor:
    """Return the scale of each pair, (G, I), 1 in the geometric mean of a head; see product_noise()."""
    # What never moves needs no room, but a finite scale.
    q, k = (x.clamp(min=_TINY).maximum(x.amax((-2, -1), keepdim=True) * 1e-4) for x in (q, k))
    f, e = f.clamp(min=_TINY), e.clamp(min=_TINY)
    found = torch.ones_like(k)
    least = product_noise(found, q, k, f, e)
    relative_GQ = q.amax(-1)
    for _ in range(ROUNDS):
        bound_GI = (relative_GQ[..., None] / q).amin(1)
        first_G1 = (k / bound_GI).amax(-1, keepdim=True)  # the least t
        t = first_G1 * torch.logspace(0, 2, STEPS)[:, None, None]  # (STEPS, G, 1)
        free = (t.square() * relative_GQ.square().sum(-1, keepdim=True) * e / f.sum(1)) ** 0.25
        tried = torch.minimum(torch.maximum(free, k), t * bound_GI)  # (STEPS, G, I)
        noise, at = product_noise(tried, q, k, f, e).min(0)
        chosen = tried.gather(0, at[None, :, None].expand(1, *k.shape))[0]
        found = torch.where((noise < least)[:, None], chosen, found)
        least = torch.minimum(noise, least)
        relative_GQ = (q * chosen[:, None]).amax(-1)
    return found / found.log().mean(-1, keepdim=True).exp()


def row_divisors(config: ModelConfig, group: InputGroup, found: HeadBalance) -> dict[str, Tensor]:
    """Return what the rows of the linears of queries, keys and values are divided by, (N,), by the linears' names."""
    divisors = [None, None, found.values.flatten()]
    if found.pairs is not None:
        first, second = channel_pairs(config)
        keys_GD = torch.empty_like(found.values)
        keys_GD[:, first], keys_GD[:, second] = found.pairs, found.pairs
        queries_HD = keys_GD.repeat_interleave(config.num_heads // config.num_kv_heads, 0)
        divisors[:2] = queries_HD.reciprocal().flatten(), keys_GD.flatten()
    if not group.parts:
        pairs = zip(group.linears, divisors, strict=True)
        return {linear.name: rows for linear, rows in pairs if rows is not None}
    (linear,) = group.linears
    whole = torch.ones(linear.n)
    for part, rows in zip(group.parts, divisors, strict=True):
        if rows is not None:
            whole[part.indices()] = rows
    return {linear.name: whole}
