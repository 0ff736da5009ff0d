"""An 8-bit directory as an exporter sees it: how each linear is stored, and what else there is.

Families with an engine are checked as for running them; of all others the names and the description tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eightfold.architectures import FAMILIES
from eightfold.config import CONFIG_DTYPES, DType, ModelConfig
from eightfold.errors import UnsupportedError, one_of, plural, shortlist
from eightfold.families import all_linears, all_norms
from eightfold.files import read_json
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.description import find_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.engines import elsewhere
from eightfold.format.journal import Entry
from eightfold.format.named import NamedDirectory
from eightfold.format.source import source_differences
from eightfold.format.stored import StoredTensors
from eightfold.layouts import Layout, known
from eightfold.model.layers import read_values, require_parameters
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    FA_TENSORS,
    KV_TENSORS,
    LINEAR_TENSORS,
    WEIGHT,
    QuantType,
    legacy_norm,
    linear_tensors,
    weight_name,
)

ENDS = "ends"  # the step of what is in no layer
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_ATTENTION = {
    QuantType.FAQUANT: tuple(f".{spec.suffix}" for spec in FA_TENSORS),
    QuantType.C8: tuple(f".{spec.suffix}" for spec in KV_TENSORS),
}


@dataclass(frozen=True)
class EightBit:
    """An open directory.

    Attributes:
        stored: its tensors.
        types: of every linear, FLOAT too, by its full module name; the head's too, where it is stored.
        norms: the modules that outlier suppression may have given a bias.
        dtype: the model's.
        config: its settings; None of a family without an engine.
        layout: the row of its family.
        beside: what begins the names of a wrapper's other parts, such as those that see images.
        biased: linears whose float model has a bias; None where only the files tell.
        num_layers: in the text model.
        dropped: names of tensors that carry nothing: a tied model's head, legacy norms, rotary frequencies.
    """

    stored: StoredTensors
    types: Mapping[str, QuantType]
    norms: tuple[str, ...]
    dtype: DType
    config: ModelConfig | None
    layout: Layout | None
    num_layers: int
    beside: tuple[str, ...] = ()
    biased: frozenset[str] | None = None
    dropped: frozenset[str] = field(default=frozenset())

    @classmethod
    def open(cls, directory: Path) -> EightBit:
        """Open a directory and check it.

        Raises:
            CheckpointError: no model, unfinished, or damaged.
            UnsupportedError: a float model, or a type that this program does not know.
        """
        raw = read_json(directory / CONFIG_NAME) if (directory / CONFIG_NAME).is_file() else {}
        if raw and elsewhere(raw, is_quantized=find_description(directory) is not None):
            return _by_name(directory)
        return _checked(Checkpoint.open(directory))

    @property
    def quantized(self) -> dict[str, QuantType]:
        """The linears in int8."""
        return {name: kind for name, kind in self.types.items() if kind is not QuantType.FLOAT}

    @cached_property
    def attention(self) -> dict[QuantType, list[str]]:
        """What is stored for int8 attention and caches: FAQUANT or C8 -> tensors."""
        names = self.stored.tensors
        found = {kind: [name for name in names if name.endswith(ends)] for kind, ends in _ATTENTION.items()}
        return {kind: members for kind, members in found.items() if members}

    def losses(self) -> list[str]:
        """Say what of the attention a format without int8 attention cannot hold."""
        what = {QuantType.FAQUANT: "int8 attention (FAQuant)", QuantType.C8: "the int8 key/value cache (C8)"}
        return [
            f"{what[kind]} of {len({step_of(name) for name in names})} layers: keys and values stay float there"
            for kind, names in self.attention.items()
        ]

    def values(self, name: str) -> NDArray[np.float32]:
        """Return scales, offsets or biases as a flat float32 copy; a packed deq_scale unpacked.

        Raises:
            CheckpointError: one is not finite, a scale is not above 0, or an offset is outside int8.
        """
        if name.endswith(f".{DEQ_SCALE}") and self.stored.tensors[name].dtype == DType.I64.value:
            values = self.stored.array(name).reshape(-1).astype(np.int32).view(np.float32)
        else:
            values = read_values(self.stored, name)
        if not name.endswith(f".{BIAS}"):
            require_parameters(name, values, self.stored.tensors[name].file)
        return values

    def require_no_norm_biases(self) -> frozenset[str]:
        """Return the norm biases, all of them zeros, and what older writers keep beside a norm.

        Raises:
            UnsupportedError: one is not zero, and nothing but this format's readers adds it.
        """
        beside = [f"{module}.{suffix}" for norm in self.norms for module in (legacy_norm(norm),) for suffix in _NORM]
        biases = [name for norm in self.norms if (name := f"{norm}.{BIAS}") in self.stored.tensors]
        found = [*biases, *(name for name in beside if name in self.stored.tensors)]
        for name in found:
            if name.endswith(f".{BIAS}") and read_values(self.stored, name).any():
                raise UnsupportedError(
                    f"values of {name}",
                    where=self.stored.directory,
                    got="a norm that adds something",
                    expected="zeros: no other engine adds a bias behind an RMS norm",
                    action="Quantize the float model with `anti_outlier` smooth, which needs no such bias.",
                )
        return frozenset(found)

    @property
    def own_tensors(self) -> frozenset[str]:
        """The tensors of int8 linears."""
        return frozenset(
            f"{name}.{spec.suffix}"
            for name, kind in self.quantized.items()
            for spec in linear_tensors(kind, has_bias=True)
        )


_NORM = (WEIGHT, BIAS)
_NORMS = (f"layernorm.{WEIGHT}", f".norm.{WEIGHT}")  # RMS norms; that of an indexer has a bias of its own


def differences(old: Entry, new: Entry) -> list[str]:
    """Return what differs between the first lines of two exports, for the user."""
    facts = {"to": "`to`", "eightfold": "version of eightfold", "format": "journal"}
    found = [f"{title}: {old.get(key)} -> {new[key]}" for key, title in facts.items() if old.get(key) != new[key]]
    before, after = old.get("options"), new["options"]
    if isinstance(before, dict) and old.get("to") == new["to"]:  # another format has other options
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        found += [f"`{key}`: {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in changed]
    return found + source_differences(old, new)


def step_of(name: str) -> str:
    """Return the journal's step of a tensor: that of its layer."""
    found = _LAYER.search(name)
    return f"layer {found[1]}" if found else ENDS


