"""Checkpoint -> decoder layers, one at a time or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eightfold.families import InputGroup, LinearShape, input_groups, slides, sliding_window
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import layers
from eightfold.model.reference.attention import (
    Attention,
    AttentionMode,
    C8Attention,
    ChannelScale,
    FAQuantAttention,
    FloatAttention,
    KVCache,
    Scoring,
    rotation,
    soft_cap,
)
from eightfold.model.reference.decoder import (
    MLP,
    Batch,
    Block,
    GatedMLP,
    GroupCall,
    LinearGroup,
    Norm,
    Origin,
    Turns,
    apply_block_,
)
from eightfold.model.reference.experts import Router, SharedExpert, SparseMLP
from eightfold.model.reference.linear import (
    DynamicMode,
    FloatLinear,
    Linear,
    W8A8DynamicLinear,
    W8A8Linear,
    W8A8MixLinear,
    W8A16Linear,
    release_widened,
)
from eightfold.model.reference.tensors import as_tensor, load_float32, mapped_tensor, picked_rows, require_finite
from eightfold.scheme import QuantType, weight_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _optional(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else as_tensor(values)


def _needed(values: NDArray[Any] | None) -> Tensor:
    assert values is not None, "the reader lets no file through that lacks it"
    return as_tensor(values)


def _static_linear(weight: Tensor, read: layers.Linear) -> W8A8Linear:
    inv_scale, offset = 1.0 / _needed(read.input_scale), _needed(read.input_offset)
    return W8A8Linear(weight, _needed(read.quant_bias), _needed(read.deq_scale), inv_scale, offset)


@dataclass(frozen=True)
class Decoder:
    """A checkpoint as a model whose layers are built when asked for.

    Attributes:
        checkpoint: where the tensors come from.
        dynamic: how W8A8_DYNAMIC quantizes a token.
        attention: what a prompt's tokens attend over when keys and values are quantized; see attention.py.
        longest: positions of the longest sequence, by which dynamic scaling and longrope turn keys; None: of those that
            are computed together, as in transformers, and the model's context where more may come.
    """

    checkpoint: Checkpoint
    dynamic: DynamicMode = "asymmetric"
    attention: AttentionMode = "cache"
    longest: int | None = None

    def turns(self, together: int | None = None) -> Turns:
        """Return how positions turn keys where sequences of up to so many positions are computed together."""
        config = self.checkpoint.config
        longest = self.longest or together or config.context
        ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
        interleaved = config.rotary_interleaved
        return Turns(*(rotation(rope, config.rotary_dim, longest, is_interleaved=interleaved) for rope in ropes))

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Return the embedding rows of token ids, (T, E) float32; only those rows are read.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        self.checkpoint.config.require_ids(token_ids)
        name = weight_name(self.checkpoint.config.names.embedding)
        rows = picked_rows(self.checkpoint, name, token_ids).to(torch.float32)
        if not torch.isfinite(rows).all():
            require_finite(mapped_tensor(self.checkpoint, name), name, self.checkpoint)
        rows = rows.to(torch.get_default_device())
        factor = self.checkpoint.config.embedding_multiplier
        return rows if factor == 1 else rows * factor

    def block(
        self,
        layer_idx: int,
        groups: Sequence[GroupCall] | None = None,
        attention: Attention | None = None,
        norms: Mapping[str, Norm] | None = None,
        mlp: MLP | None = None,
    ) -> Block:
        """Build one layer: as the checkpoint stores it, or with other parts in their place.

        Args:
            layer_idx: which.
            groups: calls of its linears, as input_groups() has them: those of a layer with experts are two.
            attention: what is between.
            norms: by name inside the layer.
            mlp: its MLP, or its experts, in place of what `groups` or the checkpoint has.
        """
        config = self.checkpoint.config
        qkv, o, *own = groups or [self.group(layer_idx, group) for group in input_groups(config, layer_idx)]
        return Block(
            config,
            norms or self.norms(layer_idx),
            qkv,
            attention or self.attend(layer_idx),
            o,
            mlp or (GatedMLP(own[0], own[1], config.activation) if own else self.sparse_mlp(layer_idx)),
            slides=slides(config, layer_idx),
        )

    def group(self, layer_idx: int, group: InputGroup) -> LinearGroup:
        """Build the linears of a layer that read one input."""
        prefix = self.checkpoint.config.names.layer(layer_idx)
        return LinearGroup(tuple(self.linear(prefix, linear) for linear in group.linears), group.parts)

    def sparse_mlp(self, layer_idx: int) -> SparseMLP:
        """Build one layer's experts as the checkpoint stores them."""
        read, sizes = layers.read_experts(self.checkpoint, layer_idx), self.checkpoint.config.experts
        assert read is not None and sizes is not None, "the layer has experts"
        router = Router(self._linear(read.router), sizes.per_token, sizes.normalizes)
        shared = None
        if read.shared is not None and read.shared_gate is not None:
            shared = SharedExpert(self._expert(read.shared), self._linear(read.shared_gate))
        return SparseMLP(router, [self._expert(expert) for expert in read.experts], shared)

    def _expert(self, read: layers.Expert) -> GatedMLP:
        gate, up, down = map(self._linear, read)
        return GatedMLP(LinearGroup((gate, up)), LinearGroup((down,)))

    def norms(self, layer_idx: int) -> dict[str, Norm]:
        return {name: self._norm(read) for name, read in layers.read_norms(self.checkpoint, layer_idx).items()}

    def _norm(self, read: layers.Norm) -> Norm:
        return Norm(as_tensor(read.gain), self.checkpoint.config.rms_norm_eps, _optional(read.bias))

    def attend(self, layer_idx: int) -> Attention:
        """Build one layer's attention as the checkpoint stores it.

        Raises:
            UnsupportedError: FAQuant with an offset that is not zero.
        """
        window, scoring = sliding_window(self.checkpoint.config, layer_idx), self.scoring
        read = layers.read_attention(self.checkpoint, layer_idx)
        if read.key is None or read.value is None:
            return FloatAttention(window, scoring)
        key, value = (
            ChannelScale(as_tensor(scale), torch.zeros(()) if offset is None else as_tensor(offset))
            for scale, offset in (read.key, read.value)
        )
        if read.query_scale is None:
            return C8Attention(key=key, value=value, mode=self.attention, window=window, scoring=scoring)
        return FAQuantAttention(
            key=key, value=value, mode=self.attention, window=window, scoring=scoring,
            query_scale_H=as_tensor(read.query_scale),
        )  # fmt: skip

    @property
    def scoring(self) -> Scoring:
        """How products of queries and keys become scores."""
        return Scoring(self.checkpoint.config.score_multiplier, self.checkpoint.config.attention_softcap)

    def linear(self, prefix: str, linear: LinearShape) -> Linear:
        return self._linear(layers.read_linear(self.checkpoint, prefix + linear.name, linear))

    def _linear(self, read: layers.Linear) -> Linear:
        weight, bias = as_tensor(read.weight), _optional(read.bias)
        if read.kind is QuantType.FLOAT:
            require_finite(weight, read.name, self.checkpoint)
            return FloatLinear(weight, bias)
        if read.kind is QuantType.W8A16:
            return W8A16Linear(weight, _needed(read.weight_scale)[:, None], _needed(read.weight_offset)[:, None], bias)
        if read.kind is QuantType.W8A8:
            return _static_linear(weight, read)
        weight_sum = weight.sum(1, dtype=torch.int32)
        by_token = W8A8DynamicLinear(weight, _needed(read.weight_scale), weight_sum, bias, self.dynamic)
        return (
            by_token if read.kind is QuantType.W8A8_DYNAMIC else W8A8MixLinear(by_token, _static_linear(weight, read))
        )

    def head(self) -> Head:
        read, config = layers.read_head(self.checkpoint), self.checkpoint.config
        is_float = read.kind is QuantType.FLOAT
        # Widened once: the head runs for every slice of tokens.
        linear = FloatLinear(load_float32(self.checkpoint, read.name), None) if is_float else self._linear(read)
        return Head(self.final_norm(), linear, config.logits_multiplier, config.logits_softcap)

    def final_norm(self) -> Norm:
        return self._norm(layers.read_norm(self.checkpoint, self.checkpoint.config.names.final_norm))

    def release_block(self, layer_idx: int) -> None:
        """Let go of the memory in which a layer's stored tensors were read and widened."""
        self.checkpoint.release(self.checkpoint.layer_tensors(self.checkpoint.config.names.layer(layer_idx)))
        release_widened()

    @torch.inference_mode()
    def hidden_states(
        self,
        sequences: Sequence[Sequence[int]],
        on_layer: Callable[[], None] = lambda: None,
        origin: Origin = "prompt",
    ) -> Tensor:
        """Run many sequences through all layers, one layer resident at a time.

        Args:
            sequences: token ids.
            on_layer: called after each layer.
            origin: whether they are computed as prompts are, or as if all of their tokens had been generated.

        Returns:
            (T, E) float32, the input of the final norm, sequences one after the other.
        """
        hidden = self.embed([token for sequence in sequences for token in sequence])
        lengths = [len(sequence) for sequence in sequences]
        turns = self.turns(max(lengths, default=None))
        for layer_idx in range(self.checkpoint.config.num_layers):
            apply_block_(self.block(layer_idx), hidden, lengths, turns, origin)
            self.release_block(layer_idx)
            on_layer()
        return hidden

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the likeliest next token, one after the other; all layers are resident.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        config, head, turns = self.checkpoint.config, self.head(), self.turns()
        blocks = [self.block(layer_idx) for layer_idx in range(config.num_layers)]
        sizes = (len(prompt_ids) + max_new_tokens, config.num_kv_heads, config.head_dim)
        caches = [KVCache(*sizes, block.attention.cache_dtype) for block in blocks]
        step_ids = list(prompt_ids)
        origin: Origin = "prompt"
        for _ in range(max_new_tokens):
            prompt_len = len(step_ids) if origin == "prompt" else 0
            batch = Batch.of([len(step_ids)], turns, caches[0].context_len, [prompt_len])
            x_TE = self.embed(step_ids)
            for block, cache in zip(blocks, caches, strict=True):
                x_TE = block(x_TE, batch, [cache])
            step_ids = [int(head(x_TE[-1:], origin).argmax())]
            origin = "generated"
            yield step_ids[0]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of one sequence, (T, V) float32."""
        return self.head()(self.hidden_states([token_ids]))


@dataclass(frozen=True)
class Head:
    """The final norm and the output head."""

    norm: Norm  # E
    linear: Linear  # E to V
    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, x_TE: Tensor, origin: Origin = "prompt") -> Tensor:
        """Return logits, (T, V) float32, of tokens that are all of one origin."""
        x, linear = self.norm(x_TE), self.linear
        is_mixed = origin == "generated" and isinstance(linear, W8A8MixLinear)
        logits = linear.generated(x) if is_mixed and isinstance(linear, W8A8MixLinear) else linear(x)
        return soft_cap(logits if self.multiplier == 1 else logits * self.multiplier, self.softcap)
