"""Perplexity on the native model, without torch.

    ppl = exp(-mean log p(t_i | t_<i))      over all tokens of a chunk but its first

Letters: R positions of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.errors import CheckpointError
from eightfold.native.model import PAGE, Chunk, NativeModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Positions whose logits are held at a time.
_STEP_TOKENS = 128


def negative_log_likelihood(
    model: NativeModel,
    chunks: Sequence[Sequence[int]],
    on_chunk: Callable[[], None] = lambda: None,
    *,
    generated: bool = False,
) -> float:
    """Return the mean over all predictions, in nats.

    Args:
        model: loaded; its cache is replaced.
        chunks: token ids, each chunk at least two; each stands alone.
        on_chunk: called after each.
        generated: compute the tokens as if they had been generated.

    Raises:
        CapacityError: no memory for the cache.
        CheckpointError: the model says NaN.
    """
    model.allocate_cache(max(map(len, chunks)))
    total, count = 0.0, 0
    for chunk in chunks:
        step = len(chunk) if model.float_prompts and not generated else _STEP_TOKENS
        total += sum(_log_probs(model, chunk[: at + step + 1], at, generated) for at in range(0, len(chunk) - 1, step))
        count += len(chunk) - 1
        on_chunk()
    if math.isnan(total):
        raise CheckpointError("log-likelihood", got="NaN", expected="a number", action="The weights are damaged.")
    return -total / count


def _log_probs(model: NativeModel, chunk: Sequence[int], at: int, generated: bool) -> float:
    """Return the sum of log p of the tokens after `at`, computed in one step."""
    tokens = chunk[at:-1]
    pages = range(-(-(at + len(tokens)) // PAGE))
    logits, _ = model.forward([Chunk(tokens, at, pages, 0 if generated else len(chunk), wants_all=True)])
    targets = np.asarray(chunk[at + 1 : at + 1 + len(tokens)])
    return float(log_softmax_at(logits, targets).sum())


def log_softmax_at(logits_RV: NDArray[Any], tokens_R: NDArray[Any]) -> NDArray[Any]:
    """Return log p of one token in each row, (R,) float64."""
    top_R1 = logits_RV.max(1, keepdims=True)
    norm_R = np.log(np.exp(logits_RV - top_R1).sum(1, dtype=np.float64))
    picked: NDArray[Any] = logits_RV[np.arange(len(tokens_R)), tokens_R].astype(np.float64) - top_R1[:, 0] - norm_R
    return picked
