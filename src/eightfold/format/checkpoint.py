"""A model directory, float or quantized, opened without reading a weight.

Opening reads config.json, the shard headers and the description, and checks them against each other and against
the table in scheme.py: afterwards every tensor the model needs is known to be there with the right dtype and shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eightfold.architectures import FAMILIES, Names
from eightfold.config import DType, ModelConfig, parse_config, require_architecture
from eightfold.errors import CheckpointError, EightfoldError, UnsupportedError, one_of, plural, shortlist
from eightfold.families import (
    all_linears,
    all_norms,
    expert_block,
    layer_of,
    settle_names,
)
from eightfold.files import read_json
from eightfold.format.description import Description, check_entries, find_description, read_description
from eightfold.format.directory import (
    CONFIG_NAME,
    explain_names,
    read_tensors,
    require_model,
    unknown_tensors,
)
from eightfold.format.engines import explain_stacked, require_engine
from eightfold.format.journal import require_finished
from eightfold.format.safetensors import TensorInfo
from eightfold.format.stored import StoredTensors
from eightfold.layouts import known as known_row
from eightfold.scheme import (
    FA_TENSORS,
    KV_TENSORS,
    LINEAR_TENSORS,
    NORM_BIAS,
    NORM_WEIGHT,
    DTypeRule,
    QuantType,
    TensorSpec,
    legacy_norm,
    linear_tensors,
    weight_name,
)
from eightfold.values import shorten

_FLOATS = tuple(kind for kind in DType if kind.is_float)


class Checkpoint(StoredTensors):
    """A checked model directory.

    Attributes:
        config: config.json, read.
        dtype: the model's dtype: config.json's, else that of the weights.
        description: the description file; None for a float model.
    """

    def __init__(
        self,
        directory: Path,
        config_raw: dict[str, Any],
        tensors: dict[str, TensorInfo],
        description: Description | None,
    ):
        super().__init__(directory, config_raw, _with_halves(config_raw, tensors))
        config = parse_config(config_raw, directory / CONFIG_NAME)
        self.config: ModelConfig = settle_names(config, config_raw, tensors)
        self.description = description

    @classmethod
    def open(cls, directory: Path, *, may_be_begun: bool = False) -> Checkpoint:
        """Open a directory and check that it holds a whole model.

        Args:
            directory: the model.
            may_be_begun: whether its journal may lack the closing line: for the command that is about to write it.

        Raises:
            CheckpointError: not a model directory, unfinished, or damaged; all missing tensors are listed together.
            ConfigError: config.json makes no sense.
            UnsupportedError: architecture, dtype or scheme that this program does not know.
        """
        config_raw, path = require_runnable(directory, may_be_begun=may_be_begun)
        description = read_description(path) if path else None
        tensors, note = read_tensors(directory, config_raw, is_quantized=description is not None)
        checkpoint = cls(directory, config_raw, tensors, description)
        checkpoint.notes += [note] if note else []
        checkpoint._check()
        return checkpoint

    def first_layers(self, count: int) -> Checkpoint:
        """Return the model that these files would hold if it had so many layers."""
        raw = dict(self.config_raw)
        is_inside = FAMILIES[self.config.architecture].is_wrapper and isinstance(raw.get("text_config"), dict)
        part = {**(raw["text_config"] if is_inside else raw), "num_hidden_layers": count}
        if isinstance(part.get("layer_types"), list):
            part["layer_types"] = part["layer_types"][:count]
        raw = {**raw, "text_config": part} if is_inside else part
        tensors = {name: info for name, info in self.tensors.items() if (layer_of(name) or 0) < count}
        return Checkpoint(self.directory, raw, tensors, self.description)

    @functools.cached_property
    def dtype(self) -> DType:
        """The model's dtype: what config.json says; where it does not, what the first linear or embedding is stored in.

        The float32 of a float model says nothing: it is what programs write that have loaded 16-bit weights as float32.
        """
        said, stored = self.config.dtype, {kind.value: kind for kind in _FLOATS}
        if said is not None and (self.is_quantized or said is not DType.F32):
            return said
        first = self.tensors.get(weight_name(next(iter(all_linears(self.config)))))
        if first is not None and first.dtype in stored:
            return stored[first.dtype]
        embedding = self.tensors[weight_name(self.config.names.embedding)]
        if embedding.dtype not in stored:
            raise self._wrong_dtype(embedding, one_of(stored))
        return stored[embedding.dtype]

    @functools.cached_property
    def beside(self) -> dict[str, TensorInfo]:
        """The tensors of a wrapper that are not its text model's, such as those that see images."""
        names = self.config.names
        if not FAMILIES[self.config.architecture].is_wrapper:
            return {}
        inner, head = names.layers.removesuffix("layers."), weight_name(names.head)
        return {name: info for name, info in self.tensors.items() if not name.startswith(inner) and name != head}

    @property
    def is_quantized(self) -> bool:
        """Whether there is a description, that is, not a float model."""
        return self.description is not None

    def quant_type(self, linear: str) -> QuantType:
        """Return how a linear (full module name) is stored, by the tag of its weight.

        Raises:
            UnsupportedError: the tag is a type this program does not know.
        """
        name = weight_name(linear)
        if self.description is None or name not in self.description.tags:
            return QuantType.FLOAT
        tag = self.description.tags[name]
        if tag not in LINEAR_TENSORS:
            known = one_of(kind.value for kind in LINEAR_TENSORS)
            where, action = self.description.path, "Make the model anew: eightfold quantize FLOAT_DIR OUT --scheme ..."
            raise UnsupportedError(f"type of {name}", where=where, got=tag, expected=known, action=action)
        return QuantType(tag)

    def _float_type(self, router: str) -> QuantType:
        kind = self.quant_type(router)
        if kind is not QuantType.FLOAT:
            where, expected = self.description and self.description.path, f"{QuantType.FLOAT.value}, as routers stay"
            name, action = weight_name(router), "Make the model anew with eightfold quantize."
            raise UnsupportedError(f"type of {name}", where=where, got=kind.value, expected=expected, action=action)
        return kind

    def attention_type(self, layer_idx: int) -> QuantType:
        """Return how a layer's attention is quantized, by the tensors it has: FLOAT, C8 or FAQUANT.

        Raises:
            UnsupportedError: it has those of both.
        """
        own = self.config.names
        possible = ((QuantType.FAQUANT, _fa_tensors(own, layer_idx)), (QuantType.C8, _kv_tensors(own, layer_idx)))
        found = [kind for kind, names in possible if any(name in self.tensors for name in names)]
        if len(found) > 1:
            raise UnsupportedError(
                f"attention of layer {layer_idx}",
                where=self.directory,
                got=f"tensors of {found[0].value} and of {found[1].value}",
                expected="one of them",
                action="Make the model anew, with --kv-int8 or --fa-quant.",
            )
        return found[0] if found else QuantType.FLOAT

    @property
    def has_int8_attention(self) -> bool:
        """Whether any layer keeps int8 keys and values."""
        kinds = (self.attention_type(layer_idx) for layer_idx in range(self.config.num_layers))
        return any(kind is not QuantType.FLOAT for kind in kinds)

    def head_weight(self) -> str:
        """Return the name of the tensor that the output head reads: the embedding's, when the model is tied."""
        names = self.config.names
        return weight_name(names.embedding if self.config.tie_word_embeddings else names.head)

    def layer_tensors(self, prefix: str) -> list[str]:
        """Return the names of all stored tensors below a name prefix."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def resident_bytes(self) -> int:
        """Return the bytes of all tensors, a tied head not counted."""
        tied = weight_name(self.config.names.head) if self.config.tie_word_embeddings else None
        return sum(info.nbytes for name, info in self.tensors.items() if name != tied)

    def _check(self) -> None:
        quantization = self.config_raw.get("quantization_config")
        if not quantization or self.is_quantized:
            self.require_whole()
            return
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        try:
            self.require_whole()
        except EightfoldError:
            raise UnsupportedError(
                '"quantization_config"',
                where=self.directory / CONFIG_NAME,
                got=shorten(str(method)),
                expected="a float model",
                action="Start from the model's unquantized weights.",
            ) from None
        left_over = f'config.json: "quantization_config" ({shorten(str(method))}) is left over'
        self.notes.append(f"{left_over}: all weights are float, and it is ignored.")

    def require_whole(self) -> None:
        """Check that the tensors are those of the family, each with its dtype and shape, stored or only planned.

        Raises:
            CheckpointError: some are missing, or are other ones; UnsupportedError: some are unknown.
        """
        expected = dict(self._expected())
        missing = [name for name, spec in expected.items() if name not in self.tensors and not spec.optional]
        if missing:
            stacked = explain_stacked(self.config_raw, self.directory, self.tensors.values())
            raise (
                stacked
                or explain_names(self.directory, self.tensors, self.config.names.embedding)
                or CheckpointError(
                    f"{plural(len(missing), 'tensor')} missing",
                    where=self.directory,
                    got=f"no {shortlist(missing, 12)}",
                    expected=f"all {len(expected)} of {self.config.architecture}",
                    action=" ".join(["Fetch or write the directory again.", *self.notes]),
                )
            )
        beyond = [name for name in self.tensors if (layer_of(name) or 0) >= self.config.num_layers]
        if beyond:
            raise CheckpointError(
                f"layers beyond config.json's {self.config.num_layers}",
                where=self.directory,
                got=shortlist(beyond, 3),
                expected="as many as config.json says",
                action="config.json and the weights belong to different models.",
            )
        # First, because a weight without an entry would look like a float one of the wrong dtype.
        if self.description is not None:
            check_entries(self.description, [*self.tensors, *self._bare_entries()])
        for name, spec in expected.items():
            if name in self.tensors:
                self._check_tensor(self.tensors[name], spec)
        # Tensors that nothing here would read: a bias or a scale left out changes every result.
        harmless = {weight_name(self.config.names.head)} if self.config.tie_word_embeddings else set()
        unknown = [
            name
            for name in self.tensors
            if name not in expected
            and name not in harmless
            and name not in self.beside
            and not name.endswith("rotary_emb.inv_freq")
        ]
        if unknown:
            known = f"only those of {self.config.architecture} in {one_of(kind.value for kind in QuantType)}"
            raise explain_names(self.directory, unknown, self.config.names.embedding) or unknown_tensors(
                self.directory, unknown, known
            )

    def _bare_entries(self) -> set[str]:
        """Return the entries that may name no tensor: vllm-ascend looks for them in some families, and for a head."""
        blocks = {i: block for i in range(self.config.num_layers) if (block := expert_block(self.config, i))}
        names = self.config.names
        entries = {weight_name(names.layer(layer_idx) + block.module) for layer_idx, block in blocks.items()}
        entries |= {weight_name(names.head)} if self.config.tie_word_embeddings else set()
        return entries & set(self.description.tags if self.description else ())

    def _expected(self) -> Iterator[tuple[str, _Expectation]]:
        config = self.config
        embedding = weight_name(config.names.embedding)
        yield embedding, _Expectation((config.vocab_size, config.hidden_size), DTypeRule.SOURCE)
        for name, size in all_norms(config).items():
            yield from self._expected_norm(name, size)
        for name, linear in all_linears(config).items():
            if name == config.names.head and config.tie_word_embeddings:
                continue
            kind = self._float_type(name) if linear.is_router else self.quant_type(name)
            for spec in linear_tensors(kind, linear.has_bias):
                yield f"{name}.{spec.suffix}", _Expectation.of(spec, N=linear.n, K=linear.k)
        if self.is_quantized:
            for layer_idx in range(config.num_layers):
                yield from self._expected_attention(layer_idx)

    def _expected_norm(self, name: str, size: int) -> Iterator[tuple[str, _Expectation]]:
        yield f"{name}.{NORM_WEIGHT.suffix}", _Expectation.of(NORM_WEIGHT, E=size)
        if self.is_quantized:  # msModelSlim writes zeros there after outlier suppression, in one of two places
            for module in (name, legacy_norm(name)):
                yield f"{module}.{NORM_BIAS.suffix}", _Expectation.of(NORM_BIAS, E=size)
            yield weight_name(legacy_norm(name)), _Expectation((size,), DTypeRule.SOURCE, optional=True)

    def _expected_attention(self, layer_idx: int) -> Iterator[tuple[str, _Expectation]]:
        config, kind = self.config, self.attention_type(layer_idx)
        if kind is QuantType.FAQUANT:
            for name, spec in _fa_tensors(config.names, layer_idx).items():
                shape = spec.shape_for(H=config.num_heads, G=config.num_kv_heads)
                # The published tables give one value for each channel of a head.
                yield name, _Expectation(shape, spec.dtype, spec.optional, also=((shape[0], config.head_dim),))
        if kind is QuantType.C8:
            for name, spec in _kv_tensors(config.names, layer_idx).items():
                yield name, _Expectation.of(spec, C=config.kv_size)

    def _check_tensor(self, info: TensorInfo, spec: _Expectation) -> None:
        if not spec.admits(info.dtype, self.dtype):
            raise self._wrong_dtype(info, spec.dtype_text(self.dtype))
        # One value for each row may be stored flat or as a column; both mean the same.
        flat = tuple(s for s in spec.shape if s != 1) if spec.shape[-1:] == (1,) else spec.shape
        if info.shape not in (spec.shape, flat, *spec.also):
            raise CheckpointError(
                f"shape of {info.name}",
                where=info.file,
                got=list(info.shape),
                expected=list(spec.shape),
                action="config.json and the weights belong to different models.",
            )

    def _wrong_dtype(self, info: TensorInfo, expected: str) -> CheckpointError:
        return CheckpointError(
            f"dtype of {info.name}",
            where=info.file,
            got=info.dtype,
            expected=expected,
            action="Start from float weights (F32, F16 or BF16)."
            if self.description is None
            else "Write the directory again.",
        )


def require_runnable(directory: Path, *, may_be_begun: bool = False) -> tuple[dict[str, Any], Path | None]:
    """Return config.json and the description of a directory whose model this program runs, before anything is read.

    Args:
        directory: the model.
        may_be_begun: whether it may be one that a command has not finished.

    Raises:
        CheckpointError: not a model directory, or unfinished.
        ConfigError: config.json names no architecture.
        UnsupportedError: a family that only other engines run, or one that is not known.
    """
    if not may_be_begun:
        require_finished(directory)
    require_model(directory)
    config_raw, path = read_json(directory / CONFIG_NAME), find_description(directory)
    require_engine(config_raw, directory, is_quantized=path is not None)
    require_architecture(config_raw, directory / CONFIG_NAME)
    return config_raw, path


def quantized_already(source: Path) -> CheckpointError:
    """Return the error of a model that is to be quantized and was."""
    return CheckpointError(
        "model",
        where=source,
        got="a quantized one",
        expected="float weights",
        action="Start from its float original.",
    )


def _with_halves(raw: Mapping[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with those of two linears, gate and up, as two: rows of the same file.

    Loaders of these families want them so, and so they are written.
    """
    halves = ((row := known_row(raw)) and row.halves) or {}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        joined = next((joined for joined in halves if module.endswith(f".{joined}")), None)
        if joined is None or not info.shape or info.shape[0] % 2:
            found[name] = info
            continue
        middle, shape = (info.begin + info.end) // 2, (info.shape[0] // 2, *info.shape[1:])
        for half, begin, end in zip(halves[joined], (info.begin, middle), (middle, info.end), strict=True):
            own = f"{module.removesuffix(joined)}{half}.{suffix}"
            found[own] = replace(info, name=own, shape=shape, begin=begin, end=end)
    return found


