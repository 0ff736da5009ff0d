"""The one table of the checkpoint format: for each quantization type its tensors.

Writers, readers and `inspect` go by it; no other file spells a tensor suffix as a string.

Shapes: N output features, K input features of a linear; H query heads, G key/value heads, D head_dim, C = G * D
channels of an attention; E the length of a norm. A weight is (N, K).

    real = (q - offset) * scale

Source: the msModelSlim `ascendV1` layout, version 1.0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from eightfold.config import DType


class QuantType(str, Enum):
    """How a tensor is stored, spelled as in quant_model_description.json."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W8A8_MIX = "W8A8_MIX"
    W8A16 = "W8A16"
    C8 = "C8"  # key/value cache parameters
    FAQUANT = "FAQuant"  # attention parameters


class DTypeRule(Enum):
    """How a tensor's element type on disk follows from the model's."""

    INT8 = "int8"
    INT32 = "int32"
    INT8_OFFSET = "int8; some writers store a float dtype"
    FLOAT32 = "float32"
    SOURCE = "as in the float checkpoint"
    MODEL = "the model's"
    DEQ = "float32 for bfloat16 models, otherwise int64 holding the float32 bit pattern"
    WIDE_BIAS = "float16 for float16 models, otherwise float32"

    def resolve(self, model: DType, source: DType | None = None, save_float32: bool = False) -> DType:
        """Return the element type on disk.

        Args:
            model: the model's dtype (config.json), which alone decides the packing of deq_scale.
            source: dtype of the tensor in the float checkpoint; None means the model's.
            save_float32: store every floating tensor as float32, as calibration in float32 does.
        """
        if self in (DTypeRule.INT8, DTypeRule.INT8_OFFSET):
            return DType.I8
        if self is DTypeRule.INT32:
            return DType.I32
        if self is DTypeRule.DEQ:
            return DType.F32 if model is DType.BF16 else DType.I64
        if save_float32 or self is DTypeRule.FLOAT32:
            return DType.F32
        if self is DTypeRule.WIDE_BIAS:
            return DType.F16 if model is DType.F16 else DType.F32
        if self is DTypeRule.SOURCE:
            return source or model
        return model


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a module: a linear, a norm or an attention."""

    suffix: str
    dtype: DTypeRule
    shape: tuple[str | int, ...]  # of size letters and 1
    tag: QuantType  # its value in the description
    meaning: str
    with_bias_only: bool = False  # present only when the float linear has a bias
    optional: bool = False  # readers do without it

    def shape_for(self, **sizes: int) -> tuple[int, ...]:
        """Return the concrete shape, given the module's sizes by letter, such as N=576, K=1536."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


# The suffixes, for code that fills or reads one tensor of a module.
WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
WEIGHT_OFFSET = "weight_offset"
INPUT_SCALE = "input_scale"
INPUT_OFFSET = "input_offset"
QUANT_BIAS = "quant_bias"
DEQ_SCALE = "deq_scale"
BIAS = "bias"
KV_SCALE = "kv_cache_scale"
KV_OFFSET = "kv_cache_offset"
FA_Q, FA_K, FA_V = "fa_q", "fa_k", "fa_v"
SCALE = "scale"
OFFSET = "offset"
LEGACY_NORM = "module"  # older writers keep a smoothed norm's weight and bias below this
REDUCE_SCALES = ("reduce_scale", "gather_scale")  # quantized communication: of o_proj and down_proj; not written here

_WEIGHT_FORMULA = "weight = (stored - weight_offset) * weight_scale"
_KEPT_BIAS = "float bias"


def _spec(
    suffix: str, dtype: DTypeRule, shape: tuple[str | int, ...], tag: QuantType, meaning: str, **flags: bool
) -> TensorSpec:
    return TensorSpec(suffix, dtype, shape, tag, meaning, **flags)


