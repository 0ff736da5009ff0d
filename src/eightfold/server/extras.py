"""What requests may ask to have beside answers: usage, token ids, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from eightfold.engine.outputs import RequestOutput


class Extras(NamedTuple):
    """What answers have beside themselves.

    Attributes:
        fingerprint: of what answers; None: they have none.
        usage: whether a stream ends with the usage.
        usage_so_far: whether every event of a stream has it.
        token_ids: whether answers have the ids of their tokens and of the prompt's, as vLLM has them.
        timings: whether answers, and every event of a stream, say how long it took, as llama.cpp has it.
    """

    fingerprint: str | None = None
    usage: bool = False
    usage_so_far: bool = False
    token_ids: bool = False
    timings: bool = False

    @property
    def are_in_events(self) -> bool:
        """Whether the events of a stream have more than the answer."""
        return self.usage_so_far or self.token_ids or self.timings


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    """Return OpenAI's counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def timings_of(outputs: Sequence[RequestOutput], generated: int) -> dict[str, float]:
    """Return llama.cpp's `timings` for the prompts of a request and what was generated so far.

    A prompt's tokens count whether they were computed or found in the cache. Times are in milliseconds.
    """
    now = time.monotonic()
    times = [output.times for output in outputs]
    began = min(each.arrival if each.scheduled is None else each.scheduled for each in times)
    first = min(now if each.first_token is None else each.first_token for each in times)
    ended = max(now if each.finished is None else each.finished for each in times)
    prompt = sum(len(output.prompt_ids) for output in outputs)
    return _part("prompt", prompt, first - began) | _part("predicted", generated, ended - first)


def _part(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(1000 * seconds, 3),
        f"{name}_per_token_ms": round(1000 * seconds / count, 3) if count else 0.0,
        f"{name}_per_second": round(count / seconds, 3) if seconds > 0 else 0.0,
    }