@dataclass(frozen=True)
class _Expectation:
    """Shape and dtype that a tensor must have, whoever wrote it."""

    shape: tuple[int, ...]
    rule: DTypeRule
    optional: bool = False
    also: tuple[tuple[int, ...], ...] = ()  # other shapes that mean the same

    @classmethod
    def of(cls, spec: TensorSpec, **sizes: int) -> _Expectation:
        return cls(spec.shape_for(**sizes), spec.dtype, spec.optional)

    def admits(self, dtype: str, model: DType) -> bool:
        return dtype in _allowed(self.rule, model)

    def dtype_text(self, model: DType) -> str:
        text = one_of(_allowed(self.rule, model))
        return text + (f" in a {model.value} model" if self.rule is DTypeRule.DEQ else "")


@functools.cache
def _allowed(rule: DTypeRule, model: DType) -> tuple[str, ...]:
    """Return the safetensors names of the types that a tensor may have."""
    if rule in (DTypeRule.INT8, DTypeRule.INT32, DTypeRule.DEQ):
        return (rule.resolve(model).value,)
    # Loaders cast floating tensors, and some writers store offsets as int8.
    also = (DType.I8,) if rule in (DTypeRule.MODEL, DTypeRule.INT8_OFFSET) else ()
    return tuple(kind.value for kind in (*_FLOATS, *also))


def _fa_tensors(names: Names, layer_idx: int) -> dict[str, TensorSpec]:
    return {f"{names.layer(layer_idx)}{names.attention}.{spec.suffix}": spec for spec in FA_TENSORS}


def _kv_tensors(names: Names, layer_idx: int) -> dict[str, TensorSpec]:
    prefix, modules = names.layer(layer_idx), (names.key, names.value)
    return {f"{prefix}{module}.{spec.suffix}": spec for module in modules for spec in KV_TENSORS}
