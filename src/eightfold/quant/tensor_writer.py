"""Writes the tensors of the output: each is checked, rounded once, written in place, and summed up for the journal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.format.checkpoint import Checkpoint
from eightfold.format.shards import ShardedWriter
from eightfold.model.reference.tensors import TORCH_DTYPES, mapped_tensor, require_finite, require_range, to_array
from eightfold.quant.plan import OutputTensor

# How much of a tensor that is only copied is looked at and written at a time, as it stays in the caches.
_PIECE_BYTES = 2 << 20

# How much of it may stay in memory before it is let go of.
_RELEASE_BYTES = 32 << 20


class TensorWriter:
    """Writes the planned tensors into files.

    Attributes:
        checksums: CRC-32 of the tensors that were written since it was last emptied, by name.
    """

    def __init__(self, checkpoint: Checkpoint, plan: dict[str, OutputTensor], writer: ShardedWriter) -> None:
        self._checkpoint, self._plan, self._writer = checkpoint, plan, writer
        self.checksums: dict[str, int] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was made, in the dtype of the plan."""
        dtype = self._plan[name].planned.dtype
        if tensor.is_floating_point() and tensor.dtype != TORCH_DTYPES[dtype]:
            require_range(tensor, dtype, name, self._checkpoint.directory, "Store float32 (`save_float32`).")
        self._writer.write(name, to_array(tensor, dtype))
        self.checksums[name] = self._writer.checksums[name]

    def copy(self, name: str, source: str | None = None) -> None:
        """Write a float tensor as it is, or widened, piece by piece."""
        source = source or name
        dtype = self._plan[name].planned.dtype
        whole = mapped_tensor(self._checkpoint, source)
        rows = whole.reshape(whole.shape[0], -1) if whole.dim() else whole.reshape(1, 1)
        row_bytes = max(1, rows.shape[1] * rows.element_size())
        step, released = max(1, _PIECE_BYTES // row_bytes), 0
        for at in range(0, len(rows), step):
            piece = rows[at : at + step]
            if not torch.isfinite(piece.sum(dtype=torch.float32)):
                require_finite(whole, source, self._checkpoint)
            if piece.dtype != TORCH_DTYPES[dtype]:
                require_range(piece, dtype, name, self._checkpoint.directory, "Store float32 (`save_float32`).")
            self._writer.append(name, to_array(piece, dtype))
            read = (at + len(piece)) * row_bytes
            if read - released >= _RELEASE_BYTES or at + len(piece) == len(rows):
                self._checkpoint.release_part(source, released, read)
                released = read
        self.checksums[name] = self._writer.checksums[name]

    def write_below(self, prefix: str, made: dict[str, Tensor]) -> None:
        """Write every planned tensor of a layer: as made, or as in the source."""
        for name in (name for name in self._plan if name.startswith(prefix)):
            if name in made:
                self.write(name, made[name])
            else:
                self.copy(name)

    def finished(self) -> dict[str, int]:
        """Return the checksums of what was written since the last call, once it is safely on disk."""
        self._writer.sync()
        found, self.checksums = self.checksums, {}
        return {name: found[name] for name in self._plan if name in found}

    def take_over(self, checksums: dict[str, int]) -> Sequence[str]:
        """Leave tensors as an earlier run wrote them; return those that are not what it wrote."""
        return [name for name, checksum in checksums.items() if self._writer.take_over(name) != checksum]
