"""Planned tensors as one safetensors file, or as numbered shards with an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.format.output import write_json
from eightfold.format.safetensors import FileWriter, PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def split_shards(plan: list[PlannedTensor], part_bytes: int | None) -> list[list[PlannedTensor]]:
    """Distribute tensors, in order, over files: a new one starts when the next tensor would reach `part_bytes`."""
    if part_bytes is None:
        return [plan]
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.nbytes >= part_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _shard_names(stem: str, count: int | None) -> list[str]:
    if count is None:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


class ShardedWriter:
    """Writes planned tensors into one file, or into numbered shards with an index."""

    def __init__(
        self,
        directory: Path,
        stem: str,
        plan: list[PlannedTensor],
        *,
        part_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        """Make the files, or with `resume` go on with those of an earlier writer; see FileWriter."""
        self._directory, self._stem, self._plan = directory, stem, plan
        shards = split_shards(plan, part_bytes)
        names = _shard_names(stem, None if part_bytes is None else len(shards))
        self._weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        self._has_index = part_bytes is not None
        self._files: dict[str, FileWriter] = {}
        try:
            for name, shard in zip(names, shards, strict=True):
                self._files[name] = FileWriter(directory / name, shard, metadata, resume=resume)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one planned tensor; BF16 as uint16 bit patterns."""
        self._files[self._weight_map[name]].write(name, array)

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Write the next elements of a planned tensor that comes in pieces; see FileWriter.append."""
        self._files[self._weight_map[name]].append(name, array)

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a tensor that is written."""
        return self._files[self._weight_map[name]].checksums[name]

    def file_checksums(self) -> dict[str, int]:
        """Return the CRC-32 of every weight file, by name, once all is written."""
        return {name: file.checksum() for name, file in self._files.items()}

    def take_over(self, name: str) -> int:
        """Leave a tensor as an earlier writer wrote it; return the CRC-32 of its bytes as they are in the file."""
        return self._files[self._weight_map[name]].take_over(name)

    def sync(self) -> None:
        """Return when what was written would survive a loss of power."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Finish all files and write the index of a sharded checkpoint."""
        for file in self._files.values():
            file.close()
        if self._has_index:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in self._plan)},
                "weight_map": self._weight_map,
            }
            write_json(self._directory / _index_name(self._stem), index)

    def abandon(self) -> None:
        """Close all files as they are, after a failure."""
        for file in self._files.values():
            file.abandon()


def total_bytes(plan: Iterable[PlannedTensor]) -> int:
    """Return the bytes of tensor data in a plan."""
    return sum(tensor.nbytes for tensor in plan)
