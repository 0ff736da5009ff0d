"""What a directory of a family without an engine holds, from its headers and its description alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from eightfold.format.description import find_description, read_description
from eightfold.format.named import NamedDirectory
from eightfold.layouts import engine_names
from eightfold.scheme import WEIGHT, QuantType, weight_name

_NORMS, _BEYOND, _OUTSIDE = "others in the layers", "behind the last layer", "outside the layers"


@dataclass(frozen=True)
class NamedPart:
    """Modules that are the same and stored alike."""

    name: str  # such as attention, or expert
    scheme: str
    dtype: str  # the weight's
    count: int  # of linears, or of other tensors
    nbytes: int  # with scales and biases


@dataclass(frozen=True)
class NamedContents:
    """Such a directory at a glance."""

    directory: str
    architecture: str
    family: str  # its model_type; empty for one that is not known
    engines: str
    dtype: str  # config.json's
    scheme: str
    num_layers: int
    files: int
    nbytes: int
    disk_bytes: int
    parts: tuple[NamedPart, ...]


def describe_named(d: NamedDirectory) -> NamedContents:
    """Summarize a directory; no weight is read.

    Raises:
        ConfigError: config.json does not say how many layers there are.
    """
    description = find_description(d.path)
    files = {info.file for info in d.tensors.values()}
    return NamedContents(
        directory=str(d.path),
        architecture=str(d.config["architectures"][0]),
        family=d.layout.model_type,
        engines=engine_names(d.layout),
        dtype=d.dtype,
        scheme=read_description(description).model_quant_type if description else QuantType.FLOAT.value,
        num_layers=d.num_layers,
        files=len(files),
        nbytes=sum(info.nbytes for info in d.tensors.values()),
        disk_bytes=sum(file.stat().st_size for file in files),
        parts=tuple(_parts(d)),
    )


def _parts(d: NamedDirectory) -> Iterator[NamedPart]:
    counts: dict[tuple[str, str, str], int] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    for name, info in d.tensors.items():
        module, _, last = name.rpartition(".")
        if module in d.linears:
            weight = d.tensors[weight_name(module)]
            key = _part_of(d, module), d.linears[module], weight.dtype
        else:
            key = _part_of(d, module), d.labels.get(name, QuantType.FLOAT.value), info.dtype
        counts[key] = counts.get(key, 0) + (module not in d.linears or last == WEIGHT)
        sizes[key] = sizes.get(key, 0) + info.nbytes
    for key in sorted(sizes, key=lambda key: (key[0] in (_NORMS, _BEYOND, _OUTSIDE), -sizes[key])):
        yield NamedPart(*key, counts[key], sizes[key])


def _part_of(d: NamedDirectory, module: str) -> str:
    inner = d.in_layer.fullmatch(module)
    if inner is None:
        return _OUTSIDE
    if int(inner[1]) >= d.num_layers:
        return _BEYOND
    if module not in d.linears:
        return _NORMS
    return d.part_of(module).value
