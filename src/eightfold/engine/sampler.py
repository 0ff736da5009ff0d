"""The choice of the next token from its logits; csrc/sample.cc computes it.

In this order, as vLLM: tokens that the answer's form forbids get no chance, nor do stop tokens while the answer is
shorter than `min_tokens`; logit bias is added; repetition, frequency and presence penalties follow. Then the likeliest
token is taken, or logits are divided by the temperature and one token is drawn: of the tokens in falling order of
logits, ties by rising id, top_k keeps the first ones, min_p some of these, top_p some of these. One number from [0, 1)
picks among them by their probabilities, summed in order of ids. (vLLM's top_k keeps all that equal the last one.)

Log-probabilities are the model's own: of the logits before all of this, as vLLM's `raw_logprobs`; there, however, an
answer's form counts first.

Letters: R rows, V vocabulary, M masks, W words of a mask, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.structured import Grammar, fill_masks, mask_words
from eightfold.errors import InputError
from eightfold.model import native as core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.model.native._core import SamplePool


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability, perhaps minus infinity; None where none were asked for.
        top: the likeliest tokens and their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """What decides on the tokens of one answer, one after the other; see choose_all.

    Its randomness is a stream of its own, begun by the seed and the answer's index, of which each choice that is drawn
    takes one number: so an answer depends neither on others nor on how steps are cut.

    Args:
        params: the request's parameters.
        prompt_ids: tokens before the answer.
        vocab_size: V.
        stop_ids: tokens that end the answer, besides `params.stop_token_ids`.
        index: the answer's place among the request's n.
        grammar: the answer's form, None for free text.

    Raises:
        InputError: a token id in the parameters is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
        index: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        _require_inside(params, vocab_size)
        self.params, self.grammar = params, grammar
        stops = sorted(token for token in stop_ids | set(params.stop_token_ids) if token < vocab_size)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        changes = bool(params.logit_bias) or penalties != (1.0, 0.0, 0.0)
        self._always_needs_logits = (
            changes or not params.is_greedy or params.logprobs is not None or grammar is not None
        )
        self._waits = params.min_tokens if stops else 0  # tokens until a stop token may come
        self._index = index
        self._chooser = core.extension.Chooser(
            vocab=vocab_size,
            temperature=0.0 if params.is_greedy else params.temperature,
            top_k=min(max(params.top_k, 0), vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            stop_ids=stops,
            min_tokens=params.min_tokens,
            bias_ids=list(params.logit_bias),
            biases=list(params.logit_bias.values()),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            prompt=list(prompt_ids) if params.repetition_penalty != 1.0 else [],
        )

    @property
    def needs_logits(self) -> bool:
        """Whether the next choice needs logits, and not only the likeliest token. May change with each token."""
        return self._always_needs_logits or self._waits > 0

    @property
    def is_finished(self) -> bool:
        """Whether the answer has a form to keep to, which lets nothing but a stop token follow."""
        return self.grammar is not None and self.grammar.is_finished

    @property
    def failure(self) -> str | None:
        """Why the answer cannot go on in its form; the token that was chosen last is then none of it."""
        return None if self.grammar is None else self.grammar.failure

    @cached_property
    def _random(self) -> np.random.Philox:
        import secrets

        seed = self.params.seed
        return np.random.Philox(key=secrets.randbits(128) if seed is None else seed % 2**64 + (self._index << 64))

    def _uniform(self) -> float:
        """Return the next number of the stream, from [0, 1): 53 bits."""
        return 0.0 if self.params.is_greedy else (int(self._random.random_raw()) >> 11) * 2.0**-53

    def _accept(self, token: int) -> None:
        self._waits -= 1
        self._chooser.accept(token)
        if self.grammar is not None:
            self.grammar.accept(token)


def choose_all(
    samplers: Sequence[Sampler],
    logits: NDArray[np.float32],
    best: Sequence[int],
    rows: Sequence[int] | None = None,
    threads: int | None = None,
) -> list[Sampled]:
    """Choose the next tokens of several answers; they are part of these from now on.

    Args:
        samplers: R, each once.
        logits: rows (V,) float32; not changed.
        best: (R,) the likeliest tokens.
        rows: which row each sampler reads that needs logits; None where sampler i has row i.
        threads: how many threads share the rows; None for EIGHTFOLD_THREADS, or one for each CPU.
    """
    sampled = [Sampled(int(token)) for token in best]
    needing = [i for i, sampler in enumerate(samplers) if sampler.needs_logits]
    if needing:
        which = np.array(needing if rows is None else rows, np.int32)
        choices = _choose([samplers[i] for i in needing], logits, which, _pool(threads))
        for i, choice in zip(needing, choices, strict=True):
            sampled[i] = choice
    for sampler, choice in zip(samplers, sampled, strict=True):
        sampler._accept(choice.token_id)
    return sampled


def prompt_logprobs(
    logits: NDArray[np.float32], token_ids: Sequence[int], top: int, threads: int | None = None
) -> list[Sampled]:
    """Return the log-probabilities of tokens that are there already.

    Args:
        logits: (T, V) float32; row t is what the model says before token t.
        token_ids: T tokens.
        top: how many of the likeliest to report.
        threads: see choose_all.
    """
    tokens = np.array(token_ids, np.int32)
    return _with_logprobs(logits, np.arange(len(tokens), dtype=np.int32), tokens, [top] * len(tokens), _pool(threads))


def _choose(
    samplers: Sequence[Sampler], logits: NDArray[np.float32], rows: NDArray[np.int32], pool: SamplePool
) -> list[Sampled]:
    tokens = np.empty(len(samplers), np.int32)
    masks, masked = _masks(samplers, logits.shape[1])
    pool.choose(
        choosers=[sampler._chooser for sampler in samplers],
        logits=logits,
        rows=rows,
        masks=masks,
        masked=masked,
        uniforms=np.array([sampler._uniform() for sampler in samplers]),
        tokens=tokens,
    )
    sampled = [Sampled(token) for token in tokens.tolist()]
    reporting = [i for i, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if reporting:
        counts = [samplers[i].params.logprobs or 0 for i in reporting]
        reports = _with_logprobs(logits, rows[reporting], tokens[reporting], counts, pool)
        for i, report in zip(reporting, reports, strict=True):
            sampled[i] = report
    return sampled


def _masks(samplers: Sequence[Sampler], vocab_size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return masks (M, W) of the answers that have a form, and which is whose (R,), -1 for none."""
    grammars = [sampler.grammar for sampler in samplers]
    forms = [grammar for grammar in grammars if grammar is not None]
    which = np.full(len(samplers), -1, np.int32)
    if not forms:
        return np.empty((0, mask_words(vocab_size)), np.int32), which
    which[[grammar is not None for grammar in grammars]] = range(len(forms))
    return fill_masks(forms, vocab_size), which


def _with_logprobs(
    logits: NDArray[np.float32],
    rows: NDArray[np.int32],
    tokens: NDArray[np.int32],
    counts: Sequence[int],
    pool: SamplePool,
) -> list[Sampled]:
    """Return tokens, chosen from `rows` of the logits, with their log-probabilities and `counts` of the likeliest."""
    width = max(counts, default=0)
    chosen = np.empty(len(tokens))
    top_ids, top = np.empty((len(tokens), width), np.int32), np.empty((len(tokens), width))
    pool.logprobs(logits=logits, rows=rows, tokens=tokens, chosen=chosen, top_ids=top_ids, top=top)
    found = zip(tokens.tolist(), chosen.tolist(), top_ids.tolist(), top.tolist(), counts, strict=True)
    return [
        Sampled(
            token, logprob, tuple((i, value) for i, value in zip(ids[:count], values[:count], strict=True) if i >= 0)
        )
        for token, logprob, ids, values, count in found
    ]


@lru_cache
def _pool(threads: int | None) -> SamplePool:
    """Return the threads that share rows: they sleep between steps."""
    return core.extension.SamplePool(core.choose_threads(threads))


def _require_inside(params: SamplingParams, vocab_size: int) -> None:
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        outside = [token for token in ids if token >= vocab_size]
        if outside:
            raise InputError(f"{name} token id", got=outside[0], expected=f"0 to {vocab_size - 1}")
