"""Stored arrays as torch tensors, and back; and where torch computes: the CPU, or an accelerator that it knows.

Within `use(device)`, stored tensors are loaded there and new ones made there; nothing else has to name a device.
Products are float32 on every device, never of a shorter type: observed ranges must not depend on a vendor's shortcuts,
and integer products of int8 are exact only then.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eightfold.config import DType
from eightfold.errors import CheckpointError, ConfigError
from eightfold.format.stored import StoredTensors
from eightfold.model import layers

if TYPE_CHECKING:
    from numpy.typing import NDArray

CPU = torch.device("cpu")

TORCH_DTYPES = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I8: torch.int8,
}


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor on the device in use, on the CPU without a copy; uint16 are the bits of BF16."""
    return _viewed(array).to(torch.get_default_device())


def _viewed(array: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def mapped_tensor(checkpoint: StoredTensors, name: str) -> torch.Tensor:
    """Return a stored tensor in its own dtype and shape, as a view of the mapped file. Not to be modified."""
    return _viewed(checkpoint.array(name))


def load_tensor(checkpoint: StoredTensors, name: str) -> torch.Tensor:
    """Return a stored tensor in its own dtype and shape, on the device in use. Not to be modified.

    On the CPU it is a view of the mapped file.
    """
    return as_tensor(checkpoint.array(name))


def picked_rows(checkpoint: StoredTensors, name: str, rows: slice | Iterable[int]) -> torch.Tensor:
    """Return some rows of a stored matrix in its own dtype, on the CPU. Not to be modified."""
    return _viewed(checkpoint.pick(name, rows))


def load_float32(checkpoint: StoredTensors, name: str) -> torch.Tensor:
    """Return a float tensor as a float32 copy.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    tensor = load_tensor(checkpoint, name).to(torch.float32, copy=True)
    require_finite(tensor, name, checkpoint)
    return tensor


def load_rows_float32(checkpoint: StoredTensors, name: str, begin: int, end: int) -> torch.Tensor:
    """Return some rows of a float matrix, (end - begin, K), as a float32 copy.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    stored = picked_rows(checkpoint, name, slice(begin, end))
    rows = stored.to(torch.get_default_device()).to(torch.float32, copy=True)
    if not torch.isfinite(rows.sum()):  # or it overflows
        require_finite(mapped_tensor(checkpoint, name), name, checkpoint)
    return rows


def require_finite(tensor: torch.Tensor, name: str, checkpoint: StoredTensors) -> None:
    """Check a float tensor, as it is stored or widened, for NaN and infinity, in slices that stay small.

    Raises:
        CheckpointError: names the first bad element's row.
    """
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for at in range(0, rows.shape[0], step):
        # A sum is finite unless an element is not, or it overflows: cheap, and only then is each element looked at.
        if not torch.isfinite(rows[at : at + step].sum(dtype=torch.float32)):
            layers.require_finite(checkpoint, name)
            return


def require_range(tensor: torch.Tensor, dtype: DType, name: str, where: Path, action: str) -> None:
    """Check that a float tensor is finite and stays so in a dtype on disk.

    Args:
        tensor: any float dtype.
        dtype: what it will be stored as.
        name: of the tensor, for the message.
        where: the file or directory it came from, for the message.
        action: what to do when only the dtype is too narrow.

    Raises:
        CheckpointError: a value is NaN, infinite, or too large.
    """
    if not dtype.is_float or not tensor.numel():
        return
    lo, hi = (float(end) for end in torch.aminmax(tensor))
    limit = torch.finfo(TORCH_DTYPES[dtype]).max
    if -limit <= lo and hi <= limit:  # NaN is in no range
        return
    damaged = not (math.isfinite(lo) and math.isfinite(hi))
    raise CheckpointError(
        f"values of {name}",
        where=where,
        got=f"{lo:g} to {hi:g}",
        expected=f"finite ones, at most {limit:g} in {dtype.value}",
        action="The weights are damaged; fetch the model again." if damaged else action,
    )


def to_array(tensor: torch.Tensor, dtype: DType) -> NDArray[Any]:
    """Return a tensor as an array in a dtype on disk, rounded once, to nearest even; BF16 as uint16 bit patterns."""
    stored = tensor.detach().to(TORCH_DTYPES[dtype]).cpu().contiguous()
    if dtype is DType.BF16:
        return np.asarray(stored.view(torch.uint16).numpy())
    return np.asarray(stored.numpy())


def find_device(name: str) -> tuple[torch.device, str]:
    """Return the device a user asked for, and what there is to say about it.

    An NPU that cannot be used is replaced by the CPU, whose output serves an NPU as well.

    Args:
        name: cpu, cuda or npu.

    Raises:
        ConfigError: torch sees no CUDA device.
    """
    if name == "npu":
        problem = _npu_problem()
        if problem:
            return CPU, f"`device` npu: {problem}, so this runs on the CPU; the output serves an NPU all the same."
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device",
            got="cuda",
            expected="cpu: torch sees no CUDA device",
            action="Leave the option out, or install a torch built for CUDA.",
        )
    return torch.device(name), ""


def _npu_problem() -> str:
    """Return why no NPU can be used, or nothing. Importing torch_npu is what adds the device to torch."""
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch_npu"
        return "torch_npu is not installed" if missing else f"torch_npu cannot be imported ({error})"
    npu = getattr(torch, "npu", None)
    return "" if npu is not None and npu.is_available() else "torch_npu sees no device"


@contextlib.contextmanager
def use(device: torch.device) -> Iterator[None]:
    """Load and make tensors on a device until the block ends."""
    if device.type == "cpu":
        yield
        return
    with _plain_float32(device):
        torch.set_default_device(device)
        try:
            yield
        finally:
            torch.set_default_device(None)


@contextlib.contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Switch off the device's shorter float format (TF32, HF32) in matrix products."""
    module, name = {
        "cuda": (torch.backends.cuda, "allow_tf32"),
        "npu": (getattr(torch, "npu", None), "allow_hf32"),
    }.get(device.type, (None, ""))
    if module is None:
        yield
        return
    before = getattr(module.matmul, name)
    setattr(module.matmul, name, False)
    try:
        yield
    finally:
        setattr(module.matmul, name, before)
