"""What a draft model saves: the same texts continued without its guesses and with them, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from eightfold.engine.engine import Engine
from eightfold.engine.sampling_params import SamplingParams


@dataclass
class Gain:
    """Of texts of one kind.

    Attributes:
        plain: tokens a second without guesses, from each sequence's first token on; one entry a repetition.
        guessing: the same with guesses.
        drafted: tokens that the draft model guessed.
        accepted: of those, the right ones.
        tokens: that all steps with guesses gave.
        passes: how many of these steps there were, counted for each sequence.
        identical: whether all answers were the same.
    """

    plain: list[float] = field(default_factory=list)
    guessing: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    passes: int = 0
    identical: bool = True

    def summary(self) -> dict[str, Any]:
        """Return medians and counts for JSON."""
        return {
            "plain_tok_s": median(self.plain),
            "draft_tok_s": median(self.guessing),
            "draft_ratio": median(b / a for a, b in zip(self.plain, self.guessing, strict=True)),
            "model_drafted": self.drafted,
            "model_accepted": self.accepted,
            "tokens_per_pass": self.tokens / max(self.passes, 1),
            "identical": self.identical,
        }


def measure_gain(
    engine: Engine,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    new_tokens: int,
    repeat: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Gain]:
    """Continue prompts of several kinds greedily, as many at a time as the engine takes.

    Args:
        engine: with a draft model, and without a cache of prefixes.
        prompts: the tokens of each prompt, by their kind.
        new_tokens: of each answer; nothing ends it earlier.
        repeat: how often all is done.
        advance: is called after each repetition of a kind.
    """
    found = {kind: Gain() for kind in prompts}
    guesser = engine.scheduler.guesser
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    try:
        for _ in range(repeat):
            for kind, gain in found.items():
                engine.scheduler.guesser = None
                plain, expected = _answers(engine, prompts[kind], params)
                engine.scheduler.guesser, before = guesser, engine.stats
                guessing, answers = _answers(engine, prompts[kind], params)
                after = engine.stats
                gain.plain.append(plain)
                gain.guessing.append(guessing)
                gain.drafted += after.model_drafted - before.model_drafted
                gain.accepted += after.model_accepted - before.model_accepted
                gain.tokens += after.generated_tokens - before.generated_tokens
                gain.passes += after.passes - before.passes
                gain.identical &= answers == expected
                advance()
    finally:
        engine.scheduler.guesser = guesser
    return found


def _answers(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[float, dict[str, list[int]]]:
    """Return tokens a second behind the first ones, and the answers."""
    tokens, seconds, size = 0, 0.0, engine.config.max_num_seqs
    answers = {}
    for begin in range(0, len(prompts), size):
        for at, prompt in enumerate(prompts[begin : begin + size], begin):
            engine.add_request(str(at), prompt, params, streams=False)
            tokens += params.max_tokens - 1 if params.max_tokens else 0
        while engine.stats.waiting or any(sequence.remaining > 1 for sequence in engine.scheduler.running):
            engine.step()
        started = time.perf_counter()
        while engine.has_unfinished:
            for output in engine.step():
                if output.finished:
                    answers[output.request_id] = output.outputs[0].token_ids
        seconds += time.perf_counter() - started
    return tokens / seconds, answers
