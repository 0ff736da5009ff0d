"""Whole answers against numpy's, frequencies against probabilities, and randomness that is each answer's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from eightfold.engine.sampler import Sampled, Sampler, choose_all, prompt_logprobs
from eightfold.engine.sampling_params import SamplingParams
from eightfold.errors import InputError
from tests.engine.models import choose
from tests.native.sample_oracle import LOG2_E, Oracle, largest, log_probs

VOCAB = 300
STOPS = frozenset({7, 9})
NO_ROWS = np.empty((0, VOCAB), np.float32)


def sampler(index: int = 0, prompt: Sequence[int] = (1, 2, 3), vocab: int = VOCAB, **fields: Any) -> Sampler:
    return Sampler(SamplingParams(max_tokens=None, **fields), prompt, vocab, STOPS, index)


def normal(*shape: int, seed: int = 0, width: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, width, shape).astype(np.float32)


def answer(one: Sampler, rows: np.ndarray) -> list[int]:
    return [choose(one, row, int(row.argmax())).token_id for row in rows]


def uniforms(seed: int, index: int, count: int) -> list[float]:
    """Return a stream's numbers; that it is Philox, keyed by seed and index, is what keeps seeds meaningful."""
    random = np.random.Philox(key=seed % 2**64 + (index << 64))
    return [(int(random.random_raw()) >> 11) * 2.0**-53 for _ in range(count)]


PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.6}
REQUESTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k": {"top_k": 20},
    "top-k off": {"top_k": -1},
    "top-k of all": {"top_k": 10**12},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.05},
    "all cuts": {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "penalties": {**PENALTIES, "temperature": 0.9},
    "greedy penalties": {**PENALTIES, "temperature": 0},
    "bias": {"logit_bias": {5: 4.0, 6: -100}, "temperature": 0},
    "min-tokens": {"min_tokens": 6, "stop_token_ids": [11], "logit_bias": {7: 50, 9: 50, 11: 51}, "temperature": 0},
    "everything": {**PENALTIES, "top_k": 40, "top_p": 0.95, "logit_bias": {250: 6.5}, "min_tokens": 3},
}


def oracle_of(params: SamplingParams, prompt: Sequence[int]) -> Oracle:
    return Oracle(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        stop_ids=sorted(STOPS | set(params.stop_token_ids)),
        min_tokens=params.min_tokens,
        bias=params.logit_bias,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        prompt=prompt if params.repetition_penalty != 1 else (),
    )


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_answers_are_numpys(fields):
    rows, prompt = normal(60, VOCAB), [1, 2, 3, 4, 4]
    one = sampler(index=2, prompt=prompt, seed=11, **fields)
    oracle, given = oracle_of(one.params, prompt), list[int]()
    for row, u in zip(rows, uniforms(11, 2, 60), strict=True):
        token = choose(one, row, int(row.argmax())).token_id
        scores = oracle.edited(row, answer=given)
        # Where a cut or an edge falls within roundings, see sample_oracle.py, either of two tokens is right.
        assert token == oracle.choose(scores, u) or (oracle.temperature > 0 and oracle.may_choose(scores, u, token))
        given.append(token)


def draws(rows: int, count: int, logits: np.ndarray, **fields: Any) -> list[int]:
    """Return the tokens of `rows` answers, `count` each, with seeds 0, 1, 2 and so on, all from the same logits."""
    samplers = [sampler(seed=seed, vocab=len(logits), **fields) for seed in range(rows)]
    matrix, best = np.tile(logits, (rows, 1)), [0] * rows
    return [each.token_id for _ in range(count) for each in choose_all(samplers, matrix, best)]


def chi_square_limit(degrees: int) -> float:
    """Return what chi square exceeds with a probability below e**-20 (Laurent and Massart 2000, lemma 1)."""
    return degrees + 2 * (degrees * 20) ** 0.5 + 2 * 20


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 2, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies_are_probabilities(fields):
    logits = np.array([0.3, -1.0, 2.0, 1.9, -0.2, 0.0, 1.0, -3.0], np.float32)
    tokens = Counter(draws(200, 100, logits, **fields))
    params = SamplingParams(**fields)
    kept = oracle_of(params, ()).kept(logits)
    shares = np.where(kept, np.exp(logits.astype(np.float64) / params.temperature), 0)
    expected = 20_000 * shares / shares.sum()
    assert set(tokens) <= set(np.flatnonzero(kept).tolist())
    statistic = sum((tokens[i] - expected[i]) ** 2 / expected[i] for i in np.flatnonzero(kept).tolist())
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


