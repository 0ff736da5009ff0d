"""One decoder layer over a flattened batch, float32, whatever the linears store.

    x += o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x) * g
    x += down(silu(gate(m)) * up(m))                     m = rms_norm(x) * g'; or several of them: experts.py

Some families have norms behind attention and MLP too, or only there, add a fraction of what those give, or gate with
gelu (ModelConfig says which).

A layer's linears are called in groups that read the same input, so that calibration can watch an input once.

Letters: T tokens of all sequences, E hidden size, F intermediate size, H query heads, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eightfold.config import Activation, ModelConfig
from eightfold.families import Rows
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


class Turns(NamedTuple):
    """How positions turn keys and queries in all layers, or in all but those that slide, which have their own way."""

    all: Rotation
    local: Rotation | None = None


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which sequence, where they stand in it, and whether they are the prompt's."""

    spans: Sequence[tuple[int, int]]  # (begin, end) of each sequence's tokens among the T
    prompt_lens: Sequence[int]  # how many of each sequence's tokens, from the first on, are the prompt's
    cos_TD: Tensor
    sin_TD: Tensor
    local: tuple[Tensor, Tensor] | None = None  # cos and sin of layers that slide, where they turn in another way
    is_interleaved: bool = False

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        turns: Turns,
        first_position: int = 0,
        prompt_lens: Sequence[int] | None = None,
    ) -> Batch:
        """Lay out sequences of the given lengths one after the other, each from `first_position` on.

        Without `prompt_lens` all tokens are prompts'.
        """
        spans = spans_of(lengths)
        positions = torch.cat([torch.arange(first_position, first_position + length) for length in lengths])
        local = None if turns.local is None else rope_tables(positions, turns.local)
        known = lengths if prompt_lens is None else prompt_lens
        return cls(spans, known, *rope_tables(positions, turns.all), local, turns.all.is_interleaved)

    def turn(self, x_THD: Tensor, *, slides: bool) -> Tensor:
        """Turn queries or keys of a layer as their positions say."""
        cos_TD, sin_TD = self.local if slides and self.local is not None else (self.cos_TD, self.sin_TD)
        return apply_rope(x_THD, cos_TD, sin_TD, is_interleaved=self.is_interleaved)

    def pick(self, rows_R: Tensor) -> Batch:
        """Return the batch of some of its tokens, whose indices are in ascending order."""
        spans, prompt_lens = [], []
        for (begin, end), prompt_len in zip(self.spans, self.prompt_lens, strict=True):
            bounds = torch.tensor([begin, begin + prompt_len, end], device=rows_R.device)
            first, generated, last = torch.searchsorted(rows_R, bounds).tolist()
            spans.append((first, last))
            prompt_lens.append(generated - first)
        return Batch(spans, prompt_lens, self.cos_TD[rows_R], self.sin_TD[rows_R])  # experts turn nothing

    def generated_T(self) -> Tensor:
        generated = torch.zeros(self.spans[-1][1] if self.spans else 0, dtype=torch.bool)
        for (begin, end), prompt_len in zip(self.spans, self.prompt_lens, strict=True):
            generated[begin + prompt_len : end] = True
        return generated


# Reads (T, K), returns one (T, N) for each linear of the group, and for each part of one that is several.
GroupCall = Callable[[Tensor, Batch], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input; `parts`: where one is several, the rows of each."""

    linears: tuple[Linear, ...]
    parts: tuple[Rows, ...] = ()

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        found = tuple(
            linear.by_origin(x_TK, batch.generated_T()) if isinstance(linear, W8A8MixLinear) else linear(x_TK)
            for linear in self.linears
        )
        return in_parts(found, self.parts)


def in_parts(found: tuple[Tensor, ...], parts: tuple[Rows, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of linears, (T, N) each, those of one that is several apart."""
    return tuple(_columns(found[0], part) for part in parts) or found


def _columns(y_TN: Tensor, rows: Rows) -> Tensor:
    own = slice(rows.first, rows.first + rows.size)
    return y_TN[:, own] if rows.blocks == 1 else y_TN.view(-1, rows.blocks, rows.stride)[:, :, own].flatten(1)


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
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, SwiGLU), or the same with gelu (GEGLU)."""

    gate_up: GroupCall
    down: GroupCall
    activation: Activation = "silu"

    def __call__(self, x_TE: Tensor, batch: Batch) -> Tensor:
        gate, up = self.gate_up(x_TE, batch)
        keeps = gate.requires_grad  # a gradient will need what is there
        if self.activation == "gelu_tanh":
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
        else:
            gate = torch.nn.functional.silu(gate, inplace=not keeps)
        (down,) = self.down(gate * up if keeps else gate.mul_(up), batch)
        return down


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    config: ModelConfig
    norms: Mapping[str, Norm]  # by their names inside the layer
    qkv: GroupCall
    attention: Attention
    o: GroupCall
    mlp: MLP
    slides: bool = False

    def __call__(self, x_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Return the layer's output, (T, E). `caches`: one for each sequence, which must then be one token run each."""
        names = self.config.names
        attended = self._attend(self._normed(names.before_attention, x_TE), batch, caches)
        x_TE = x_TE + self._added(names.after_attention, attended)
        return x_TE + self._added(names.after_ffn, self.mlp(self._normed(names.before_ffn, x_TE), batch))

    def _normed(self, norm: str, x: Tensor) -> Tensor:
        return self.norms[norm](x) if norm else x

    def _added(self, norm: str, y_TE: Tensor) -> Tensor:
        """Return what is added to the hidden states of what attention or MLP gave."""
        factor = self.config.residual_multiplier
        return self._normed(norm, y_TE) if factor == 1 else self._normed(norm, y_TE) * factor

    def _attend(self, n_TE: Tensor, batch: Batch, caches: Sequence[KVCache] | None) -> Tensor:
        dim, names, over = self.config.head_dim, self.config.names, self.config.qk_norm
        q, k, v = self.qkv(n_TE, batch)
        if over == "width":
            q, k = self.norms[names.q_norm](q), self.norms[names.k_norm](k)
        q, k, v = (y.reshape(len(y), -1, dim) for y in (q, k, v))
        if over == "head":
            q, k = self.norms[names.q_norm](q), self.norms[names.k_norm](k)
        q, k = batch.turn(q, slides=self.slides), batch.turn(k, slides=self.slides)
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
    turns: Turns,
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
