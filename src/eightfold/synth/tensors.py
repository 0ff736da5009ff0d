"""Random tensors: what they hold is decided by their names, shapes and a seed.

A value is one of 65,536 quantiles of a normal distribution, picked by 16 random bits: a look-up, and no arithmetic.
Each piece of rows has its own generator, so that values do not depend on who computes which piece.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import DType
from eightfold.format.bfloat16 import bfloat16_bits
from eightfold.format.shards import PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Elements of a piece, and how many are looked up at a time: their indices then stay in the first caches.
PIECE, _RUN = 1 << 22, 1 << 15


@dataclass(frozen=True)
class RandomTensor:
    """One tensor to be made.

    Attributes:
        name: its name in the file.
        shape: a matrix's, or a vector's.
        std: deviation of an ordinary element.
        mean: of its elements.
        rows: rows of a matrix that are larger, and by what factor.
        columns: its columns that are larger or smaller; of a vector, the elements that are set, and to what.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    rows: Mapping[int, float] = field(default_factory=dict)
    columns: Mapping[int, float] = field(default_factory=dict)
    dtype: DType | None = None  # None: the model's
    stacked: int = 1  # so many matrices below each other are one tensor

    def planned(self, dtype: DType) -> PlannedTensor:
        """Return it as it stands in a file of a model of this dtype."""
        n, *k = self.shape
        shape = self.shape if self.stacked == 1 else (self.stacked, n // self.stacked, *k)
        return PlannedTensor(self.name, self.dtype or dtype, shape)


class RandomValues:
    """What tensors hold: decided by their names, shapes and a seed alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def tensors(self) -> Iterator[RandomTensor]:
        """Yield the tensors of the model."""
        raise NotImplementedError

    def _generator(self, what: str, piece: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(what.encode()), piece]))

    def pieces(self, tensor: RandomTensor) -> list[range]:
        """Return the rows of a tensor's pieces, in order; a vector is one piece."""
        rows = tensor.shape[0]
        step = max(1, PIECE // tensor.shape[1]) if len(tensor.shape) > 1 else rows
        return [range(at, min(rows, at + step)) for at in range(0, rows, step)]

    def values(self, tensor: RandomTensor, rows: range, dtype: DType) -> NDArray[Any]:
        """Return a piece, (rows, K) or a whole vector, in a dtype on disk; BF16 as uint16 bit patterns."""
        generator = self._generator(tensor.name, rows.start)
        if len(tensor.shape) == 1:
            vector = tensor.mean + tensor.std * generator.standard_normal(tensor.shape[0])
            vector[list(tensor.columns)] = list(tensor.columns.values())
            return stored(vector.astype(np.float32), dtype)
        shape = (len(rows), tensor.shape[1])
        bits = generator.integers(0, 1 << 64, -(-shape[0] * shape[1] // 4), np.uint64).view(np.uint16)
        bits = bits[: shape[0] * shape[1]]
        values = _look_up(_table(tensor.std, dtype, tensor.mean), bits).reshape(shape)
        _plant(values, bits.reshape(shape), tensor, rows, dtype)
        return values


def _plant(values: NDArray[Any], bits: NDArray[np.uint16], tensor: RandomTensor, rows: range, dtype: DType) -> None:
    """Scale what stands out. Where a row and a column meet, the row decides."""
    for column, factor in tensor.columns.items():
        values[:, column] = _table(tensor.std * factor, dtype)[bits[:, column]]
    for row, factor in tensor.rows.items():
        if row in rows:
            values[row - rows.start] = _table(tensor.std * factor, dtype)[bits[row - rows.start]]


def _look_up(table: NDArray[Any], bits: NDArray[np.uint16]) -> NDArray[Any]:
    out = np.empty(len(bits), table.dtype)
    for at in range(0, len(bits), _RUN):
        # No index can be out of range; mode "wrap" spares the check.
        np.take(table, bits[at : at + _RUN], out=out[at : at + _RUN], mode="wrap")
    return out


@functools.cache
def _quantiles() -> NDArray[np.float32]:
    """Return 65,536 quantiles of a normal distribution, each as likely as the others."""
    normal = NormalDist()
    half = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768)], np.float32)
    return np.concatenate([half, -half])


@functools.lru_cache(maxsize=64)
def _table(std: float, dtype: DType, mean: float = 0.0) -> NDArray[Any]:
    return stored(_quantiles() * np.float32(std) + np.float32(mean), dtype)


def stored(values: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """Return finite float32 values in a dtype on disk, rounded to nearest even; BF16 as uint16 bit patterns."""
    if dtype is DType.F16:
        return values.astype(np.float16)
    if dtype is DType.F8_E4M3:
        return _float8(values)
    if dtype is DType.F32:
        return values
    return bfloat16_bits(values)


def _float8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the nearest float8 of four bits of exponent and three of mantissa, up to 448, as its bits."""
    codes = np.arange(127)  # of what is not negative; 127 is no number
    exponents, fractions = codes >> 3, codes & 7
    known = np.where(exponents, np.ldexp(1 + fractions / 8, exponents - 7), np.ldexp(fractions / 8, -6))
    nearest = np.searchsorted((known[1:] + known[:-1]) / 2, np.abs(values))
    return (nearest | np.where(values < 0, 128, 0)).astype(np.uint8)
