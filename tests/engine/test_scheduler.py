"""Who gets which tokens of a step."""

from __future__ import annotations

import random

import pytest

from eightfold.engine.engine import Engine
from eightfold.engine.scheduler import LEAST_TOKENS, Pace
from eightfold.model.native.model import PAGE
from tests.engine.models import greedy, run, step, tokens


def steps_of(engine: Engine) -> list[dict[str, int]]:
    """Return a list that fills with the tokens of each request in each step."""
    found: list[dict[str, int]] = []
    schedule = engine.scheduler.schedule

    def noting():
        plan = schedule()
        found.append({sequence.request.request_id: sequence.scheduled for sequence in plan})
        return plan

    engine.scheduler.schedule = noting
    engine.scheduler.pace.note = lambda *_: None  # tokens are to be counted, not seconds
    return found


def add(engine: Engine, request_id: str, prompt_len: int, count: int = 50, **changes) -> None:
    prompt = tokens(random.Random(request_id), prompt_len)
    engine.add_request(request_id, prompt, greedy(count, **changes))


def test_next_tokens_come_first_and_a_long_prompt_takes_the_rest(small):
    engine = small("w8a8").engine(max_batched_tokens=64)
    steps = steps_of(engine)
    add(engine, "a", 10)
    add(engine, "b", 20)
    step(engine)
    add(engine, "long", 300)
    run(engine)
    assert steps[0] == {"a": 10, "b": 20}
    assert steps[1:6] == [{"a": 1, "b": 1, "long": 62}] * 4 + [{"a": 1, "b": 1, "long": 300 - 4 * 62}]
    assert steps[6] == {"a": 1, "b": 1, "long": 1}


def test_short_prompts_pass_a_long_one_but_leave_it_half(small):
    engine = small("w8a8").engine(max_batched_tokens=64, max_num_seqs=20)
    steps = steps_of(engine)
    add(engine, "long", 300)
    for at in range(8):
        add(engine, f"short {at}", 20)
    run(engine)
    # 64 tokens: half are the long one's, one short prompt fits into the other half, and what it leaves goes back.
    assert steps[0] == {"short 0": 20, "long": 44}
    assert steps[1] == {"short 0": 1, "short 1": 20, "long": 43}
    # The last piece of the long one is short itself.
    assert all(each["long"] >= 32 for each in steps[:6])
    assert sum(each["long"] for each in steps[:7]) >= 300


def test_a_second_long_prompt_waits_for_the_first(small):
    engine = small("w8a8").engine(max_batched_tokens=64)
    steps = steps_of(engine)
    add(engine, "first", 200)
    add(engine, "second", 200)
    run(engine)
    assert steps[:3] == [{"first": 64}] * 3
    # Eight are left, so both fit.
    assert steps[3] == {"first": 8, "second": 56}


def test_those_who_came_first_start_first(small):
    engine = small("w8a8").engine(max_num_seqs=2)
    steps = steps_of(engine)
    for at in range(5):
        add(engine, str(at), 10, count=3)
    run(engine)
    assert [list(each) for each in steps] == [["0", "1"]] * 3 + [["2", "3"]] * 3 + [["4"]] * 3


def test_one_that_needs_many_blocks_is_not_passed_by_those_that_need_few(small):
    model = small("w8a8")
    engine = model.engine(kv_memory=5 * model.page_bytes, max_batched_tokens=1000)
    steps = steps_of(engine)
    add(engine, "two", 2 * PAGE - 50, count=40)
    step(engine)
    add(engine, "four", 4 * PAGE - 50)
    add(engine, "one", PAGE - 50)
    run(engine)
    assert all(list(each) == ["two"] for each in steps[:40])
    assert steps[40] == {"four": 4 * PAGE - 50, "one": PAGE - 50}


def test_the_youngest_gives_its_blocks_and_comes_back_at_its_place(small):
    model = small("w8a8")
    engine = model.engine(kv_memory=3 * model.page_bytes, max_batched_tokens=512)
    steps = steps_of(engine)
    add(engine, "old", PAGE - 30, count=100)
    add(engine, "young", PAGE - 20, count=60)
    step(engine)
    add(engine, "later", 10, count=5)
    found = run(engine)
    # One block was free; the young one takes it after 20 tokens. Ten steps later the old one needs one too.
    assert engine.stats.preemptions == 1
    stopped = next(at for at, each in enumerate(steps) if "young" not in each)
    assert (stopped, steps[stopped]) == (31, {"old": 1})
    again = next(at for at, each in enumerate(steps) if at > stopped and "young" in each)
    assert steps[again]["young"] > 1
    assert found["young"][0].token_ids == model.answer(tokens(random.Random("young"), PAGE - 20), 60)


def test_a_prompt_may_be_stopped_before_its_end(small):
    model = small("w8a8")
    engine = model.engine(kv_memory=3 * model.page_bytes, max_num_seqs=2, max_batched_tokens=6)
    steps = steps_of(engine)
    add(engine, "old", PAGE - 30, count=60)
    while not engine.stats.generated_tokens:
        step(engine)
    before = len(steps)
    add(engine, "young", 240, count=3)  # five tokens a step
    found = run(engine)
    assert engine.stats.preemptions == 1
    assert steps[before + 29] == {"old": 1, "young": 5}
    assert steps[before + 30] == {"old": 1}
    assert found["young"][0].token_ids == model.answer(tokens(random.Random("young"), 240), 3)


