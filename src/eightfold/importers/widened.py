"""Directories of float8, int8, int4 or float4 weights with scales -> float directories.

Which forms of weights are read: quant/name_sources.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold import __version__
from eightfold.config import CONFIG_DTYPES, DType, has_engine, parse_config
from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.exporters.eight_bit import step_of
from eightfold.exporters.finite import finite_pieces
from eightfold.files import has_file, read_json, write_json
from eightfold.format.compressed import settings_of
from eightfold.format.description import find_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, total_bytes
from eightfold.format.source import hold_source, source_differences, source_facts
from eightfold.format.stored import StoredTensors
from eightfold.format.streaming import Item, copy_companions, write_items
from eightfold.values import shown, size_text
from eightfold.written_config import both_dialects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.importers import ImportOptions
    from eightfold.quant.name_sources import Source

NEEDS_TORCH = True

# Writers whose weights name_sources.py reads.
_METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4")
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")  # of an 8-bit cache, which is left out
_PART_BYTES = 5 << 30
_ROWS = 1 << 22  # elements that are widened at a time


def recognizes(source: Path) -> bool:
    """Whether config.json says that the weights are quantized, by whomever but this format's writers."""
    if not source.is_dir() or not has_file(source / CONFIG_NAME) or find_description(source) is not None:
        return False
    return settings_of(read_json(source / CONFIG_NAME)) is not None


def convert(source: Path, target: Path, options: ImportOptions) -> str:
    """Make a float directory; see importers/__init__.py."""
    stored = StoredTensors.read(source)
    _require_known(stored)
    items, widened = _items(stored, options.dtype)
    head: Entry = {
        "format": FORMAT,
        "command": "import",
        "eightfold": __version__,
        "layers": stored.num_layers,
        "dtype": options.dtype.value,
        "source": source_facts(stored),
    }
    growing = Output(
        target, head, source=source, explain=_differences, overwrite=options.overwrite, progress=options.progress
    )
    nbytes = total_bytes(item.planned for item in items)
    with growing as output:
        if not output.is_complete:
            hold_source(stored, output)
            part = _PART_BYTES if nbytes > _PART_BYTES else None
            checksums = write_items(
                output,
                "model",
                items,
                title="import",
                part_bytes=part,
                metadata={"format": "pt"},
                progress=options.progress,
            )
            raw, _ = copy_companions(stored, output)
            write_json(output.path / CONFIG_NAME, _config(dict(raw), options.dtype))
            output.finish(checksums)
    return f"{widened} weights widened to {options.dtype.value}, {size_text(nbytes)}"


def _differences(old: Entry, new: Entry) -> list[str]:
    before, now = old.get("dtype"), new["dtype"]
    return [*([f"`dtype`: {before} -> {now}"] if before != now else []), *source_differences(old, new)]


def _require_known(stored: StoredTensors) -> None:
    method = (settings_of(stored.config_raw) or {}).get("quant_method")
    if method not in _METHODS:
        raise UnsupportedError(
            '"quant_method"',
            where=stored.directory / CONFIG_NAME,
            got=shown(method),
            expected="compressed-tensors or fp8",
            action="Start from the model's unquantized weights.",
        )


def _items(stored: StoredTensors, dtype: DType) -> tuple[list[Item], int]:
    """Return the tensors to write, and how many of them have another form now."""
    from eightfold.quant.name_sources import Coding, Sources

    found, widened = [], 0
    for name, source in Sources(stored).items():
        if name.endswith(_CACHE_SCALES):
            continue
        is_plain = not source.scale and source.coding is Coding.PLAIN
        kind = DType(stored.tensors[source.tensor].dtype) if is_plain else dtype
        pieces = partial(finite_pieces, stored, source.tensor) if is_plain else partial(_widened, stored, source, dtype)
        found.append(Item(PlannedTensor(name, kind, source.shape), step_of(name), pieces))
        widened += not is_plain
    if not widened:
        raise CheckpointError(
            "weights", where=stored.directory, got="float ones alone", expected="quantized ones, as config.json says"
        )
    return found, widened


def _widened(stored: StoredTensors, source: Source, dtype: DType) -> Iterator[NDArray[Any]]:
    """Yield the values of a weight, some rows at a time; of a stack one expert after the other."""
    from eightfold.model.reference.tensors import require_range, to_array
    from eightfold.quant.name_rows import Rows

    stack = [source]
    if len(source.shape) == 3:
        stack = [source.of_expert(expert, is_input_major=False) for expert in range(source.shape[0])]
    for each in stack:
        rows, (n, k) = Rows(stored, each), each.shape
        step = max(1, _ROWS // max(1, k))
        for begin in range(0, n, step):
            piece = rows(begin, min(n, begin + step))
            require_range(piece, dtype, source.tensor, stored.directory, "Import as bf16.")
            yield to_array(piece, dtype)
    stored.release([source.tensor])


def _config(raw: dict[str, Any], dtype: DType) -> dict[str, Any]:
    """Return config.json's object without what it said of its quantization."""
    for part in (raw, raw.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict):
                part.pop(key, None)
    if has_engine(raw):
        return both_dialects(raw, parse_config(raw, Path(CONFIG_NAME)), dtype)
    name = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    return {**raw, "torch_dtype": name, "dtype": name}