# In the order in which the reference tool lists them.
LINEAR_TENSORS: dict[QuantType, tuple[TensorSpec, ...]] = {
    QuantType.FLOAT: (
        _spec(WEIGHT, DTypeRule.SOURCE, ("N", "K"), QuantType.FLOAT, "float weight"),
        _spec(BIAS, DTypeRule.SOURCE, ("N",), QuantType.FLOAT, _KEPT_BIAS, with_bias_only=True),
    ),
    QuantType.W8A8: (
        _spec(WEIGHT, DTypeRule.INT8, ("N", "K"), QuantType.W8A8, "symmetric, per output channel, in [-127, 127]"),
        _spec(WEIGHT_SCALE, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8, _WEIGHT_FORMULA, optional=True),
        _spec(WEIGHT_OFFSET, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8, "zeros", optional=True),
        _spec(INPUT_SCALE, DTypeRule.MODEL, (1,), QuantType.W8A8, "x = (stored - input_offset) * input_scale"),
        _spec(INPUT_OFFSET, DTypeRule.MODEL, (1,), QuantType.W8A8, "an integer in [-128, 127], stored as a float"),
        _spec(
            QUANT_BIAS, DTypeRule.INT32, ("N",), QuantType.W8A8, "round(bias / deq_scale - input_offset * sum_k weight)"
        ),
        _spec(DEQ_SCALE, DTypeRule.DEQ, ("N",), QuantType.W8A8, "input_scale * weight_scale"),
        _spec(
            BIAS,
            DTypeRule.MODEL,
            ("N",),
            QuantType.FLOAT,
            "already inside quant_bias",
            with_bias_only=True,
            optional=True,
        ),
    ),
    QuantType.W8A8_DYNAMIC: (
        _spec(
            WEIGHT, DTypeRule.INT8, ("N", "K"), QuantType.W8A8_DYNAMIC, "symmetric, per output channel, in [-127, 127]"
        ),
        _spec(WEIGHT_SCALE, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8_DYNAMIC, _WEIGHT_FORMULA),
        _spec(WEIGHT_OFFSET, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8_DYNAMIC, "zeros", optional=True),
        _spec(BIAS, DTypeRule.MODEL, ("N",), QuantType.FLOAT, _KEPT_BIAS, with_bias_only=True),
    ),
    # Prompt tokens as W8A8_DYNAMIC, generated tokens as W8A8.
    QuantType.W8A8_MIX: (
        _spec(WEIGHT, DTypeRule.INT8, ("N", "K"), QuantType.W8A8_MIX, "symmetric, per output channel, in [-127, 127]"),
        _spec(WEIGHT_SCALE, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8_MIX, _WEIGHT_FORMULA),
        _spec(WEIGHT_OFFSET, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A8_MIX, "zeros", optional=True),
        _spec(INPUT_SCALE, DTypeRule.MODEL, (1,), QuantType.W8A8_MIX, "as in W8A8, for generated tokens"),
        _spec(INPUT_OFFSET, DTypeRule.MODEL, (1,), QuantType.W8A8_MIX, "as in W8A8, for generated tokens"),
        _spec(QUANT_BIAS, DTypeRule.INT32, ("N",), QuantType.W8A8_MIX, "as in W8A8, for generated tokens"),
        _spec(DEQ_SCALE, DTypeRule.DEQ, ("N",), QuantType.W8A8_MIX, "as in W8A8, for generated tokens"),
        _spec(BIAS, DTypeRule.MODEL, ("N",), QuantType.FLOAT, "for prompt tokens", with_bias_only=True),
    ),
    QuantType.W8A16: (
        _spec(WEIGHT, DTypeRule.INT8, ("N", "K"), QuantType.W8A16, "per output channel, symmetric or asymmetric"),
        _spec(WEIGHT_SCALE, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A16, _WEIGHT_FORMULA),
        _spec(WEIGHT_OFFSET, DTypeRule.FLOAT32, ("N", 1), QuantType.W8A16, "zeros, or integers in [-128, 127]"),
        _spec(BIAS, DTypeRule.WIDE_BIAS, ("N",), QuantType.FLOAT, _KEPT_BIAS, with_bias_only=True),
    ),
}

# Attention quantization, relative to the attention module, such as model.layers.0.self_attn.
_FA_HEADS = ((FA_Q, "H", "query after RoPE"), (FA_K, "G", "key after RoPE"), (FA_V, "G", "value"))
FA_TENSORS: tuple[TensorSpec, ...] = (
    *(
        _spec(f"{part}.{SCALE}", DTypeRule.MODEL, (heads, 1), QuantType.FAQUANT, f"{what} = stored * scale, by head")
        for part, heads, what in _FA_HEADS
    ),
    *(
        _spec(f"{part}.{OFFSET}", DTypeRule.INT8_OFFSET, (heads, 1), QuantType.FAQUANT, "zeros", optional=True)
        for part, heads, _ in _FA_HEADS
    ),
)

# The int8 key/value cache, relative to k_proj and v_proj.
KV_TENSORS: tuple[TensorSpec, ...] = (
    _spec(KV_SCALE, DTypeRule.MODEL, ("C",), QuantType.C8, "cached = (stored - offset) * scale, by channel"),
    _spec(
        KV_OFFSET,
        DTypeRule.MODEL,
        ("C",),
        QuantType.C8,
        "zeros, or integers in [-128, 127], stored as floats",
        optional=True,
    ),
)

# A norm's gain, and what outlier suppression adds to it.
NORM_WEIGHT = _spec(WEIGHT, DTypeRule.SOURCE, ("E",), QuantType.FLOAT, "gain")
NORM_BIAS = _spec(BIAS, DTypeRule.FLOAT32, ("E",), QuantType.FLOAT, "added after the gain; zeros", optional=True)

# The schemes a user can ask for, by the name on the command line, and what each costs and gives.
SCHEMES: dict[str, QuantType] = {
    "w8a8": QuantType.W8A8,
    "w8a8-dynamic": QuantType.W8A8_DYNAMIC,
    "w8a8-mix": QuantType.W8A8_MIX,
    "w8a16": QuantType.W8A16,
}

NEEDS_CALIBRATION = frozenset({QuantType.W8A8, QuantType.W8A8_MIX})

DESCRIPTION_VERSION = "1.0.0"


def linear_tensors(quant_type: QuantType, has_bias: bool) -> tuple[TensorSpec, ...]:
    """Return the tensors that one linear stores under a quantization type."""
    return tuple(spec for spec in LINEAR_TENSORS[quant_type] if has_bias or not spec.with_bias_only)


def weight_name(module: str) -> str:
    """Return the name of a module's weight tensor (a linear's, an embedding's, a norm's gain)."""
    return f"{module}.{WEIGHT}"


def bias_name(module: str) -> str:
    """Return the name of a module's float bias."""
    return f"{module}.{BIAS}"


def legacy_norm(module: str) -> str:
    """Return the module below which older writers repeat a smoothed norm."""
    return f"{module}.{LEGACY_NORM}"


def weight_file_stem(quant_type: QuantType) -> str:
    """Return the weight file's name without its ending: quant_model_weight_w8a8, ..."""
    return f"quant_model_weight_{quant_type.value.lower()}"


def description_names(quant_type: QuantType, legacy: bool) -> tuple[str, ...]:
    """Return the file names under which the description is written."""
    suffixed = f"quant_model_description_{quant_type.value.lower()}.json"
    return ("quant_model_description.json", suffixed) if legacy else ("quant_model_description.json",)
