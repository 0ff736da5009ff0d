"""bfloat16, which numpy does not have: the upper half of a float32, as bit patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightfold.config import DType


def widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return stored numbers as a float32 copy.

    Args:
        stored: as they lie in a file; BF16 as uint16 bit patterns.
        dtype: by its safetensors name.
    """
    if dtype == DType.BF16.value:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.array(stored, dtype=np.float32)


def bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return finite numbers as bfloat16 bit patterns, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
