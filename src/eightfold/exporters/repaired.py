"""One linear as it lies in a directory, whatever is missing or of another type there, and as it should be written.

    real weight    (weight - weight_offset) * weight_scale
    deq_scale      input_scale * weight_scale
    quant_bias     round(bias / deq_scale - input_offset * sum_k weight)        a static linear; its bias is inside

Each of these follows from the others, so what a writer has left out can be made. Weights stay as they are unless a
loader cannot take their type (`widen`, `centre`), which is a loss.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightfold.check.directory import RawDirectory
from eightfold.config import DType
from eightfold.errors import CheckpointError, UnsupportedError, one_of
from eightfold.families import LinearShape, layer_of
from eightfold.format.bfloat16 import bfloat16_bits, widened
from eightfold.format.shards import PlannedTensor
from eightfold.format.stored import StoredTensors
from eightfold.format.streaming import pieces_of
from eightfold.model.layers import require_parameters
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    NEEDS_CALIBRATION,
    QUANT_BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    linear_tensors,
)

_FLOATS = tuple(kind.value for kind in DType if kind.is_float)
_NUMBERS = ("F32", "F16", "BF16", "I8", "I32", "I64")  # what scales, offsets and biases may be
_ROWS_BYTES = 16 << 20  # of a weight that is looked through at once

# Yields a tensor from its first row to its last.
Pieces = Callable[[], Iterable[NDArray[Any]]]


class Stored(StoredTensors):
    """The tensors of a directory, whatever they are.

    Attributes:
        dtype: the model's.
    """

    def __init__(self, d: RawDirectory, dtype: DType) -> None:
        super().__init__(d.path, d.config, d.tensors)
        self.dtype = dtype

    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""
        return name in self.tensors

    def values(self, name: str) -> NDArray[np.float32]:
        """Return a small tensor flat, as a float32 copy; an int64 deq_scale holds the bits of float32.

        Raises:
            CheckpointError: it is of a type that nobody writes it in.
        """
        info = self.tensors[name]
        if info.dtype not in _NUMBERS:
            raise CheckpointError(f"type of {name}", where=info.file, got=info.dtype, expected=one_of(_NUMBERS))
        stored = self.array(name).reshape(-1)
        if name.endswith(f".{DEQ_SCALE}") and stored.dtype == np.int64:
            return stored.astype(np.int32).view(np.float32)
        return widened(stored, self.tensors[name].dtype)


def narrowed(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Return float32 numbers as they are stored in a dtype, to nearest; BF16 as bit patterns."""
    if dtype is DType.BF16:
        return bfloat16_bits(values)
    numpy_types = {DType.F16: np.float16, DType.F32: np.float32, DType.I8: np.int8, DType.I32: np.int32}
    if dtype in (DType.I8, DType.I32):
        values = np.rint(values)
    with np.errstate(over="ignore", invalid="ignore"):  # what no longer is a number is refused as it is written
        return np.asarray(values, numpy_types[dtype])


def rounded(value: float, dtype: DType) -> float:
    """Return a number as a tensor of a float dtype holds it."""
    return float(widened(narrowed(np.array([value], np.float32), dtype), dtype.value)[0])


def sound(planned: PlannedTensor, pieces: Pieces, where: Path) -> Iterator[NDArray[Any]]:
    """Yield what is written of a tensor, if every reader can compute with it.

    Raises:
        CheckpointError: a float is NaN or infinite, or a scale is 0, in the file that is repaired or in the new dtype.
    """
    is_parameter = planned.name.endswith(("scale", "offset"))
    for piece in pieces():
        if planned.dtype.is_float:
            is_bfloat = planned.dtype is DType.BF16
            bad = (piece & 0x7F80) == 0x7F80 if is_bfloat else ~np.isfinite(piece)
            if bad.any():
                raise CheckpointError(
                    planned.name,
                    where=where,
                    got=f"{widened(piece[bad][:1], planned.dtype.value)[0]:g} as {planned.dtype.value}",
                    expected="finite numbers",
                    action="The weights are damaged, or too large for the model's dtype; fetch the model again.",
                )
            if is_parameter:
                require_parameters(planned.name, widened(piece.reshape(-1), planned.dtype.value), where)
        yield piece


