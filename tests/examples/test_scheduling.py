"""Who is admitted when, which steps are shared, and what they are counted as."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from examples.server import generate
from examples.server.engine import NativeBatcher, pages_for, steps
from examples.server.generate import AdmissionError, Limits, Request, Timing, generate_requests
from examples.server.loaded import LoadedDecoder, ReferenceBatcher

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE
from tests.engine.models import Small, make


def limits(**changes: Any) -> Limits:
    usual: dict[str, Any] = {
        "max_batch_size": 2,
        "max_prefill_batch_size": 2,
        "max_prefill_tokens": 100,
        "max_new_tokens": 8,
        "num_blocks": 10,
        "block_size": 16,
        "stop_ids": frozenset({-1}),
    }
    return Limits(**{**usual, **changes})


class Fake:
    """Says as many tokens as the first token of the prompt is large; a prefill lasts 100 each, a decode step 1 each."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls, self.held = 0.0, [], set()
        monkeypatch.setattr(generate.time, "perf_counter", lambda: self.now)  # type: ignore[attr-defined]

    def prefill(self, requests: Sequence[Request]) -> list[int]:
        self.calls.append(("prefill", [request.req_id for request in requests]))
        self.now += 100.0 * len(requests)
        self.held |= {request.req_id for request in requests}
        return [self._next(request) for request in requests]

    def decode(self, requests: Sequence[Request]) -> list[int]:
        self.calls.append(("decode", [request.req_id for request in requests]))
        self.now += 1.0 * len(requests)
        return [self._next(request) for request in requests]

    def release(self, request: Request) -> None:
        self.held.remove(request.req_id)

    def _next(self, request: Request) -> int:
        assert request.req_id in self.held
        count = len(request.out_tokens)
        return -1 if count + 1 == request.input_ids[0] else count


@pytest.fixture
def fake(monkeypatch) -> Fake:
    return Fake(monkeypatch)


def run(fake: Fake, *counts: int, length: int = 1, **changes: object) -> tuple[list[Request], Timing]:
    requests = [Request(i, [count] + [0] * (length - 1)) for i, count in enumerate(counts)]
    timing = generate_requests(requests, fake, limits(**changes))
    assert [request.out_tokens for request in requests] == [[*range(count - 1), -1] for count in counts]
    assert not fake.held
    return requests, timing


def test_a_batch_is_prefilled_together_and_decoded_together(fake):
    _, timing = run(fake, 4, 4)
    assert timing == Timing([200.0], [2.0, 2.0, 2.0])
    assert fake.calls == [("prefill", [0, 1]), *[("decode", [0, 1])] * 3]


def test_the_next_request_comes_in_when_one_has_left(fake):
    _, timing = run(fake, 2, 4, 3)
    # 0 and 1 decode; 0 is finished; 2 is prefilled and, in the same turn, decoded with 1.
    assert timing == Timing([200.0, 100.0], [2.0, 2.0, 2.0])
    assert fake.calls[2:4] == [("prefill", [2]), ("decode", [1, 2])]


def test_a_request_that_its_prefill_finishes_leaves_no_decode_step_in_that_turn(fake):
    _, timing = run(fake, 1, 3, 3)
    # 0 ends with the first prefill. Next turn: 2 joins 1, and both decode.
    assert timing == Timing([200.0, 100.0], [2.0, 2.0])


def test_answers_of_one_token_need_no_decode_steps(fake):
    _, timing = run(fake, 1, 1, 1)
    assert timing == Timing([200.0, 100.0], [])


def test_an_answer_ends_at_its_length_too(fake):
    requests = [Request(0, [99])]
    generate_requests(requests, fake, limits(max_new_tokens=3))
    assert requests[0].out_tokens == [0, 1, 2]
    assert not fake.held


