"""compressed-tensors, the format of vLLM, SGLang and transformers for quantized models. No integer changes.

    ours                        there
    weight int8 (N, K)          weight; of W8A16 weight_packed int32 (N, ceil(K / 4)): value + 128, lowest byte first
    weight_scale (N, 1)         the same
    weight_offset (N, 1)        of W8A16 weight_zero_point int32 (ceil(N / 4), 1): value + 128, packed along N
    input_scale (1)             input_scale float32 (1)
    input_offset (1)            input_zero_point int8 (1)
    bias                        the same; of quant_bias where its writer left the bias out
    deq_scale, quant_bias       none: they follow from the others

W8A8_MIX becomes W8A8_DYNAMIC. Which linear is stored how, config.json says: one group for each way, `targets` of
modules, and `ignore` for those that stay float.

Source: compressed-tensors 0.20 (compressors/pack_quantized, quantization/quant_config), vLLM 0.32.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eightfold import __version__
from eightfold.config import DType
from eightfold.errors import UnsupportedError, plural, shortlist
from eightfold.exporters import ExportOptions
from eightfold.exporters.eight_bit import EightBit, differences, step_of
from eightfold.exporters.finite import finite_pieces
from eightfold.files import write_json
from eightfold.format.compressed import (
    INPUT_ZERO_POINT,
    INT,
    METHOD,
    MIXED,
    PACKED,
    WEIGHT_PACKED,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
)
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, total_bytes
from eightfold.format.source import hold_source, source_facts
from eightfold.format.streaming import Item, copy_companions, pieces_of, write_items
from eightfold.layouts import EXPERT, GROUPS
from eightfold.progress import Progress
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    QUANT_BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
)
from eightfold.written_config import both_dialects

PART_BYTES = 5 << 30  # of a file; a model of at most this size is one file
_STEM = "model"
_FUSED = dict(zip(GROUPS[:2], ("qkv_proj", "gate_up_proj"), strict=True))  # what engines call linears that they join
_LEFT_OUT = ("quantize", "quantization_config", "compression_config")


class Way(NamedTuple):
    """How the linears of one group are stored."""

    kind: QuantType  # W8A8, W8A8_DYNAMIC or W8A16
    symmetric: bool  # inputs; of W8A16 the weights

    def as_group(self, targets: list[str], form: str | None) -> dict[str, Any]:
        """Return the group of config.json."""
        is_alone = self.kind is QuantType.W8A16
        weights = {**_INTEGERS, "strategy": "channel", "symmetric": self.symmetric or not is_alone, "dynamic": False}
        is_dynamic = self.kind is QuantType.W8A8_DYNAMIC
        strategy = "token" if is_dynamic else "tensor"
        inputs = {**_INTEGERS, "strategy": strategy, "symmetric": self.symmetric, "dynamic": is_dynamic}
        found = {"targets": targets, "weights": weights, "input_activations": None if is_alone else inputs}
        return {**found, "output_activations": None, **({"format": form} if form else {})}

    @property
    def form(self) -> str:
        return PACKED if self.kind is QuantType.W8A16 else INT


_INTEGERS = {"num_bits": 8, "type": "int"}


def plan(source: Path, options: ExportOptions) -> CompressedTensorsExport:
    """Return what is going to be written; see exporters/__init__.py.

    Raises:
        EightfoldError: the source is damaged, a float model, or has what the format cannot hold in any way.
    """
    return CompressedTensorsExport(EightBit.open(source), options)


@dataclass
class CompressedTensorsExport:
    """What is going to be written.

    Attributes:
        source: the 8-bit directory.
        options: the user's.
        ways: of every int8 linear, how it is stored there.
        items: the tensors.
    """

    source: EightBit
    options: ExportOptions
    ways: dict[str, Way] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = self.source.losses()
        self._assign()
        self._plan_items()
        self.nbytes = total_bytes(item.planned for item in self.items)
        self.notes = [*self.source.stored.notes, *self._notes()]

    # --- how each linear is stored

    def _assign(self) -> None:
        for name, kind in self.source.quantized.items():
            if kind is not QuantType.W8A16:
                self._require_no_offsets(name)
            match kind:
                case QuantType.W8A8:
                    way = Way(kind, not self._values(name, INPUT_OFFSET).any())
                case QuantType.W8A16:
                    way = Way(kind, not self._values(name, WEIGHT_OFFSET).any())
                case _:
                    way = Way(QuantType.W8A8_DYNAMIC, self.options.activations != "asymmetric")
            self.ways[name] = way
        # A linear of zeros, or one whose zeros are 0 by chance, goes with those beside it: fewer groups.
        for kind in (QuantType.W8A8, QuantType.W8A16):
            if Way(kind, False) in self.ways.values():
                self.ways.update({name: Way(kind, False) for name, way in self.ways.items() if way.kind is kind})

    def _values(self, module: str, suffix: str) -> NDArray[np.float32]:
        name = f"{module}.{suffix}"
        values = self.source.values(name)
        if suffix in (INPUT_OFFSET, WEIGHT_OFFSET) and (values != np.rint(values)).any():
            fraction = float(values[values != np.rint(values)][0])
            raise UnsupportedError(
                f"values of {name}", where=self.source.stored.directory, got=f"{fraction:g}", expected="whole numbers"
            )
        return values

    def _require_no_offsets(self, module: str) -> None:
        """Refuse offsets of weights whose inputs are int8: no reader subtracts them."""
        name = f"{module}.{WEIGHT_OFFSET}"
        if name in self.source.stored.tensors and self.source.values(name).any():
            raise UnsupportedError(
                f"values of {name}",
                where=self.source.stored.directory,
                got="offsets of weights beside int8 inputs",
                expected="zeros",
                action="Quantize the model again.",
            )

    # --- tensors

    def _plan_items(self) -> None:
        source = self.source
        dropped = source.dropped | source.require_no_norm_biases()
        dropped |= {name for names in source.attention.values() for name in names}
        own = source.own_tensors
        for name in source.stored.tensors:
            module, _, last = name.rpartition(".")
            if module in self.ways and last == WEIGHT:
                self._add_linear(module, self.ways[module])
            elif name not in own and name not in dropped:
                self._copy(name)

    def _add_linear(self, module: str, way: Way) -> None:
        stored = self.source.stored
        n, k = stored.tensors[f"{module}.{WEIGHT}"].shape
        if way.kind is QuantType.W8A16:
            name = f"{module}.{WEIGHT}"
            self._add(f"{module}.{WEIGHT_PACKED}", DType.I32, (n, -(-k // 4)), lambda: _packed(pieces_of(stored, name)))
            self._add_made(f"{module}.{WEIGHT_SHAPE}", DType.I64, np.array([n, k], "<i8"))
            if not way.symmetric:
                offset = self._values(module, WEIGHT_OFFSET).astype(np.int8).reshape(1, n)
                zero = np.concatenate(list(_packed([offset]))).reshape(-1, 1)
                self._add_made(f"{module}.{WEIGHT_ZERO_POINT}", DType.I32, zero)
        else:
            self._copy(f"{module}.{WEIGHT}")
        self._add_scale(module, n)
        if way.kind is QuantType.W8A8:
            self._add_made(f"{module}.{INPUT_SCALE}", DType.F32, self._values(module, INPUT_SCALE))
            if not way.symmetric:
                zero = self._values(module, INPUT_OFFSET).astype(np.int8)
                self._add_made(f"{module}.{INPUT_ZERO_POINT}", DType.I8, zero)
        self._add_bias(module)

    def _add_scale(self, module: str, n: int) -> None:
        name = f"{module}.{WEIGHT_SCALE}"
        stored = self.source.stored
        if name in stored.tensors:
            self._values(module, WEIGHT_SCALE)  # checked
            self._add(name, DType(stored.tensors[name].dtype), (n, 1), lambda: pieces_of(stored, name))
            return
        # Some writers leave it out, as static linears can do without: deq_scale = input_scale * weight_scale.
        scale = self._values(module, DEQ_SCALE) / self._values(module, INPUT_SCALE)
        self._add_made(name, DType.F32, scale.reshape(n, 1))

    def _add_bias(self, module: str) -> None:
        """Add a linear's bias; where its writer has left it in quant_bias alone, what it was."""
        source, name = self.source, f"{module}.{BIAS}"
        if name in source.stored.tensors:
            self._copy(name)
        elif f"{module}.{QUANT_BIAS}" not in source.stored.tensors:
            return
        elif source.biased is None:
            if (bias := self._folded_bias(module)).any():
                self._add_made(name, DType.F32, bias)
        elif module in source.biased:
            n = source.stored.tensors[f"{module}.{WEIGHT}"].shape[0]
            self._add(name, DType.F32, (n,), lambda: [self._folded_bias(module)])

    def _folded_bias(self, module: str) -> NDArray[np.float32]:
        """Return bias = (quant_bias + input_offset * sum_k weight) * deq_scale, (N,)."""
        stored = self.source.stored
        sums = [piece.sum(1, dtype=np.int64) for piece in pieces_of(stored, f"{module}.{WEIGHT}")]
        folded = stored.array(f"{module}.{QUANT_BIAS}").reshape(-1).astype(np.int64)
        whole = folded + self._values(module, INPUT_OFFSET).astype(np.int64) * np.concatenate(sums)
        bias = whole * self._values(module, DEQ_SCALE).astype(np.float64)
        return np.asarray(bias, dtype=np.float32)

    def _add(self, name: str, dtype: DType, shape: tuple[int, ...], pieces: Any) -> None:
        self.items.append(Item(PlannedTensor(name, dtype, shape), step_of(name), pieces))

    def _add_made(self, name: str, dtype: DType, array: NDArray[Any]) -> None:
        self._add(name, dtype, array.shape, lambda: [array])

    def _copy(self, name: str) -> None:
        stored = self.source.stored
        info = stored.tensors[name]
        self._add(name, DType(info.dtype), info.shape, lambda: finite_pieces(stored, name))

    # --- config.json

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says of the linears."""
        groups = defaultdict(list)
        for name, way in self.ways.items():
            groups[way].append(name)
        forms = {way.form for way in groups}
        form = next(iter(forms)) if len(forms) == 1 else MIXED
        targets = {way: ["Linear"] for way in groups} if len(groups) == 1 else self._targets(groups)
        return {
            "quant_method": METHOD,
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": way.as_group(targets[way], way.form if form == MIXED else None)
                for i, way in enumerate(groups)
            },
            "ignore": self._ignored(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _targets(self, groups: Mapping[Way, list[str]]) -> dict[Way, list[str]]:
        """Return what names the linears of each group: patterns where all of a kind are in it, else their names."""
        ways_of = defaultdict(set)
        for name, way in self.ways.items():
            ways_of[_kind_of(name)].add(way)
        found = {}
        for way, names in groups.items():
            whole = dict.fromkeys(_kind_of(name) for name in names if len(ways_of[_kind_of(name)]) == 1)
            single = [self._named(name) for name in names if _kind_of(name) not in whole]
            found[way] = [*(f"re:.*{re.escape(kind).replace('#', '[0-9]+')}$" for kind in whole), *single]
        return found

    def _named(self, name: str) -> str:
        """Return what matches one linear. A wrapper's classes put its layers elsewhere than its file does."""
        at = name.find("layers.")
        return f"re:.*{re.escape(name[at:])}$" if self.source.beside and at > 0 else name

    def _ignored(self) -> list[str]:
        """Return what stays float; also by the names of what engines join, where all parts stay so."""
        floats = [name for name, kind in self.source.types.items() if kind is QuantType.FLOAT]
        found = dict.fromkeys(map(self._named, floats))
        for name in floats:
            parent, _, last = name.rpartition(".")
            for parts, fused in _FUSED.items():
                if last == parts[0] and all(f"{parent}.{part}" in floats for part in parts):
                    found[self._named(f"{parent}.{fused}")] = None
        # A head that shares the embedding is a linear there too.
        head = self.source.config.names.head if self.source.config is not None else "lm_head"
        if head not in self.ways:
            found["lm_head"] = None
        return [*found, *(f"re:.*{re.escape(part)}.*" for part in self.source.beside)]

    # --- what a user should know

    def _notes(self) -> Iterator[str]:
        kinds, ways = {*self.source.quantized.values()}, {*self.ways.values()}
        has_static = any(way.kind is QuantType.W8A8 for way in ways)
        if QuantType.W8A8_MIX in kinds:
            yield "W8A8_MIX becomes W8A8_DYNAMIC: readers have one way for prompts and for generated tokens."
        if has_static:
            yield (
                "SGLang computes static inputs as ones with a scale for each token, without saying so; transformers "
                "needs dtype float32 for them."
            )
        if any(not way.symmetric and way.kind is not QuantType.W8A16 for way in ways):
            yield "inputs have offsets, which vLLM takes on CPUs and GPUs, SGLang and vllm-ascend do not."
        if QuantType.W8A16 in kinds:
            yield "vLLM has a kernel for 8-bit weights beside float inputs on GPUs, and none on CPUs."
        if Way(QuantType.W8A16, False) in ways:
            yield (
                "weights have offsets: vLLM has kernels for them on few GPUs (Hopper's), and transformers 5.24 loads "
                "them with CompressedTensorsConfig(dequantize=True) alone."
            )
        experts = {way.kind for name, way in self.ways.items() if EXPERT.fullmatch(name)}
        if experts - {QuantType.W8A16}:
            yield "transformers 5.24 reads W8A16 experts and no other int8 ones; vLLM on GPUs reads these."
        unscaled = [name for name in self.ways if f"{name}.{WEIGHT_SCALE}" not in self.source.stored.tensors]
        if unscaled:
            yield f"{plural(len(unscaled), WEIGHT_SCALE)} not stored, and computed as deq_scale / input_scale."
        if mixed := self._mixed():
            yield f"linears that vLLM joins are stored differently, which it refuses: {shortlist(mixed, 2)}."

    def _mixed(self) -> list[str]:
        found = []
        for name in self.source.types:
            parent, _, last = name.rpartition(".")
            for parts in _FUSED:
                if last == parts[0]:
                    members = [f"{parent}.{part}" for part in parts]
                    if len({self.ways.get(member) for member in members if member in self.source.types}) > 1:
                        found.append(f"{parent}.{{{','.join(parts)}}}")
        return found

    # --- writing

    def _head(self) -> Entry:
        activations = {"activations": self.options.activations or "symmetric"}
        has_choice = any(way.kind is QuantType.W8A8_DYNAMIC for way in self.ways.values())
        return {
            "format": FORMAT,
            "command": "export",
            "eightfold": __version__,
            "to": METHOD,
            "layers": self.source.num_layers,
            "options": activations if has_choice else {},
            "source": source_facts(self.source.stored),
        }

    def write(self, target: Path, *, overwrite: bool, progress: Progress) -> bool:
        """Write the directory, or go on where that was stopped; return whether it was there already.

        Raises:
            OutputError: `target` cannot be made or replaced.
        """
        stored = self.source.stored
        growing = Output(
            target, self._head(), source=stored.directory, explain=differences, overwrite=overwrite, progress=progress
        )
        with growing as output:
            if output.is_complete:
                return True
            hold_source(stored, output)
            part = PART_BYTES if self.nbytes > PART_BYTES else None
            checksums = write_items(
                output, _STEM, self.items, title="export", part_bytes=part, metadata={"format": "pt"}, progress=progress
            )
            raw, notes = copy_companions(stored, output)
            self.notes += notes
            write_json(output.path / CONFIG_NAME, self._config(raw))
            output.finish(checksums)
        return False

    def _config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        source = self.source
        out = dict(raw) if source.config is None else both_dialects(raw, source.config, source.dtype)
        keys = (*_LEFT_OUT, *(source.layout.mindie_keys if source.layout is not None else ()))
        kept = {key: value for key, value in out.items() if key not in keys}
        return {**kept, "quantization_config": self.quantization_config()}


def _kind_of(name: str) -> str:
    """Return what a linear is called in every layer: self_attn.q_proj, mlp.experts.#.up_proj."""
    inner = re.sub(r"^.*?layers\.\d+\.", "", name)
    return re.sub(r"\.\d+\.", ".#.", f".{inner}")


def _packed(pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.int32]]:
    """Yield int8 rows (n, K) as int32 (n, ceil(K / 4)): four values + 128, lowest byte first; zeros behind the last."""
    for piece in pieces:
        values = np.ascontiguousarray(piece).view(np.uint8) ^ 0x80
        if short := -values.shape[1] % 4:
            values = np.pad(values, ((0, 0), (0, short)))
        yield values.view("<i4")
