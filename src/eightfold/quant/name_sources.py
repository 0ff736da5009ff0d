"""Weights as they lie in a source, of whichever format: which rows of which tensor, how packed, and with which scales.

    float8, blocks       weight, weight_scale_inv (ceil(N / 128), ceil(K / 128)): the product, despite the name
    float8 or int8       weight, weight_scale (N, 1) or one for all, as compressed-tensors writes them
    int4                 weight_packed (N, ceil(K / 8)) int32, weight_scale (N, K / group), weight_shape, as
                         compressed-tensors writes them: low bits first, 8 is 0
    float4               X_blocks (E, N, K / 32, 16) uint8, X_scales (E, N, K / 32), as gpt-oss has them; or weight
                         (N, K / 2) and scale (N, K / 32), as DeepSeek V4 has them: two values in a byte, the low one
                         first; scales are powers of two

Any but int4 may be stacked: weight and scales then begin with E, and X stands for X.weight.

Letters: E experts, N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from eightfold.config import DType
from eightfold.errors import CheckpointError, ConfigError, UnsupportedError
from eightfold.files import read_json
from eightfold.format.description import find_description
from eightfold.format.directory import CONFIG_NAME, explain_names
from eightfold.format.safetensors import TensorInfo
from eightfold.format.stored import StoredTensors
from eightfold.layouts import text_config
from eightfold.scheme import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, weight_name
from eightfold.values import shown

FLOAT8 = ("F8_E4M3", "F8_E5M2")
POWERS = ("F8_E8M0", "U8")  # of two, as scales: 2^(byte - 127)

FLOATS = {kind.value: kind for kind in DType if kind.is_float}
_INVERSE = "_scale_inv"  # of DeepSeek's float8, which despite its name is multiplied
_SCALES = (f".{WEIGHT_SCALE}", ".scale")
_PACKED, _SHAPE, _ZERO_POINT, _ORDER = ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx"
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_FOREIGN = (".qweight", ".SCB", ".absmax", ".quant_map")

# Of static inputs; of older writers.
_UNREAD = (f".{INPUT_SCALE}", ".input_zero_point", "activation_scale", ".rotary_emb.inv_freq")

_FLOAT4_BLOCK = 32  # values with one scale
FETCH_AGAIN = "Fetch the model again, with all of its files."


class Coding(Enum):
    """How the elements of a weight are stored."""

    PLAIN = "one by one"
    INT4 = "eight in an int32"
    FLOAT4 = "two in a byte"


@dataclass(frozen=True)
class Source:
    """A matrix (N, K) or a vector (N,), some rows of one, or one for each expert, where it lies.

    Attributes:
        tensor: its name there.
        shape: as it is read; (E, N, K) or (E, K, N) of a stack that is not taken apart.
        expert: of a stacked tensor, the index.
        is_input_major: the tensor, or the expert's part of it, is (K, N).
        begin: the first row.
        step: between two rows.
        scale: the tensor of scales of a weight that has some.
        block: rows and columns that share a scale; (1, K) where each row has its own.
        coding: how its elements are stored.
        form: the tensor that says which shape a packed weight has.
    """

    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    is_input_major: bool = False
    begin: int = 0
    step: int = 1
    scale: str = ""
    block: tuple[int, int] = (1, 1)
    coding: Coding = Coding.PLAIN
    form: str = ""

    def part(self, begin: int, count: int, step: int = 1) -> Source:
        """Return some of its rows."""
        return replace(self, shape=(count, *self.shape[1:]), begin=begin, step=step)

    def of_expert(self, expert: int, *, is_input_major: bool) -> Source:
        """Return the matrix of one expert of a stack, (N, K), or its vector."""
        if not is_input_major:
            return replace(self, shape=self.shape[1:], expert=expert)
        k, n = self.shape[1:]
        return replace(self, shape=(n, k), expert=expert, is_input_major=True, block=(self.block[1], self.block[0]))


class Sources(Mapping[str, Source]):
    """The weights of a directory, by the names that they have where they are not quantized.

    Raises:
        CheckpointError: some are quantized in a way that is not read, or scales and weights do not fit each other.
        UnsupportedError: a type of element that is not read.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self._stored, self._tensors = stored, stored.tensors
        if foreign := [name for name in self._tensors if name.endswith(_FOREIGN)]:
            raise explain_names(stored.directory, foreign) or AssertionError(foreign)
        self._forms: dict[tuple[tuple[int, ...], ...], tuple[int, int]] = {}  # of packed weights, by what is stored
        self._found: dict[str, Source] = {}
        self._scales = self._scales_of()
        apart = {*self._scales.values(), *(name for name in self._tensors if name.endswith((_SHAPE, *_UNREAD)))}
        for name, info in self._tensors.items():
            if name not in apart:
                base, source = self._of(info)
                self._require_new(base, source)
                self._found[base] = source

    def __getitem__(self, name: str) -> Source:
        return self._found[name]

    def __iter__(self) -> Any:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def info(self, source: Source) -> TensorInfo:
        """Return where a weight lies."""
        return self._tensors[source.tensor]

    def _require_new(self, name: str, source: Source) -> None:
        if name in self._found:
            got = f"it in {self._found[name].tensor} and in {source.tensor}"
            raise CheckpointError(name, where=self._stored.directory, got=got, expected="it once", action=FETCH_AGAIN)

    def _scales_of(self) -> dict[str, str]:
        """Return stored weight -> its scales."""
        names, found = self._tensors, {}
        for name in names:
            base = name.removesuffix(_INVERSE)
            candidates = [base] if base != name else []
            for suffix in _SCALES:
                if name.endswith(suffix):
                    module = name.removesuffix(suffix)
                    candidates = [weight_name(module), module + _PACKED]
            if name.endswith(_BLOCK_SCALES):
                candidates = [name.removesuffix(_BLOCK_SCALES) + _BLOCKS]
            elif name.endswith("_scale") and not candidates:
                candidates = [name.removesuffix("_scale")]
            base = next((candidate for candidate in candidates if candidate in names), "")
            if base:
                found[base] = name
            elif name.endswith((_INVERSE, f".{WEIGHT_SCALE}")):
                expected = "the weight that it scales"
                where = self._stored.directory
                raise CheckpointError(
                    name, where=where, got=f"no {candidates[0]}", expected=expected, action=FETCH_AGAIN
                )
        return found

    def _of(self, info: TensorInfo) -> tuple[str, Source]:
        """Return the name that a weight has where it is not quantized, and how it is read."""
        name, scale = info.name, self._tensors.get(self._scales.get(info.name, ""))
        if name.endswith(_PACKED):
            return name.removesuffix(_PACKED) + f".{WEIGHT}", self._int4(info, scale)
        if name.endswith(_BLOCKS) and len(info.shape) == 4:
            return name.removesuffix(_BLOCKS), self._float4(info, scale, info.shape[:2], math.prod(info.shape[2:]))
        if info.dtype in ("I8", "U8") and scale is not None and scale.dtype in POWERS and len(info.shape) == 2:
            return name, self._float4(info, scale, info.shape[:1], info.shape[1])
        return name, self._plain(info, scale)

    def _plain(self, info: TensorInfo, scale: TensorInfo | None) -> Source:
        if info.dtype not in (*FLOAT8, DType.I8.value):
            if info.dtype not in {kind.value for kind in DType} or scale is not None:
                got = f"{info.dtype} with scales" if scale is not None else info.dtype
                expected = "F32, F16 or BF16, or F8_E4M3 or I8 with scales"
                action = "Start from the float model."
                what = f"dtype of {info.name}"
                raise UnsupportedError(what, where=info.file, got=got, expected=expected, action=action)
            return Source(info.name, info.shape)
        if scale is None and info.dtype == DType.I8.value and len(info.shape) < 2:
            return Source(info.name, info.shape)
        if scale is None or len(info.shape) not in (2, 3):
            base, dot, _ = info.name.rpartition(f".{WEIGHT}")
            other = f"{base}.{WEIGHT_SCALE}" if dot else f"{info.name}_scale"
            raise CheckpointError(
                f"scales of {info.name}",
                where=info.file,
                got="none" if scale is None else f"a weight of shape {list(info.shape)}",
                expected=f"a tensor {info.name}{_INVERSE} or {other}",
                action=FETCH_AGAIN,
            )
        self._require_symmetric(info, info.name.removesuffix(f".{WEIGHT}"))
        return Source(info.name, info.shape, scale=scale.name, block=self._block(info, scale))

    def _require_symmetric(self, info: TensorInfo, module: str) -> None:
        for suffix, got, expected in (
            (_ZERO_POINT, "an offset of integers", "symmetric weights"),
            (_ORDER, "columns in an order of their own", "groups of neighbouring columns"),
        ):
            if module + suffix in self._tensors:
                action = "Start from the float model."
                raise UnsupportedError(module + suffix, where=info.file, got=got, expected=expected, action=action)

    def _block(self, info: TensorInfo, scale: TensorInfo) -> tuple[int, int]:
        """Return the rows and columns of the stored matrices that share a scale."""
        n, k = info.shape[-2:]
        shape = scale.shape
        if len(info.shape) == 3 and shape not in ((), (1,)):
            if shape[:1] != info.shape[:1]:
                expected = f"[{info.shape[0]}, ...], some for each expert"
                got = list(shape)
                raise CheckpointError(
                    f"shape of {scale.name}", where=scale.file, got=got, expected=expected, action=FETCH_AGAIN
                )
            shape = shape[1:]
        is_inverse = scale.name.endswith(_INVERSE)
        if shape in ((n, 1), (n,)):
            return 1, k
        if shape in ((), (1,)) or (shape == (1, 1) and not is_inverse):
            return n, k
        if len(info.shape) == 3 and shape == (1, k) and not is_inverse:
            return n, 1
        size = self._block_size()
        expected_shape = (-(-n // size[0]), -(-k // size[1]))
        if shape != expected_shape:
            stack = info.shape[:-2]
            raise CheckpointError(
                f"shape of {scale.name}",
                where=scale.file,
                got=list(scale.shape),
                expected=f"{[*stack, *expected_shape]} for blocks of {size[0]} x {size[1]}, or {[*stack, n, 1]}",
                action=FETCH_AGAIN,
            )
        return size

    def _block_size(self) -> tuple[int, int]:
        raw = self._stored.config_raw
        method = raw.get("quantization_config")
        method = method if isinstance(method, dict) else text_config(raw).get("quantization_config")
        size = method.get("weight_block_size") if isinstance(method, dict) else None
        size = [128, 128] if size is None else size
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
            return size[0], size[1]
        where = self._stored.directory / CONFIG_NAME
        raise ConfigError('"weight_block_size"', where=where, got=shown(size), expected="two positive numbers")

    def _int4(self, info: TensorInfo, scale: TensorInfo | None) -> Source:
        module = info.name.removesuffix(_PACKED)
        form = self._tensors.get(module + _SHAPE)
        if info.dtype != DType.I32.value or len(info.shape) != 2:
            got, expected = f"{info.dtype} {list(info.shape)}", "I32 with two dimensions: integers of 4 bits"
            action = "Start from the float model."
            raise UnsupportedError(info.name, where=info.file, got=got, expected=expected, action=action)
        self._require_symmetric(info, module)
        if scale is None or form is None:
            name, expected = module + (f".{WEIGHT_SCALE}" if scale is None else _SHAPE), "it beside a packed weight"
            raise CheckpointError(name, where=info.file, got="none", expected=expected, action=FETCH_AGAIN)
        n, k = self._form(info, scale, form)
        groups = scale.shape[-1] if scale.shape else 0
        if scale.shape != (n, groups) or groups < 1 or k % groups:
            expected = f"[{n}, one for each group of columns of {k}]"
            what = f"shape of {scale.name}"
            raise CheckpointError(what, where=scale.file, got=list(scale.shape), expected=expected, action=FETCH_AGAIN)
        return Source(info.name, (n, k), scale=scale.name, block=(1, k // groups), coding=Coding.INT4, form=form.name)

    def _form(self, info: TensorInfo, scale: TensorInfo, form: TensorInfo) -> tuple[int, int]:
        """Return the shape of a packed weight.

        Weights that are stored alike are taken to be shaped alike, so that files are not read all over; whoever reads
        one compares it with read_form().
        """
        key = info.shape, scale.shape
        if key not in self._forms:
            self._forms[key] = read_form(self._stored, form.name, info.name)
        return self._forms[key]

    def _float4(self, info: TensorInfo, scale: TensorInfo | None, rows: tuple[int, ...], nbytes: int) -> Source:
        shape = (*rows, -(-2 * nbytes // _FLOAT4_BLOCK))
        if scale is None or scale.shape != shape:
            raise CheckpointError(
                f"scales of {info.name}",
                where=info.file,
                got="none" if scale is None else f"shape {list(scale.shape)} of {scale.name}",
                expected=f"{list(shape)}, one for {_FLOAT4_BLOCK} values",
                action=FETCH_AGAIN,
            )
        if info.dtype not in ("I8", "U8") or scale.dtype not in POWERS:
            got = f"{info.dtype} with scales in {scale.dtype}"
            raise UnsupportedError(
                f"dtype of {info.name}",
                where=info.file,
                got=got,
                expected="U8 with scales in U8",
                action="Start from the float model.",
            )
        block, coding = (1, _FLOAT4_BLOCK), Coding.FLOAT4
        return Source(info.name, (*rows, 2 * nbytes), scale=scale.name, block=block, coding=coding)


def read_form(stored: StoredTensors, name: str, packed: str) -> tuple[int, int]:
    """Return the shape of a packed weight (N, K), as the tensor beside it says.

    Args:
        stored: the directory.
        name: the tensor that says it.
        packed: the tensor of packed integers, which has to be wide enough and no wider.

    Raises:
        CheckpointError: it says something else.
    """
    info = stored.tensors[packed]
    form = stored.tensors[name]
    is_form = form.dtype in ("I64", "I32") and form.shape == (2,)
    n, k = map(int, stored.array(name)) if is_form else (0, 0)
    if not is_form or k < 1 or info.shape != (n, -(-k // 8)):
        raise CheckpointError(
            f"shape of {packed}",
            where=info.file,
            got=list(info.shape),
            expected=f"{[n, -(-k // 8)]} for {[n, k]} in 4 bits" if is_form else f"two sizes in {name}",
            action="Integers of 4 bits are read. Otherwise fetch the model again.",
        )
    return n, k


def is_quantized_elsewhere(source: Path) -> bool:
    """Whether a model that can run here has weights in float8 or integers with scales: what is read by name alone.

    Raises:
        CheckpointError: no model directory.
    """
    raw = read_json(source / CONFIG_NAME)
    if not raw.get("quantization_config") or find_description(source) is not None:
        return False
    tensors = StoredTensors.read(source).tensors
    if any(name.endswith(_PACKED) for name in tensors):
        return True
    integers = [name for name, info in tensors.items() if info.dtype in (*FLOAT8, DType.I8.value)]
    return any(f"{name}{_INVERSE}" in tensors or _scale_beside(name) in tensors for name in integers)


def _scale_beside(weight: str) -> str:
    """Return what compressed-tensors calls the scales of a weight."""
    return f"{weight.removesuffix(f'.{WEIGHT}')}.{WEIGHT_SCALE}"
