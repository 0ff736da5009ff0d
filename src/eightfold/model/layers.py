"""What the modules of a model consist of, read from its checkpoint: once for both backends.

Weights stay views of the mapped files, in the dtype they are stored in (BF16 as uint16 bit patterns); who computes with
them looks for damaged numbers. All other tensors are small: flat float32 copies, checked here.

Letters: N outputs, K inputs, I width of an expert, H query heads, G key/value heads, D head_dim, V vocabulary,
E hidden size.

Sources of the rotary frequencies: RoFormer, Su et al. 2021, arXiv:2104.09864; YaRN, Peng et al. 2023,
arXiv:2309.00071; LongRoPE, Ding et al. 2024, arXiv:2402.13753; the llama3 stretching is that of the Llama 3.1 model
card, dynamic scaling, and what follows from settings that a file leaves out, transformers'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eightfold.config import DType
from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.families import (
    ExpertShapes,
    LinearShape,
    expert_block,
    head_shape,
    layer_norms,
)
from eightfold.format.bfloat16 import widened
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.stored import StoredTensors
from eightfold.rope import RopeParameters
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    FA_K,
    FA_Q,
    FA_V,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_OFFSET,
    KV_SCALE,
    NEEDS_CALIBRATION,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    legacy_norm,
    weight_name,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_CHECKED_ELEMENTS = 1 << 22  # of a large tensor at a time

# Beyond these, a reciprocal, or a product of two, is no float32 any more; real ones are far inside.
_SCALES = 1e-37, 1e15
_SCALE_NAMES = (WEIGHT_SCALE, INPUT_SCALE, DEQ_SCALE, KV_SCALE, SCALE)
_OFFSET_NAMES = (WEIGHT_OFFSET, INPUT_OFFSET, KV_OFFSET, OFFSET)


@dataclass(frozen=True)
class Linear:
    """A linear as it is stored; what its scheme does without is None.

    Attributes:
        kind: the scheme.
        name: of the weight tensor.
        weight: (N, K) in the dtype on disk, a view of the file.
        bias: (N,); None in W8A8 too, where quant_bias has it.
        weight_scale: (N,); W8A8 files need not have it, as deq_scale has.
        weight_offset: (N,), W8A16 only: zeros in the other schemes.
        input_scale: (1,), of static activations, as input_offset.
        deq_scale: (N,), of static activations, as quant_bias, which is int32.
    """

    kind: QuantType
    name: str
    weight: NDArray[Any]
    bias: NDArray[Any] | None = None
    weight_scale: NDArray[Any] | None = None
    weight_offset: NDArray[Any] | None = None
    input_scale: NDArray[Any] | None = None
    input_offset: NDArray[Any] | None = None
    deq_scale: NDArray[Any] | None = None
    quant_bias: NDArray[Any] | None = None


class Expert(NamedTuple):
    """One expert: gate and up are (I, E), down is (E, I)."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        router: (experts, E) float.
        experts: those that were asked for, in rising order.
        shared: the expert of all tokens; None where there is none.
        shared_gate: (1, E) float, of the shared expert.
    """

    router: Linear
    experts: tuple[Expert, ...]
    shared: Expert | None = None
    shared_gate: Linear | None = None


class Norm(NamedTuple):
    """The gain of an RMS norm and what is added behind it: None where a file has none, or zeros."""

    gain: NDArray[Any]
    bias: NDArray[Any] | None


class Channels(NamedTuple):
    """How keys or values are stored: scales and offsets, both (G, D); None: no offsets."""

    scale: NDArray[Any]
    offset: NDArray[Any] | None


class Attention(NamedTuple):
    """How an attention is computed: FLOAT, C8 or FAQUANT; only the last has scales of queries, (H,)."""

    kind: QuantType
    key: Channels | None = None
    value: Channels | None = None
    query_scale: NDArray[Any] | None = None


def read_linear(checkpoint: Checkpoint, module: str, shape: LinearShape) -> Linear:
    """Read a linear.

    Raises:
        CheckpointError: a bias is not a finite number, a scale not one above 0, or an offset outside int8.
    """
    kind, name = checkpoint.quant_type(module), weight_name(module)
    weight = checkpoint.array(name)
    has_bias = shape.has_bias and kind is not QuantType.W8A8
    bias = read_values(checkpoint, f"{module}.{BIAS}") if has_bias else None
    if kind is QuantType.FLOAT:
        return Linear(kind, name, weight, bias)
    scale = f"{module}.{WEIGHT_SCALE}"
    weight_scale = _read_scale(checkpoint, scale) if scale in checkpoint.tensors else None
    if kind not in NEEDS_CALIBRATION:
        has_offset = kind is QuantType.W8A16
        offset = _read_offset(checkpoint, f"{module}.{WEIGHT_OFFSET}") if has_offset else None
        return Linear(kind, name, weight, bias, weight_scale, offset)
    return Linear(
        kind,
        name,
        weight,
        bias,
        weight_scale,
        input_scale=_read_scale(checkpoint, f"{module}.{INPUT_SCALE}"),
        input_offset=_read_offset(checkpoint, f"{module}.{INPUT_OFFSET}"),
        deq_scale=_read_scale(checkpoint, f"{module}.{DEQ_SCALE}"),
        quant_bias=np.ascontiguousarray(checkpoint.array(f"{module}.{QUANT_BIAS}").reshape(-1), dtype=np.int32),
    )


def read_experts(checkpoint: Checkpoint, layer_idx: int, wanted: range | None = None) -> Experts | None:
    """Read the experts of a layer, or some of them; None of a layer that has none.

    Args:
        checkpoint: of the model.
        layer_idx: of the layer.
        wanted: indices of experts; the one of all tokens comes in any case. None: all.

    Raises:
        CheckpointError: a scale is not a finite number above 0, or an offset outside int8.
    """
    block, prefix = expert_block(checkpoint.config, layer_idx), checkpoint.config.names.layer(layer_idx)
    if block is None:
        return None

    def linear(shape: LinearShape) -> Linear:
        return read_linear(checkpoint, prefix + shape.name, shape)

    def expert(shapes: ExpertShapes) -> Expert:
        return Expert(*map(linear, shapes))

    return Experts(
        linear(block.router),
        tuple(map(expert, block.experts if wanted is None else block.experts[wanted.start : wanted.stop])),
        None if block.shared is None else expert(block.shared),
        None if block.shared_gate is None else linear(block.shared_gate),
    )


def read_head(checkpoint: Checkpoint) -> Linear:
    """Read the output head (V, E): the embedding, when the model is tied."""
    config = checkpoint.config
    if config.tie_word_embeddings:
        name = checkpoint.head_weight()
        return Linear(QuantType.FLOAT, name, checkpoint.array(name))
    return read_linear(checkpoint, config.names.head, head_shape(config))


def read_norm(checkpoint: Checkpoint, module: str) -> Norm:
    """Read a norm, its gain as it is meant; its bias may stand where older writers put it.

    Raises:
        CheckpointError: a value is not a finite number.
    """
    gain, offset = read_values(checkpoint, weight_name(module)), checkpoint.config.norm_offset
    if offset:
        gain += np.float32(offset)
    stored = [name for name in (bias_name(module), bias_name(legacy_norm(module))) if name in checkpoint.tensors]
    bias = read_values(checkpoint, stored[0]) if stored else None
    # Writers put zeros there; adding them would only cost time.
    return Norm(gain, bias if bias is not None and bias.any() else None)


def read_norms(checkpoint: Checkpoint, layer_idx: int) -> dict[str, Norm]:
    """Read the norms of a layer, by their names inside it."""
    prefix = checkpoint.config.names.layer(layer_idx)
    return {name: read_norm(checkpoint, prefix + name) for name in layer_norms(checkpoint.config)}


def read_attention(checkpoint: Checkpoint, layer_idx: int) -> Attention:
    """Read how a layer's attention is computed.

    Raises:
        CheckpointError: a scale is not a finite number above 0, or an offset is outside int8.
        UnsupportedError: FAQuant with an offset that is not zero.
    """
    kind, names = checkpoint.attention_type(layer_idx), checkpoint.config.names
    prefix = names.layer(layer_idx)
    if kind is QuantType.C8:
        key, value = (_channels(checkpoint, prefix + part, KV_SCALE, KV_OFFSET) for part in (names.key, names.value))
        return Attention(kind, key, value)
    if kind is QuantType.FLOAT:
        return Attention(kind)
    module = prefix + names.attention
    for part in (FA_Q, FA_K, FA_V):
        _require_zeros(checkpoint, f"{module}.{part}.{OFFSET}")
    key, value = (_channels(checkpoint, f"{module}.{part}", SCALE) for part in (FA_K, FA_V))
    query_scale = _read_scale(checkpoint, f"{module}.{FA_Q}.{SCALE}")
    # A file may repeat it for each channel of the head.
    return Attention(kind, key, value, query_scale.reshape(checkpoint.config.num_heads, -1)[:, 0])


def rope_scale(rope: RopeParameters) -> float:
    """Return what cosines and sines are multiplied by: 1 but with YaRN and longrope, whose longer contexts need it."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    if rope.rope_type != "yarn":
        return 1.0
    growth = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (growth * rope.mscale + 1) / (growth * rope.mscale_all_dim + 1)
    return growth + 1


