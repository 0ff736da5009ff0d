"""Where the torch half computes: the CPU, or an accelerator that torch knows.

Within `use(device)`, stored tensors are loaded there and new ones made there; nothing else has to name a device.
Products are float32 on every device, never of a shorter type: observed ranges must not depend on a vendor's shortcuts,
and integer products of int8 are exact only then.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch

from eightfold.errors import ConfigError

CPU = torch.device("cpu")


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
