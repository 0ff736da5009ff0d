"""A model directory as it lies there, read once for all rules: nothing in it needs to be right.

Checkpoint (format/checkpoint.py) refuses what does not fit together; here that is what is looked for. Only config.json
must say how large the model is, and one safetensors file must be there.

Letters: N output features, K input features of a linear; H query heads, G key/value heads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eightfold.config import DType, ModelConfig, parse_config
from eightfold.errors import CheckpointError, EightfoldError
from eightfold.families import (
    LinearShape,
    all_linears,
    all_norms,
    input_groups,
    smooth_pairs,
)
from eightfold.files import read_file, read_json
from eightfold.format.bfloat16 import bfloat16_bits, widened
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import require_finished
from eightfold.format.safetensors import MappedFile, TensorInfo, read_header
from eightfold.format.tokenizer_files import TokenizerFiles
from eightfold.scheme import FA_TENSORS, INPUT_OFFSET, INPUT_SCALE, KV_TENSORS, bias_name, legacy_norm, weight_name
from eightfold.vocabulary import has_tokenizer

DESCRIPTIONS = "quant_model_description*.json"
INTEGERS = ("I8", "I32", "I64")

# Rule -> linears that become one, and what they have to agree in.
SHARED_INPUTS = {
    f"{title}-{suffix}".replace("_", "-"): (title, suffix)
    for title in ("qkv", "gate_up")
    for suffix in (INPUT_SCALE, INPUT_OFFSET)
}

# What tensor names and shapes depend on; the rest of a config.json may be beyond our own reader.
_GEOMETRY = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


_Content = TypeVar("_Content")


@dataclass(frozen=True)
class Packed:
    """The linears of one layer that loaders join into one, and the norm before them."""

    title: str  # qkv or gate_up
    members: tuple[str, ...]  # full module names
    norm: str

    @property
    def module(self) -> str:
        return self.members[0].rpartition(".")[0]


@dataclass
class RawDirectory:
    """What lies in a directory.

    Attributes:
        path: the folder.
        config: config.json as it stands.
        model: the sizes in it.
        descriptions: description files by name, those that could be read.
        damaged: files that cannot be read -> a sentence that says why.
        files: safetensors files by name -> their tensors.
        tensors: every stored tensor; of one that is in two files, the last in alphabetical order.
        linears: the linears of the layers, by full module name, without the head.
        norms: the norms, by full module name -> length.
        packed: what loaders join, layer by layer.
        has_int8: whether any linear of the layers is stored as int8.
        has_tokenizer: whether there is a file that a tokenizer can be made of.
        tokenizer: what the tokenizer's files say, and a sentence about one that cannot be read.
    """

    path: Path
    config: dict[str, Any]
    model: ModelConfig
    descriptions: dict[str, dict[str, Any]]
    files: dict[str, dict[str, TensorInfo]]
    damaged: dict[str, str]

    def __post_init__(self) -> None:
        self.tensors = {name: info for header in self.files.values() for name, info in header.items()}
        self.linears: dict[str, LinearShape] = all_linears(self.model)
        self.head = self.linears.pop(self.model.names.head)
        self.norms = all_norms(self.model)
        self.packed = tuple(_packed(self.model))
        self.has_int8 = any(self.dtype_of(weight_name(name)) == DType.I8.value for name in self.linears)
        self._maps: dict[Path, MappedFile] = {}
        self.has_tokenizer = has_tokenizer(self.path)
        self.tokenizer, self.tokenizer_fault = TokenizerFiles({}, {}, {}), ""
        try:
            self.tokenizer = TokenizerFiles.read(self.path)
        except CheckpointError as error:
            self.tokenizer_fault = str(error)

    @classmethod
    def open(cls, path: Path) -> RawDirectory:
        """Gather a directory.

        Raises:
            CheckpointError: no directory, an unfinished one, or one without config.json or safetensors files.
            ConfigError: config.json does not say how large the model is.
            UnsupportedError: an architecture of which the tensors' names are not known.
        """
        require_finished(path)
        return cls.gather(path)

    @classmethod
    def gather(cls, path: Path) -> RawDirectory:
        """Gather a directory as open() does, or one that is being made."""
        if not path.is_dir():
            raise CheckpointError(f"no directory {path}", expected="a model directory", action="Check the path.")
        config = read_json(path / CONFIG_NAME)
        model = _sizes(config, path / CONFIG_NAME)
        descriptions, damaged = _gather(path.glob(DESCRIPTIONS), _json_object)
        headers, damaged_files = _gather(path.glob("[!.]*.safetensors"), read_header)
        files = {**headers, **{name: {} for name in damaged_files}}
        if not files:
            raise CheckpointError("weights", where=path, got="no *.safetensors", expected="safetensors files")
        return cls(path, config, model, descriptions, files, {**damaged, **damaged_files})

    def only(self, names: Iterable[str]) -> RawDirectory:
        """Return the same directory with these safetensors files and no others."""
        return replace(self, files={name: self.files[name] for name in names})

    @property
    def outer_weights(self) -> tuple[str, ...]:
        """The weights outside of the layers that a loader reads: the embedding, and the head of an untied model."""
        embedding = weight_name(self.model.names.embedding)
        return (embedding,) if self.model.tie_word_embeddings else (embedding, weight_name(self.model.names.head))

    def dtype_of(self, name: str) -> str | None:
        """Return a tensor's element type by its safetensors name; None when it is not stored."""
        return self.tensors[name].dtype if name in self.tensors else None

    def values(self, name: str) -> NDArray[Any] | None:
        """Return a small tensor's values.

        Returns:
            float64 or int64, in the tensor's shape; None when it is not stored or of a type without a reader.
        """
        return values_of(self.tensors.get(name), self._maps)

    def absent(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.tensors]

    def misshapen(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return the tensors that are stored in another shape."""
        return [name for name, shape in shapes.items() if name in self.tensors and self.tensors[name].shape != shape]

    def nonzero(self, names: Iterable[str], suffix: str = "") -> list[str]:
        """Return the tensors with this end of their name that are stored and hold anything but zeros."""
        return self._holding((name for name in names if name.endswith(suffix)), np.any)

    def beyond_int8(self, names: Iterable[str]) -> list[str]:
        """Return the tensors that are stored and hold anything but integers from -128 to 127."""
        return self._holding(names, lambda x: not np.all((x == np.rint(x)) & (x >= -128) & (x <= 127)))

    def _holding(self, names: Iterable[str], what: Callable[[NDArray[Any]], Any]) -> list[str]:
        return [name for name in names if (found := self.values(name)) is not None and what(found)]

    def unequal_inputs(self, groups: Iterable[Packed], dtype: DType) -> Iterator[tuple[str, list[str]]]:
        """Yield, for each of SHARED_INPUTS, the modules whose joined linears do not agree when cast to a dtype."""
        groups = list(groups)
        for rule, (title, suffix) in SHARED_INPUTS.items():
            modules = []
            for group in groups:
                found = [self.values(f"{member}.{suffix}") for member in group.members if group.title == title]
                if differ([cast(values, dtype) for values in found if values is not None]):
                    modules.append(group.module)
            yield rule, modules

    def duplicates(self) -> tuple[list[str], set[str]]:
        """Return the tensors that lie in more than one file, and the files of these."""
        counts = Counter(name for header in self.files.values() for name in header)
        twice = [name for name, count in counts.items() if count > 1]
        return twice, {file for file, header in self.files.items() if not header.keys().isdisjoint(twice)}

    def unmatched(self, description: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return a description's entries that have no tensor, and the tensors that have no entry if there are any."""
        tags = [key for key, value in description.items() if isinstance(value, str) and "." in key]
        tags = [key for key in tags if not key.endswith(".quant_type")]
        return self.absent(tags), [name for name in self.tensors if tags and name not in tags]

    def kv_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of an int8 key/value cache in every layer -> shape."""
        return {
            f"{self.model.names.layer(layer_idx)}{module}.{spec.suffix}": spec.shape_for(C=self.model.kv_size)
            for layer_idx in range(self.model.num_layers)
            for module in (self.model.names.key, self.model.names.value)
            for spec in KV_TENSORS
        }

    def fa_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of quantized attention in every layer -> shape."""
        heads = {"H": self.model.num_heads, "G": self.model.num_kv_heads}
        names = self.model.names
        modules = [names.layer(layer_idx) + names.attention for layer_idx in range(self.model.num_layers)]
        return {f"{module}.{s.suffix}": s.shape_for(**heads) for module in modules for s in FA_TENSORS}

    def norm_tensors(self) -> set[str]:
        """Return the names a norm's tensors may have, in the present and the older layout."""
        modules = [module for norm in self.norms for module in (norm, legacy_norm(norm))]
        return {name(module) for module in modules for name in (weight_name, bias_name)}


def packs(kinds: Mapping[Packed, str]) -> dict[str, dict[str, int]]:
    """Count how the layers' groups are joined: group -> how -> layers."""
    counts = {group.title: Counter[str]() for group in kinds}
    for group, kind in kinds.items():
        counts[group.title][kind] += 1
    return {title: dict(count) for title, count in counts.items()}


def values_of(info: TensorInfo | None, maps: dict[Path, MappedFile]) -> NDArray[Any] | None:
    """Return a small tensor's values, float64 or int64; None of one that is not stored, or of a type without a reader.

    Args:
        info: where it is stored.
        maps: the files that are open, to which its file is added.
    """
    if info is None or info.dtype not in {kind.value for kind in DType if kind is not DType.F8_E4M3}:
        return None
    if info.file not in maps:
        maps[info.file] = MappedFile(info.file)
    array = maps[info.file].array(info)
    if info.dtype == DType.BF16.value:
        array = widened(array, info.dtype)
    return array.astype(np.float64 if DType(info.dtype).is_float else np.int64)


def differ(members: list[NDArray[Any]]) -> bool:
    """Whether values that must be one are not, by the tolerance of torch.allclose: |a - b| <= 1e-8 + 1e-5 |b|."""
    flat = np.concatenate([np.empty(0), *(member.reshape(-1) for member in members)])
    return flat.size > 0 and not np.allclose(flat, flat[0])


def cast(values: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    """Return values rounded to float16 or bfloat16, as float64."""
    if dtype is DType.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float64)
    return widened(bfloat16_bits(values), DType.BF16.value).astype(np.float64)


def _packed(model: ModelConfig) -> Iterator[Packed]:
    norms = {pair.group: pair.source for pair in smooth_pairs(model) if pair.source_is_norm}
    for layer_idx in range(model.num_layers):
        prefix = model.names.layer(layer_idx)
        for group in input_groups(model, layer_idx):
            if group.title in norms:
                members = tuple(prefix + linear.name for linear in group.linears)
                yield Packed(group.title, members, prefix + norms[group.title])


def _gather(paths: Iterable[Path], read: Callable[[Path], _Content]) -> tuple[dict[str, _Content], dict[str, str]]:
    """Return what can be read by file name, and of the other files why not."""
    found: dict[str, _Content] = {}
    damaged: dict[str, str] = {}
    for path in sorted(paths):
        try:
            found[path.name] = read(path)
        except CheckpointError as error:
            damaged[path.name] = str(error)
    return found, damaged


def _sizes(config: dict[str, Any], where: Path) -> ModelConfig:
    try:
        return parse_config(config, where)
    except EightfoldError:
        return parse_config({key: config[key] for key in _GEOMETRY if key in config}, where)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_file(path))  # as loaders read it: of a repeated key, the last
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"It is no JSON: {error}. Fetch it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"It holds a {type(content).__name__} and no object. Fetch it again.")
    return content
