"""Prompt lookup: what is guessed, how sure it is, and how many guesses a step checks."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.engine import speculate
from eightfold.engine.speculate import Lookup, measure_row_cost
from tests.engine.models import greedy, run, step, tokens


def grown(token_ids: list[int], start: int) -> Lookup:
    """Return the lookup of a sequence that began with `start` tokens and got the others one by one."""
    growing = token_ids[:start]
    lookup = Lookup(growing)
    for token in token_ids[start:]:
        growing.append(token)
        lookup.follow()
    return lookup


def position(lookup: Lookup) -> tuple[int, int]:
    """Return where the next token is looked up, and how many tokens agree before it."""
    return (lookup._at, lookup._length) if lookup._at >= 0 else (-1, 0)


def test_it_goes_on_as_after_the_same_tokens_earlier():
    prompt = [1, 2, 3, 4, 5, 6, 7]
    assert position(grown([*prompt, 9], 7)) == (-1, 0)
    assert position(grown([*prompt, 9, 3], 7)) == (-1, 0)
    lookup = grown([*prompt, 9, 3, 4], 7)  # two agree
    assert position(lookup) == (4, 2)
    assert lookup.guesses(3) == [5, 6, 7]
    assert position(grown([*prompt, 9, 3, 4, 5], 7)) == (5, 3)
    assert position(grown([*prompt, 9, 3, 4, 8], 7)) == (-1, 0)


def test_three_tokens_say_more_than_two_and_the_last_place_more_than_the_first():
    assert position(grown([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 10)) == (3, 3)
    for start in (2, 9):
        assert position(grown([2, 3, 4, 9, 2, 3, 5, 8, 2, 3], start)) == (6, 2)
        assert position(grown([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3], start)) == (8, 3)


def test_a_circle_is_guessed_round_and_round():
    lookup = grown([7, 1, 2, 3, 1, 2, 3, 1, 2, 3], 3)
    assert lookup.guesses(7) == [1, 2, 3, 1, 2, 3, 1]
    assert grown([5] * 9, 1).guesses(4) == [5] * 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.data())
def test_a_guess_stands_behind_tokens_that_agree_and_there_is_one_if_a_pair_was_seen(token_ids, data):
    start = data.draw(st.integers(2, len(token_ids)))
    at, length = position(grown(token_ids, start))
    if at >= 0:
        assert token_ids[at - length : at] == token_ids[-length:]
    elif start < len(token_ids):
        assert token_ids[-2:] not in [token_ids[i - 2 : i] for i in range(2, len(token_ids))]


def test_it_learns_whether_guesses_agree_also_while_none_are_checked():
    rng = random.Random(0)
    copying = grown([*(text := tokens(rng, 200)), *text], 200)
    assert position(copying)[1] > 16
    assert copying.odds(0) > 0.95
    two = [rng.randrange(3) for _ in range(600)]  # pairs are seen again all the time, and mean nothing
    assert grown(two, 10).odds(0) < 0.7
    assert grown(tokens(rng, 30), 10).odds(0) == 0.0


class TestHowManyAreChecked:
    """A guess that is right with probability p is worth the time b of a row while p * (time / tokens) > b."""

    @pytest.fixture
    def checked(self, small, monkeypatch):
        """Run an engine on sequences that always guess; return the guesses of a step for some odds and row cost."""

        def count(sequences: int, odds: float, row_cost: float, most: int = 8) -> int:
            engine = small("w8a8").engine(max_num_seqs=32, max_batched_tokens=512, speculate=most)
            engine.scheduler.guesser.row_cost = row_cost
            for at in range(sequences):
                engine.add_request(str(at), [1, 2, 3, 4] * 4, greedy(100))
            step(engine)
            with (
                mock.patch.object(Lookup, "odds", lambda self, ahead: odds),
                mock.patch.object(Lookup, "guesses", lambda self, count: [0] * count),
            ):
                step(engine)
            return engine.stats.drafted

        return count

    def test_one_sequence(self, checked):
        # A second token for 0.1 of a step: p = 0.05 is too little, p = 0.5 is worth it until 0.5^n is too little.
        assert checked(1, 0.05, 0.1) == 0
        # 0.5 * 1.1 > 0.1 * 1; 0.25 * 1.2 > 0.1 * 1.5; 0.125 * 1.3 < 0.1 * 1.75
        assert checked(1, 0.5, 0.1) == 2
        assert checked(1, 1.0, 0.1) == 8

    def test_many_sequences_use_the_machine_without_guesses(self, checked):
        # Of 20 rows each takes 0.1: 3 for 20 tokens, so a guess at 0.1 has to be right with 0.67 at least.
        assert checked(20, 0.6, 0.1) == 0
        assert checked(20, 0.9, 0.1) > 10
        assert checked(20, 0.9, 1.0) == 0

    def test_no_more_than_asked_for(self, checked):
        assert checked(1, 1.0, 0.01, most=3) == 3


def test_guesses_stay_inside_the_blocks_the_length_and_the_step(small):
    model = small("w8a8")
    engine = model.engine(speculate=8, max_batched_tokens=16)
    engine.scheduler.guesser.row_cost = 0.01
    prompts = [[1, 2, 3] * 42, [5, 6] * 60]
    for at, prompt in enumerate(prompts):
        engine.add_request(str(at), prompt, greedy(30))
    model_run, sizes = engine.model.run, []

    def watched(laid_out):
        sizes.append(len(laid_out.token_ids))
        for at, end in enumerate(laid_out.starts[1:]):
            if len(laid_out.starts) == 3:  # both
                assert laid_out.positions[end - 1] < len(prompts[at]) + 30 - 1
        return model_run(laid_out)

    engine.model.run = watched
    with mock.patch.object(Lookup, "odds", lambda self, ahead: 1.0 if self._at >= 0 else 0.0):
        found = run(engine)
    assert engine.stats.drafted > 20
    assert max(sizes) == 16
    for at, prompt in enumerate(prompts):
        assert found[str(at)][0].token_ids == model.answer(prompt, 30)


def test_no_guesses_while_prompts_are_computed(small):
    engine = small("w8a8").engine(speculate=8)
    engine.scheduler.guesser.row_cost = 0.01
    engine.add_request("0", [1, 2] * 20, greedy(50))
    step(engine)
    engine.add_request("1", tokens(random.Random(1), 60 * 5), greedy(50))
    drafted = engine.stats.drafted
    with mock.patch.object(Lookup, "odds", lambda self, ahead: 1.0 if self._at >= 0 else 0.0):
        for _ in range(4):
            step(engine)
            assert engine.stats.drafted == drafted
        run(engine)
    assert engine.stats.drafted > drafted


def test_the_cost_of_a_row_is_measured(small):
    model = small("w8a8").alone
    model.allocate_cache(128)
    for seconds, expected in (({1: 1.1, 8: 1.8}, 0.1), ({1: 1.0, 8: 1.0}, 0.01), ({1: 1.0, 8: 8.0}, 1.0)):
        with mock.patch.object(speculate, "_seconds", lambda _, chunk, seconds=seconds: seconds[len(chunk.token_ids)]):
            assert measure_row_cost(model) == pytest.approx(expected)
    assert 0.01 <= measure_row_cost(model) <= 1.0
