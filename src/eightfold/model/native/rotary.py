"""Rotary frequencies in numpy: the same as the reference's, see there for sources.

f_i = theta**(-2 i / D), i < D/2, stretched for long contexts
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import RopeParameters

if TYPE_CHECKING:
    from numpy.typing import NDArray


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> NDArray[Any]:
    """Return (D/2,) float32 angles for one position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq: NDArray[Any] = np.float32(1.0) / np.power(np.float32(rope.rope_theta), exponents)
    if rope.rope_type == "linear":
        inv_freq = inv_freq / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        return _stretch_llama3(inv_freq, rope)
    return inv_freq


def _stretch_llama3(inv_freq: NDArray[Any], rope: RopeParameters) -> NDArray[Any]:
    # Long waves are stretched by `factor`, short ones kept, those between blended.
    old_context = rope.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (old_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    stretched = np.where(wavelength > old_context / rope.low_freq_factor, inv_freq / rope.factor, blended)
    kept = np.where(wavelength < old_context / rope.high_freq_factor, inv_freq, stretched)
    return np.ascontiguousarray(kept, dtype=np.float32)
