"""Rotary embedding, key/value caches, and causal attention over them: float, C8 (int8 cache), FAQuant (all int8).

    rope     x cos(p f) + rotate_half(x) sin(p f)               position p, f_i = theta**(-2 i / R), i < R/2
    float    O_h = softmax(cap(Q_h K_g^T / sqrt(D)) + mask) V_g   g = h // (H / G)
    C8       k8 = clamp(rne(k / k_scale[c] + k_offset[c]))      read as (k8 - k_offset) * k_scale, v likewise
    FAQuant  S = (q8 . K8) * q_scale[h] * k_scale[g] / sqrt(D) + mask
             m_b = max of S over key block b,  P8_b = rne(255 exp(S_b - m_b))
             O = v_scale[g] * sum_b e^(m_b - m) (P8_b . V8_b)  /  sum_b e^(m_b - m) sum P8_b

Some families turn only the first R channels of a head, or turn neighbours (2 i, 2 i + 1) together in place of
(i, i + R/2); some have another factor than 1 / sqrt(D), or cap scores: cap(x) = c tanh(x / c).

Divisions by a scale are products with its float32 reciprocal, taken once. Key blocks are BLOCK positions long and start
at multiples of BLOCK, so each row has its own scale of probabilities in each block: a long context loses no more than a
short one. Probabilities are normalized by their quantized sum.

Two modes. `cache`: every token, of a prompt or generated, attends over what the cache holds; results do not depend on
how a prompt is cut. `mindie`: a prompt's tokens attend in float over the fresh keys and values (and over what the cache
holds of earlier ones); only generated tokens read everything from the cache.

Letters: S new tokens, C context tokens (the new ones are the last S), H query heads, G kv heads, D head_dim.

Source: RoFormer, Su et al. 2021, arXiv:2104.09864; the flow of MindIE's fused attention; the online softmax over blocks
is FlashAttention's (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from eightfold.model.layers import rope_base, rope_scale, stretch_frequencies
from eightfold.model.reference.linear import to_int8_
from eightfold.rope import RopeParameters

AttentionMode = Literal["cache", "mindie"]

# Key positions that share one scale of probabilities; also the cache block of MindIE.
BLOCK = 128

# Probabilities are never negative, so all 8 bits count.
P_MAX = 255

# Queries whose scores are held at a time.
_QUERY_ROWS = 256


class Rotation(NamedTuple):
    """How positions turn keys and queries.

    Attributes:
        inv_freq: (R/2,) float32 angles for one position.
        scale: what the turned grow by.
        is_interleaved: whether neighbours are pairs.
    """

    inv_freq: Tensor
    scale: float = 1.0
    is_interleaved: bool = False


def rotation(rope: RopeParameters, rotary_dim: int, longest: int, *, is_interleaved: bool = False) -> Rotation:
    """Return the rotation of a model whose longest sequence has so many positions; see layers.inverse_frequencies."""
    # torch and numpy round powers differently in their last bit, so each backend takes its own.
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / rotary_dim
    periods = rope_base(rope, rotary_dim, longest) ** exponents
    inv_freq = torch.from_numpy(stretch_frequencies(periods.numpy(), rope, longest))
    return Rotation(inv_freq.to(torch.get_default_device()), rope_scale(rope), is_interleaved)


def rope_tables(positions_T: Tensor, turns: Rotation) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (T, R) float32, for int64 positions (T,)."""
    angles = positions_T.to(torch.float32)[:, None] * turns.inv_freq[None, :]
    doubled = angles.repeat_interleave(2, dim=-1) if turns.is_interleaved else torch.cat((angles, angles), dim=-1)
    return doubled.cos() * turns.scale, doubled.sin() * turns.scale


def apply_rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Rotate the first R channels of each head of (T, heads, D)."""
    size = cos_TR.shape[-1]
    turned, kept = x_THD[..., :size], x_THD[..., size:]
    if is_interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    out = turned * cos_TR[:, None] + rotated * sin_TR[:, None]
    return torch.cat((out, kept), dim=-1) if kept.shape[-1] else out


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118, section 2); x itself where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


class Scoring(NamedTuple):
    """How a query's products with keys become scores: their factor, 1 / sqrt(D) where there is none, and their cap."""

    factor: float | None = None
    cap: float | None = None


PLAIN = Scoring()