@dataclass
class RepairedLinear:
    """A linear that is going to be written.

    Attributes:
        stored: where it lies.
        module: its full name.
        shape: what config.json says of it.
        kind: the type that it is written in.
        was: the type that is stored.
        common: (input_scale, input_offset) that it shares with others, where its own differ from theirs.
        centred: whether a weight with offsets is rounded anew, to one without.
    """

    stored: Stored
    module: str
    shape: LinearShape
    kind: QuantType
    was: QuantType
    common: tuple[float, float] | None = None
    centred: bool = False
    _sums: NDArray[np.float64] | None = None

    def has(self, suffix: str) -> bool:
        return self.stored.has(f"{self.module}.{suffix}")

    def values(self, suffix: str) -> NDArray[np.float32]:
        return self.stored.values(f"{self.module}.{suffix}")

    def lacks(self, what: str, from_what: str) -> CheckpointError:
        """Return the refusal of a linear of which something cannot be made."""
        return CheckpointError(
            f"{self.module}.{what}",
            where=self.stored.directory,
            got="no such tensor, and nothing to make it of",
            expected=f"it, or {from_what}",
            action="Quantize the model again.",
        )

    def require_sound(self) -> None:
        """Check what is stored beside the weight.

        Raises:
            CheckpointError: a tensor is of another shape or type, or holds what is no scale, offset or bias.
        """
        for spec in linear_tensors(self.was, has_bias=True):
            if spec.suffix == WEIGHT or not self.has(spec.suffix):
                continue
            info = self.stored.tensors[f"{self.module}.{spec.suffix}"]
            shape = spec.shape_for(N=self.shape.n, K=self.shape.k)
            if math.prod(info.shape) != math.prod(shape):
                raise CheckpointError(info.name, where=info.file, got=list(info.shape), expected=list(shape))
            values = self.values(spec.suffix)
            if spec.suffix in (QUANT_BIAS, BIAS):
                if not np.isfinite(values).all():
                    raise CheckpointError(info.name, where=info.file, got="NaN or infinity", expected="finite numbers",
                                          action="The file is damaged; fetch or make it again.")  # fmt: skip
            elif spec.suffix != DEQ_SCALE or not self._has_better_deq:
                require_parameters(info.name, values, info.file)

    # --- what its numbers are, stored or not

    def weight_scale(self) -> NDArray[np.float32]:
        """(N,)"""
        if self.has(WEIGHT_SCALE):
            return self.values(WEIGHT_SCALE)
        if not (self.has(DEQ_SCALE) and self.has(INPUT_SCALE)):
            raise self.lacks(WEIGHT_SCALE, f"{DEQ_SCALE} and {INPUT_SCALE}")
        return self.values(DEQ_SCALE) / self.values(INPUT_SCALE)

    def weight_offset(self) -> NDArray[np.float32]:
        """(N,); zeros where none are stored."""
        return self.values(WEIGHT_OFFSET) if self.has(WEIGHT_OFFSET) else np.zeros(self.shape.n, np.float32)

    def inputs(self) -> tuple[float, float]:
        """Return its own input_scale and input_offset."""
        if not self.has(INPUT_SCALE):
            raise self.lacks(INPUT_SCALE, "the float model to calibrate")
        offset = float(self.values(INPUT_OFFSET)[0]) if self.has(INPUT_OFFSET) else None
        if offset is None:
            raise self.lacks(INPUT_OFFSET, "the float model to calibrate")
        return float(self.values(INPUT_SCALE)[0]), offset

    def own_deq(self) -> NDArray[np.float32]:
        """(N,), as it is stored, or of its own input's scale."""
        if self.has(DEQ_SCALE) and not self._has_better_deq:
            return self.values(DEQ_SCALE)
        if self.has(WEIGHT_SCALE):  # of the input_scale that is written, as loaders use both
            return np.asarray(np.float32(rounded(self.inputs()[0], self.stored.dtype)) * self.weight_scale())
        raise self.lacks(DEQ_SCALE, f"{INPUT_SCALE} and {WEIGHT_SCALE}")

    @property
    def _has_better_deq(self) -> bool:
        """Whether input_scale and weight_scale say it better: a 16-bit deq_scale has lost small numbers."""
        name = f"{self.module}.{DEQ_SCALE}"
        return self.stored.has(name) and self.stored.tensors[name].dtype in ("F16", "BF16") and self.has(WEIGHT_SCALE)

    def sums(self) -> NDArray[np.float64]:
        """Return the sums of the rows of the weight, (N,)."""
        if self._sums is None:
            weight = self.stored.array(f"{self.module}.{WEIGHT}")
            step = max(1, _ROWS_BYTES // max(1, self.shape.k))
            pieces = [weight[at : at + step].sum(1, dtype=np.int64) for at in range(0, len(weight), step)]
            self._sums = np.concatenate(pieces).astype(np.float64)
            self.stored.release([f"{self.module}.{WEIGHT}"])
        return self._sums

    def real_bias(self) -> NDArray[np.float64]:
        """Return the bias that is added, (N,): quant_bias says it, and the float one exactly where both are the same.

        They are not where a writer has moved a shift of the inputs into quant_bias alone.
        """
        said = self.values(BIAS).astype(np.float64) if self.has(BIAS) else None
        if self.was in NEEDS_CALIBRATION and self.has(QUANT_BIAS):
            deq = self.own_deq().astype(np.float64)
            inside = self._beside_offset() * deq
            if said is None or not self.shape.has_bias:
                return inside
            return np.where(np.abs(inside - said) <= 2 * deq + 0.01 * np.abs(said), said, inside)
        if said is None:
            self.lacking_bias()
        return np.zeros(self.shape.n) if said is None else said

    def _beside_offset(self) -> NDArray[np.float64]:
        """Return what quant_bias holds beside the input_offset, (N,), in units of deq_scale."""
        _, offset = self.inputs()
        integers = self.stored.array(f"{self.module}.{QUANT_BIAS}").reshape(-1).astype(np.float64)
        beside = integers + offset * self.sums()
        return np.where(np.abs(beside) <= 2 + 1e-6 * np.abs(integers), 0, beside) if not self.shape.has_bias else beside

    def require_place_for_bias(self) -> None:
        """Refuse to make a linear without a bias of a static one that has a bias inside.

        Raises:
            UnsupportedError: quant_bias holds more than its offset, such as what is left of a shift of the inputs.
        """
        if self.kind in NEEDS_CALIBRATION or self.was not in NEEDS_CALIBRATION or self.shape.has_bias:
            return
        if self.has(QUANT_BIAS) and self._beside_offset().any():
            raise UnsupportedError(
                f"{self.module} as {self.kind.value}",
                where=self.stored.directory,
                got=f"a bias inside its {QUANT_BIAS}, for which a linear of this family has no place otherwise",
                expected="none",
                action="Quantize linears that share an input with one type, or suppress outliers without a shift.",
            )

    # --- what is written

    def tensors(self) -> dict[str, tuple[PlannedTensor, QuantType]]:
        """Return what is written of it by suffix, with the tag of each: the table of the format decides."""
        found = {}
        for spec in linear_tensors(self.kind, self.shape.has_bias):
            name = f"{self.module}.{spec.suffix}"
            if spec.suffix == BIAS and spec.optional and not self.has(BIAS) and not self._has_real_bias:
                continue
            stored = self.stored.tensors[name].dtype if self.stored.has(name) else ""
            source = DType(stored) if stored in _FLOATS else self.stored.dtype
            shape = spec.shape_for(N=self.shape.n, K=self.shape.k)
            planned = PlannedTensor(name, spec.dtype.resolve(self.stored.dtype, source), shape)
            found[spec.suffix] = planned, spec.tag
        return found

    def check(self, suffix: str) -> None:
        """Raise what is to be said of a tensor that nothing here can be made of."""
        if suffix == WEIGHT_SCALE:
            self.weight_scale()
        elif suffix == BIAS:
            self.lacking_bias()
        elif suffix in (INPUT_SCALE, INPUT_OFFSET):
            self.inputs()
        elif suffix == DEQ_SCALE:
            self.own_deq()

    def lacking_bias(self) -> None:
        """Raise what is to be said of a bias that nothing tells."""
        if self.shape.has_bias and not (self.was in NEEDS_CALIBRATION and self.has(QUANT_BIAS)):
            raise self.lacks(BIAS, QUANT_BIAS)

    @property
    def _has_real_bias(self) -> bool:
        return self.has(QUANT_BIAS)

    @property
    def keeps_numbers(self) -> bool:
        """Whether its scales, offsets and integers are those that are stored."""
        return self.common is None and not self.centred and self.kind is self.was

    def pieces(self, suffix: str, planned: PlannedTensor) -> Iterator[NDArray[Any]]:
        """Yield what is written of one of its tensors, from the first row to the last."""
        if suffix == WEIGHT:
            yield from self._weight(planned.dtype)
            return
        is_kept = self.keeps_numbers or (suffix == WEIGHT_SCALE and not self.centred)
        if self.has(suffix) and is_kept and self.stored.tensors[planned.name].dtype == planned.dtype.value:
            yield self.stored.array(planned.name).reshape(planned.shape)
            return
        values = self._made(suffix)
        if suffix == QUANT_BIAS and not np.all(np.abs(values) < 2**31):
            raise CheckpointError(planned.name, where=self.stored.directory, got=f"{np.abs(values).max():g}",
                                  expected="32-bit integers", action="Quantize the model again.")  # fmt: skip
        if suffix == DEQ_SCALE:
            require_parameters(planned.name, values, self.stored.directory)
        if planned.dtype is DType.I64:  # a packed deq_scale
            yield np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64).reshape(planned.shape)
        else:
            yield narrowed(values, planned.dtype).reshape(planned.shape)

    def _made(self, suffix: str) -> NDArray[Any]:
        """Return the numbers of one of its tensors, as they follow from the others."""
        if suffix == WEIGHT_SCALE:
            return self._centred() if self.centred else self.weight_scale()
        if suffix == WEIGHT_OFFSET:
            return np.zeros(self.shape.n, np.float32) if self.centred else self.weight_offset()
        if suffix == BIAS:
            return self.real_bias().astype(np.float32)
        scale, offset = self.common or self.inputs()
        if suffix == INPUT_SCALE:
            return np.array([scale], np.float32)
        if suffix == INPUT_OFFSET:
            return np.array([offset], np.float32)
        deq = self.own_deq() if self.common is None else np.float32(scale) * self._exact_weight_scale()
        if suffix == DEQ_SCALE:
            return deq
        assert suffix == QUANT_BIAS, suffix
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.rint(self.real_bias() / deq.astype(np.float64) - offset * self.sums()))

    def _exact_weight_scale(self) -> NDArray[np.float32]:
        return self.weight_scale() if self.has(WEIGHT_SCALE) else self.own_deq() / np.float32(self.inputs()[0])

    def _weight(self, dtype: DType) -> Iterator[NDArray[Any]]:
        name = f"{self.module}.{WEIGHT}"
        stored, kind = self.stored.array(name), self.stored.tensors[name].dtype
        is_changed = self.kind is QuantType.FLOAT and self.was is not QuantType.FLOAT
        scale = offset = new_scale = np.zeros((0, 1), np.float32)
        if is_changed or self.centred:
            scale, offset = self._exact_weight_scale()[:, None], self.weight_offset()[:, None]
        if self.centred:
            new_scale = self._centred()[:, None]
        step = max(1, _ROWS_BYTES // (4 * max(1, self.shape.k)))
        for at in range(0, len(stored), step):
            rows = stored[at : at + step]
            if not is_changed and not self.centred:
                yield rows if kind == dtype.value else narrowed(widened(rows, kind), dtype)
                continue
            real = (rows.astype(np.float32) - offset[at : at + step]) * scale[at : at + step]
            if self.centred:
                yield np.clip(np.rint(real / new_scale[at : at + step]), -127, 127).astype(np.int8)
            else:
                yield narrowed(real, dtype)
        self.stored.release([name])

    def _centred(self) -> NDArray[np.float32]:
        """Return the scales of the weight without offsets, (N,)."""
        name = f"{self.module}.{WEIGHT}"
        stored, scale, offset = self.stored.array(name), self.weight_scale(), self.weight_offset()
        lo, hi = stored.min(1).astype(np.float32) - offset, stored.max(1).astype(np.float32) - offset
        self.stored.release([name])
        return np.asarray(np.maximum(np.maximum(-lo, hi), 1) * scale / 127, np.float32)


@dataclass(frozen=True)
class Written:
    """A tensor of the new directory."""

    planned: PlannedTensor
    tag: QuantType
    pieces: Pieces

    @property
    def step(self) -> str:
        """The journal's step of it."""
        layer = layer_of(self.planned.name)
        return "ends" if layer is None else f"layer {layer}"


@dataclass
class Repair:
    """What is going to be written.

    Attributes:
        dtype: the model's.
        kind: what the description says of the whole model.
        types: of the linears in the layers.
        tensors: by name, in their order.
        repairs: what is put right -> the places.
        losses: what a loader does not have, and is therefore left out or rounded -> the places.
        bare: entries of the description that a loader looks for without a tensor.
    """

    dtype: DType
    kind: QuantType = QuantType.FLOAT
    types: dict[str, QuantType] = field(default_factory=dict)
    tensors: dict[str, Written] = field(default_factory=dict)
    repairs: dict[str, list[str]] = field(default_factory=dict)
    losses: dict[str, list[str]] = field(default_factory=dict)
    bare: dict[str, QuantType] = field(default_factory=dict)

    def repair(self, what: str, *places: str) -> None:
        self.repairs.setdefault(what, []).extend(places)

    def lose(self, what: str, *places: str) -> None:
        self.losses.setdefault(what, []).extend(places)

    def copy(self, stored: Stored, name: str, shape: tuple[int, ...], as_name: str | None = None) -> None:
        """Add a float tensor as it is stored."""
        info = stored.tensors[name]
        if info.shape != shape:
            raise CheckpointError(name, where=info.file, got=list(info.shape), expected=list(shape))
        dtype = DType(info.dtype) if info.dtype in ("F32", "F16", "BF16") else None
        if dtype is None:
            raise CheckpointError(f"type of {name}", where=info.file, got=info.dtype, expected="F32, F16 or BF16")
        planned = PlannedTensor(as_name or name, dtype, shape)
        self.tensors[planned.name] = Written(planned, QuantType.FLOAT, lambda: pieces_of(stored, name))