@pytest.mark.parametrize("changes", [{"max_prefill_batch_size": 1}, {"max_prefill_tokens": 5}])
def test_prefills_are_as_small_as_asked_for(fake, changes):
    _, timing = run(fake, 3, 3, length=5, **changes)
    assert timing == Timing([100.0, 100.0], [1.0, 2.0, 1.0])


def test_more_requests_than_the_batch_holds_are_all_answered(fake):
    requests, timing = run(fake, *[2] * 7)
    assert len(timing.prefill) == 4
    assert sum(len(request.out_tokens) for request in requests) == 14


def test_a_request_longer_than_a_prefill_is_refused(fake):
    with pytest.raises(AdmissionError) as caught:
        run(fake, 2, 2, length=101)
    assert str(caught.value) == "req 0's  input length is 101, which is longer than max_prefill_tokens 100"


def test_a_request_larger_than_the_free_cache_is_refused(fake):
    # ceil((60 + 8) / 16) = 5 blocks each; the first leaves 9 - 5.
    with pytest.raises(AdmissionError) as caught:
        run(fake, 2, 2, length=60, num_blocks=9, max_prefill_tokens=200)
    assert str(caught.value) == "req: 1 out of memory, need block: 5 is more than free block 4"


def test_a_refusal_while_others_run_gives_their_cache_back(fake):
    requests = [Request(0, [8] + [0] * 59), Request(1, [8]), Request(2, [8] * 101)]
    with pytest.raises(AdmissionError):
        generate_requests(requests, fake, limits(max_batch_size=3, max_prefill_batch_size=1))
    assert not fake.held


def test_blocks_of_those_who_left_are_free_again(fake):
    _, timing = run(fake, 2, 2, 2, length=60, max_batch_size=1, num_blocks=5)
    assert len(timing.prefill) == 3


# --- what computes


def test_prompts_are_cut_into_steps():
    requests = [Request(i, [0] * length) for i, length in enumerate((3, 10, 1, 4))]
    cut = [[(r.req_id, begin, end) for r, begin, end in step] for step in steps(requests, 4, whole=False)]
    assert cut == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(1, 5, 9)], [(1, 9, 10), (2, 0, 1), (3, 0, 2)], [(3, 2, 4)]]
    whole = [[r.req_id for r, _, _ in step] for step in steps(requests, 4, whole=True)]
    assert whole == [[0], [1], [2], [3]]
    assert [[r.req_id for r, _, _ in step] for step in steps(requests, 5, whole=True)] == [[0], [1], [2, 3]]


@pytest.mark.parametrize(("block_size", "pages"), [(128, 6), (256, 12), (64, 3 + 2), (100, 5 + 2), (1, 1 + 2)])
def test_blocks_of_any_size_are_pages(block_size, pages):
    assert pages_for(6, block_size, sequences=2) == pages


@pytest.fixture(scope="module", params=["w8a8", "c8"])
def small(request, tmp_path_factory) -> Small:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_answers_do_not_depend_on_company(small, kind):
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (5, 700, 130, 1, 128, 40)]
    if kind == "reference":
        prompts = prompts[2:]
    checkpoint, pages = Checkpoint.open(small.directory), 3 * 6
    if kind == "native":
        model = load_model(checkpoint, threads=1, dynamic="symmetric", attention="mindie")
        model.allocate_cache(pages * PAGE)
        batcher = NativeBatcher(model, pages)
    else:
        batcher = ReferenceBatcher(LoadedDecoder.of(checkpoint))  # type: ignore[assignment]
    settings = limits(
        max_batch_size=3, max_prefill_batch_size=3, max_prefill_tokens=800, num_blocks=pages, block_size=128
    )
    together, alone = ([Request(i, prompt) for i, prompt in enumerate(prompts)] for _ in range(2))
    generate_requests(together, batcher, settings)
    for request in alone:
        generate_requests([request], batcher, settings)
    assert [r.out_tokens for r in together] == [r.out_tokens for r in alone]
    assert {len(r.out_tokens) for r in together} == {8}