def test_nobody_starts_who_would_be_stopped_at_once(small):
    """A free block is kept for a sequence that will need it within a few tokens."""
    model = small("w8a8")
    engine = model.engine(kv_memory=2 * model.page_bytes, max_batched_tokens=512)
    steps = steps_of(engine)
    add(engine, "going", PAGE - 5, count=10)
    step(engine)
    add(engine, "next", 10, count=5)
    run(engine)
    assert all(list(each) == ["going"] for each in steps[:10])
    assert engine.stats.preemptions == 0


def test_a_common_beginning_is_waited_for_and_others_pass(small):
    engine = small("w8a8").engine(max_batched_tokens=64)
    steps = steps_of(engine)
    stem = tokens(random.Random(0), 2 * PAGE)
    engine.add_request("first", [*stem, 1, 2, 3], greedy(60))
    engine.add_request("second", [*stem, 4, 5], greedy(5))
    add(engine, "other", 10)
    run(engine)
    before = [each for each in steps if "second" not in each]
    assert before[0] == {"other": 10, "first": 54}
    started = steps.index(next(each for each in steps if "second" in each))
    assert steps[started]["second"] == 2
    assert sum(each.get("first", 0) for each in steps[:started]) >= 2 * PAGE


def test_a_common_beginning_is_waited_for_also_by_those_that_came_in_the_same_step(small):
    engine = small("w8a8").engine(max_batched_tokens=512)
    steps = steps_of(engine)
    stem = tokens(random.Random(0), PAGE)
    for at in range(4):
        engine.add_request(str(at), [*stem, at, at], greedy(5))
    run(engine)
    assert steps[:2] == [{"0": PAGE + 2}, {"0": 1, "1": 2, "2": 2, "3": 2}]


def test_blocks_that_are_computed_again_are_found_again(small):
    model = small("w8a8")
    engine = model.engine(kv_memory=3 * model.page_bytes, max_batched_tokens=512)
    add(engine, "old", PAGE - 30, count=250)
    add(engine, "young", PAGE - 20, count=60)
    (answer,) = run(engine)["young"]
    assert engine.stats.preemptions == 1
    # The old one needed all three blocks, so nothing of the young one was left.
    assert engine.stats.prefix_hit_tokens == 0
    engine.add_request("again", [*tokens(random.Random("young"), PAGE - 20), *answer.token_ids], greedy(1))
    run(engine)
    assert engine.stats.prefix_hit_tokens == PAGE


def test_what_ends_with_its_first_token_is_found(small):
    engine = small("w8a8").engine(max_batched_tokens=512)
    prompt = tokens(random.Random(3), 2 * PAGE + 50)
    for _ in range(2):
        engine.add_request("", prompt, greedy(1))
        run(engine)
    assert engine.stats.prefix_hit_tokens == 2 * PAGE


def test_a_prompt_whose_log_probabilities_are_wanted_comes_in_small_pieces(small):
    engine = small("w8a8").engine(max_batched_tokens=512)
    steps = steps_of(engine)
    add(engine, "", 200, prompt_logprobs=0)
    run(engine)
    assert [each[""] for each in steps[:5]] == [64, 64, 64, 8, 1]


class TestPace:
    """How prompts are held back while others wait for their next token."""

    def test_nothing_is_known_at_first(self):
        pace = Pace()
        assert pace.prompt_tokens() is None
        pace.note(4, 0, 0.02)
        assert pace.prompt_tokens() is None

    def test_a_fifth_of_a_second_is_added_to_quick_steps(self):
        pace = Pace()
        pace.note(0, 512, 0.512)
        assert pace.prompt_tokens() == pytest.approx(200, abs=1)

    def test_and_two_steps_to_slow_ones(self):
        pace = Pace()
        pace.note(3, 0, 0.3)
        pace.note(3, 200, 0.3 + 0.4)
        assert pace.prompt_tokens() == pytest.approx(0.6 / 0.002, abs=1)

    def test_there_is_a_least(self):
        pace = Pace()
        pace.note(0, 100, 1000.0)
        assert pace.prompt_tokens() == LEAST_TOKENS

    def test_few_tokens_say_nothing_about_one(self):
        pace = Pace()
        pace.note(3, LEAST_TOKENS - 1, 1.0)
        assert pace.prompt_tokens() is None

    def test_one_slow_step_is_forgotten(self):
        pace = Pace()
        for seconds in (0.1, 10.0, *[0.1] * 30):
            pace.note(0, 100, seconds)
        assert pace.prompt_tokens() == pytest.approx(200, abs=3)

    def test_an_engine_holds_prompts_back_only_while_others_wait(self, small):
        engine = small("w8a8").engine(max_batched_tokens=512)
        steps = steps_of(engine)
        engine.scheduler.pace.token_seconds = 0.002
        add(engine, "long", 300)
        step(engine)
        add(engine, "other", 300)
        run(engine)
        assert steps[0] == {"long": 300}
        assert steps[1:4] == [{"long": 1, "other": 100}] * 3


def test_an_engine_learns_its_pace(small):
    engine = small("w8a8").engine()
    add(engine, "", 300, count=5)
    run(engine)
    pace = engine.scheduler.pace
    assert 0 < pace.token_seconds < 1 and 0 < pace.step_seconds < 1
