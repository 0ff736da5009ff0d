"""Float tensors that are copied as they are: a reader computes with whatever they hold, so they hold numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from eightfold.format.stored import StoredTensors
from eightfold.format.streaming import pieces_of
from eightfold.model.layers import require_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The bits of the exponent, which are all set in infinities and in what is no number.
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def finite_pieces(stored: StoredTensors, name: str) -> Iterator[NDArray[Any]]:
    """Yield the elements of a stored tensor as streaming.pieces_of() does.

    Raises:
        CheckpointError: a float is NaN or infinite; the first of them is named.
    """
    dtype = stored.tensors[name].dtype
    for piece in pieces_of(stored, name):
        if is_damaged(piece, dtype):
            require_finite(stored, name)
        yield piece


def is_damaged(values: NDArray[Any], dtype: str) -> bool:
    """Whether any value of a stored float type is NaN or infinite; never so of other types."""
    if (exponent := _EXPONENTS.get(dtype)) is None or not values.size:
        return False
    bits = values.view(f"<u{values.itemsize}")
    return bool(((bits & exponent) == exponent).any())