def _float_model(directory: Path) -> UnsupportedError:
    return UnsupportedError(
        "model to export",
        where=directory,
        got="a float one",
        expected="an 8-bit directory",
        action="Quantize it first; other engines read a float model as it is.",
    )


def _checked(checkpoint: Checkpoint) -> EightBit:
    if checkpoint.description is None:
        raise _float_model(checkpoint.directory)
    config = checkpoint.config
    row = known(checkpoint.config_raw)
    if row is not None and row.halves:
        raise UnsupportedError(
            f"export of {config.architecture}",
            where=checkpoint.directory,
            got="gate and up in two tensors, as the engines of the NPU read them",
            expected="a family that transformers reads so",
            action="Other engines want them joined, which is not done yet.",
        )
    linears = all_linears(config)
    if config.tie_word_embeddings:
        linears.pop(config.names.head)
    types = {name: checkpoint.quant_type(name) for name in linears}
    tied = {weight_name(config.names.head)} if config.tie_word_embeddings else set()
    frequencies = {name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")}
    family = FAMILIES[config.architecture]
    return EightBit(
        checkpoint,
        types,
        tuple(all_norms(config)),
        checkpoint.dtype,
        config,
        row,
        config.num_layers,
        beside=tuple(sorted({_part(name) for name in checkpoint.beside})) if family.is_wrapper else (),
        biased=frozenset(name for name, linear in linears.items() if linear.has_bias),
        dropped=frozenset((tied | frequencies) & checkpoint.tensors.keys()),
    )


def _part(name: str) -> str:
    """Return what begins the names of a part of a wrapper: `visual` of model.visual.blocks.0."""
    parts = name.split(".")
    return parts[1] if parts[0] == "model" and len(parts) > 2 else parts[0]


def _by_name(directory: Path) -> EightBit:
    named = NamedDirectory.open(directory)
    if not named.description:
        raise _float_model(directory)
    stored = StoredTensors(directory, named.config, dict(named.tensors))
    types: dict[str, QuantType] = {}
    for name, info in named.tensors.items():
        module, _, last = name.rpartition(".")
        label = named.labels.get(name, QuantType.FLOAT.value)
        if last != WEIGHT or (label == QuantType.FLOAT.value and (len(info.shape) != 2 or "embed" in module)):
            continue
        if label not in LINEAR_TENSORS or (info.dtype == DType.I8.value) != (label != QuantType.FLOAT.value):
            got = f"{info.dtype} under {label}"
            expected = f"int8 under {one_of(kind.value for kind in LINEAR_TENSORS if kind is not QuantType.FLOAT)}"
            raise UnsupportedError(f"type of {name}", where=directory, got=got, expected=expected)
        types[module] = QuantType(label)
    _require_whole(stored, types)
    norms = [name.removesuffix(f".{WEIGHT}") for name in stored.tensors if name.endswith(_NORMS)]
    dtype = CONFIG_DTYPES.get(named.dtype.removeprefix("torch."), DType.BF16)
    return EightBit(stored, types, tuple(norms), dtype, None, named.layout, named.num_layers)


def _require_whole(stored: StoredTensors, types: Mapping[str, QuantType]) -> None:
    """Refuse int8 linears whose parameters are not all there."""
    missing = [
        name
        for module, kind in types.items()
        if kind is not QuantType.FLOAT
        for spec in linear_tensors(kind, has_bias=False)
        if not spec.optional and (name := f"{module}.{spec.suffix}") not in stored.tensors
    ]
    if missing:
        raise UnsupportedError(
            f"{plural(len(missing), 'tensor')} missing",
            where=stored.directory,
            got=f"no {shortlist(missing, 4)}",
            expected="those of the description's types",
        )
