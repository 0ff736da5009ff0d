"""GGUF in Q8_0 -> an 8-bit W8A16 directory, a few rows in memory at a time.

A row whose blocks all have one scale, as `export --to gguf` writes it, keeps its integers, and its scale as float16 has
it. llama.cpp's own quantizer gives each block of 32 a scale of its own: such a row is widened and rounded anew with one
scale, which is one more rounding of 1/254 of its largest weight at most. Embedding, head and norms become float.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eightfold.config import DType, ModelConfig, parse_config
from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.exporters.eight_bit import step_of
from eightfold.families import all_linears
from eightfold.files import write_json
from eightfold.format.description import render_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.gguf_layout import block_dtype
from eightfold.format.journal import FORMAT
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, total_bytes
from eightfold.format.streaming import Item, write_items
from eightfold.importers.container import StoredTensor
from eightfold.importers.gguf import (
    GgufFile,
    match_tensors,
    open_file,
    read_config,
    read_float,
    row_order,
    write_tokenizer,
)
from eightfold.model.layers import require_parameters
from eightfold.quant.qparams import quantize_weight
from eightfold.scheme import (
    BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    description_names,
    linear_tensors,
    weight_file_stem,
    weight_name,
)
from eightfold.values import size_text
from eightfold.written_config import both_dialects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.importers import ImportOptions

Pieces = Callable[[], Iterable["NDArray[Any]"]]

_PIECE = 1 << 21  # elements of a weight at a time
_NO_WEIGHT = float(np.finfo(np.float32).eps)  # the scale of a row of zeros, as quantize has it
_FLOATS = ("F32", "F16", "BF16")
_Q8_0 = "Q8_0"


def import_w8a16(source: Path, target: Path, options: ImportOptions) -> str:
    """Make the directory; return a line about what was made.

    Raises:
        UnsupportedError: a linear is neither in Q8_0 nor float, or none is in Q8_0.
        CheckpointError: the file is damaged.
    """
    file = open_file(source)
    raw = read_config(file, options.dtype)
    config = parse_config(raw, source)
    found = _Import(file, config, options.dtype, match_tensors(file, config))
    head = {"format": FORMAT, "command": "import-gguf"}
    with Output(target, head, source=source, overwrite=options.overwrite, progress=options.progress) as output:
        # First: what can fail in seconds should not after minutes.
        write_tokenizer(file.path, output.path, raw, file.fields)
        stem = weight_file_stem(QuantType.W8A16)
        checksums = write_items(output, stem, found.items, title="import", progress=options.progress)
        text = render_description(QuantType.W8A16, found.tags)
        for name in description_names(QuantType.W8A16, legacy=False):
            (output.path / name).write_text(text, encoding="utf-8")
        write_json(output.path / CONFIG_NAME, both_dialects(raw, config, options.dtype))
        output.finish(checksums)
    size = size_text(total_bytes(item.planned for item in found.items))
    kept = f"{found.rows - found.rounded} of {found.rows} rows keep their integers"
    anew = ", the others had a scale for each block and were rounded anew" if found.rounded else ""
    return f"{found.linears} linears as {QuantType.W8A16.value}, {kept}{anew}, {size}"


@dataclass
class _Import:
    """What is going to be written.

    Attributes:
        names: the tensors, by their name in the directory -> their name in the file.
        items: the tensors of the directory.
        tags: their entries in the description.
        linears, rows, rounded: how many are int8; their rows; those of them that were rounded anew.
    """

    file: GgufFile
    config: ModelConfig
    dtype: DType
    names: dict[str, str]
    items: list[Item] = field(default_factory=list)
    tags: dict[str, QuantType] = field(default_factory=dict)
    linears: int = 0
    rows: int = 0
    rounded: int = 0

    def __post_init__(self) -> None:
        linears, head = all_linears(self.config), self.config.names.head
        own = {weight_name(module): module for module in linears if module != head}
        biases = {bias_name(module) for module in linears}
        for name, gguf_name in self.names.items():
            kind = self.file.kinds(self.file.tensors[gguf_name].kind).name
            if name in own and kind == _Q8_0:
                self._add_linear(own[name], has_bias=bias_name(own[name]) in self.names)
            elif name in own and kind not in _FLOATS:
                raise UnsupportedError(
                    f"type of {gguf_name}",
                    where=self.file.path,
                    got=kind,
                    expected=f"{_Q8_0}, or float",
                    action="Leave out `scheme` to import the model as float, and quantize that.",
                )
            elif name not in biases or weight_name(name.removesuffix(f".{BIAS}")) not in self._int8():
                self._add(name, self.dtype, self.file.shape(gguf_name), QuantType.FLOAT, self._float(name, self.dtype))
        if not self.linears:
            got, expected = "no linear in it", "some; a float file is imported without `scheme`"
            raise UnsupportedError(f"{_Q8_0} to import", where=self.file.path, got=got, expected=expected)
        if self.config.tie_word_embeddings:  # as `quantize` does: some loaders look for a head in any case
            embedding = weight_name(self.config.names.embedding)
            shape = self.file.shape(self.names[embedding])
            self._add(weight_name(head), self.dtype, shape, QuantType.FLOAT, self._float(embedding, self.dtype))

    def _int8(self) -> set[str]:
        """Return the names of the weights in Q8_0."""
        kinds, tensors = self.file.kinds, self.file.tensors
        return {ours for ours, theirs in self.names.items() if kinds(tensors[theirs].kind).name == _Q8_0}

    def _add(
        self,
        name: str,
        dtype: DType,
        shape: tuple[int, ...],
        tag: QuantType,
        pieces: Pieces,
    ) -> None:
        self.items.append(Item(PlannedTensor(name, dtype, shape), step_of(name), pieces))
        self.tags[name] = tag

    def _float(self, name: str, dtype: DType) -> Pieces:
        return lambda: [read_float(self.file, self.config, name, self.names[name], dtype)]

    def _add_linear(self, module: str, has_bias: bool) -> None:
        name = weight_name(module)
        stored = self.file.tensors[self.names[name]]
        n, k = stored.shape
        scale = np.empty((n, 1), np.float32)  # filled while the weight is written, which comes first
        self.linears, self.rows = self.linears + 1, self.rows + n
        for spec in linear_tensors(QuantType.W8A16, has_bias):
            dtype = spec.dtype.resolve(self.dtype)
            makers: dict[str, Pieces] = {
                WEIGHT: partial(self._integers, stored, row_order(self.file, self.config, name), scale),
                WEIGHT_SCALE: lambda: [scale],
                WEIGHT_OFFSET: lambda: [np.zeros((n, 1), np.float32)],
                BIAS: self._float(bias_name(module), dtype),
            }
            self._add(f"{module}.{spec.suffix}", dtype, spec.shape_for(N=n, K=k), spec.tag, makers[spec.suffix])

    def _integers(
        self, stored: StoredTensor, order: NDArray[Any] | None, scale: NDArray[Any]
    ) -> Iterator[NDArray[Any]]:
        """Yield the integers of a weight, some rows at a time, and put the scales of these rows into `scale`."""
        raw = stored.rows()
        step = max(1, _PIECE // stored.shape[1])
        for at in range(0, len(raw), step):
            rows = raw[at : at + step] if order is None else raw[order[at : at + step]]
            values, found, rounded = _row_scales(rows.view(block_dtype()), stored.name, self.file.path)
            require_parameters(WEIGHT_SCALE, found, self.file.path)
            scale[at : at + step, 0] = found
            self.rounded += rounded
            yield values


def _row_scales(blocks: NDArray[Any], name: str, where: Path) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return the integers of rows of blocks, (n, K), a scale for each, (n,) float32, and how many are rounded anew."""
    scales, values = blocks["scale"].astype(np.float32), blocks["values"]
    if not np.isfinite(scales).all():
        action = "The weights are damaged; fetch the model again."
        raise CheckpointError(
            f"scales of {name}", where=where, got="one that is no number", expected="finite ones", action=action
        )
    used: NDArray[Any] = (values != 0).any(2)  # what a block of zeros is multiplied by does not matter
    first = np.where(used.any(1), np.take_along_axis(scales, used.argmax(1)[:, None], 1)[:, 0], scales[:, 0])
    differs = (used & (scales != first[:, None])).any(1) | (used.any(1) & (first <= 0))
    found = np.where(first > 0, first, np.float32(_NO_WEIGHT))
    made = np.ascontiguousarray(values.reshape(len(values), -1))
    if differs.any():
        real = (values[differs] * scales[differs, :, None]).reshape(int(differs.sum()), -1)
        anew = quantize_weight(torch.from_numpy(real), is_symmetric=True)
        made = made.copy()
        made[differs], found[differs] = anew.values.numpy(), anew.scale[:, 0].numpy()
    return made, found, int(differs.sum())
