"""What an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass


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
