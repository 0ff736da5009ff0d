"""One decoder layer over a flattened batch, float32, whatever the linears store.

    x += o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x) * g
    x += down(silu(gate(m)) * up(m))                     m = rms_norm(x) * g'; or several of them: experts.py

A layer's linears are called in groups that read the same input, so that calibration can watch an input once.

Letters: T tokens of all sequences, E hidden size, F intermediate size, H query heads, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.model.reference.attention import Attention, KVCache, Rotation, apply_rope, rope_tables
from eightfold.model.reference.linear import Linear, W8A8MixLinear

# Where tokens come from; what reads a prompt and what generates may compute differently.
Origin = Literal["prompt", "generated"]


def spans_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return where sequences of the given lengths begin and end, one after the other."""
    spans, at = [], 0
    for length in lengths:
        spans.append((at, at + length))
        at += length
    return spans


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which sequence, where they stand in it, and whether they are the prompt's."""

    spans: Sequence[tuple[int, int]]  # (begin, end) of each sequence's tokens among the T
    prompt_lens: Sequence[int]  # how many of each sequence's tokens, from the first on, are the prompt's
    cos_TD: Tensor
    sin_TD: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        turns: Rotation,
        first_position: int = 0,
        prompt_lens: Sequence[int] | None = None,
    ) -> Batch:
        """Lay out sequences of the given lengths one after the other, each from `first_position` on.

        Without `prompt_lens` all tokens are prompts'.
        """
        spans = spans_of(lengths)
        positions = torch.cat([torch.arange(first_position, first_position + length) for length in lengths])
        return cls(spans, lengths if prompt_lens is None else prompt_lens, *rope_tables(positions, turns))

    def pick(self, rows_R: Tensor) -> Batch:
        """Return the batch of some of its tokens, whose indices are in ascending order."""
        spans, prompt_lens = [], []
        for (begin, end), prompt_len in zip(self.spans, self.prompt_lens, strict=True):
            bounds = torch.tensor([begin, begin + prompt_len, end], device=rows_R.device)
            first, generated, last = torch.searchsorted(rows_R, bounds).tolist()
            spans.append((first, last))
            prompt_lens.append(generated - first)
        return Batch(spans, prompt_lens, self.cos_TD[rows_R], self.sin_TD[rows_R])

    def generated_T(self) -> Tensor:
        generated = torch.zeros(self.spans[-1][1] if self.spans else 0, dtype=torch.bool)
        for (begin, end), prompt_len in zip(self.spans, self.prompt_lens, strict=True):
            generated[begin + prompt_len : end] = True
        return generated


# Reads (T, K), returns one (T, N) for each linear of the group.
GroupCall = Callable[[Tensor, Batch], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input."""

    linears: tuple[Linear, ...]

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(
            linear.by_origin(x_TK, batch.generated_T()) if isinstance(linear, W8A8MixLinear) else linear(x_TK)
            for linear in self.linears
        )


@dataclass(frozen=True)
class Norm:
    """rms_norm(x) * gain + bias."""

    gain: Tensor  # float32
    eps: float
    bias: Tensor | None = None  # what shifting outliers leaves behind

    def __call__(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.gain, self.eps)
        return y if self.bias is None else y + self.bias


# Reads (T, E), returns (T, E).
MLP = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, SwiGLU)."""

    gate_up: GroupCall
    down: GroupCall

    def __call__(self, x_TE: Tensor, batch: Batch) -> Tensor:
        gate, up = self.gate_up(x_TE, batch)
        (down,) = self.down(torch.nn.functional.silu(gate, inplace=True).mul_(up), batch)
        return down


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    config: ModelConfig
    input_norm: Norm  # E
    post_norm: Norm  # E
    q_norm: Norm | None  # D
    k_norm: Norm | None  # D
    qkv: GroupCall
    attention: Attention
    o: GroupCall
    mlp: MLP

    def __call__(self, x_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Return the layer's output, (T, E). `caches`: one for each sequence, which must then be one token run each."""
        x_TE = x_TE + self._attend(self.input_norm(x_TE), batch, caches)
        return x_TE + self.mlp(self.post_norm(x_TE), batch)

    def _attend(self, n_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None) -> Tensor:
        dim = self.config.head_dim
        q, k, v = (y.reshape(len(y), -1, dim) for y in self.qkv(n_TE, batch))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, batch.cos_TD, batch.sin_TD)
        k = apply_rope(k, batch.cos_TD, batch.sin_TD)
        out = torch.empty_like(q)
        for i, (begin, end) in enumerate(batch.spans):
            cache = None if caches is None else caches[i]
            out[begin:end] = self.attention(q[begin:end], k[begin:end], v[begin:end], cache, batch.prompt_lens[i])
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
    block: Block,
    hidden_TE: Tensor,
    lengths: Sequence[int],
    turns: Rotation,
    origin: Origin = "prompt",
    max_tokens: int = 2048,
) -> None:
    """Run one layer over many whole sequences, a few thousand tokens at a time. Modifies `hidden_TE`.

    The cut into batches changes no result that is not also changed by a matrix library's own blocking: sequences
    never see each other.
    """
    at = 0
    for group in token_batches(lengths, max_tokens):
        sizes = [lengths[index] for index in group]
        piece = hidden_TE[at : at + sum(sizes)]
        batch = Batch.of(sizes, turns, prompt_lens=None if origin == "prompt" else [0] * len(sizes))
        piece.copy_(block(piece, batch))
        at += sum(sizes)
