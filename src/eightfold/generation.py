"""What generating means on any backend: what comes out, and what can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError, InputError


@dataclass(frozen=True)
class Generation:
    """What was generated."""

    token_ids: list[int]  # without the stop token
    finish_reason: Literal["stop", "length"]


def require_room(config: ModelConfig, prompt_len: int, max_new_tokens: int) -> int:
    """Return how many positions a prompt and its answer take.

    Raises:
        CapacityError: the prompt is empty, or both do not fit the model's context.
    """
    needed = prompt_len + max_new_tokens
    if not prompt_len:
        raise CapacityError("prompt", got="no tokens", expected="at least one", action="Give some text with --prompt.")
    if needed > config.max_position_embeddings:
        raise CapacityError(
            "prompt",
            got=f"{prompt_len} tokens and {max_new_tokens} new ones",
            expected=f"1 to {config.max_position_embeddings} together",
            action="Shorten the prompt or lower --max-new-tokens.",
        )
    return needed


def require_ids(config: ModelConfig, token_ids: Sequence[int]) -> None:
    """Check token ids against the vocabulary.

    Raises:
        InputError: one is outside.
    """
    outside = [token for token in token_ids if not 0 <= token < config.vocab_size]
    if outside:
        raise InputError("token id", got=outside[0], expected=f"0 to {config.vocab_size - 1}")