def attend(q_SHD: Tensor, k_CGD: Tensor, v_CGD: Tensor, window: int | None, scoring: Scoring = PLAIN) -> Tensor:
    """Return causal attention of the last S tokens over all C, as (S, H, D) float32.

    Args:
        q_SHD: rotated queries.
        k_CGD: rotated keys of the whole context.
        v_CGD: values of the whole context.
        window: how many positions a query sees, itself included; None for all.
        scoring: see there.
    """
    new, heads, _ = q_SHD.shape
    context, kv_heads, _ = k_CGD.shape
    q = q_SHD.transpose(0, 1)[None]
    k = k_CGD.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)[None]
    v = v_CGD.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)[None]
    slides = window is not None and window < context
    if scoring.cap is not None:
        return _attend_capped(q[0], k[0], v[0], visible(new, context, window), scoring)
    if new == context and not slides:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.factor)
    elif new == 1 and not slides:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scoring.factor)
    else:
        mask = visible(new, context, window)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.factor)
    return out[0].transpose(0, 1)


def _attend_capped(q_HSD: Tensor, k_HCD: Tensor, v_HCD: Tensor, mask_SC: Tensor, scoring: Scoring) -> Tensor:
    out = torch.empty_like(q_HSD)
    factor = q_HSD.shape[-1] ** -0.5 if scoring.factor is None else scoring.factor
    for at in range(0, q_HSD.shape[1], _QUERY_ROWS):
        rows = slice(at, at + _QUERY_ROWS)
        scores = soft_cap(q_HSD[:, rows] @ k_HCD.transpose(1, 2) * factor, scoring.cap)
        out[:, rows] = scores.masked_fill_(~mask_SC[rows], -math.inf).softmax(-1) @ v_HCD
    return out.transpose(0, 1)


def visible(new: int, context: int, window: int | None) -> Tensor:
    """Return which of C positions each of the last S tokens sees, (S, C) bool."""
    query = torch.arange(context - new, context)[:, None]
    key = torch.arange(context)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


class KVCache:
    """Rotated keys and values of one sequence in one layer, (capacity, G, D) each."""

    def __init__(self, capacity: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self._keys = torch.empty(capacity, num_kv_heads, head_dim, dtype=dtype)
        self._values = torch.empty(capacity, num_kv_heads, head_dim, dtype=dtype)
        self.context_len = 0

    def append(self, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; return the keys and values of the whole context."""
        end = self.context_len + k_SGD.shape[0]
        self._keys[self.context_len : end] = k_SGD
        self._values[self.context_len : end] = v_SGD
        self.context_len = end
        return self._keys[:end], self._values[:end]


class Attention(Protocol):
    """Causal attention of one sequence's new tokens."""

    cache_dtype: torch.dtype

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cache: KVCache | None, prompt_len: int) -> Tensor:
        """Return (S, H, D) float32.

        Args:
            q_SHD: rotated queries, float32.
            k_SGD: rotated keys, float32.
            v_SGD: values, float32.
            cache: earlier tokens, to which the new ones are added; None when there are none.
            prompt_len: how many of the S tokens, from the first on, belong to the prompt; the rest was generated.
        """
        ...


@dataclass(frozen=True)
class FloatAttention:
    """Nothing is quantized."""

    window: int | None = None
    scoring: Scoring = PLAIN
    cache_dtype = torch.float32

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cache: KVCache | None, prompt_len: int) -> Tensor:
        k, v = (k_SGD, v_SGD) if cache is None else cache.append(k_SGD, v_SGD)
        return attend(q_SHD, k, v, self.window, self.scoring)


@dataclass(frozen=True)
class ChannelScale:
    """int8 parameters of a key or value, (G, D) float32 each; for one scale a head, constant along D."""

    scale: Tensor
    offset: Tensor

    def quantize(self, x_SGD: Tensor) -> Tensor:
        return to_int8_(x_SGD * self.scale.reciprocal(), self.offset)

    def real(self, q_SGD: Tensor) -> Tensor:
        return (q_SGD.to(torch.float32) - self.offset) * self.scale


