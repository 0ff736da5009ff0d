"""What csrc/sample.cc computes, in numpy: edits in float32 like there, masses and sums in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LOG2_E = 1.4426950408889634

# U is half a unit in the last place of float32. A mass there is 2**y of the same float32 y as here, within 2 U. A block
# of 64 is summed in four lanes, 16 roundings, and all else in float64: sums are within 18 U, and a share of one, or a
# comparison of two, within 40 U.
U = 2.0**-24
SLACK = 40 * U


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """How tokens of one answer are chosen."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: Sequence[int] = ()
    min_tokens: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    prompt: Sequence[int] = ()

    def edited(self, logits: np.ndarray, mask: np.ndarray | None = None, answer: Sequence[int] = ()) -> np.ndarray:
        """Return logits after everything but the temperature; what has no chance is minus infinity."""
        scores = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
        if mask is not None:
            scores[~unpacked(mask, len(scores))] = -np.inf
        if len(answer) < self.min_tokens:
            before = scores.copy()
            scores[list(self.stop_ids)] = -np.inf
            if (scores == -np.inf).all():
                scores = before
        for token, bias in self.bias.items():
            scores[token] += np.float32(bias)
        counts = Counter(answer)
        for token in {*self.prompt, *answer}:
            x, repetition = scores[token], np.float32(self.repetition)
            x = x / repetition if x > 0 else x * repetition
            x -= np.float32(self.frequency) * np.float32(counts[token])
            scores[token] = x - np.float32(self.presence) if counts[token] else x
        return scores

    def choose(self, scores: np.ndarray, u: float) -> int:
        """Return the token that a number from [0, 1) picks."""
        if self.temperature == 0:
            return int(scores.argmax())
        masses = np.where(self.kept(scores), masses_of(scores, self.temperature), 0)
        sums = np.cumsum(masses)
        return int(np.searchsorted(sums, u * sums[-1], side="right"))

    def may_choose(self, scores: np.ndarray, u: float, token: int) -> bool:
        """Whether a sampler with rounded sums may pick a token: cuts and sums are moved by what roundings do."""
        masses = masses_of(scores, self.temperature)
        for slack in (-SLACK, 0.0, SLACK):
            kept = self.kept(scores, slack)
            if kept[token]:
                sums = np.cumsum(np.where(kept, masses, 0)) / masses[kept].sum()
                if sums[token] - masses[token] / masses[kept].sum() - SLACK <= u <= sums[token] + SLACK:
                    return True
        return False

    def kept(self, scores: np.ndarray, slack: float = 0.0) -> np.ndarray:
        """Return which tokens can be drawn (V,)."""
        order = np.argsort(-scores, kind="stable")
        order = order[: self.top_k or None]
        masses = masses_of(scores, self.temperature)[order]
        stays = masses >= np.float32(self.min_p) * (1 - slack)
        masses, order = masses[stays], order[stays]
        if self.top_p < 1:
            before = np.cumsum(masses) - masses
            stays = before < (self.top_p + slack) * masses.sum()
            stays[0] = True
            order = order[stays]
        kept = np.zeros(len(scores), bool)
        kept[order] = True
        return kept


def masses_of(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return 2**y, y = (score - max) log2(e) / T rounded to float32 at each step; 0 where y < -125.5 (V,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        y = (scores - scores.max()) * np.float32(LOG2_E / temperature)
    return np.where(y >= np.float32(-125.5), np.exp2(y.astype(np.float64)), 0)


def packed(allowed: np.ndarray) -> np.ndarray:
    """Return a mask, int32, of booleans; bits behind the last are ones, which must not matter."""
    bits = np.ones(-(-len(allowed) // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpacked(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the booleans of a mask."""
    return np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")[:size].astype(bool)


def largest(logits: np.ndarray, count: int) -> list[int]:
    """Return the ids of the largest logits, largest first, ties by id, without minus infinity and NaN."""
    scores = np.where(np.isnan(logits), -np.inf, logits)
    order = np.argsort(-scores, kind="stable")[:count]
    return [int(i) for i in order if scores[i] > -np.inf]


def log_probs(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """Return log-probabilities (V,) float64 and how far rounded ones may be from them.

    A term's exponent has three roundings, of its difference, its scale and their product: 3 U of the difference, on the
    average over the distribution. A mass adds 2 U, and the sum 18 U unless each of its lanes has one term.
    """
    x = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    down = x.max() - x
    terms = np.exp(-down)
    mean_down = float((terms * np.where(np.isfinite(down), down, 0)).sum() / terms.sum())
    return x - x.max() - np.log(terms.sum()), (3 * mean_down + (2 if len(x) <= 4 else 20)) * U