def test_neighbouring_choices_are_independent():
    """Of one answer, of neighbouring seeds, and of neighbouring indices: pairs of 4 x 4 tokens are equally likely."""
    logits = np.zeros(4, np.float32)
    one = sampler(seed=5, vocab=4)
    in_time = [choose(one, logits, 0).token_id for _ in range(8000)]
    by_seed = draws(4000, 1, logits)
    many = [sampler(seed=5, index=index, vocab=4) for index in range(4000)]
    by_index = [each.token_id for each in choose_all(many, np.zeros((4000, 4), np.float32), [0] * 4000)]
    for tokens in (in_time, by_seed, by_index):
        pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
        expected = len(tokens) / 2 / 16
        statistic = sum((pairs[a, b] - expected) ** 2 / expected for a in range(4) for b in range(4))
        assert statistic < chi_square_limit(15)


def test_a_seeded_answer_is_the_same_in_any_company():
    rows = normal(30, VOCAB)
    fields: dict[str, Any] = {"seed": 3, "temperature": 1.0, "top_p": 0.95, **PENALTIES}
    alone = answer(sampler(**fields), rows)
    one, others = sampler(**fields), [sampler(seed=i, top_k=5) for i in range(6)]
    found = []
    for step, row in enumerate(rows):
        company = others[: step % 7]
        place = step % (len(company) + 1)
        samplers = [*company[:place], one, *company[place:]]
        matrix = normal(len(samplers), VOCAB, seed=step)
        matrix[place] = row
        found.append(choose_all(samplers, matrix, [0] * len(samplers), threads=1 + step % 3)[place].token_id)
    assert found == alone


def test_answers_of_one_request_differ_by_index_and_requests_by_seed():
    rows = normal(20, VOCAB)
    answers = [answer(sampler(seed=seed, index=index), rows) for seed in (-1, 0, 1, 2**64 - 2) for index in range(3)]
    assert len({tuple(tokens) for tokens in answers}) == 12
    assert answer(sampler(seed=1, index=1), rows) == answers[7]


def test_seeds_mean_tomorrow_what_they_mean_today():
    """Chosen once, from a flat distribution; a change of the stream would change every user's seeded answers."""
    flat = np.zeros((8, 1000), np.float32)
    assert answer(sampler(seed=42, vocab=1000), flat) == SEED_42
    assert answer(sampler(seed=42, index=1, vocab=1000), flat) == SEED_42_INDEX_1


SEED_42 = [820, 189, 867, 394, 368, 434, 194, 62]
SEED_42_INDEX_1 = [443, 816, 509, 387, 24, 347, 965, 772]


def test_without_a_seed_no_two_answers_are_alike():
    rows = np.zeros((20, VOCAB), np.float32)
    first, second = sampler(), sampler()
    assert answer(first, rows) != answer(second, rows)  # alike once in 300**20 times


def test_what_needs_logits():
    assert not sampler(temperature=0).needs_logits
    assert not sampler(temperature=0, top_k=5, top_p=0.5, min_p=0.1, seed=3, stop="x").needs_logits
    assert sampler().needs_logits
    assert sampler(temperature=0, logprobs=0).needs_logits
    assert sampler(temperature=0, logit_bias={5: 0.0}).needs_logits
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert sampler(temperature=0, **dict[str, Any]({name: 1.1})).needs_logits
    assert not sampler(temperature=0, prompt_logprobs=3).needs_logits


def test_only_the_first_tokens_need_logits_for_min_tokens():
    one = sampler(temperature=0, min_tokens=2)
    row = np.zeros(VOCAB, np.float32)
    row[[7, 9, 50]] = 3.0, 2.0, 1.0
    for _ in range(2):
        assert one.needs_logits
        assert choose(one, row, 7) == Sampled(50)
    assert not one.needs_logits
    assert choose(one, None, 7) == Sampled(7)
    nothing_stops = Sampler(SamplingParams(temperature=0, min_tokens=2), [1], VOCAB, frozenset())
    assert not nothing_stops.needs_logits


def test_the_likeliest_token_is_taken_as_it_is_told():
    assert choose(sampler(temperature=0), None, 123) == Sampled(123, None, ())


def mixed_samplers() -> list[Sampler]:
    fields: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}, {"temperature": 0}, {"seed": 2, "logprobs": 1}]
    return [sampler(**each) for each in fields]


def test_rows_may_be_all_or_named():
    rows = normal(4, VOCAB)
    best = rows.argmax(1).tolist()
    needed = choose_all(mixed_samplers(), np.ascontiguousarray(rows[[1, 3]]), best, rows=[0, 1])
    assert choose_all(mixed_samplers(), rows, best) == needed
    assert choose_all(mixed_samplers(), np.ascontiguousarray(rows[::-1]), best, rows=[2, 0]) == needed
    assert [needed[0].token_id, needed[2].token_id] == [best[0], best[2]]
    assert choose_all([sampler(temperature=0)] * 2, NO_ROWS, [5, 6]) == [Sampled(5), Sampled(6)]
    assert choose_all([], NO_ROWS, []) == []


