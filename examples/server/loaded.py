"""The reference backend for many requests: each layer is built once, and each request computed by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from examples.server.generate import Request

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch, Block, GroupCall, Norm
from eightfold.model.reference.kvcache import Attention, KVCache
from eightfold.model.reference.load import Decoder, Head


@dataclass(frozen=True)
class LoadedDecoder(Decoder):
    """A decoder that builds each layer once."""

    _blocks: dict[int, Block] = field(default_factory=dict, compare=False)
    _heads: list[Head] = field(default_factory=list, compare=False)

    def block(
        self,
        layer_idx: int,
        groups: Sequence[GroupCall] | None = None,
        attention: Attention | None = None,
        norms: Mapping[str, Norm] | None = None,
    ) -> Block:
        """Return a layer as the checkpoint stores it, or build one with other parts."""
        if groups or attention or norms:
            return super().block(layer_idx, groups, attention, norms)
        if layer_idx not in self._blocks:
            self._blocks[layer_idx] = super().block(layer_idx)
        return self._blocks[layer_idx]

    def head(self) -> Head:
        """Return the final norm and the output head."""
        if not self._heads:
            self._heads.append(super().head())
        return self._heads[0]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LoadedDecoder:
        """Load a whole model, to compute as MindIE on an NPU."""
        decoder = cls(checkpoint, dynamic="symmetric", attention="mindie")
        for layer_idx in range(checkpoint.config.num_layers):
            decoder.block(layer_idx)
        decoder.head()
        return decoder


class ReferenceBatcher:
    """Requests one after the other, a step of each at a time."""

    def __init__(self, decoder: LoadedDecoder) -> None:
        self._decoder = decoder
        self._caches: dict[int, list[KVCache]] = {}  # of each running request, by layer

    def prefill(self, requests: Sequence[Request]) -> list[int]:
        """Run prompts; return the first token of each answer."""
        return [self._run(request, request.input_ids, len(request.input_ids)) for request in requests]

    def decode(self, requests: Sequence[Request]) -> list[int]:
        """Run the last token of each request; return the next ones."""
        return [self._run(request, request.out_tokens[-1:], 0) for request in requests]

    def release(self, request: Request) -> None:
        """Forget a request's keys and values."""
        self._caches.pop(request.req_id, None)

    @torch.inference_mode()
    def _run(self, request: Request, token_ids: list[int], prompt_len: int) -> int:
        decoder = self._decoder
        caches = self._caches.setdefault(request.req_id, []) or self._open(request)
        batch = Batch.of([len(token_ids)], decoder.inv_freq, caches[0].context_len, [prompt_len])
        x_TE = decoder.embed(token_ids)
        for layer_idx, cache in enumerate(caches):
            x_TE = decoder.block(layer_idx)(x_TE, batch, [cache])
        return int(decoder.head()(x_TE[-1:], "prompt" if prompt_len else "generated").argmax())

    def _open(self, request: Request) -> list[KVCache]:
        """Make a request's caches, for as many positions as there can be: what is not written takes no memory."""
        config = self._decoder.checkpoint.config
        sizes = (config.max_position_embeddings, config.num_kv_heads, config.head_dim)
        blocks = [self._decoder.block(layer_idx) for layer_idx in range(config.num_layers)]
        self._caches[request.req_id] = [KVCache(*sizes, block.attention.cache_dtype) for block in blocks]
        return self._caches[request.req_id]
