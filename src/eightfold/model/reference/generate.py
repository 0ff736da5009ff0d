"""Greedy generation, one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from eightfold.model.reference.decoder import Batch, Origin
from eightfold.model.reference.kvcache import KVCache
from eightfold.model.reference.load import Decoder


class Generation(NamedTuple):
    """An answer."""

    token_ids: list[int]  # without the stop token
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] = lambda token: None,
) -> Generation:
    """Continue a prompt with the most likely token until a stop token or the limit.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    config = decoder.checkpoint.config
    needed = len(prompt_ids) + max_new_tokens
    blocks = [decoder.block(layer_idx) for layer_idx in range(config.num_layers)]
    caches = [KVCache(needed, config.num_kv_heads, config.head_dim, block.attention.cache_dtype) for block in blocks]
    head, inv_freq = decoder.head(), decoder.inv_freq
    step_ids, produced = list(prompt_ids), list[int]()
    while len(produced) < max_new_tokens:
        origin: Origin = "generated" if produced else "prompt"
        prompt_lens = [0 if produced else len(step_ids)]
        batch = Batch.of([len(step_ids)], inv_freq, caches[0].context_len, prompt_lens)
        x_TE = decoder.embed(step_ids)
        for block, cache in zip(blocks, caches, strict=True):
            x_TE = block(x_TE, batch, [cache])
        token = int(head(x_TE[-1:], origin).argmax())
        if token in stop_ids:
            return Generation(produced, "stop")
        produced.append(token)
        on_token(token)
        step_ids = [token]
    return Generation(produced, "length")
