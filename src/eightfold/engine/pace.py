"""How much of a prompt a step takes while other sequences wait for their next token.

A step with prompts takes longer, and everybody's next token comes with its end. So what prompts add to a step is kept
to a fifth of a second, or to two steps without prompts where those are slow: prompts then have two thirds of the
machine. What a prompt's token takes is learned from the steps. Nobody's answer depends on any of this.
"""

from __future__ import annotations

DELAY_SECONDS = 0.2
DELAY_STEPS = 2.0

# Fewer tokens than these cost almost as much time as these do.
LEAST_TOKENS = 32

_WEIGHT = 0.25  # of the newest step in an average


class Pace:
    """Averages of what steps take.

    Attributes:
        step_seconds: of steps without prompts; 0 as long as there was none.
        token_seconds: that one token of a prompt adds to a step; 0 as long as it is not known.
    """

    def __init__(self) -> None:
        self.step_seconds = self.token_seconds = 0.0

    def note(self, going_on: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            going_on: sequences that got their next token.
            prompt_tokens: of prompts.
            seconds: that it took.
        """
        if not prompt_tokens:
            self.step_seconds = _average(self.step_seconds, seconds)
        elif prompt_tokens >= LEAST_TOKENS:
            own = max(seconds - (self.step_seconds if going_on else 0.0), seconds / 10)
            self.token_seconds = _average(self.token_seconds, own / prompt_tokens)

    def prompt_tokens(self) -> int | None:
        """Return how many tokens of prompts a step may take in which sequences go on; None: as many as it can."""
        if not self.token_seconds:
            return None
        delay = max(DELAY_SECONDS, DELAY_STEPS * self.step_seconds)
        return max(LEAST_TOKENS, int(delay / self.token_seconds))


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new
