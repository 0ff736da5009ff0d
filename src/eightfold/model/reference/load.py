"""Checkpoint -> decoder layers, one at a time or all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.errors import UnsupportedError
from eightfold.families import (
    ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    KEY,
    LM_HEAD,
    VALUE,
    LinearShape,
    all_linears,
    input_groups,
    layer_norms,
    layer_prefix,
    sliding_window,
)
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.attention import inverse_frequencies
from eightfold.model.reference.decoder import Block, GroupCall, LinearGroup, Norm, Origin, apply_block_
from eightfold.model.reference.kvcache import (
    Attention,
    AttentionMode,
    C8Attention,
    ChannelScale,
    FAQuantAttention,
    FloatAttention,
)
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
from eightfold.model.reference.tensors import load_float32, load_tensor, mapped_tensor, require_finite
from eightfold.scheme import (
    FA_K,
    FA_Q,
    FA_V,
    KV_OFFSET,
    KV_SCALE,
    OFFSET,
    SCALE,
    QuantType,
    bias_name,
    legacy_norm,
    linear_tensors,
    weight_name,
)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).reshape(-1)


def _float_linear(_: DynamicMode, *, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return FloatLinear(weight, None if bias is None else _flat(bias))


def _w8a16_linear(
    _: DynamicMode, *, weight: Tensor, weight_scale: Tensor, weight_offset: Tensor, bias: Tensor | None = None
) -> Linear:
    return W8A16Linear(
        weight, _flat(weight_scale)[:, None], _flat(weight_offset)[:, None], None if bias is None else _flat(bias)
    )


def _w8a8_linear(
    _: DynamicMode,
    *,
    weight: Tensor,
    input_scale: Tensor,
    input_offset: Tensor,
    quant_bias: Tensor,
    deq_scale: Tensor,
    **unused: Tensor,  # weight_scale and weight_offset say nothing new, bias is inside quant_bias
) -> W8A8Linear:
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    return W8A8Linear(weight, quant_bias, deq_scale, 1.0 / _flat(input_scale), _flat(input_offset))


def _dynamic_linear(
    mode: DynamicMode, *, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **unused: Tensor
) -> W8A8DynamicLinear:
    weight_sum = weight.sum(1, dtype=torch.int32)
    return W8A8DynamicLinear(weight, _flat(weight_scale), weight_sum, None if bias is None else _flat(bias), mode)


def _mix_linear(mode: DynamicMode, **stored: Tensor) -> Linear:
    return W8A8MixLinear(_dynamic_linear(mode, **stored), _w8a8_linear(mode, **stored))


# Keyword arguments are the suffixes in scheme.py.
LINEAR_FOR: dict[QuantType, Callable[..., Linear]] = {
    QuantType.FLOAT: _float_linear,
    QuantType.W8A8: _w8a8_linear,
    QuantType.W8A8_DYNAMIC: _dynamic_linear,
    QuantType.W8A8_MIX: _mix_linear,
    QuantType.W8A16: _w8a16_linear,
}


@dataclass(frozen=True)
class Decoder:
    """A checkpoint as a model whose layers are built when asked for.

    Attributes:
        checkpoint: where the tensors come from.
        dynamic: how W8A8_DYNAMIC quantizes a token.
        attention: what a prompt's tokens attend over when keys and values are quantized; see kvcache.py.
    """

    checkpoint: Checkpoint
    dynamic: DynamicMode = "asymmetric"
    attention: AttentionMode = "cache"

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies, (D/2,) float32."""
        return inverse_frequencies(self.checkpoint.config.rope, self.checkpoint.config.head_dim)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Return the embedding rows of token ids, (T, E) float32; only those rows are read.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        self.checkpoint.config.require_ids(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64, device="cpu")
        name = weight_name(EMBEDDING)
        rows = mapped_tensor(self.checkpoint, name)[ids].to(torch.float32)
        if not torch.isfinite(rows).all():
            require_finite(mapped_tensor(self.checkpoint, name), name, self.checkpoint)
        return rows.to(torch.get_default_device())

    def block(
        self,
        layer_idx: int,
        groups: Sequence[GroupCall] | None = None,
        attention: Attention | None = None,
        norms: Mapping[str, Norm] | None = None,
    ) -> Block:
        """Build one layer: as the checkpoint stores it, or with other parts in their place."""
        qkv, o, gate_up, down = groups or [
            LinearGroup(tuple(self.linear(layer_prefix(layer_idx), linear) for linear in group.linears))
            for group in input_groups(self.checkpoint.config)
        ]
        norms = norms or self.norms(layer_idx)
        return Block(
            self.checkpoint.config,
            norms["input_layernorm"],
            norms["post_attention_layernorm"],
            norms.get("self_attn.q_norm"),
            norms.get("self_attn.k_norm"),
            qkv,
            attention or self.attend(layer_idx),
            o,
            gate_up,
            down,
        )

    def norms(self, layer_idx: int) -> dict[str, Norm]:
        """Return one layer's norms by their name inside the layer."""
        prefix = layer_prefix(layer_idx)
        return {name: self._norm(prefix + name) for name in layer_norms(self.checkpoint.config)}

    def _norm(self, name: str) -> Norm:
        gain = load_float32(self.checkpoint, weight_name(name))
        stored = [b for b in (bias_name(name), bias_name(legacy_norm(name))) if b in self.checkpoint.tensors]
        bias = load_float32(self.checkpoint, stored[0]) if stored else None
        # Writers put zeros there; adding them would only cost time.
        kept = bias if bias is not None and bool(bias.any()) else None
        return Norm(gain, self.checkpoint.config.rms_norm_eps, kept)

    def attend(self, layer_idx: int) -> Attention:
        """Build one layer's attention as the checkpoint stores it.

        Raises:
            UnsupportedError: FAQuant with an offset that is not zero.
        """
        window = sliding_window(self.checkpoint.config, layer_idx)
        kind, prefix = self.checkpoint.attention_type(layer_idx), layer_prefix(layer_idx)
        if kind is QuantType.C8:
            key, value = (self._channel_scale(prefix + linear, KV_SCALE, KV_OFFSET) for linear in (KEY, VALUE))
            return C8Attention(key=key, value=value, mode=self.attention, window=window)
        if kind is QuantType.FAQUANT:
            module = prefix + ATTENTION
            for part in (FA_Q, FA_K, FA_V):
                self._require_zeros(f"{module}.{part}.{OFFSET}")
            key, value = (self._channel_scale(module, f"{part}.{SCALE}") for part in (FA_K, FA_V))
            query_scale_H = self._head_scale(f"{module}.{FA_Q}.{SCALE}")
            return FAQuantAttention(
                key=key, value=value, mode=self.attention, window=window, query_scale_H=query_scale_H
            )
        return FloatAttention(window)

    def _channel_scale(self, module: str, scale: str, offset: str = "") -> ChannelScale:
        config = self.checkpoint.config
        shape = (config.num_kv_heads, config.head_dim)
        stored = load_float32(self.checkpoint, f"{module}.{scale}")
        scale_GD = stored.reshape(shape[0], -1).expand(shape).contiguous()
        name = f"{module}.{offset}"
        if not offset or name not in self.checkpoint.tensors:
            return ChannelScale(scale_GD, torch.zeros(()))
        return ChannelScale(scale_GD, load_float32(self.checkpoint, name).reshape(shape))

    def _require_zeros(self, name: str) -> None:
        """Refuse an offset that nothing here would subtract."""
        if name not in self.checkpoint.tensors:
            return
        lo, hi = (float(end) for end in torch.aminmax(load_float32(self.checkpoint, name)))
        if lo or hi:
            raise UnsupportedError(
                f"values of {name}",
                where=self.checkpoint.tensors[name].file,
                got=f"{lo:g} to {hi:g}",
                expected="zeros",
                action="Attention is computed without offsets; quantize it symmetrically.",
            )

    def _head_scale(self, name: str) -> Tensor:
        """Return one scale for each head; a file may repeat it for each channel of the head."""
        return load_float32(self.checkpoint, name).reshape(self.checkpoint.config.num_heads, -1)[:, 0]

    def linear(self, prefix: str, linear: LinearShape) -> Linear:
        """Build one linear as the checkpoint stores it."""
        name = prefix + linear.name
        quant_type = self.checkpoint.quant_type(name)
        stored = {
            spec.suffix: load_tensor(self.checkpoint, f"{name}.{spec.suffix}")
            for spec in linear_tensors(quant_type, linear.has_bias)
            if f"{name}.{spec.suffix}" in self.checkpoint.tensors
        }
        for suffix, tensor in stored.items():
            if tensor.is_floating_point():
                require_finite(tensor, f"{name}.{suffix}", self.checkpoint)
        return LINEAR_FOR[quant_type](self.dynamic, **stored)

    def head(self) -> Head:
        """Build the final norm and the output head."""
        return Head(self.final_norm(), self._head_linear())

    def final_norm(self) -> Norm:
        """Build the norm before the output head."""
        return self._norm(FINAL_NORM)

    def _head_linear(self) -> Linear:
        config = self.checkpoint.config
        if not config.tie_word_embeddings and self.checkpoint.quant_type(LM_HEAD) is not QuantType.FLOAT:
            return self.linear("", all_linears(config)[LM_HEAD])
        # Widened once: the head runs for every slice of tokens.
        return FloatLinear(load_float32(self.checkpoint, self.checkpoint.head_weight()), None)

    def release_block(self, layer_idx: int) -> None:
        """Let go of the memory in which a layer's stored tensors were read and widened."""
        self.checkpoint.release(self.checkpoint.layer_tensors(layer_prefix(layer_idx)))
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
        inv_freq = self.inv_freq
        for layer_idx in range(self.checkpoint.config.num_layers):
            apply_block_(self.block(layer_idx), hidden, lengths, inv_freq, origin)
            self.release_block(layer_idx)
            on_layer()
        return hidden

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of one sequence, (T, V) float32."""
        return self.head()(self.hidden_states([token_ids]))


@dataclass(frozen=True)
class Head:
    """The final norm and the output head."""

    norm: Norm  # E
    linear: Linear  # E to V

    def __call__(self, x_TE: Tensor, origin: Origin = "prompt") -> Tensor:
        """Return logits, (T, V) float32, of tokens that are all of one origin."""
        x = self.norm(x_TE)
        if origin == "generated" and isinstance(self.linear, W8A8MixLinear):
            return self.linear.generated(x)
        return self.linear(x)
