"""Weights as they lie in a source, of whichever format: which rows of which tensor, and with which scales.

    float8, blocks       weight, weight_scale_inv (ceil(N / 128), ceil(K / 128)): the product, despite the name
    float8 or int8       weight, weight_scale (N, 1) or one for all, as compressed-tensors writes them

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from eightfold.config import DType
from eightfold.errors import CheckpointError, ConfigError, UnsupportedError, shortlist
from eightfold.files import read_json
from eightfold.format.checkpoint import find_description
from eightfold.format.directory import CONFIG_NAME, explain_names
from eightfold.format.safetensors import TensorInfo
from eightfold.format.stored import StoredTensors
from eightfold.layouts import text_config
from eightfold.scheme import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, weight_name
from eightfold.values import shown

FLOAT8 = ("F8_E4M3", "F8_E5M2")

FLOATS = {kind.value: kind for kind in DType if kind.is_float}
_INVERSE = "_scale_inv"  # of DeepSeek's float8, which despite its name is multiplied
_SCALES = (f".{WEIGHT_SCALE}", ".scale")
UNREAD = (f".{INPUT_SCALE}", ".input_zero_point", ".rotary_emb.inv_freq")  # of static inputs; of older writers
_FOREIGN = (".qweight", ".weight_packed", ".SCB", ".absmax", ".quant_map")
_MXFP4 = ("_blocks", "_scales")
_ZERO_POINT = ".weight_zero_point"


@dataclass(frozen=True)
class Source:
    """A matrix (N, K) or a vector (N,), or some rows of one, where it lies.

    Attributes:
        tensor: its name there.
        shape: as it is read.
        expert: of a stacked tensor, the index.
        is_input_major: the tensor, or the expert's part of it, is (K, N).
        begin: the first row.
        step: between two rows.
        scale: the tensor of scales of an integer or float8 matrix.
        block: rows and columns that share a scale; (1, K) where each row has its own.
    """

    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    is_input_major: bool = False
    begin: int = 0
    step: int = 1
    scale: str = ""
    block: tuple[int, int] = (1, 1)

    def part(self, begin: int, count: int, step: int = 1) -> Source:
        """Return some of its rows."""
        return replace(self, shape=(count, *self.shape[1:]), begin=begin, step=step)


class Sources:
    """The weights of a directory.

    Raises:
        CheckpointError: some are quantized in a way that is not read, or scales belong to no weight.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self._scales = self._scales_of()
        self._is_scale = frozenset(self._scales.values())

    def is_scale(self, name: str) -> bool:
        """Whether a tensor is read with a weight."""
        return name in self._is_scale

    def _scales_of(self) -> dict[str, str]:
        """Return weight -> its scales; what belongs to other tools' formats is refused."""
        names = self.stored.tensors
        if foreign := [name for name in names if name.endswith(_FOREIGN)]:
            raise explain_names(self.stored.directory, foreign) or AssertionError(foreign)
        if packed := [name for name in names if name.endswith(_MXFP4)]:
            raise CheckpointError(
                "tensor names",
                where=self.stored.directory,
                got=f"4-bit weights ({shortlist(packed, 2)})",
                expected="bfloat16, float8 or int8 weights",
                action="Load it with transformers and dequantize=True, and write it with save_pretrained.",
            )
        found: dict[str, str] = {}
        for name in names:
            base = name.removesuffix(_INVERSE)
            for suffix in _SCALES:
                if name.endswith(suffix) and weight_name(name.removesuffix(suffix)) in names:
                    base = weight_name(name.removesuffix(suffix))
            if base != name and base in names:
                found[base] = name
            elif base != name:
                raise CheckpointError(
                    name, where=self.stored.directory, got=f"no {base}", expected="the weight that it scales"
                )
        return found

    def of(self, info: TensorInfo) -> Source:
        """Return a tensor as it is read, with its scales.

        Raises:
            CheckpointError: it has none and needs some, or they do not fit it.
            UnsupportedError: a type of element that is not read.
        """
        scale, shape = self._scales.get(info.name, ""), info.shape
        if info.dtype not in (*FLOAT8, DType.I8.value):
            if info.dtype not in {kind.value for kind in DType} or scale:
                got = f"{info.dtype} with scales" if scale else info.dtype
                expected = "F32, F16 or BF16, or F8_E4M3 or I8 with scales"
                raise UnsupportedError(f"dtype of {info.name}", where=info.file, got=got, expected=expected)
            return Source(info.name, shape)
        if not scale and info.dtype == DType.I8.value and len(shape) < 2:
            return Source(info.name, shape)
        if not scale or len(shape) != 2:
            raise CheckpointError(
                f"scales of {info.name}",
                where=info.file,
                got="none" if not scale else f"a weight of shape {list(shape)}",
                expected=f"a tensor {info.name}{_INVERSE} or {info.name.removesuffix(WEIGHT)}{WEIGHT_SCALE}",
                action="Fetch the model again, with all of its files.",
            )
        if info.name.removesuffix(f".{WEIGHT}") + _ZERO_POINT in self.stored.tensors:
            raise UnsupportedError(
                f"{info.name.removesuffix(WEIGHT)}{_ZERO_POINT[1:]}",
                where=info.file,
                got="an offset of int8 weights",
                expected="symmetric weights",
            )
        return Source(info.name, shape, scale=scale, block=self._block(info, self.stored.tensors[scale]))

    def _block(self, info: TensorInfo, scale: TensorInfo) -> tuple[int, int]:
        n, k = info.shape
        if scale.shape in ((n, 1), (n,)):
            return 1, k
        if scale.shape in ((), (1,)) or (scale.shape == (1, 1) and not scale.name.endswith(_INVERSE)):
            return n, k
        method = self.stored.config_raw.get("quantization_config")
        method = method if isinstance(method, dict) else text_config(self.stored.config_raw).get("quantization_config")
        size = method.get("weight_block_size") if isinstance(method, dict) else None
        size = [128, 128] if size is None else size
        is_size = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        if not is_size:
            got = shown(size)
            raise ConfigError(
                '"weight_block_size"',
                where=self.stored.directory / CONFIG_NAME,
                got=got,
                expected="two positive numbers",
            )
        expected = (-(-n // size[0]), -(-k // size[1]))
        if scale.shape != expected:
            raise CheckpointError(
                f"shape of {scale.name}",
                where=scale.file,
                got=list(scale.shape),
                expected=f"{list(expected)} for blocks of {size[0]} x {size[1]}, or [{n}, 1]",
            )
        return size[0], size[1]

    def of_stack(self, info: TensorInfo) -> Source:
        """Return one expert of a stacked tensor.

        Raises:
            UnsupportedError: it is quantized.
        """
        if info.dtype not in FLOATS or info.name in self._scales:
            raise UnsupportedError(
                f"dtype of {info.name}",
                where=info.file,
                got=info.dtype,
                expected="F32, F16 or BF16 for experts in one tensor",
                action="Start from the model's unquantized weights.",
            )
        return Source(info.name, info.shape[1:])


def is_quantized_elsewhere(source: Path) -> bool:
    """Whether a model that can run here has weights in float8 or int8 with scales: what is read by name alone.

    Raises:
        CheckpointError: no model directory.
    """
    raw = read_json(source / CONFIG_NAME)
    if not raw.get("quantization_config") or find_description(source) is not None:
        return False
    tensors = StoredTensors.read(source).tensors
    integers = [name for name, info in tensors.items() if info.dtype in (*FLOAT8, DType.I8.value)]
    return any(f"{name}{_INVERSE}" in tensors or _scale_beside(name) in tensors for name in integers)


def _scale_beside(weight: str) -> str:
    """Return what compressed-tensors calls the scales of a weight."""
    return f"{weight.removesuffix(f'.{WEIGHT}')}.{WEIGHT_SCALE}"