def rope_base(rope: RopeParameters, head_dim: int, longest: int) -> float:
    """Return theta: dynamic scaling has a larger one for sequences longer than the original context."""
    context = rope.original_max_position_embeddings
    if rope.rope_type != "dynamic" or longest <= context:
        return rope.rope_theta
    growth = rope.factor * longest / context - (rope.factor - 1)
    return float(rope.rope_theta * growth ** (head_dim / (head_dim - 2)))


def inverse_frequencies(rope: RopeParameters, rotary_dim: int, longest: int) -> NDArray[Any]:
    """Return f_i = theta**(-2 i / R) for i < R/2, stretched for long contexts: float32 angles for one position.

    Args:
        rope: the settings.
        rotary_dim: R, how many channels of a head are turned.
        longest: positions of the longest sequence, by which dynamic scaling and longrope choose: as in vLLM for all
            sequences alike, since keys are cached as they were turned.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return stretch_frequencies(np.power(np.float32(rope_base(rope, rotary_dim, longest)), exponents), rope, longest)


def stretch_frequencies(periods: NDArray[Any], rope: RopeParameters, longest: int) -> NDArray[Any]:
    """Return the frequencies 1 / periods, (D/2,) float32, stretched as the model's long context wants it."""
    inv_freq = np.float32(1.0) / periods
    if rope.rope_type == "linear":
        return np.asarray(inv_freq / np.float32(rope.factor))
    if rope.rope_type == "yarn":
        return _stretch_by_turns(periods, rope)
    if rope.rope_type == "longrope":
        is_long = longest > rope.original_max_position_embeddings
        factors = np.array(rope.long_factor if is_long else rope.short_factor, np.float32)
        return np.asarray(np.float32(1.0) / (factors * periods))
    if rope.rope_type != "llama3":
        return np.asarray(inv_freq)
    # Long waves are stretched by `factor`, short ones kept, those between blended.
    old_context = rope.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (old_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    stretched = np.where(wavelength > old_context / rope.low_freq_factor, inv_freq / rope.factor, blended)
    kept = np.where(wavelength < old_context / rope.high_freq_factor, inv_freq, stretched)
    return np.ascontiguousarray(kept, dtype=np.float32)


def _stretch_by_turns(periods: NDArray[Any], rope: RopeParameters) -> NDArray[Any]:
    """Return YaRN's frequencies: those that turn often in the original context kept, rare ones stretched."""
    pairs = len(periods)

    def place(turns: float) -> float:  # of the pair that turns so often there
        return (
            pairs * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(rope.rope_theta)
        )

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    stretched = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
    kept = np.float32(1) - stretched
    slow = np.float32(1) / (np.float32(rope.factor) * periods)
    return np.asarray(slow * (1 - kept) + np.float32(1) / periods * kept, dtype=np.float32)


def read_values(checkpoint: StoredTensors, name: str) -> NDArray[Any]:
    """Return a small tensor as a flat float32 copy.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    values = _flat(checkpoint, name)
    if not np.isfinite(values).all():
        require_finite(checkpoint, name)
    return values


def _flat(checkpoint: StoredTensors, name: str) -> NDArray[Any]:
    return _widened(checkpoint.array(name).reshape(-1))


def require_finite(checkpoint: StoredTensors, name: str) -> None:
    """Look through a float tensor for NaN and infinity, in slices that stay small.

    Raises:
        CheckpointError: names the first of them.
    """
    array = checkpoint.array(name)
    array = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
    step = max(1, _CHECKED_ELEMENTS // max(1, array.shape[1]))
    for at in range(0, len(array), step):
        values = _widened(array[at : at + step])
        for row, column in np.argwhere(~np.isfinite(values))[:1]:
            raise CheckpointError(
                f"{name}[{at + row}, {column}]",
                where=checkpoint.tensors[name].file,
                got=float(values[row, column]),
                expected="a finite number",
                action="The weights are damaged; fetch the model again.",
            )


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    """Return values as a float32 copy; uint16 are the bits of BF16."""
    return widened(array, DType.BF16.value if array.dtype == np.uint16 else "")


def _read_scale(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    """Return what integers are multiplied by, of either form: a deq_scale may be packed into int64."""
    stored = checkpoint.array(name).reshape(-1)
    is_packed = stored.dtype == np.int64  # float32 bits in the low half
    values = stored.astype(np.int32).view(np.float32) if is_packed else _flat(checkpoint, name)
    require_parameters(name, values, checkpoint.tensors[name].file)
    return values


def _read_offset(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    """Return what stands for zero among int8 numbers."""
    values = _flat(checkpoint, name)
    require_parameters(name, values, checkpoint.tensors[name].file)
    return values


def is_parameter(name: str) -> bool:
    """Return whether a tensor holds scales or offsets."""
    return name.rpartition(".")[2] in (*_SCALE_NAMES, *_OFFSET_NAMES)


def require_parameters(name: str, values: NDArray[Any], where: Path, action: str = "") -> None:
    """Check scales or offsets; which of them, the name tells. Loaders would compute with whatever is there.

    Raises:
        CheckpointError: a scale that is not a number above 0, or an offset outside int8.
    """
    (least, most), expected = _SCALES, f"a number above 0, from {_SCALES[0]:g} to {_SCALES[1]:g}"
    if name.rpartition(".")[2] in _OFFSET_NAMES:
        least, most, expected = -128, 127, "an int8 number, from -128 to 127"
    if not values.size or (values.min() >= least and values.max() <= most):  # with a NaN, neither is
        return
    for at in np.flatnonzero(~((values >= least) & (values <= most)))[:1]:
        raise CheckpointError(
            f"{name}[{at}]",
            where=where,
            got=f"{values.flat[at]:g}",
            expected=expected,
            action=action or "The file is damaged, or was not written for this format; quantize the model again.",
        )


def _channels(checkpoint: Checkpoint, module: str, scale: str, offset: str = "") -> Channels:
    config = checkpoint.config
    shape = (config.num_kv_heads, config.head_dim)
    stored = _read_scale(checkpoint, f"{module}.{scale}").reshape(shape[0], -1)
    name = f"{module}.{offset}"
    has_offset = bool(offset) and name in checkpoint.tensors
    offset_GD = _read_offset(checkpoint, name).reshape(shape) if has_offset else None
    return Channels(np.broadcast_to(stored, shape).copy(), offset_GD)


def _require_zeros(checkpoint: Checkpoint, name: str) -> None:
    """Refuse an offset that nothing here would subtract."""
    if name not in checkpoint.tensors or not (values := read_values(checkpoint, name)).any():
        return
    raise UnsupportedError(
        f"values of {name}",
        where=checkpoint.tensors[name].file,
        got=f"{values.min():g} to {values.max():g}",
        expected="zeros",
        action="Attention is computed without offsets; quantize it symmetrically.",
    )
