"""What an evaluation measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import ModelConfig
from eightfold.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Evaluation:
    """What was measured. The second half is None without a model to compare with."""

    nll: float
    ppl: float
    tokens: int  # predictions
    chunks: int
    ppl_against: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None  # share of positions with the same most likely token

    @classmethod
    def of(cls, chunks: int, tally: Tally) -> Evaluation:
        """Average over positions.

        Raises:
            CheckpointError: a likelihood is NaN.
        """
        nll_T = np.concatenate(tally.nll)
        nll = float(nll_T.mean())
        if math.isnan(nll):
            raise CheckpointError("log-likelihood", got="NaN", expected="a number", action="The weights are damaged.")
        if not tally.kl:
            return cls(nll, _exp(nll), len(nll_T), chunks)
        kl_T = np.concatenate(tally.kl)
        return cls(
            nll,
            _exp(nll),
            len(nll_T),
            chunks,
            ppl_against=_exp(float(np.concatenate(tally.nll_against).mean())),
            kl_mean=float(kl_T.mean()),
            kl_p99=float(np.sort(kl_T)[math.ceil(0.99 * len(kl_T)) - 1]),
            top1_agreement=float(np.concatenate(tally.same_top).mean()),
        )


@dataclass
class Tally:
    """What is kept of each position, in pieces; the last three stay empty without a model to compare with."""

    nll: list[NDArray[Any]] = field(default_factory=list)  # float64
    nll_against: list[NDArray[Any]] = field(default_factory=list)
    kl: list[NDArray[Any]] = field(default_factory=list)
    same_top: list[NDArray[Any]] = field(default_factory=list)  # bool


def require_same_vocabulary(configs: Sequence[ModelConfig]) -> None:
    """Refuse to compare models of different vocabularies: the first is the one that is judged.

    Raises:
        ConfigError: they differ.
    """
    ours, theirs = configs[0].vocab_size, configs[-1].vocab_size
    if ours != theirs:
        raise ConfigError("vocabulary of `against`", got=theirs, expected=ours, action="Give the float original.")


def _exp(nll: float) -> float:
    """Return e**nll, infinity past what a float holds."""
    try:
        return math.exp(nll)
    except OverflowError:  # past 709 nats a token: the weights are damaged, and the number should say so
        return math.inf
