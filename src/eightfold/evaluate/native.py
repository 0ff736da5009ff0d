"""Perplexity on the native model, and its distance from another one, without torch; formulas as in perplexity.py.

Letters: R positions of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.errors import CheckpointError
from eightfold.evaluate.evaluation import Evaluation, require_same_vocabulary, safe_exp
from eightfold.native.model import PAGE, Chunk, NativeModel

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
    tally = _Tally()
    for chunk in chunks:
        step = len(chunk) if any(each.float_prompts for each in models) and not generated else _STEP_TOKENS
        for at in range(0, len(chunk) - 1, step):
            tally.add([_log_probs(each, chunk[: at + step + 1], at, generated) for each in models], chunk[at + 1 :])
        on_chunk()
    return tally.result(len(chunks))


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


class _Tally:
    """What is kept of each position."""

    def __init__(self) -> None:
        self._nll: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
        self._kl: list[NDArray[Any]] = []
        self._same_top: list[NDArray[Any]] = []

    def add(self, log_probs: list[NDArray[Any]], following: Sequence[int]) -> None:
        rows = np.arange(len(log_probs[0]))
        targets = np.asarray(following[: len(rows)])
        for kept, of_model in zip(self._nll, log_probs, strict=False):
            kept.append(-of_model[rows, targets].astype(np.float64))
        if len(log_probs) > 1:
            judged, float_model = log_probs
            self._kl.append((np.exp(float_model) * (float_model - judged)).sum(1, dtype=np.float64))
            self._same_top.append(judged.argmax(1) == float_model.argmax(1))

    def result(self, chunks: int) -> Evaluation:
        nll_T = np.concatenate(self._nll[0])
        nll = float(nll_T.mean())
        if math.isnan(nll):
            raise CheckpointError("log-likelihood", got="NaN", expected="a number", action="The weights are damaged.")
        if not self._kl:
            return Evaluation(nll, safe_exp(nll), len(nll_T), chunks)
        kl_T = np.concatenate(self._kl)
        return Evaluation(
            nll,
            safe_exp(nll),
            len(nll_T),
            chunks,
            ppl_against=safe_exp(float(np.concatenate(self._nll[1]).mean())),
            kl_mean=float(kl_T.mean()),
            kl_p99=float(np.sort(kl_T)[math.ceil(0.99 * len(kl_T)) - 1]),
            top1_agreement=float(np.concatenate(self._same_top).mean()),
        )
