"""Random models of families that this program only quantizes, under the names and in the form they are published with.

    attention   latent, full with an output gate, or linear, by what config.json has
    FFN         dense in the first layers, then experts: one matrix each, or stacked in one tensor
    float8      (DeepSeek) in blocks of 128 x 128 with a scale each; what is no linear of a layer is not
    behind      the layers that predict further tokens, as many as config.json says

Values are normal with deviation K**-0.5: enough to quantize, and no model that says anything.

Letters: N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eightfold.config import DType
from eightfold.format.directory import CONFIG_NAME
from eightfold.layouts import layout_of, text_config
from eightfold.synth.tensors import RandomTensor, RandomValues

_BLOCK = 128
_FLOAT8_STD = 100.0  # of float8 values, so that most of their range is used

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class NamedModel(RandomValues):
    """All tensors of such a model."""

    def __init__(self, raw: Mapping[str, Any], seed: int) -> None:
        """Take a config.json, one of shapes.MODELS."""
        super().__init__(seed)
        self._text = text_config(raw)
        self._layout = layout_of(raw, Path(CONFIG_NAME))
        self._is_float8 = "quantization_config" in raw
        self._prefix = self._layout.layers[0].removesuffix("layers.")
        self._hidden = self._text["hidden_size"]

    def tensors(self) -> Iterator[RandomTensor]:
        """Yield them in the order of the files."""
        text, hidden = self._text, self._hidden
        yield self._float(f"{self._prefix}embed_tokens", text["vocab_size"], hidden)
        count = text["num_hidden_layers"]
        for i in range(count):
            yield from self._layer(f"{self._prefix}layers.{i}.", i)
        for i in range(text.get("num_nextn_predict_layers", 0)):
            yield from self._next_layer(f"{self._prefix}layers.{count + i}.", count + i)
        if text.get("mtp_num_hidden_layers"):
            yield from self._mtp()
        yield self._norm(f"{self._prefix}norm", hidden)
        yield self._float("lm_head", text["vocab_size"], hidden)

    def _next_layer(self, at: str, i: int) -> Iterator[RandomTensor]:
        hidden = self._hidden
        yield self._float(f"{at}embed_tokens", self._text["vocab_size"], hidden)
        yield from (self._norm(f"{at}{name}", hidden) for name in ("enorm", "hnorm"))
        yield self._float(f"{at}eh_proj", hidden, 2 * hidden)
        yield from self._layer(at, i)
        yield self._norm(f"{at}shared_head.norm", hidden)
        yield self._float(f"{at}shared_head.head", self._text["vocab_size"], hidden)

    def _mtp(self) -> Iterator[RandomTensor]:
        hidden = self._hidden
        yield self._float("mtp.fc", hidden, 2 * hidden)
        yield from self._attention("mtp.layers.0.self_attn.")
        yield from self._experts("mtp.layers.0.mlp.")
        names = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm", "pre_fc_norm_embedding")
        yield from (self._norm(f"mtp.{name}", hidden) for name in (*names, "pre_fc_norm_hidden"))

    def _layer(self, at: str, i: int) -> Iterator[RandomTensor]:
        text = self._text
        types = text.get("layer_types")
        if "kv_lora_rank" in text:
            yield from self._latent(f"{at}self_attn.")
        elif types is not None and i < len(types) and types[i] == "linear_attention":
            yield from self._linear_attention(f"{at}linear_attn.")
        else:
            yield from self._attention(f"{at}self_attn.")
        if i < text.get("first_k_dense_replace", 0):
            yield from self._ffn(f"{at}mlp.", text["intermediate_size"])
        else:
            yield from self._experts(f"{at}mlp.")
        yield from (self._norm(f"{at}{name}", self._hidden) for name in ("input_layernorm", "post_attention_layernorm"))

    def _attention(self, at: str) -> Iterator[RandomTensor]:
        text, hidden = self._text, self._hidden
        size = text["head_dim"]
        queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
        rows = {"q_proj": queries * (2 if text.get("attn_output_gate") else 1), "k_proj": keys, "v_proj": keys}
        for name, n in rows.items():
            yield from self._linear(at + name, n, hidden)
            if text.get("attention_bias"):
                yield RandomTensor(f"{at}{name}.bias", (n,), 0.5)
        yield from self._linear(f"{at}o_proj", hidden, queries)
        if text.get("use_qk_norm", True):
            yield from (self._norm(f"{at}{name}", size) for name in ("q_norm", "k_norm"))

    def _latent(self, at: str) -> Iterator[RandomTensor]:
        text, hidden, heads = self._text, self._hidden, self._text["num_attention_heads"]
        nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
        for name, n, k in (
            ("q_a_proj", text["q_lora_rank"], hidden),
            ("q_b_proj", heads * (nope + rope), text["q_lora_rank"]),
            ("kv_a_proj_with_mqa", text["kv_lora_rank"] + rope, hidden),
            ("kv_b_proj", heads * (nope + value), text["kv_lora_rank"]),
            ("o_proj", hidden, heads * value),
        ):
            yield from self._linear(at + name, n, k)
        yield self._norm(f"{at}q_a_layernorm", text["q_lora_rank"])
        yield self._norm(f"{at}kv_a_layernorm", text["kv_lora_rank"])

    def _linear_attention(self, at: str) -> Iterator[RandomTensor]:
        text, hidden = self._text, self._hidden
        heads, size = text["linear_num_value_heads"], text["linear_value_head_dim"]
        keys, values = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * size
        for name, n in (("in_proj_qkv", 2 * keys + values), ("in_proj_z", values), ("in_proj_b", heads)):
            yield self._float(at + name, n, hidden)
        yield self._float(f"{at}in_proj_a", heads, hidden)
        yield self._float(f"{at}out_proj", hidden, values)
        channels, width = 2 * keys + values, text["linear_conv_kernel_dim"]
        yield RandomTensor(f"{at}conv1d.weight", (channels, width), 0.5, stacked=channels)
        yield from (RandomTensor(f"{at}{name}", (heads,), 0.1, mean=1.0) for name in ("A_log", "dt_bias"))
        yield self._norm(f"{at}norm", size)

    def _ffn(self, at: str, width: int) -> Iterator[RandomTensor]:
        for name in _PROJECTIONS:
            shape = (self._hidden, width) if name == "down_proj" else (width, self._hidden)
            yield from self._linear(at + name, *shape)

    def _experts(self, at: str) -> Iterator[RandomTensor]:
        text, hidden, width = self._text, self._hidden, self._text["moe_intermediate_size"]
        count = text[self._layout.expert_key]
        yield self._float(f"{at}gate", count, hidden)
        if "n_group" in text:
            yield RandomTensor(f"{at}gate.e_score_correction_bias", (count,), 0.1, dtype=DType.F32)
        if self._layout.model_type == "qwen3_5_moe":  # published with the experts of a layer in one tensor
            for name, n, k in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
                yield RandomTensor(f"{at}experts.{name}", (count * n, k), k**-0.5, stacked=count)
        else:
            for i in range(count):
                yield from self._ffn(f"{at}experts.{i}.", width)
        if "shared_expert_intermediate_size" in text:
            yield from self._ffn(f"{at}shared_expert.", text["shared_expert_intermediate_size"])
            yield self._float(f"{at}shared_expert_gate", 1, hidden)
        if "n_shared_experts" in text:
            yield from self._ffn(f"{at}shared_experts.", width * text["n_shared_experts"])

    def _linear(self, module: str, n: int, k: int) -> Iterator[RandomTensor]:
        if not self._is_float8:
            yield self._float(module, n, k)
            return
        yield RandomTensor(f"{module}.weight", (n, k), _FLOAT8_STD, dtype=DType.F8_E4M3)
        grid, scale = (-(-n // _BLOCK), -(-k // _BLOCK)), k**-0.5 / _FLOAT8_STD
        yield RandomTensor(f"{module}.weight_scale_inv", grid, scale / 8, mean=scale, dtype=DType.F32)

    def _float(self, module: str, n: int, k: int) -> RandomTensor:
        return RandomTensor(f"{module}.weight", (n, k), float(k**-0.5))

    def _norm(self, module: str, size: int) -> RandomTensor:
        return RandomTensor(f"{module}.weight", (size,), 0.1, mean=1.0)
