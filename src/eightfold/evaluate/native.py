"""Perplexity on the native model, and its distance from another one, without torch; formulas as in perplexity.py.

Letters: R positions of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.evaluate.evaluation import Evaluation, Tally, require_same_vocabulary
from eightfold.model.native.model import PAGE, Chunk, NativeModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Positions whose logits are held at a time.
_STEP_TOKENS = 128


def evaluate(
    model: NativeModel,
    chunks: Sequence[Sequence[int]],
    against: NativeModel | None = None,
    on_chunk: Callable[[], None] = lambda: None,
    *,
    generated: bool = False,
) -> Evaluation:
    """Measure a model on chunks, and its distance from `against`.

    Args:
        model: loaded; its cache is replaced, as that of `against`.
        chunks: token ids, each chunk at least two; each stands alone.
        against: usually the float model; the same vocabulary.
        on_chunk: called after each.
        generated: compute the tokens as if they had been generated.

    Raises:
        CapacityError: no memory for the cache.
        CheckpointError: the model says NaN.
        ConfigError: the two have different vocabularies.
    """
    models = [model] if against is None else [model, against]
    require_same_vocabulary([each.config for each in models])
    for each in models:
        each.allocate_cache(max(map(len, chunks)))
    tally = Tally()
    for chunk in chunks:
        step = len(chunk) if any(each.float_prompts for each in models) and not generated else _STEP_TOKENS
        for at in range(0, len(chunk) - 1, step):
            log_probs = [_log_probs(each, chunk[: at + step + 1], at, generated) for each in models]
            _add(tally, log_probs, chunk[at + 1 :])
        on_chunk()
    return Evaluation.of(len(chunks), tally)


def _log_probs(model: NativeModel, chunk: Sequence[int], at: int, generated: bool) -> NDArray[Any]:
    """Return log p after each token from `at` on but the last, (R, V) float32, computed in one step."""
    tokens = chunk[at:-1]
    pages = range(-(-(at + len(tokens)) // PAGE))
    logits, _ = model.forward([Chunk(tokens, at, pages, 0 if generated else len(chunk), wants_all=True)])
    return log_softmax(logits)


def log_softmax(logits_RV: NDArray[Any]) -> NDArray[Any]:
    """Return log p, (R, V) float32; sums are float64."""
    shifted: NDArray[Any] = logits_RV - logits_RV.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return shifted


def _add(tally: Tally, log_probs: list[NDArray[Any]], following: Sequence[int]) -> None:
    rows = np.arange(len(log_probs[0]))
    targets = np.asarray(following[: len(rows)])
    for kept, of_model in zip((tally.nll, tally.nll_against), log_probs, strict=False):
        kept.append(-of_model[rows, targets].astype(np.float64))
    if len(log_probs) > 1:
        judged, float_model = log_probs
        tally.kl.append((np.exp(float_model) * (float_model - judged)).sum(1, dtype=np.float64))
        tally.same_top.append(judged.argmax(1) == float_model.argmax(1))
