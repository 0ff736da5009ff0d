"""A model that answers one request after the other, and says how long each token took: native where it was built.

Numbers are those of MindIE on an NPU: dynamic activations are quantized symmetrically, and the tokens of a prompt
attend in float.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from eightfold.errors import CapacityError
from eightfold.format.checkpoint import Checkpoint
from eightfold.native import core


@dataclass(frozen=True)
class Step:
    """One token of an answer."""

    token: int
    seconds: float  # since the token before it, or since the request began


class _Finished(Exception):
    """The answer is complete: a stop token came."""


class Engine:
    """A loaded model.

    Attributes:
        context: how many positions it has, for a prompt and its answer together.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.context = checkpoint.config.max_position_embeddings
        self._generate = _native(checkpoint) if core.is_built() else _reference(checkpoint)

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
            self._generate(prompt_ids, max_new_tokens, on_token=on_token)
        return steps


def _native(checkpoint: Checkpoint) -> Callable[..., Any]:
    from eightfold.native.generate import generate
    from eightfold.native.load import load_model

    return partial(generate, load_model(checkpoint, dynamic="symmetric", attention="mindie"))


def _reference(checkpoint: Checkpoint) -> Callable[..., Any]:
    from eightfold.cli import console

    console.require_torch("run_pa without the compiled extension")
    from examples.server.loaded import LoadedDecoder

    from eightfold.reference.generate import generate

    return partial(generate, LoadedDecoder.of(checkpoint))