def test_logits_are_not_changed():
    rows = normal(2, VOCAB)
    before = rows.copy()
    choose_all([sampler(**REQUESTS["everything"]), sampler(logit_bias={3: 5.0})], rows, [0, 0])
    np.testing.assert_array_equal(rows, before)


def test_logprobs_are_the_models_own():
    """Neither temperature nor penalties nor bias nor cuts change what is reported."""
    row = normal(VOCAB, seed=5)
    expected, error = log_probs(row)
    everything: dict[str, Any] = {**REQUESTS["everything"], "temperature": 3.0, "seed": 1}
    for fields in ({"temperature": 0}, everything, {"temperature": 0, "logit_bias": {299: 100}}):
        sampled = choose(sampler(logprobs=3, **fields), row, int(row.argmax()))
        assert sampled.logprob == pytest.approx(expected[sampled.token_id], rel=0, abs=error)
        assert [token for token, _ in sampled.top] == largest(row, 3)
        assert [value for _, value in sampled.top] == pytest.approx(expected[largest(row, 3)], rel=0, abs=error)
    assert choose(sampler(temperature=0, logit_bias={299: 100}), row, 0).token_id == 299


def test_each_answer_has_the_logprobs_it_asked_for():
    rows = normal(5, VOCAB)
    counts = [None, 0, 2, 20, None]
    sampled = choose_all([sampler(seed=i, logprobs=count) for i, count in enumerate(counts)], rows, [0] * 5)
    assert [len(each.top) for each in sampled] == [0, 0, 2, 20, 0]
    assert [each.logprob is None for each in sampled] == [True, False, False, False, True]
    assert sampled[2].top == choose_all([sampler(logprobs=20)], rows[2:3], [0])[0].top[:2]
    few = choose(Sampler(SamplingParams(logprobs=20), [0], 3, frozenset()), np.zeros(3, np.float32), 0)
    assert [token for token, _ in few.top] == [0, 1, 2]
    assert [value for _, value in few.top] == pytest.approx([-np.log(3)] * 3)


def test_tokens_without_a_chance_are_not_among_the_likeliest():
    row = np.full(VOCAB, -np.inf, np.float32)
    row[[200, 100]] = 1.0, 2.0
    sampled = choose(sampler(logprobs=20, seed=1), row, 100)
    assert [token for token, _ in sampled.top] == [100, 200]
    assert prompt_logprobs(row[None], [5], 1)[0].logprob == -np.inf


def test_hardly_any_temperature_takes_the_first_of_the_likeliest():
    flat = np.zeros((30, VOCAB), np.float32)
    assert answer(sampler(temperature=0.9e-5, seed=1, logprobs=0), flat) == [0] * 30
    assert len(set(answer(sampler(temperature=1e-5, seed=1), flat))) > 1


def test_prompt_logprobs():
    rows = normal(6, VOCAB)
    tokens = [5, 0, 299, 17, 17, 3]
    for top in (0, 4):
        found = prompt_logprobs(rows, tokens, top)
        assert [each.token_id for each in found] == tokens
        for row, token, each in zip(rows, tokens, found, strict=True):
            expected, error = log_probs(row)
            assert each.logprob == pytest.approx(expected[token], rel=0, abs=error)
            assert [i for i, _ in each.top] == largest(row, top)
    assert prompt_logprobs(NO_ROWS, [], 3) == []


def test_a_token_that_is_forbidden_is_never_drawn():
    banned = dict.fromkeys(range(1, 8), -100.0)
    logits = np.zeros(8, np.float32)
    assert set(draws(50, 20, logits, logit_bias=banned)) == {0}
    assert set(draws(50, 20, logits, top_k=3)) == {0, 1, 2}


def test_equal_masses_are_exact():
    """At this temperature the four tokens have masses 1, 1/2, 1/4, 1/4, and u decides without rounding."""
    one = sampler(seed=9, vocab=4, temperature=LOG2_E)
    row = np.array([0, -1, -2, -2], np.float32)
    found = [choose(one, row, 0).token_id for _ in range(200)]
    assert found == [0 if u < 0.5 else 1 if u < 0.75 else 2 if u < 0.875 else 3 for u in uniforms(9, 0, 200)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {300: 1.0}}, "logit_bias token id: got 300, expected 0 to 299"),
        ({"logit_bias": {2**62: 1.0}}, "logit_bias token id: got 4611686018427387904, expected 0 to 299"),
        ({"stop_token_ids": [5, 300]}, "stop_token_ids token id: got 300, expected 0 to 299"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(fields, message):
    with pytest.raises(InputError) as caught:
        sampler(**fields)
    assert str(caught.value) == message


def test_a_models_stop_token_outside_the_vocabulary_is_no_error():
    one = Sampler(SamplingParams(min_tokens=1, temperature=0), [1], 10, frozenset({5, 32_000}))
    row = np.zeros(10, np.float32)
    row[5] = 1
    assert choose(one, row, 5).token_id == 0
