"""What an evaluation measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eightfold.config import ModelConfig
from eightfold.errors import ConfigError


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


def require_same_vocabulary(configs: Sequence[ModelConfig]) -> None:
    """Refuse to compare models of different vocabularies: the first is the one that is judged.

    Raises:
        ConfigError: they differ.
    """
    ours, theirs = configs[0].vocab_size, configs[-1].vocab_size
    if ours != theirs:
        raise ConfigError("vocabulary of --against", got=theirs, expected=ours, action="Give the float original.")


def safe_exp(nll: float) -> float:
    """Return e**nll, infinity past what a float holds."""
    try:
        return math.exp(nll)
    except OverflowError:  # past 709 nats a token: the weights are damaged, and the number should say so
        return math.inf
