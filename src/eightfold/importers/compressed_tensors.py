"""compressed-tensors directories of int8 -> our layout. Weights and scales stay as they are, to the last bit.

    there                                     ours
    weight int8, or weight_packed int32       weight int8 (N, K)
    weight_scale (N, 1), (N,) or one for all  weight_scale float32 (N, 1)
    weight_zero_point                         weight_offset: W8A16 only
    input_scale, input_zero_point             input_scale, input_offset: W8A8
    bias                                      bias
    none                                      deq_scale, quant_bias: as `quantize` computes them

What has no weight scales stays float. Which linears have static inputs, config.json says (format/compressed.py).

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eightfold import __version__
from eightfold.config import DType, has_engine
from eightfold.errors import CheckpointError, UnsupportedError, one_of
from eightfold.exporters.eight_bit import step_of
from eightfold.exporters.finite import finite_pieces
from eightfold.files import write_json
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.compressed import (
    INPUT_ZERO_POINT,
    WEIGHT_PACKED,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    Inputs,
    Schemes,
    is_int8,
)
from eightfold.format.description import Description, render_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.output import Output
from eightfold.format.safetensors import TensorInfo
from eightfold.format.shards import PlannedTensor, total_bytes
from eightfold.format.source import hold_source, source_differences, source_facts
from eightfold.format.stored import StoredTensors
from eightfold.format.streaming import Item, copy_companions, pieces_of, write_items
from eightfold.model.layers import read_values, require_parameters
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
    TensorSpec,
    description_names,
    linear_tensors,
    weight_file_stem,
    weight_name,
)
from eightfold.values import size_text
from eightfold.written_config import both_dialects

if TYPE_CHECKING:
    from eightfold.importers import ImportOptions

NEEDS_TORCH = False

_KINDS = {
    Inputs.FLOAT: QuantType.W8A16,
    Inputs.DYNAMIC: QuantType.W8A8_DYNAMIC,
    Inputs.STATIC: QuantType.W8A8,
}
_Q_RANGE, _MOST = 255, 127  # of int8: how far two lie apart, and the largest


def recognizes(source: Path) -> bool:
    """Whether config.json says that this is one, with int8 weights."""
    return is_int8(source)


def convert(source: Path, target: Path, options: ImportOptions) -> str:
    """Make an 8-bit directory; see importers/__init__.py."""
    found = _Import(source)
    head: Entry = {
        "format": FORMAT,
        "command": "import",
        "eightfold": __version__,
        "layers": found.config.num_layers,
        "source": source_facts(found.stored),
    }
    growing = Output(
        target,
        head,
        source=source,
        explain=source_differences,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    with growing as output:
        if not output.is_complete:
            hold_source(found.stored, output)
            stem = weight_file_stem(found.scheme)
            checksums = write_items(output, stem, found.items, title="import", progress=options.progress)
            found.write_companions(output)
            output.finish(checksums)
    counts = Counter(kind.value for kind in found.kinds.values())
    kinds = ", ".join(f"{count} linears as {kind}" for kind, count in counts.items())
    return f"{kinds}, {size_text(total_bytes(item.planned for item in found.items))}"


@dataclass
class _Import:
    """What is going to be written.

    Attributes:
        kinds: of every int8 linear, by module.
        items: the tensors.
        tags: their entries in the description.
    """

    source: Path
    kinds: dict[str, QuantType] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    tags: dict[str, QuantType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stored = StoredTensors.read(self.source)
        raw = self.stored.config_raw
        if not has_engine(raw):
            raise UnsupportedError(
                "model to import",
                where=self.source,
                got="a family that runs in other engines alone",
                expected="one that runs here",
                action="eightfold quantize DIR OUT --scheme w8a8-dynamic keeps its integers.",
            )
        self._schemes = Schemes(self.source, raw)
        self._require_types()
        self._assign()
        self.scheme = Counter(self.kinds.values()).most_common(1)[0][0]
        without = {key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")}
        checkpoint = Checkpoint(self.source, without, dict(self.stored.tensors), None)
        self.config, self.dtype = checkpoint.config, checkpoint.dtype
        self._is_exact = all(map(self._fits_model, self.kinds))
        self._plan()
        self._require_whole(without)

    def _require_types(self) -> None:
        known = [kind.value for kind in DType]
        for name, info in self.stored.tensors.items():
            if info.dtype not in known:
                raise CheckpointError(f"type of {name}", where=info.file, got=info.dtype, expected=one_of(known))

    def _assign(self) -> None:
        modules = []
        for name, info in self.stored.tensors.items():
            module, _, last = name.rpartition(".")
            if last == WEIGHT_PACKED and f"{module}.{WEIGHT}" in self.stored.tensors:
                got, expected = f"{WEIGHT} and {WEIGHT_PACKED}", "one of them"
                raise CheckpointError(f"weight of {module}", where=self.source, got=got, expected=expected)
            if last == WEIGHT_PACKED or (last == WEIGHT and info.dtype == DType.I8.value):
                modules.append(module)
        if not modules:
            raise CheckpointError(
                "weights", where=self.source, got="none in int8", expected="int8, as config.json says"
            )
        for module, inputs in self._schemes.inputs_of(modules).items():
            kind = self.kinds[module] = _KINDS[inputs]
            if kind is not QuantType.W8A16 and f"{module}.{WEIGHT_ZERO_POINT}" in self.stored.tensors:
                got, expected = f"weights with offsets and {kind.value}", "symmetric weights, or float inputs"
                raise UnsupportedError(f"type of {module}", where=self.source, got=got, expected=expected)

    def _fits_model(self, module: str) -> bool:
        """Whether the model's dtype holds the scale of static inputs, as it does in what was made here."""
        if self.kinds[module] is not QuantType.W8A8:
            return True
        scale = self._values(module, INPUT_SCALE)
        return bool((_rounded(scale, self.dtype) == scale).all())

    # --- tensors

    def _plan(self) -> None:
        own = {f"{module}.{suffix}" for module in self.kinds for suffix in (*_THEIRS, BIAS)}
        for name, info in self.stored.tensors.items():
            module, _, last = name.rpartition(".")
            if module in self.kinds and last in (WEIGHT, WEIGHT_PACKED):
                self._add_linear(module)
            elif name not in own and not name.endswith("rotary_emb.inv_freq"):
                planned = PlannedTensor(name, DType(info.dtype), info.shape)
                self._add(planned, QuantType.FLOAT, partial(finite_pieces, self.stored, name))
        names = self.config.names
        head, embedding = weight_name(names.head), self.stored.tensors.get(weight_name(names.embedding))
        if self.config.tie_word_embeddings and head not in self.tags and embedding is not None:
            # As `quantize` does: some loaders look for a head in any case.
            planned = PlannedTensor(head, DType(embedding.dtype), embedding.shape)
            self._add(planned, QuantType.FLOAT, partial(finite_pieces, self.stored, embedding.name))

    def _add_linear(self, module: str) -> None:
        kind, (n, k) = self.kinds[module], self._shape(module)
        has_bias = f"{module}.{BIAS}" in self.stored.tensors
        makers = self._makers(module, n, k)
        for spec in linear_tensors(kind, has_bias):
            planned = PlannedTensor(f"{module}.{spec.suffix}", self._dtype(module, spec), spec.shape_for(N=n, K=k))
            self._add(planned, spec.tag, makers[spec.suffix])

    def _dtype(self, module: str, spec: TensorSpec) -> DType:
        stored = self.stored.tensors.get(f"{module}.{spec.suffix}")
        own = spec.dtype.resolve(self.dtype)
        if spec.suffix == INPUT_SCALE and not self._is_exact:
            return DType.F32
        if spec.suffix == BIAS and stored is not None and own is not DType.F32:
            return DType(stored.dtype)
        return own

    def _add(self, planned: PlannedTensor, tag: QuantType, pieces: Callable[[], Iterable[NDArray[Any]]]) -> None:
        self.items.append(Item(planned, step_of(planned.name), pieces))
        self.tags[planned.name] = tag

    def _shape(self, module: str) -> tuple[int, int]:
        """Return the shape of a weight, packed or not."""
        packed = self.stored.tensors.get(f"{module}.{WEIGHT_PACKED}")
        if packed is None:
            weight = self.stored.tensors[f"{module}.{WEIGHT}"]
            if len(weight.shape) != 2:
                raise CheckpointError(weight.name, where=weight.file, got=list(weight.shape), expected="[N, K]")
            return weight.shape[0], weight.shape[1]
        name = f"{module}.{WEIGHT_SHAPE}"
        form = self.stored.tensors.get(name)
        is_form = form is not None and form.dtype in (DType.I64.value, DType.I32.value)
        shape = tuple(map(int, self.stored.array(name).reshape(-1))) if is_form else ()
        if len(shape) != 2 or packed.dtype != DType.I32.value or packed.shape != (shape[0], -(-shape[1] // 4)):
            raise CheckpointError(
                f"shape of {packed.name}",
                where=packed.file,
                got=f"{packed.dtype} {list(packed.shape)}",
                expected=f"I32 [N, K / 4] of the {list(shape) or 'two sizes'} in {name}: integers of 8 bits",
            )
        return shape[0], shape[1]

    def _makers(self, module: str, n: int, k: int) -> dict[str, Callable[[], Iterable[NDArray[Any]]]]:
        """Return what makes each tensor of a linear, by suffix."""
        scale = self._scale(module, n)
        static = self.kinds[module] in NEEDS_CALIBRATION
        input_scale = self._values(module, INPUT_SCALE) if static else np.ones(1, np.float32)
        input_offset = self._input_offset(module) if static else np.zeros(1, np.float32)
        offset = self._offset(module, n).reshape(n, 1)
        deq_scale = input_scale * scale
        packed = deq_scale if self.dtype is DType.BF16 else deq_scale.view("<i4").astype("<i8")
        column = scale.reshape(n, 1)
        return {
            WEIGHT: lambda: self._weight(module, k),
            WEIGHT_SCALE: lambda: [column],
            WEIGHT_OFFSET: lambda: [offset],
            INPUT_SCALE: lambda: [_as(input_scale, self._dtype_of_inputs)],
            INPUT_OFFSET: lambda: [_as(input_offset, self.dtype)],
            DEQ_SCALE: lambda: [packed],
            QUANT_BIAS: lambda: [self._quant_bias(module, k, deq_scale, input_offset)],
            BIAS: lambda: self._bias(module),
        }

    @property
    def _dtype_of_inputs(self) -> DType:
        return self.dtype if self._is_exact else DType.F32

    def _values(self, module: str, suffix: str, n: int = 1) -> NDArray[np.float32]:
        """Return scales: one, or n of them."""
        name = f"{module}.{suffix}"
        if name not in self.stored.tensors:
            raise CheckpointError(name, where=self.source, got="none", expected="it, as config.json says")
        self._require_size(name, 1, n)
        values = read_values(self.stored, name)
        require_parameters(name, values, self.stored.tensors[name].file)
        return values

    def _require_size(self, name: str, *sizes: int) -> None:
        info = self.stored.tensors[name]
        if math.prod(info.shape) not in sizes:
            expected = f"[{sizes[-1]}, 1], one for each output" if max(sizes) > 1 else "[1], one for all"
            raise UnsupportedError(f"shape of {name}", where=info.file, got=list(info.shape), expected=expected)

    def _zero_points(self, name: str, n: int = 1) -> NDArray[np.float32]:
        """Return zero points that are not packed: one, or n of them."""
        self._require_size(name, 1, n)
        values = read_values(self.stored, name)
        if bad := values[(values != np.rint(values)) | (np.abs(values + 0.5) > 127.5)][:1].tolist():
            expected = "integers from -128 to 127"
            raise CheckpointError(name, where=self.stored.tensors[name].file, got=f"{bad[0]:g}", expected=expected)
        return values

    def _scale(self, module: str, n: int) -> NDArray[np.float32]:
        """Return the scales of a weight, (N,)."""
        scale = self._values(module, WEIGHT_SCALE, n)
        return np.array(np.broadcast_to(scale, (n,)), dtype=np.float32)

    def _input_offset(self, module: str) -> NDArray[np.float32]:
        name = f"{module}.{INPUT_ZERO_POINT}"
        return self._zero_points(name) if name in self.stored.tensors else np.zeros(1, np.float32)

    def _offset(self, module: str, n: int) -> NDArray[np.float32]:
        name = f"{module}.{WEIGHT_ZERO_POINT}"
        if name not in self.stored.tensors:
            return np.zeros(n, np.float32)
        stored = self.stored.array(name)
        if stored.dtype == np.int32:  # packed along N
            self._require_size(name, -(-n // 4))
            return np.array(_unpacked(stored.reshape(1, -1), n)[0], dtype=np.float32)
        return np.array(np.broadcast_to(self._zero_points(name, n), (n,)), dtype=np.float32)

    def _weight(self, module: str, k: int) -> Iterator[NDArray[Any]]:
        packed = f"{module}.{WEIGHT_PACKED}"
        if packed not in self.stored.tensors:
            yield from pieces_of(self.stored, f"{module}.{WEIGHT}")
            return
        for piece in pieces_of(self.stored, packed):
            yield _unpacked(piece, k)

    def _quant_bias(
        self, module: str, k: int, deq_scale: NDArray[np.float32], input_offset: NDArray[np.float32]
    ) -> NDArray[np.int32]:
        """Return rne(bias / deq_scale - input_offset * sum_k weight), (N,); see quant/qparams.static_params()."""
        sums = np.concatenate([piece.sum(1, dtype=np.int64) for piece in self._weight(module, k)])
        correction = -input_offset.astype(np.float64) * sums
        if f"{module}.{BIAS}" in self.stored.tensors:
            room = max(0, 2**31 - 1 - _Q_RANGE * _MOST * k)
            bias = read_values(self.stored, f"{module}.{BIAS}").astype(np.float64)
            correction += np.clip(bias / deq_scale.astype(np.float64), -room, room)
        return np.asarray(np.rint(correction), dtype=np.int32)

    def _bias(self, module: str) -> Iterable[NDArray[Any]]:
        name = f"{module}.{BIAS}"
        if self.kinds[module] is QuantType.W8A16 and self.dtype is not DType.F16:
            return [read_values(self.stored, name)]
        return finite_pieces(self.stored, name)

    # --- what else is written

    def _require_whole(self, raw: Mapping[str, Any]) -> None:
        """Refuse a model whose tensors are not those of its family, before anything is written."""
        files = {
            item.planned.name: TensorInfo(
                item.planned.name, item.planned.dtype.value, item.planned.shape, self.source, 0, item.planned.nbytes
            )
            for item in self.items
        }
        tags = {name: tag.value for name, tag in self.tags.items()}
        description = Description(self.source / CONFIG_NAME, self.scheme.value, tags)
        Checkpoint(self.source, dict(raw), files, description).require_whole()

    def write_companions(self, output: Output) -> None:
        """Write the files that are carried over, the description and config.json."""
        raw, _ = copy_companions(self.stored, output)
        text = render_description(self.scheme, self.tags)
        for name in description_names(self.scheme, legacy=False):
            (output.path / name).write_text(text, encoding="utf-8")
        out = both_dialects(raw, self.config, self.dtype)
        write_json(output.path / CONFIG_NAME, {key: out[key] for key in out if key != "compression_config"})


_THEIRS = (
    *(WEIGHT, WEIGHT_PACKED, WEIGHT_SHAPE, WEIGHT_SCALE, WEIGHT_ZERO_POINT),
    *(INPUT_SCALE, INPUT_ZERO_POINT, "weight_g_idx"),
)


def _unpacked(packed: NDArray[Any], count: int) -> NDArray[np.int8]:
    """Return what int32 (n, C) hold, (n, count) int8: the lowest byte first, 128 more."""
    values = np.ascontiguousarray(packed).view(np.uint8)[:, :count] ^ 0x80
    return np.ascontiguousarray(values).view(np.int8)


def _rounded(values: NDArray[np.float32], dtype: DType) -> NDArray[np.float32]:
    """Return values as a dtype holds them."""
    if dtype is DType.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype is DType.BF16:
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # only compared: what is cut off is not exact
    return values


def _as(values: NDArray[np.float32], dtype: DType) -> NDArray[Any]:
    """Return values that a dtype holds, in it."""
    if dtype is DType.BF16:
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype("<f2" if dtype is DType.F16 else "<f4")
