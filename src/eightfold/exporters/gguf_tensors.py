"""The tensors of a GGUF file, planned from the headers and the small tensors of an 8-bit directory.

    int8, one scale a row      -> Q8_0: the same integers, and in each block of 32 the scale as float16
    int8 with offsets          -> (stored - offset) * scale, rounded to Q8_0 anew
    float                      -> as it is, or rounded to Q8_0 as llama.cpp's quantizer does
    norms, biases              -> float32

Letters: N outputs, K inputs, H heads, D head_dim.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import DType
from eightfold.errors import UnsupportedError
from eightfold.exporters.finite import is_damaged
from eightfold.exporters.gguf_fields import rope_divisors
from eightfold.families import LinearShape, all_linears, all_norms, head_shape
from eightfold.format.bfloat16 import widened
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.gguf_layout import (
    BLOCK,
    LAYER_MODULES,
    MODULES,
    NAMES,
    PAIRED,
    ROPE_FACTORS,
    block_dtype,
    pair,
    require_gguf,
)
from eightfold.model.layers import Linear, read_linear, read_norm, read_values, require_finite
from eightfold.scheme import QuantType, bias_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

Q8_0 = "Q8_0"

_PIECE = 1 << 21  # elements of a weight at a time
_LARGEST = float(np.finfo(np.float16).max)

Pieces = Callable[[], Iterator["NDArray[Any]"]]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        shape: outputs first.
        kind: its type, by the gguf package's name.
        pieces: makes its elements, some rows at a time.
        source: the stored tensor that is read for them; empty: several small ones.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Pieces
    source: str = ""

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        return count // BLOCK * block_dtype().itemsize if self.kind == Q8_0 else count * DType(self.kind).itemsize


@dataclass
class TensorPlan:
    """All tensors, and what happens to them.

    Attributes:
        tensors: in the order of the file.
        kinds: how many linears of each type the directory has.
        kept: names of float matrices that stay float.
        rounded: of those that become Q8_0.
        asymmetric: of weights whose offsets go into new integers.
        scale_errors: the worst relative error of a weight's scales as float16, by the weight's name.
    """

    tensors: list[Tensor] = field(default_factory=list)
    kinds: Counter[QuantType] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    asymmetric: list[str] = field(default_factory=list)
    scale_errors: dict[str, float] = field(default_factory=dict)


def plan_tensors(checkpoint: Checkpoint, architecture: str, *, rounds_floats: bool) -> TensorPlan:
    """Plan the file of an architecture that gguf_layout.WRITTEN_AS has.

    Args:
        checkpoint: the directory.
        architecture: its name in GGUF.
        rounds_floats: whether float matrices become Q8_0 where their rows are whole blocks.

    Raises:
        UnsupportedError: int8 rows that are no whole blocks, or a norm with a bias.
        CheckpointError: a scale or an offset makes no sense.
    """
    planner = _Planner(checkpoint, architecture, rounds_floats)
    config, plan = checkpoint.config, planner.plan
    planner.add_linear(NAMES.embedding, head_shape(config))
    for module in all_norms(config):
        planner.add_norm(module)
    for module, shape in all_linears(config).items():
        if module != NAMES.head or not config.tie_word_embeddings:
            planner.add_linear(module, shape)
    if (divisors := rope_divisors(config)) is not None:
        plan.tensors.append(Tensor(ROPE_FACTORS, divisors.shape, "F32", lambda: iter([divisors])))
    return plan


class _Planner:
    def __init__(self, checkpoint: Checkpoint, architecture: str, rounds_floats: bool) -> None:
        self._checkpoint, self._pairs, self._rounds_floats = checkpoint, architecture == PAIRED, rounds_floats
        self.plan = TensorPlan()
        inner = {ours: theirs for theirs, ours in LAYER_MODULES.items()}
        self._names = {ours: theirs for theirs, ours in MODULES.items()}
        for i in range(checkpoint.config.num_layers):
            self._names.update({NAMES.layer(i) + ours: f"blk.{i}.{theirs}" for ours, theirs in inner.items()})

    def add_norm(self, module: str) -> None:
        norm = read_norm(self._checkpoint, module)
        if norm.bias is not None:
            where, name = self._checkpoint.directory, bias_name(module)
            raise UnsupportedError(
                f"values of {name}", where=where, got="other ones", expected="zeros, as GGUF has none"
            )
        name = f"{self._names[module]}.weight"
        self.plan.tensors.append(Tensor(name, norm.gain.shape, "F32", lambda: iter([norm.gain])))

    def add_linear(self, module: str, shape: LinearShape) -> None:
        """Plan a linear, or the embedding, which is stored as one."""
        checkpoint, plan = self._checkpoint, self.plan
        linear, name = read_linear(checkpoint, module, shape), self._names[module]
        order = self._order(module, shape.n)
        source, kind = linear.name, checkpoint.tensors[linear.name].dtype
        if linear.kind is not QuantType.FLOAT:
            plan.kinds[linear.kind] += 1
            kind, pieces = Q8_0, self._integers(module, linear, order)
        elif self._rounds_floats and shape.k % BLOCK == 0:
            plan.rounded.append(source)
            kind, pieces = Q8_0, functools.partial(_round, functools.partial(_floats, checkpoint, source, order))
        else:
            plan.kept.append(source)
            pieces = functools.partial(_as_it_is, checkpoint, source, order)
        plan.tensors.append(Tensor(f"{name}.weight", (shape.n, shape.k), kind, pieces, source))
        if shape.has_bias:
            bias = functools.partial(_bias, checkpoint, module, shape, order)
            plan.tensors.append(Tensor(f"{name}.bias", (shape.n,), "F32", bias))

    def _order(self, module: str, rows: int) -> NDArray[Any] | None:
        """Return the rows of q or k in the order of the file; None where it is that of the directory."""
        config = self._checkpoint.config
        heads = {NAMES.qkv[0]: config.num_heads, NAMES.qkv[1]: config.num_kv_heads}
        found = next((count for inner, count in heads.items() if module.endswith(f".{inner}")), None)
        return pair(np.arange(rows), found) if found is not None and self._pairs else None

    def _integers(self, module: str, linear: Linear, order: NDArray[Any] | None) -> Pieces:
        checkpoint, plan, name = self._checkpoint, self.plan, linear.name
        info = checkpoint.tensors[name]
        if info.shape[1] % BLOCK:
            raise UnsupportedError(
                f"shape of {name}",
                where=info.file,
                got=list(info.shape),
                expected=f"rows of whole blocks of {BLOCK}, for Q8_0",
                action="Quantize the model with this linear kept float.",
            )
        scale = weight_scale(linear)
        if linear.weight_offset is not None and linear.weight_offset.any():
            plan.asymmetric.append(name)
            return functools.partial(
                _round, functools.partial(_dequantized, checkpoint, name, scale, linear.weight_offset, order)
            )
        with np.errstate(over="ignore"):
            there = scale.astype(np.float16).astype(np.float32)
        if not np.isfinite(there).all():
            got, expected = f"a scale of {scale.max():g}", f"at most {_LARGEST:g}, as float16 holds"
            raise UnsupportedError(f"scales of {name}", where=info.file, got=got, expected=expected)
        plan.scale_errors[name] = float(np.max(np.abs(there - scale) / scale, initial=0))
        return functools.partial(_blocks, checkpoint, name, scale, order)


def weight_scale(linear: Linear) -> NDArray[Any]:
    """Return the scale of each row of an int8 weight, (N,) float32; files of static activations need not have it."""
    if linear.weight_scale is not None:
        return linear.weight_scale
    assert linear.deq_scale is not None and linear.input_scale is not None
    scale: NDArray[Any] = linear.deq_scale / linear.input_scale
    return scale


def _bias(
    checkpoint: Checkpoint, module: str, shape: LinearShape, order: NDArray[Any] | None
) -> Iterator[NDArray[Any]]:
    """Yield a bias as float32; of static activations from quant_bias, where the file has no other."""
    linear = read_linear(checkpoint, module, shape)
    bias = linear.bias
    if bias is None and bias_name(module) in checkpoint.tensors:
        bias = read_values(checkpoint, bias_name(module))
    if bias is None:
        assert linear.quant_bias is not None and linear.input_offset is not None and linear.deq_scale is not None
        sums = linear.weight.sum(1, dtype=np.int64)
        whole = linear.quant_bias.astype(np.float64) + linear.input_offset.astype(np.float64) * sums
        bias = (whole * linear.deq_scale).astype(np.float32)
    yield bias if order is None else bias[order]


def _slices(checkpoint: Checkpoint, name: str, order: NDArray[Any] | None) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Yield (which rows, the rows) of a stored matrix, some at a time, and let go of each again."""
    array = checkpoint.array(name)
    step, row_bytes = max(1, _PIECE // array.shape[1]), array.shape[1] * array.itemsize
    for at in range(0, len(array), step):
        if order is None:
            yield slice(at, at + step), array[at : at + step]
            checkpoint.release_part(name, at * row_bytes, min(at + step, len(array)) * row_bytes)
        else:
            yield order[at : at + step], array[order[at : at + step]]


def _blocks(
    checkpoint: Checkpoint, name: str, scale: NDArray[Any], order: NDArray[Any] | None
) -> Iterator[NDArray[Any]]:
    """Yield the integers of a weight as blocks of Q8_0 that all have the scale of their row."""
    for rows, values in _slices(checkpoint, name, order):
        made = np.empty((len(values), values.shape[1] // BLOCK), block_dtype())
        made["scale"] = scale[rows, None].astype(np.float16)
        made["values"] = values.reshape(len(values), -1, BLOCK)
        yield made


def _dequantized(
    checkpoint: Checkpoint, name: str, scale: NDArray[Any], offset: NDArray[Any], order: NDArray[Any] | None
) -> Iterator[NDArray[Any]]:
    for rows, values in _slices(checkpoint, name, order):
        yield (values - offset[rows, None]) * scale[rows, None]


def _floats(checkpoint: Checkpoint, name: str, order: NDArray[Any] | None) -> Iterator[NDArray[Any]]:
    """Yield a float matrix as float32."""
    for values in _as_it_is(checkpoint, name, order):
        yield widened(values, checkpoint.tensors[name].dtype)


def _as_it_is(checkpoint: Checkpoint, name: str, order: NDArray[Any] | None) -> Iterator[NDArray[Any]]:
    """Yield a float matrix in its own type; what is no number is refused by name."""
    for _, values in _slices(checkpoint, name, order):
        if is_damaged(values, checkpoint.tensors[name].dtype):
            require_finite(checkpoint, name)
        yield values


def _round(floats: Pieces) -> Iterator[NDArray[Any]]:
    """Yield float32 rows as Q8_0, each block with a scale of its own."""
    gguf = require_gguf("export")
    for rows in floats():
        yield gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
