"""Greedy generation of one sequence on the native model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eightfold.generation import Generation, require_ids, require_room
from eightfold.model.native.model import PAGE, Chunk, NativeModel

# Tokens of a prompt that run at once: enough for the matrix products, little enough for memory.
PREFILL_TOKENS = 512


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
            _, best = model.forward([Chunk(piece, at, used, len(prompt_ids), wants=not step_ids, logits=False)])
            at += len(piece)
        token = int(best[0])
        if token in stop_ids:
            return Generation(produced, "stop")
        produced.append(token)
        on_token(token)
        step_ids = [token]
    return Generation(produced, "length")
