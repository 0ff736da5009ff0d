"""Who is admitted when, which steps are shared, and what they are counted as."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from examples.server.engine import Step
from examples.server.generate import AdmissionError, Limits, Request, Timing, generate_requests


def limits(**changes: int) -> Limits:
    usual = {
        "max_batch_size": 2,
        "max_prefill_batch_size": 2,
        "max_prefill_tokens": 100,
        "max_new_tokens": 8,
        "num_blocks": 10,
        "block_size": 16,
    }
    return Limits(**{**usual, **changes})


def answer(prompt: Sequence[int]) -> list[Step]:
    """Say as many tokens as the first token of the prompt is large; a prefill lasts 100, a decode step 1."""
    return [Step(token, 1.0 if token else 100.0) for token in range(prompt[0])]


def run(*counts: int, length: int = 1, **changes: int) -> tuple[list[Request], Timing]:
    requests = [Request(i, [count] + [0] * (length - 1)) for i, count in enumerate(counts)]
    timing = generate_requests(requests, answer, limits(**changes))
    assert [request.out_tokens for request in requests] == [list(range(count)) for count in counts]
    return requests, timing


def test_a_batch_is_prefilled_together_and_decoded_together():
    _, timing = run(4, 4)
    assert timing == Timing([200.0], [2.0, 2.0, 2.0])


def test_the_next_request_comes_in_when_one_has_left():
    _, timing = run(2, 4, 3)
    # 0 and 1 decode; 0 is finished; 2 is prefilled and, in the same turn, decoded with 1.
    assert timing == Timing([200.0, 100.0], [2.0, 2.0, 2.0])


def test_a_request_that_its_prefill_finishes_leaves_no_decode_step_in_that_turn():
    _, timing = run(1, 3, 3)
    # 0 ends with the first prefill. Next turn: 2 joins 1, and both decode.
    assert timing == Timing([200.0, 100.0], [2.0, 2.0])


def test_answers_of_one_token_need_no_decode_steps():
    _, timing = run(1, 1, 1)
    assert timing == Timing([200.0, 100.0], [])


@pytest.mark.parametrize("changes", [{"max_prefill_batch_size": 1}, {"max_prefill_tokens": 5}])
def test_prefills_are_as_small_as_asked_for(changes):
    _, timing = run(3, 3, length=5, **changes)
    assert timing == Timing([100.0, 100.0], [1.0, 2.0, 1.0])


def test_more_requests_than_the_batch_holds_are_all_answered():
    requests, timing = run(*[2] * 7)
    assert len(timing.prefill) == 4
    assert sum(len(request.out_tokens) for request in requests) == 14


def test_a_request_longer_than_a_prefill_is_refused():
    with pytest.raises(AdmissionError) as caught:
        run(2, 2, length=101)
    assert str(caught.value) == "req 0's  input length is 101, which is longer than max_prefill_tokens 100"


def test_a_request_larger_than_the_free_cache_is_refused():
    # ceil((60 + 8) / 16) = 5 blocks each; the first leaves 9 - 5.
    with pytest.raises(AdmissionError) as caught:
        run(2, 2, length=60, num_blocks=9, max_prefill_tokens=200)
    assert str(caught.value) == "req: 1 out of memory, need block: 5 is more than free block 4"


def test_blocks_of_those_who_left_are_free_again():
    _, timing = run(2, 2, 2, length=60, max_batch_size=1, num_blocks=5)
    assert len(timing.prefill) == 3
