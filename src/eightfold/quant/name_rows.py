"""Rows of a source as float32: whatever they are stored in, however packed, wherever their scales lie.

    w = element * scale of its block

A few rows are read at a time. What they are: name_sources.py.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.format.stored import StoredTensors
from eightfold.model.reference.tensors import mapped_tensor
from eightfold.quant.name_sources import FETCH_AGAIN, FLOAT8, POWERS, Coding, Source, read_form
from eightfold.quant.qparams import QuantizedWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

# The values of 4 bits: two's complement moved by 8; sign, two bits of exponent, one of mantissa (OCP MX, 5.3.3).
_INT4 = tuple(range(-8, 8))
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_DAMAGED = "The weights are damaged; fetch the model again."


class Rows:
    """The rows of one source.

    Raises:
        CheckpointError: its scales are not finite numbers above 0, or it has not the shape that was planned.
    """

    def __init__(self, stored: StoredTensors, source: Source) -> None:
        self._stored, self._source = stored, source
        self._info = stored.tensors[source.tensor]
        self._whole = self._read_whole()
        self._grid = self._read_scales() if source.scale else None
        if source.form and (form := read_form(stored, source.form, source.tensor)) != source.shape:
            got, expected = list(form), f"{list(source.shape)}, as others that are packed alike"
            what = f"values of {source.form}"
            raise CheckpointError(what, where=self._info.file, got=got, expected=expected, action=FETCH_AGAIN)

    def __call__(self, begin: int, end: int) -> Tensor:
        """Return rows `begin` to `end`, made anew, finite."""
        rows = self._stored_rows(begin, end)
        if self._source.coding is not Coding.PLAIN:
            found = _unpacked(rows, self._source.coding)[:, : self._source.shape[1]].contiguous()
        elif self._info.dtype in FLOAT8:
            # A table: torch converts one element at a time, which takes sixteen times as long.
            found = torch.from_numpy(np.take(_float8_values(self._info.dtype), rows.numpy()))
        else:
            found = rows.to(torch.float32, copy=True).contiguous()
        if self._grid is not None:
            self._multiply(found, self._grid[self._blocks(begin, end)])
        if not torch.isfinite(found.sum()):
            self._require_finite(found, begin)
        return found

    def all(self) -> Tensor:
        """Return all rows."""
        return self(0, self._source.shape[0])

    def integers(self) -> QuantizedWeight | None:
        """Return what is stored in int8 with a scale for each row, as it is; None for anything else."""
        n, k = self._source.shape
        is_int8 = self._source.coding is Coding.PLAIN and self._info.dtype == DType.I8.value
        if not is_int8 or self._grid is None or self._source.block[1] < k:
            return None
        scale = self._grid[self._blocks(0, n)]
        return QuantizedWeight(self._stored_rows(0, n).contiguous(), scale, torch.zeros(n, 1))

    def _read_whole(self) -> Tensor:
        source = self._source
        if source.coding is not Coding.PLAIN:
            array: NDArray[Any] = self._stored.array(source.tensor)
            array = array if source.expert is None else array[source.expert]
            return torch.from_numpy(array.reshape(len(array), -1).view(np.uint8))
        whole = mapped_tensor(self._stored, source.tensor)
        return whole if source.expert is None else whole[source.expert]

    def _stored_rows(self, begin: int, end: int) -> Tensor:
        source = self._source
        first, last = (source.begin + row * source.step for row in (begin, end - 1))
        at = slice(first, last + 1, source.step)
        return self._whole[:, at].T if source.is_input_major else self._whole[at]

    def _blocks(self, begin: int, end: int) -> Tensor:
        """Return the row of the scales that belongs to each of some rows."""
        source = self._source
        return (source.begin + torch.arange(begin, end) * source.step) // source.block[0]

    def _multiply(self, rows: Tensor, scale: Tensor) -> None:
        width, k = self._source.block[1], rows.shape[1]
        if scale.shape[1] == 1:
            rows.mul_(scale)
            return
        whole = k // width * width
        rows[:, :whole].view(len(rows), -1, width).mul_(scale[:, : whole // width, None])
        if whole < k:
            rows[:, whole:].mul_(scale[:, -1:])

    def _read_scales(self) -> Tensor:
        """Return the scales, (blocks of rows, blocks of columns) float32."""
        source, name = self._source, self._source.scale
        info, found = self._stored.tensors[name], mapped_tensor(self._stored, name)
        if source.expert is not None and found.shape[:1] == self._info.shape[:1]:
            found = found[source.expert]
        if info.dtype in POWERS:
            found = torch.ldexp(torch.ones(found.shape), found.to(torch.int32) - 127)
        elif info.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"dtype of {name}", where=info.file, got=info.dtype, expected="F32, BF16 or F8_E8M0", action=FETCH_AGAIN
            )
        scale = found.to(torch.float32)
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            raise CheckpointError(
                f"values of {name}",
                where=info.file,
                got=f"{float(scale[bad][0]):g}",
                expected="finite scales above 0",
                action=_DAMAGED,
            )
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
        return scale.T.contiguous() if source.is_input_major else scale

    def _require_finite(self, rows: Tensor, begin: int) -> None:
        flat = rows.reshape(len(rows), -1)
        for row, column in (~torch.isfinite(flat)).nonzero()[:1].tolist():
            place = f"expert {self._source.expert}, " if self._source.expert is not None else ""
            raise CheckpointError(
                f"{self._source.tensor}[{place}{self._source.begin + (begin + row) * self._source.step}, {column}]",
                where=self._info.file,
                got=float(flat[row, column]),
                expected="a finite number",
                action=_DAMAGED,
            )


def _unpacked(rows: Tensor, coding: Coding) -> Tensor:
    """Return what packed bytes (n, B) mean, (n, 2 B) float32."""
    pairs = np.take(_pairs(coding), rows.numpy())
    return torch.from_numpy(pairs.view(np.float16)).to(torch.float32)


@functools.cache
def _float8_values(dtype: str) -> NDArray[np.float32]:
    """Return what each byte of a float8 type means, (256,)."""
    values: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(_FLOAT8[dtype]).to(torch.float32).numpy()
    return values


@functools.cache
def _pairs(coding: Coding) -> NDArray[np.uint32]:
    """Return the two float16 that each byte means, the low 4 bits first, (256,) as uint32."""
    values = np.array(_INT4 if coding is Coding.INT4 else _FLOAT4, np.float16)
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], 1).reshape(-1).view(np.uint32)
