"""A model on the reference backend that answers one request after the other, and says how long each token took.

Numbers are those of MindIE on an NPU: dynamic activations are quantized symmetrically, and the tokens of a prompt
attend in float.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from eightfold.errors import CapacityError
from eightfold.format.checkpoint import Checkpoint
from eightfold.reference.decoder import Block, GroupCall, Norm
from eightfold.reference.generate import generate
from eightfold.reference.kvcache import Attention
from eightfold.reference.load import Decoder, Head


@dataclass(frozen=True)
class Step:
    """One token of an answer."""

    token: int
    seconds: float  # since the token before it, or since the request began


class _Finished(Exception):
    """The answer is complete: a stop token came."""


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


class Engine:
    """A loaded model.

    Attributes:
        context: how many positions it has, for a prompt and its answer together.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.context = checkpoint.config.max_position_embeddings
        self._decoder = LoadedDecoder(checkpoint, dynamic="symmetric", attention="mindie")
        for layer_idx in range(checkpoint.config.num_layers):
            self._decoder.block(layer_idx)
        self._decoder.head()

    def require_room(self, prompt_len: int, max_new_tokens: int, request: str) -> None:
        """Check that a prompt and its answer fit.

        Raises:
            CapacityError: the prompt is empty, or both together are longer than the context.
        """
        if not prompt_len:
            raise CapacityError(request, got="no tokens", expected="at least one")
        if prompt_len + max_new_tokens > self.context:
            raise CapacityError(
                request,
                got=f"{prompt_len} tokens and {max_new_tokens} new ones",
                expected=f"at most {self.context} together",
                action="Shorten it, or lower --max_output_length.",
            )

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[Step]:
        """Return the most likely continuation; a stop token is its last one."""
        steps: list[Step] = []
        last = time.perf_counter()

        def on_token(token: int) -> None:
            nonlocal last
            now = time.perf_counter()
            steps.append(Step(token, now - last))
            last = now
            if token in stop_ids:
                raise _Finished

        with suppress(_Finished):
            generate(self._decoder, prompt_ids, max_new_tokens, on_token=on_token)
        return steps
