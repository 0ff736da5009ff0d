"""Rotary embedding and causal attention over one sequence.

    rope(x, p) = x cos(p f) + rotate_half(x) sin(p f)        f_i = theta**(-2 i / D), i < D/2
    O_h        = softmax(Q_h K_g^T / sqrt(D) + mask) V_g     g = h // (H / G)

Letters: S new tokens, C context tokens (the new ones are the last S), H query heads, G kv heads, D head_dim.

Source: RoFormer, Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eightfold.config import RopeParameters
from eightfold.model.layers import stretch_frequencies


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Return (D/2,) float32 angles for one position, after stretching for long contexts."""
    # torch and numpy round powers differently in their last bit, so each backend takes its own.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    plain = 1.0 / (rope.rope_theta**exponents)
    return torch.from_numpy(stretch_frequencies(plain.numpy(), rope)).to(torch.get_default_device())


def rope_tables(positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (T, D) float32, for int64 positions (T,)."""
    angles = positions_T.to(torch.float32)[:, None] * inv_freq[None, :]
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos(), doubled.sin()


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each head of (T, heads, D)."""
    first, second = x_THD.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_THD * cos_TD[:, None] + rotated * sin_TD[:, None]


def attend(q_SHD: Tensor, k_CGD: Tensor, v_CGD: Tensor, window: int | None) -> Tensor:
    """Return causal attention of the last S tokens over all C, as (S, H, D) float32.

    Args:
        q_SHD: rotated queries.
        k_CGD: rotated keys of the whole context.
        v_CGD: values of the whole context.
        window: how many positions a query sees, itself included; None for all.
    """
    new, heads, _ = q_SHD.shape
    context, kv_heads, _ = k_CGD.shape
    q = q_SHD.transpose(0, 1)[None]
    k = k_CGD.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)[None]
    v = v_CGD.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)[None]
    slides = window is not None and window < context
    if new == context and not slides:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif new == 1 and not slides:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        mask = visible(new, context, window)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def visible(new: int, context: int, window: int | None) -> Tensor:
    """Return which of C positions each of the last S tokens sees, (S, C) bool."""
    query = torch.arange(context - new, context)[:, None]
    key = torch.arange(context)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
