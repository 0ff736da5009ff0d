"""Greedy generation of one sequence on the native model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError, InputError
from eightfold.native.model import PAGE, Chunk, NativeModel

# Tokens of a prompt that run at once: enough for the matrix products, little enough for memory.
PREFILL_TOKENS = 512


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


def generate(
    model: NativeModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] = lambda token: None,
) -> Generation:
    """Continue a prompt with the most likely token until a stop token or the limit.

    Raises:
        CapacityError: the prompt is empty, or prompt and answer do not fit the model's context or the memory.
        InputError: an id is outside the vocabulary.
    """
    require_ids(model.config, prompt_ids)
    model.allocate_cache(require_room(model.config, len(prompt_ids), max_new_tokens))
    pages = range(model.pages)
    at, produced = 0, list[int]()
    step_ids = list(prompt_ids)
    while len(produced) < max_new_tokens:
        while step_ids:
            cut = len(step_ids) if model.float_prompts else PREFILL_TOKENS
            piece, step_ids = step_ids[:cut], step_ids[cut:]
            used = pages[: -(-(at + len(piece)) // PAGE)]
            _, best = model.forward([Chunk(piece, at, used, len(prompt_ids), wants=not step_ids)])
            at += len(piece)
        token = int(best[0])
        if token in stop_ids:
            return Generation(produced, "stop")
        produced.append(token)
        on_token(token)
        step_ids = [token]
    return Generation(produced, "length")
