"""What vLLM has to know of a directory, from its description and the headers of its files; vLLM is not needed here.

Everything that vLLM cannot compute is refused here, before a weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eightfold.config import DType
from eightfold.errors import CheckpointError, UnsupportedError, one_of, plural, shortlist
from eightfold.files import read_json
from eightfold.format.description import find_description, read_description
from eightfold.format.directory import CONFIG_NAME, read_tensors, require_model
from eightfold.format.journal import require_finished
from eightfold.format.stored import StoredTensors
from eightfold.layouts import EXPERT, text_config
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    FA_TENSORS,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_TENSORS,
    LEGACY_NORM,
    LINEAR_TENSORS,
    REDUCE_SCALES,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    weight_name,
)

_TYPES = {kind.value: kind for kind in LINEAR_TENSORS}

# What a product cannot do without. The scale of a static linear's weight may be left out: deq_scale holds it.
_NEEDED = {
    QuantType.FLOAT: (),
    QuantType.W8A8: (INPUT_SCALE, INPUT_OFFSET),
    QuantType.W8A8_DYNAMIC: (WEIGHT_SCALE,),
    QuantType.W8A8_MIX: (WEIGHT_SCALE,),
    QuantType.W8A16: (WEIGHT_SCALE,),
}

# A norm as outlier suppression finds it. Others, such as those inside attention, may have biases of their own.
_NORM = re.compile(r"(.*[._])?(norm|layernorm)")


def _suffixes(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


# Tensors that no module of vLLM takes: int8 caches and attention, quantized communication, norms that older writers
# repeat, and what experts do without, as they take ranges from each token and have symmetric weights.
IGNORED = re.compile(
    rf"\.({_suffixes(spec.suffix for spec in (*FA_TENSORS, *KV_TENSORS))}|{_suffixes(REDUCE_SCALES)})$"
    rf"|norm\.{LEGACY_NORM}\.({WEIGHT}|{BIAS})$"
    rf"|\.experts\.\d+\..*\.{WEIGHT_OFFSET}$"
)


@dataclass(frozen=True)
class Contents:
    """The linears of a directory.

    Attributes:
        path: the directory.
        types: the type of each linear, and FLOAT of all other modules that have a weight, by module.
        names: all tensors.
        packed: whether deq_scale holds the bits of float32 in int64.
        notes: what vLLM leaves out, one line each.
    """

    path: Path
    types: Mapping[str, QuantType]
    names: frozenset[str]
    packed: bool
    notes: tuple[str, ...]

    def stored(self, modules: Iterable[str]) -> frozenset[str]:
        """Return the suffixes that each of these linears has a tensor for."""
        modules, suffixes = tuple(modules), {spec.suffix for specs in LINEAR_TENSORS.values() for spec in specs}
        return frozenset(s for s in suffixes if all(f"{module}.{s}" in self.names for module in modules))


def read_contents(directory: Path) -> Contents:
    """Read a quantized directory as vLLM will load it.

    Raises:
        CheckpointError: not a complete quantized directory, or one that is not what its description says.
        UnsupportedError: a type of quantization, or a norm's bias, that vLLM has no product or module for.
    """
    require_finished(directory)
    require_model(directory)
    found = find_description(directory)
    if found is None:
        raise CheckpointError("description", where=directory, got="none", expected="quant_model_description.json")
    tags = read_description(found).tags
    config = read_json(directory / CONFIG_NAME)
    tensors, _ = read_tensors(directory, config, is_quantized=True)
    stored = StoredTensors(directory, config, tensors)
    types = _types(stored, tags, found)
    _require_tensors(stored, types)
    _require_symmetric(stored, types)
    if "rms_norm_eps" in text_config(config):
        _require_zero_norm_biases(stored)
    packed = any(info.dtype == DType.I64.value for name, info in tensors.items() if name.endswith(f".{DEQ_SCALE}"))
    return Contents(directory, types, frozenset(tensors), packed, tuple(_notes(tags, types)))


def _types(stored: StoredTensors, tags: Mapping[str, str], where: Path) -> dict[str, QuantType]:
    """Return the type of every module that has a weight. One without an entry is float, as its tensor has to be."""
    types, unknown, wrong = {}, {}, []
    for name, info in stored.tensors.items():
        if not name.endswith(f".{WEIGHT}") or IGNORED.search(name):
            continue
        label = tags.get(name, QuantType.FLOAT.value)
        if label not in _TYPES:
            unknown[name] = label
        elif (info.dtype == DType.I8.value) != (label != QuantType.FLOAT.value):
            wrong.append(f"{name}: {label} over {info.dtype}")
        else:
            types[name.removesuffix(f".{WEIGHT}")] = _TYPES[label]
    if unknown:
        raise UnsupportedError(
            f"type of {len(unknown)} weights",
            where=where,
            got=f"{', '.join(sorted(set(unknown.values())))} ({shortlist(unknown, 2)})",
            expected=one_of(_TYPES),
            action="Quantize these with one of them, or serve the directory with vllm-ascend.",
        )
    if wrong:
        raise CheckpointError(
            "entries",
            where=where,
            got=shortlist(wrong, 2),
            expected="FLOAT for float weights, the type of int8 ones",
            action="Correct the description, or write the directory again.",
        )
    return types


def _require_tensors(stored: StoredTensors, types: Mapping[str, QuantType]) -> None:
    absent = [
        f"{module}.{suffix}"
        for module, kind in types.items()
        for suffix in _NEEDED[kind]
        if f"{module}.{suffix}" not in stored.tensors
    ]
    for module, kind in types.items():
        scales = (f"{module}.{WEIGHT_SCALE}", f"{module}.{DEQ_SCALE}")
        if kind is QuantType.W8A8 and not any(name in stored.tensors for name in scales):
            absent.append(scales[0])
    if absent:
        raise CheckpointError(
            f"{plural(len(absent), 'tensor')} missing",
            where=stored.directory,
            got=f"none of the name {shortlist(absent)}",
            expected="what the linear's type needs",
            action="Fetch the directory again, or write it again.",
        )


def _require_symmetric(stored: StoredTensors, types: Mapping[str, QuantType]) -> None:
    """Refuse offsets of weights that meet int8 inputs: a product of int8 has no place for them."""
    without = (QuantType.FLOAT, QuantType.W8A16)
    offsets = [
        f"{module}.{WEIGHT_OFFSET}"
        for module, kind in types.items()
        if (kind not in without and EXPERT.fullmatch(module) is None)
    ]
    if shifted := _nonzero(stored, offsets):
        raise UnsupportedError(
            "offsets of weights that meet int8 inputs",
            where=stored.directory,
            got=f"values other than zero ({shortlist(shifted, 2)})",
            expected="zeros",
            action="Quantize them symmetrically, or as W8A16.",
        )


def _require_zero_norm_biases(stored: StoredTensors) -> None:
    """Refuse what outlier suppression with a shift leaves behind norms: vLLM's RMS norms have no bias, and it would
    be passed over in silence. Zeros, which m1 to m5 write, say nothing.
    """
    modules = [name.removesuffix(f".{BIAS}") for name in stored.tensors if name.endswith(f".{BIAS}")]
    norms = [module for module in modules if _NORM.fullmatch(module) and weight_name(module) in stored.tensors]
    if shifted := _nonzero(stored, [bias_name(module) for module in norms]):
        raise UnsupportedError(
            "biases of norms",
            where=stored.directory,
            got=f"values other than zero ({shortlist(shifted, 2)})",
            expected="zeros or none, as vLLM's norms have no bias",
            action="Quantize without a shift (`--anti-outlier smooth`, or m1 to m6 without ch_align).",
        )


def _nonzero(stored: StoredTensors, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in stored.tensors and np.any(stored.array(name))]


def _notes(tags: Mapping[str, str], types: Mapping[str, QuantType]) -> list[str]:
    labels, notes = set(tags.values()), []
    if QuantType.C8.value in labels:
        notes.append("the int8 key/value cache (C8) is ignored: vLLM keeps its cache as --kv-cache-dtype says")
    if QuantType.FAQUANT.value in labels:
        notes.append("quantized attention (FAQuant) is ignored: vLLM attends in float")
    if QuantType.W8A8_MIX in types.values():
        notes.append("W8A8_MIX is computed as W8A8_DYNAMIC, for generated tokens too")
    return notes
