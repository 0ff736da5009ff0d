"""One linear as it lies in a directory, whatever is missing or of another type there, and as it should be written.

    real weight    (weight - weight_offset) * weight_scale
    deq_scale      input_scale * weight_scale
    quant_bias     round(bias / deq_scale - input_offset * sum_k weight)        a static linear; its bias is inside

Each of these follows from the others, so what a writer has left out can be made. Weights stay as they are unless a
loader cannot take their type (`widen`, `centre`), which is a loss.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightfold.check.directory import RawDirectory
from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.families import LinearShape, layer_of
from eightfold.format.shards import PlannedTensor
from eightfold.format.stored import StoredTensors
from eightfold.format.streaming import pieces_of
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
_ROWS_BYTES = 16 << 20  # of a weight that is looked through at once


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
        """Return a small tensor flat, as a float32 copy; an int64 deq_scale holds the bits of float32."""
        stored = self.array(name).reshape(-1)
        if name.endswith(f".{DEQ_SCALE}") and stored.dtype == np.int64:
            return stored.astype(np.int32).view(np.float32)
        return widened(stored, self.tensors[name].dtype)


def widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return stored numbers as a float32 copy; BF16 comes as bit patterns."""
    if dtype == DType.BF16.value:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.array(stored, dtype=np.float32)


def narrowed(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Return float32 numbers as they are stored in a dtype, to nearest; BF16 as bit patterns."""
    if dtype is DType.BF16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    numpy_types = {DType.F16: np.float16, DType.F32: np.float32, DType.I8: np.int8, DType.I32: np.int32}
    if dtype in (DType.I8, DType.I32):
        values = np.rint(values)
    return np.asarray(values, numpy_types[dtype])


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
        if self.has(DEQ_SCALE) and self.stored.tensors[f"{self.module}.{DEQ_SCALE}"].dtype in ("I64", "F32"):
            return self.values(DEQ_SCALE)
        if self.has(WEIGHT_SCALE):  # a 16-bit deq_scale has lost small numbers
            return np.asarray(np.float32(self.inputs()[0]) * self.weight_scale())
        if self.has(DEQ_SCALE):
            return self.values(DEQ_SCALE)
        raise self.lacks(DEQ_SCALE, f"{INPUT_SCALE} and {WEIGHT_SCALE}")

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
        """Return the float bias, (N,), by quant_bias where nothing else says it."""
        if self.has(BIAS):
            return self.values(BIAS).astype(np.float64)
        if self.was in NEEDS_CALIBRATION and self.has(QUANT_BIAS):
            _, offset = self.inputs()
            integers = self.stored.array(f"{self.module}.{QUANT_BIAS}").reshape(-1).astype(np.float64)
            return (integers + offset * self.sums()) * self.own_deq().astype(np.float64)
        self.lacking_bias()
        return np.zeros(self.shape.n)

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
        is_kept = self.has(suffix) and (self.keeps_numbers or suffix in (WEIGHT_SCALE, BIAS)) and not self.centred
        if is_kept and self.stored.tensors[planned.name].dtype == planned.dtype.value:
            yield self.stored.array(planned.name).reshape(planned.shape)
            return
        values = self._made(suffix)
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
        return np.rint(self.real_bias() / deq.astype(np.float64) - offset * self.sums())

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


# Yields a tensor from its first row to its last.
Pieces = Callable[[], Iterable[NDArray[Any]]]


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
        tensors: by name, in their order.
        repairs: what is put right -> the places.
        losses: what a loader does not have, and is therefore left out or rounded -> the places.
        bare: entries of the description that a loader looks for without a tensor.
    """

    dtype: DType
    kind: QuantType = QuantType.FLOAT
    tensors: dict[str, Written] = field(default_factory=dict)
    repairs: dict[str, list[str]] = field(default_factory=dict)
    losses: dict[str, list[str]] = field(default_factory=dict)
    bare: dict[str, QuantType] = field(default_factory=dict)

    def repair(self, what: str, *places: str) -> None:
        self.repairs.setdefault(what, []).extend(places)

    def lose(self, what: str, *places: str) -> None:
        self.losses.setdefault(what, []).extend(places)

    def copy(self, stored: Stored, name: str, shape: tuple[int, ...], as_name: str | None = None) -> None:
        """Add a float tensor as it is stored; float64 in the model's dtype."""
        info = stored.tensors[name]
        if info.shape != shape:
            raise CheckpointError(name, where=info.file, got=list(info.shape), expected=list(shape))
        dtype = DType(info.dtype) if info.dtype in ("F32", "F16", "BF16") else None
        if dtype is None:
            raise CheckpointError(f"type of {name}", where=info.file, got=info.dtype, expected="F32, F16 or BF16")
        planned = PlannedTensor(as_name or name, dtype, shape)
        self.tensors[planned.name] = Written(planned, QuantType.FLOAT, lambda: pieces_of(stored, name))