@dataclass(frozen=True, kw_only=True)
class QuantizedAttention:
    """What C8 and FAQuant share: an int8 cache, and float attention over fresh tokens in mode `mindie`."""

    key: ChannelScale
    value: ChannelScale
    mode: AttentionMode = "cache"
    window: int | None = None
    scoring: Scoring = PLAIN
    cache_dtype = torch.int8

    def __call__(self, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, cache: KVCache | None, prompt_len: int) -> Tensor:
        new = len(q_SHD)
        k8, v8 = self.key.quantize(k_SGD), self.value.quantize(v_SGD)
        if cache is not None:
            k8, v8 = cache.append(k8, v8)
        fresh = prompt_len if self.mode == "mindie" else 0
        if not fresh:
            return self.over_cache(q_SHD, k8, v8)
        old = len(k8) - new
        keys = torch.cat((self.key.real(k8[:old]), k_SGD[:fresh]))
        values = torch.cat((self.value.real(v8[:old]), v_SGD[:fresh]))
        out = attend(q_SHD[:fresh], keys, values, self.window, self.scoring)
        return out if fresh == new else torch.cat((out, self.over_cache(q_SHD[fresh:], k8, v8)))

    def over_cache(self, q_SHD: Tensor, k8_CGD: Tensor, v8_CGD: Tensor) -> Tensor:
        """Return attention of the last S tokens over int8 keys and values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class C8Attention(QuantizedAttention):
    """Keys and values are read back to float; queries and probabilities stay float."""

    def over_cache(self, q_SHD: Tensor, k8_CGD: Tensor, v8_CGD: Tensor) -> Tensor:
        return attend(q_SHD, self.key.real(k8_CGD), self.value.real(v8_CGD), self.window, self.scoring)


@dataclass(frozen=True, kw_only=True)
class FAQuantAttention(QuantizedAttention):
    """Both products are of integers; scales are symmetric, one for each head."""

    query_scale_H: Tensor  # (H,) float32

    def over_cache(self, q_SHD: Tensor, k8_CGD: Tensor, v8_CGD: Tensor) -> Tensor:
        _, heads, dim = q_SHD.shape
        q8_SHD = to_int8_(q_SHD * self.query_scale_H.reciprocal()[:, None], torch.zeros(()))
        sharing = heads // k8_CGD.shape[1]
        key_scale_H = self.key.scale[:, 0].repeat_interleave(sharing)
        value_scale_H = self.value.scale[:, 0].repeat_interleave(sharing)
        factor = 1 / math.sqrt(dim) if self.scoring.factor is None else self.scoring.factor
        score_scale_H = self.query_scale_H * key_scale_H * factor
        out = attend_int8(q8_SHD, k8_CGD, v8_CGD, score_scale_H, self.window, self.scoring.cap)
        return out * value_scale_H[:, None]


def attend_int8(
    q8_SHD: Tensor,
    k8_CGD: Tensor,
    v8_CGD: Tensor,
    score_scale_H: Tensor,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    """Return causal attention of the last S tokens in units of the value scale, (S, H, D) float32.

    All integer products are exact: 127 * 127 * D stays below 2**24 for D up to 1040, 255 * 128 * BLOCK does too.

    Args:
        q8_SHD: int8 queries.
        k8_CGD: int8 keys.
        v8_CGD: int8 values.
        score_scale_H: (H,) float32, from integer products to scores.
        window: how many positions a query sees, itself included; None for all.
        cap: of scores.
    """
    new, heads, dim = q8_SHD.shape
    context, kv_heads, _ = k8_CGD.shape
    blocks = -(-context // BLOCK)
    pad = (0, 0, 0, 0, 0, blocks * BLOCK - context)
    keys = torch.nn.functional.pad(k8_CGD, pad).to(torch.float32).permute(1, 2, 0)  # (G, D, blocks * BLOCK)
    values = torch.nn.functional.pad(v8_CGD, pad).to(torch.float32).transpose(0, 1)
    values = values.reshape(kv_heads, blocks, BLOCK, dim)
    out = torch.empty(new, heads, dim)
    for at in range(0, new, _QUERY_ROWS):
        end = min(at + _QUERY_ROWS, new)
        # Later blocks are hidden from all of these queries.
        seen = -(-(context - new + end) // BLOCK)
        mask = visible(new, context, window)[at:end]
        mask = torch.nn.functional.pad(mask, (0, blocks * BLOCK - context))[:, : seen * BLOCK]
        q = q8_SHD[at:end].to(torch.float32).permute(1, 0, 2).reshape(kv_heads, -1, dim)
        scores = (q @ keys[:, :, : seen * BLOCK]).reshape(heads, end - at, -1) * score_scale_H[:, None, None]
        scores = soft_cap(scores, cap)
        piece = _softmax_product(scores.masked_fill_(~mask, -math.inf), values[:, :seen])
        out[at:end] = piece.transpose(0, 1)
    return out


def _softmax_product(scores_HSC: Tensor, values_GbKD: Tensor) -> Tensor:
    """Return softmax(scores) @ values with probabilities of 8 bits without a sign, (H, S, D)."""
    heads, rows, _ = scores_HSC.shape
    kv_heads, blocks, _, dim = values_GbKD.shape
    scores = scores_HSC.reshape(heads, rows, blocks, BLOCK)
    block_max = scores.amax(-1)  # (H, S, b)
    # A block that a query does not see at all counts for nothing.
    safe_max = block_max.masked_fill(block_max == -math.inf, 0.0)
    p8 = torch.round((scores - safe_max[..., None]).exp_().mul_(P_MAX))
    weight = (block_max - block_max.amax(-1, keepdim=True)).exp()
    grouped = p8.reshape(kv_heads, -1, blocks, BLOCK).transpose(1, 2)  # (G, b, H / G * S, BLOCK)
    products = (grouped @ values_GbKD).transpose(1, 2).reshape(heads, rows, blocks, dim)
    total = (weight * p8.sum(-1)).sum(-1, keepdim=True)
    return (products * weight[..., None]).sum(2) / total
