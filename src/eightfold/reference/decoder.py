"""One decoder layer over a flattened batch, float32, whatever the linears store.

    x += o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x) * g
    x += down(silu(gate(m)) * up(m))                     m = rms_norm(x) * g'

A layer's linears are called in groups that read the same input, so that calibration can watch an input once.

Letters: T tokens of all sequences, E hidden size, F intermediate size, H query heads, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.reference.attention import apply_rope, attend, rope_tables
from eightfold.reference.linear import Linear


class KVCache:
    """Rotated keys and values of one sequence in one layer, (capacity, G, D) float32 each."""

    def __init__(self, capacity: int, num_kv_heads: int, head_dim: int) -> None:
        self._keys = torch.empty(capacity, num_kv_heads, head_dim)
        self._values = torch.empty(capacity, num_kv_heads, head_dim)
        self.context_len = 0

    def append(self, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; return the keys and values of the whole context."""
        end = self.context_len + k_SGD.shape[0]
        self._keys[self.context_len : end] = k_SGD
        self._values[self.context_len : end] = v_SGD
        self.context_len = end
        return self._keys[:end], self._values[:end]


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which sequence, and where they stand in it."""

    spans: Sequence[tuple[int, int]]  # (begin, end) of each sequence's tokens among the T
    cos_TD: Tensor
    sin_TD: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], inv_freq: Tensor, first_position: int = 0) -> Batch:
        """Lay out sequences of the given lengths one after the other, each from `first_position` on."""
        spans, at = [], 0
        for length in lengths:
            spans.append((at, at + length))
            at += length
        positions = torch.cat([torch.arange(first_position, first_position + length) for length in lengths])
        return cls(spans, *rope_tables(positions, inv_freq))


# Reads (T, K), returns one (T, N) for each linear of the group.
GroupCall = Callable[[Tensor, Batch], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input."""

    linears: tuple[Linear, ...]

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return every linear's output."""
        return tuple(linear(x_TK) for linear in self.linears)


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    config: ModelConfig
    window: int | None
    input_norm: Tensor  # (E,)
    post_norm: Tensor  # (E,)
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None  # (D,)
    qkv: GroupCall
    o: GroupCall
    gate_up: GroupCall
    down: GroupCall

    def __call__(self, x_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Return the layer's output, (T, E). `caches`: one for each sequence, which must then be one token run each."""
        x_TE = x_TE + self._attention(rms_norm(x_TE, self.input_norm, self.config.rms_norm_eps), batch, caches)
        gate, up = self.gate_up(rms_norm(x_TE, self.post_norm, self.config.rms_norm_eps), batch)
        (down,) = self.down(torch.nn.functional.silu(gate, inplace=True).mul_(up), batch)
        return x_TE + down

    def _attention(self, n_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None) -> Tensor:
        dim = self.config.head_dim
        q, k, v = (y.reshape(len(y), -1, dim) for y in self.qkv(n_TE, batch))
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm, self.config.rms_norm_eps)
        q = apply_rope(q, batch.cos_TD, batch.sin_TD)
        k = apply_rope(k, batch.cos_TD, batch.sin_TD)
        out = torch.empty_like(q)
        for i, (begin, end) in enumerate(batch.spans):
            keys, values = k[begin:end], v[begin:end]
            if caches is not None:
                keys, values = caches[i].append(keys, values)
            out[begin:end] = attend(q[begin:end], keys, values, self.window)
        (projected,) = self.o(out.flatten(1), batch)
        return projected


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group consecutive sequences (by index) so that a group holds at most `max_tokens`, or one longer sequence."""
    groups: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not groups or filled + length > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += length
    return groups


def apply_block_(
    block: Block, hidden_TE: Tensor, lengths: Sequence[int], inv_freq: Tensor, max_tokens: int = 2048
) -> None:
    """Run one layer over many sequences, a few thousand tokens at a time. Modifies `hidden_TE`.

    The cut into batches changes no result that is not also changed by a matrix library's own blocking: sequences
    never see each other.
    """
    at = 0
    for group in token_batches(lengths, max_tokens):
        sizes = [lengths[index] for index in group]
        piece = hidden_TE[at : at + sum(sizes)]
        piece.copy_(block(piece, Batch.of(sizes, inv_freq)))
        at += sum(sizes)
