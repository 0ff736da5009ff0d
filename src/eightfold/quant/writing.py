"""Tensors on their way from torch into the files of an output; what an earlier run has left: format/streaming.py."""

from __future__ import annotations

import torch
from torch import Tensor

from eightfold.format.shards import ShardedWriter
from eightfold.format.stored import StoredTensors
from eightfold.model.layers import is_parameter, require_parameters
from eightfold.model.reference.tensors import (
    TORCH_DTYPES,
    mapped_tensor,
    picked_rows,
    require_finite,
    require_range,
    to_array,
)
from eightfold.quant.plan import OutputTensor

_DAMAGED = "Weights or activations are far too large: check the float model and the calibration data."
_TOO_NARROW = "Store float32 (`save_float32`), or choose another `dtype`."

# How much of a tensor that is only copied is looked at and written at a time, as it stays in the caches.
_PIECE_BYTES = 2 << 20

# How much of it may stay in memory before it is let go of.
_RELEASE_BYTES = 32 << 20


class TensorWriter:
    """Writes the planned tensors into files.

    Attributes:
        checksums: CRC-32 of the tensors that were written since it was last emptied, by name.
    """

    def __init__(self, checkpoint: StoredTensors, plan: dict[str, OutputTensor], writer: ShardedWriter) -> None:
        self._checkpoint, self._plan, self._writer = checkpoint, plan, writer
        self.checksums: dict[str, int] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was made, in the dtype of the plan."""
        dtype = self._plan[name].planned.dtype
        if tensor.is_floating_point() and tensor.dtype != TORCH_DTYPES[dtype]:
            require_range(tensor, dtype, name, self._checkpoint.directory, _TOO_NARROW)
        if is_parameter(name) and tensor.dtype != torch.int8:
            stored = tensor.to(torch.int32).view(torch.float32) if tensor.dtype == torch.int64 else tensor
            values = stored.to(TORCH_DTYPES[dtype] if dtype.is_float else stored.dtype).to(torch.float32)
            require_parameters(name, values.cpu().numpy(), self._checkpoint.directory, _DAMAGED)
        self._writer.write(name, to_array(tensor, dtype))
        self.done(name)

    def write_made(self, made: dict[str, Tensor]) -> None:
        """Write tensors that were made."""
        for name, tensor in made.items():
            self.write(name, tensor)

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a float tensor that comes in pieces."""
        dtype = self._plan[name].planned.dtype
        require_range(rows, dtype, name, self._checkpoint.directory, _TOO_NARROW)
        self._writer.append(name, to_array(rows, dtype))

    def done(self, name: str) -> None:
        """Take note of a tensor whose last piece is written."""
        self.checksums[name] = self._writer.checksums[name]

    def copy(self, name: str, source: str | None = None) -> None:
        """Write a float tensor as it is, or widened, piece by piece."""
        source = source or name
        dtype = self._plan[name].planned.dtype
        info = self._checkpoint.tensors[source]
        count = info.shape[0] if info.shape else 1
        row_bytes = max(1, info.nbytes // max(1, count))
        step, released = max(1, _PIECE_BYTES // row_bytes), 0
        for at in range(0, count, step):
            piece = self._rows(source, at, min(count, at + step))
            if not torch.isfinite(piece.sum(dtype=torch.float32)):
                require_finite(mapped_tensor(self._checkpoint, source), source, self._checkpoint)
            if piece.dtype != TORCH_DTYPES[dtype]:
                require_range(piece, dtype, name, self._checkpoint.directory, _TOO_NARROW)
            self._writer.append(name, to_array(piece, dtype))
            read = (at + len(piece)) * row_bytes
            if read - released >= _RELEASE_BYTES or at + len(piece) == count:
                self._checkpoint.release_part(source, released, read)
                released = read
        self.done(name)

    def _rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return some rows of a tensor, as a matrix."""
        if not self._checkpoint.tensors[name].shape:
            return mapped_tensor(self._checkpoint, name).reshape(1, 1)
        return picked_rows(self._checkpoint, name, slice(begin, end)).reshape(end - begin, -1)

    def write_below(self, prefix: str, made: dict[str, Tensor]) -> None:
        """Write every planned tensor of a layer that is not written yet: as made, or as in the source."""
        for name in (name for name in self._plan if name.startswith(prefix) and name not in self.checksums):
            if name in made:
                self.write(name, made[name])
            else:
                self.copy(name)

    def finished(self) -> dict[str, int]:
        """Return the checksums of what was written since the last call, once it is safely on disk."""
        self._writer.sync()
        found, self.checksums = self.checksums, {}
        return {name: found[name] for name in self._plan if name in found}
