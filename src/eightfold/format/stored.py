"""The tensors of a model directory, by name: read without knowing what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.files import read_json
from eightfold.format.directory import CONFIG_NAME, read_tensors, require_model
from eightfold.format.journal import require_finished
from eightfold.format.safetensors import MappedFile, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


class StoredTensors:
    """An open directory.

    Attributes:
        directory: the folder.
        config_raw: config.json as it stands.
        tensors: every stored tensor by name.
        notes: what a user should know of its files, one line each.
    """

    def __init__(self, directory: Path, config_raw: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.config_raw = config_raw
        self.tensors = tensors
        self.notes: list[str] = []
        self._maps: dict[Path, MappedFile] = {}

    @classmethod
    def read(cls, directory: Path) -> StoredTensors:
        """Open a float directory of any family; that its tensors make a model is not checked.

        Raises:
            CheckpointError: not a model directory, unfinished, or with weights that are missing or damaged.
        """
        require_finished(directory)
        require_model(directory)
        config_raw = read_json(directory / CONFIG_NAME)
        tensors, note = read_tensors(directory, config_raw, is_quantized=False)
        stored = cls(directory, config_raw, tensors)
        stored.notes += [note] if note else []
        return stored

    @property
    def num_layers(self) -> int:
        """How many decoder layers config.json says that the model has."""
        from eightfold.layouts import layer_count

        return layer_count(self.config_raw, self.directory / CONFIG_NAME)

    def array(self, name: str) -> NDArray[Any]:
        """Return a tensor as a view of the mapped file; BF16 as uint16 bit patterns, float8 as uint8."""
        info = self.tensors[name]
        mapped = self._maps.get(info.file)
        if mapped is None:
            mapped = self._maps[info.file] = MappedFile(info.file)
        return mapped.array(info)

    def pick(self, name: str, rows: slice | Iterable[int]) -> NDArray[Any]:
        """Return some rows of a tensor, as `array` does all."""
        return self.array(name)[rows if isinstance(rows, slice) else list(rows)]

    def release(self, names: Iterable[str]) -> None:
        """Let go of the memory that reading these tensors took; they can be read again."""
        for name in names:
            self.release_part(name, 0, self.tensors[name].nbytes)

    def release_part(self, name: str, begin: int, end: int) -> None:
        """Let go of the memory that reading some bytes of a tensor took."""
        info = self.tensors[name]
        if info.file in self._maps:
            self._maps[info.file].release(info.begin + begin, info.begin + end)
