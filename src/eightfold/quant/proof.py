"""Outlier suppression must not change the float model: run one sample through both and compare logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eightfold.errors import UnsupportedError
from eightfold.model.reference.linear import float_linear
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor

# Moving a scale from one factor to another changes float32 results in their last bits: measured, 2e-6 of the largest
# logit. What is wrong by a factor somewhere shows at 1e-2 and above.
MAX_RELATIVE_DIFFERENCE = 1e-3

# Logits of so many positions and words are held at a time, and so many rows of the head.
_TOKENS, _ROWS = 512, 4096


def compare_logits(decoder: Decoder, float_TE: Tensor, smoothed_TE: Tensor) -> tuple[float, float]:
    """Compare what enters the final norm in both models.

    Returns:
        The largest difference of a logit, and the largest logit.

    Raises:
        UnsupportedError: they differ by more than rounding.
    """
    norm, checkpoint = decoder.final_norm(), decoder.checkpoint
    expected_TE, found_TE = norm(float_TE), norm(smoothed_TE)
    name = checkpoint.head_weight()
    difference = largest = 0.0
    for row in range(0, checkpoint.config.vocab_size, _ROWS):
        weight = load_tensor(checkpoint, name)[row : row + _ROWS].to(torch.float32)
        for at in range(0, len(float_TE), _TOKENS):
            expected = float_linear(expected_TE[at : at + _TOKENS], weight, None)
            found = float_linear(found_TE[at : at + _TOKENS], weight, None)
            difference = _larger(difference, float((found - expected).abs().max()))
            largest = _larger(largest, float(expected.abs().max()))
        checkpoint.release([name])
    if not difference <= MAX_RELATIVE_DIFFERENCE * largest:
        raise UnsupportedError(
            "largest change of a logit by outlier suppression",
            where=checkpoint.directory,
            got=f"{difference:g} (the largest logit is {largest:g})",
            expected=f"at most {MAX_RELATIVE_DIFFERENCE * largest:g}",
            action="Use another `anti_outlier` method, or store float32 (`save_float32`).",
        )
    return difference, largest


def _larger(a: float, b: float) -> float:
    """Return the larger; what is not a number is never passed over."""
    return b if math.isnan(b) or b > a else a
