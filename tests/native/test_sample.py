"""The choice of tokens in the core against numpy's: the same where sums are exact, within roundings elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eightfold.model import native as core
from tests.native.operands import each
from tests.native.sample_oracle import LOG2_E, Oracle, largest, log_probs, packed

POOL = core.extension.SamplePool(1)
NONE = np.zeros((0, 0), np.int32)
BLOCK = 64


def chooser(oracle: Oracle, vocab: int) -> Any:
    return core.extension.Chooser(
        vocab=vocab,
        temperature=oracle.temperature,
        top_k=oracle.top_k,
        top_p=oracle.top_p,
        min_p=oracle.min_p,
        stop_ids=list(oracle.stop_ids),
        min_tokens=oracle.min_tokens,
        bias_ids=list(oracle.bias),
        biases=list(oracle.bias.values()),
        repetition=oracle.repetition,
        frequency=oracle.frequency,
        presence=oracle.presence,
        prompt=list(oracle.prompt),
    )


def choose_rows(
    choosers: Sequence[Any],
    logits: np.ndarray,
    uniforms: Sequence[float] | np.ndarray,
    *,
    rows: Sequence[int] | None = None,
    masks: np.ndarray = NONE,
    masked: Sequence[int] | None = None,
    pool: Any = POOL,
) -> list[int]:
    tokens = np.full(len(choosers), -77, np.int32)
    pool.choose(
        choosers=list(choosers),
        logits=logits,
        rows=np.array(range(len(choosers)) if rows is None else rows, np.int32),
        masks=masks,
        masked=np.array([-1] * len(choosers) if masked is None else masked, np.int32),
        uniforms=np.array(uniforms, np.float64),
        tokens=tokens,
    )
    return tokens.tolist()


def choose(oracle: Oracle, logits: np.ndarray, u: float, mask: np.ndarray | None = None) -> int:
    masks: dict[str, Any] = {} if mask is None else {"masks": mask[None], "masked": [0]}
    return choose_rows([chooser(oracle, len(logits))], logits[None], [u], **masks)[0]


def logprobs(logits: np.ndarray, tokens: Sequence[int], top: int, pool: Any = POOL) -> tuple[np.ndarray, ...]:
    count = len(tokens)
    chosen, ids, values = np.empty(count), np.empty((count, top), np.int32), np.empty((count, top))
    rows, ints = np.arange(count, dtype=np.int32), np.array(tokens, np.int32)
    pool.logprobs(logits=logits, rows=rows, tokens=ints, chosen=chosen, top_ids=ids, top=values)
    return chosen, ids, values


def normal(size: int, seed: int, width: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, width, size).astype(np.float32)


# At this temperature masses are powers of two, so whole logits from a narrow range have exact sums everywhere, and
# numpy's choice is the only right one.
EXACT = LOG2_E


def whole(size: int, seed: int, least: int = -9) -> np.ndarray:
    return np.random.default_rng(seed).integers(least, 0, size, endpoint=True).astype(np.float32)


CUTS = {
    "all": {},
    "one": {"top_k": 1},
    "top-k": {"top_k": 50},
    "wide top-k": {"top_k": 700},
    "top-k of more than there are": {"top_k": 100_000},
    "top-p": {"top_p": 0.75},
    "narrow top-p": {"top_p": 2.0**-12},
    "wide top-p": {"top_p": 1 - 2.0**-10},
    "min-p": {"min_p": 2.0**-3},
    "highest min-p": {"min_p": 1.0},
    "all three": {"top_k": 300, "top_p": 0.5, "min_p": 2.0**-4},
}
CUT = each("cuts", CUTS.values())


def uniforms_of(seed: int, count: int = 20) -> list[float]:
    """Return numbers at the ends of their range and between."""
    return [0.0, 2.0**-53, 0.5, 1 - 2.0**-53, *np.random.default_rng(seed).random(count - 4).tolist()]


@CUT
@each("size", [1, 2, 63, 64, 65, 700, 5000])
def test_draws_with_exact_sums(cuts, size):
    oracle = Oracle(temperature=EXACT, **{**cuts, "top_k": min(cuts.get("top_k", 0), size)})
    for seed in range(4):
        logits, uniforms = whole(size, seed), uniforms_of(seed)
        found = choose_rows([chooser(oracle, size)] * len(uniforms), logits[None], uniforms, rows=[0] * len(uniforms))
        assert found == [oracle.choose(logits, u) for u in uniforms]


@CUT
@each("size", [64, 5000])
def test_draws_among_equals_take_the_first_ones(cuts, size):
    oracle = Oracle(temperature=EXACT, **{**cuts, "top_k": min(cuts.get("top_k", 0), size)})
    logits = np.zeros(size, np.float32)
    logits[::2] = -0.0  # the same number
    uniforms = uniforms_of(1, 60)
    found = choose_rows([chooser(oracle, size)] * 60, logits[None], uniforms, rows=[0] * 60)
    assert found == [oracle.choose(logits, u) for u in uniforms]


WHOLE_OR_NOTHING = st.one_of(st.integers(-9, 0).map(float), st.just(-np.inf), st.just(np.nan))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(WHOLE_OR_NOTHING, min_size=1, max_size=200).filter(lambda values: np.isfinite(values).any()),
    top_k=st.integers(0, 40),
    top_p=st.one_of(st.just(1.0), st.integers(1, 64).map(lambda i: i / 64)),
    min_p=st.one_of(st.just(0.0), st.integers(0, 9).map(lambda i: 2.0**-i)),
    u=st.integers(0, 2**20 - 1).map(lambda i: i / 2**20),
    seed=st.integers(0, 9),
)
@example(values=[-np.inf, 0.0], top_k=0, top_p=1.0, min_p=0.0, u=0.0, seed=0)
@example(values=[np.nan, -9.0, 0.0, np.nan], top_k=3, top_p=1.0, min_p=0.0, u=0.0, seed=0)
def test_draws_with_exact_sums_of_any_row(values, top_k, top_p, min_p, u, seed):
    logits = np.array(values, np.float32)
    oracle = Oracle(temperature=EXACT, top_k=top_k, top_p=top_p, min_p=min_p)
    mask = np.random.default_rng(seed).random(len(values)) < 0.7
    if not np.isfinite(logits[mask]).any():
        mask[:] = True
    assert choose(oracle, logits, u, packed(mask)) == oracle.choose(oracle.edited(logits, packed(mask)), u)


@CUT
@each("temperature", [1e-5, 0.1, 0.8, 1.0, 2.0, 1e3, 1e30, 1e300])
@each("size", [50, 3000])
def test_draws_with_rounded_sums(cuts, temperature, size):
    oracle = Oracle(temperature=temperature, **{**cuts, "top_k": min(cuts.get("top_k", 0), size)})
    logits, uniforms = normal(size, size), uniforms_of(size, 30)
    found = choose_rows([chooser(oracle, size)] * 30, logits[None], uniforms, rows=[0] * 30)
    assert all(oracle.may_choose(logits, u, token) for u, token in zip(uniforms, found, strict=True))
    exactly = sum(token == oracle.choose(logits, u) for u, token in zip(uniforms, found, strict=True))
    # A number within SLACK of an edge between tokens may go either way, and two of the 30 are at the ends of [0, 1).
    assert exactly >= 30 - 3


@each("size", [40, 1500])
def test_a_nucleus_that_ends_among_close_logits(size):
    """All logits within one part of the range that is looked at first, and many that are the same."""
    rng = np.random.default_rng(size)
    logits = (8 + 2.0**-16 * rng.integers(0, size // 2, size)).astype(np.float32)
    for top_p, temperature in ((0.3, 1.0), (0.9, 0.01), (0.5, 100.0)):
        oracle = Oracle(temperature=temperature, top_p=top_p)
        found = {choose(oracle, logits, u) for u in uniforms_of(3, 100)}
        assert all(oracle.kept(logits, 2.0**-18)[token] for token in found)
    order = largest(logits, size)
    for count in (1, 7, size // 2, size - 1):
        oracle = Oracle(temperature=1e6, top_k=count)
        found = {choose(oracle, logits, u) for u in np.linspace(0, 1, 4 * size, endpoint=False)}
        assert found == set(order[:count])


def test_a_nucleus_counts_what_can_never_be_in_it():
    """A long tail below the bound of what is looked at has 9 % of the mass."""
    logits = np.full(40_000, -12.0, np.float32)
    logits[:3] = 0.0, -1.0, -2.0
    tail = 40_000 * np.exp(-12.0)
    head = 1 + np.exp(-1) + np.exp(-2)
    edge = (1 + np.exp(-1)) / (head + tail)  # so much the first two have
    assert 0.05 < tail / (head + tail) < 0.15
    last = 1 - 2.0**-53
    assert choose(Oracle(temperature=1.0, top_p=edge - 1e-4), logits, last) == 1
    assert choose(Oracle(temperature=1.0, top_p=edge + 1e-4), logits, last) == 2


@each("size", [1, 40, 64, 4097])
def test_the_likeliest_is_the_first_of_the_largest(size):
    logits = whole(size, size)
    for u in (0.0, 0.9):
        assert choose(Oracle(), logits, u) == int(logits.argmax())
        # Hot or cold, a single candidate stays the only one.
        assert choose(Oracle(temperature=5.0, top_k=1), logits, u) == int(logits.argmax())


def test_what_is_not_a_number_or_minus_infinity_has_no_chance():
    logits = np.full(200, np.nan, np.float32)
    logits[100:] = -np.inf
    logits[[5, 150]] = 1.0, 0.0
    for u in uniforms_of(4):
        assert choose(Oracle(temperature=1.0), logits, u) in (5, 150)
        assert choose(Oracle(temperature=1.0, top_k=80), logits, u) in (5, 150)
        assert choose(Oracle(temperature=1.0, top_p=0.99), logits, u) in (5, 150)
    assert choose(Oracle(), logits, 0.0) == 5


@each("temperature", [0.0, 1.0])
def test_rows_without_any_chance_still_give_a_token(temperature):
    oracle = Oracle(temperature=temperature, top_p=0.9)
    assert choose(oracle, np.full(70, np.nan, np.float32), 0.3) == 0
    assert choose(oracle, np.full(70, -np.inf, np.float32), 0.3) == 0
    infinite = np.zeros(70, np.float32)
    infinite[[66, 68]] = np.inf
    assert choose(oracle, infinite, 0.9) == 66


def test_huge_logits_do_not_overflow():
    logits = np.array([3e38, -3e38, 2.9e38, 3e38], np.float32)
    for temperature in (1e-5, 1.0, 1e30):
        oracle = Oracle(temperature=temperature, top_p=0.99)
        assert {choose(oracle, logits, u) for u in (0.0, 0.4, 0.6, 0.99)} == {0, 3}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    repetition=st.sampled_from([1.0, 1.3, 0.5, 1e-30, 1e30]),
    frequency=st.sampled_from([0.0, 0.7, -2.0]),
    presence=st.sampled_from([0.0, 1.1, -2.0]),
    with_mask=st.booleans(),
    min_tokens=st.sampled_from([0, 3, 9]),
)
def test_edits_are_numpys(seed, repetition, frequency, presence, with_mask, min_tokens):
    """The likeliest token after edits is the same, answer after answer: so their bits are."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(40, 200))
    oracle = Oracle(
        stop_ids=rng.integers(0, size, 2).tolist(),
        min_tokens=min_tokens,
        bias={
            int(token): float(bias) for token, bias in zip(rng.integers(0, size, 5), rng.normal(0, 3, 5), strict=True)
        },
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        prompt=rng.integers(0, size, 20).tolist(),
    )
    native, answer = chooser(oracle, size), list[int]()
    for _ in range(6):
        logits = rng.normal(0, 2, size).astype(np.float32)
        mask = packed(rng.random(size) < 0.3) if with_mask else None
        masks: dict[str, Any] = {} if mask is None else {"masks": mask[None], "masked": [0]}
        token = choose_rows([native], logits[None], [0.0], **masks)[0]
        assert token == oracle.choose(oracle.edited(logits, mask, answer), 0.0)
        native.accept(token)
        answer.append(token)


def test_edits_leave_the_logits_alone():
    logits = normal(100, 1)
    before = logits.copy()
    oracle = Oracle(temperature=1.0, bias={3: 5.0}, repetition=1.5, prompt=[1, 2, 3], stop_ids=[4], min_tokens=1)
    choose(oracle, logits, 0.5, packed(np.arange(100) % 2 == 0))
    np.testing.assert_array_equal(logits, before)


def test_stop_tokens_come_early_only_where_nothing_else_may():
    oracle = Oracle(stop_ids=[7, 9], min_tokens=2)
    logits = np.zeros(64, np.float32)
    logits[7], logits[9] = 2.0, 1.0
    allowed = np.zeros(64, bool)
    allowed[[7, 9]] = True
    native = chooser(oracle, 64)
    assert choose_rows([native], logits[None], [0.0]) == [0]
    assert choose_rows([native], logits[None], [0.0], masks=packed(allowed)[None], masked=[0]) == [7]
    native.accept(0)
    assert choose_rows([native], logits[None], [0.0]) == [0]
    native.accept(0)
    assert choose_rows([native], logits[None], [0.0]) == [7]


@each("size", [1, 31, 32, 33, 64, 100, 700])
def test_masks_of_every_shape(size):
    rng = np.random.default_rng(size)
    logits = normal(size, size)
    for allowed in (
        rng.random(size) < 0.5,
        np.ones(size, bool),
        np.arange(size) == size - 1,
        np.arange(size) // 32 % 2 == 0,
    ):
        if allowed.any():
            assert choose(Oracle(), logits, 0.0, packed(allowed)) == int(np.where(allowed, logits, -np.inf).argmax())
            assert allowed[choose(Oracle(temperature=9.0), logits, 0.7, packed(allowed))]


def test_each_row_has_its_own_mask():
    logits = normal(96, 3)
    masks = np.stack([packed(np.arange(96) == 5), packed(np.arange(96) == 70)])
    native = chooser(Oracle(temperature=1.0), 96)
    found = choose_rows([native] * 4, logits[None], [0.1] * 4, rows=[0] * 4, masks=masks, masked=[1, -1, 0, 1])
    assert (found[0], found[2], found[3]) == (70, 5, 70)
    assert found[1] == Oracle(temperature=1.0).choose(logits, 0.1)


@each("size", [1, 5, 64, 65, 3000])
@each("top", [0, 1, 20])
def test_logprobs(size, top):
    logits = np.stack([normal(size, seed, width) for seed, width in ((1, 3.0), (2, 0.01), (3, 40.0))])
    tokens = [0, size // 2, size - 1]
    top = min(top, size)
    chosen, ids, values = logprobs(logits, tokens, top)
    for row, token, value, found, likeliest in zip(logits, tokens, chosen, ids, values, strict=True):
        expected, error = log_probs(row)
        assert abs(value - expected[token]) <= error
        assert found.tolist() == largest(row, top)
        assert (np.abs(likeliest - expected[found]) <= error).all()


def test_logprobs_of_two_are_as_good_as_their_exponentials():
    """So a mass is within 2 U everywhere, and 0 where float32 ends."""
    logits = np.zeros((4000, 2), np.float32)
    logits[:, 1] = -np.linspace(0, 2, 4000)
    logits[2000:, 1] *= 60
    chosen = logprobs(logits, [1] * 4000, 0)[0]
    for row, value in zip(logits, chosen, strict=True):
        expected, error = log_probs(row)
        assert abs(value - expected[1]) <= error


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.one_of(WHOLE_OR_NOTHING, st.just(np.inf)), min_size=1, max_size=300), top=st.integers(1, 30))
def test_the_largest_with_ties(values, top):
    logits = np.array(values, np.float32)
    _, ids, _ = logprobs(logits[None], [0], top)
    found = largest(logits, top)
    assert ids[0].tolist() == found + [-1] * (top - len(found))


def test_log_probabilities_are_never_nan():
    rows = np.array(
        [[np.nan, -np.inf, 0.0], [np.nan, np.nan, np.nan], [np.inf, 0.0, np.inf], [-np.inf] * 3], np.float32
    )
    chosen = np.stack([logprobs(rows, [token] * 4, 2)[0] for token in range(3)], 1)
    nothing = -np.inf
    np.testing.assert_array_equal(chosen[0], [nothing, nothing, 0.0])
    np.testing.assert_array_equal(chosen[1], [nothing] * 3)
    np.testing.assert_array_equal(chosen[2], [0.0, nothing, 0.0])
    np.testing.assert_array_equal(chosen[3], [nothing] * 3)


MIXED = [
    Oracle(),
    Oracle(temperature=0.7),
    Oracle(temperature=1.0, top_k=50, top_p=0.9),
    Oracle(temperature=1.5, top_p=0.95),
    Oracle(temperature=1.0, min_p=0.01, bias={3: 2.0}),
    Oracle(repetition=1.2, prompt=range(500)),
]


def mixed_batch(rows: int, size: int) -> tuple[list[Any], np.ndarray, list[float]]:
    choosers = [chooser(MIXED[r % len(MIXED)], size) for r in range(rows)]
    logits = np.stack([normal(size, r) for r in range(rows)])
    return choosers, logits, np.random.default_rng(rows).random(rows).tolist()


def test_a_row_does_not_depend_on_others_or_on_threads():
    rows, size = 40, 3001
    choosers, logits, uniforms = mixed_batch(rows, size)
    alone = [choose_rows([c], logits[[r]], [u])[0] for r, (c, u) in enumerate(zip(choosers, uniforms, strict=True))]
    chosen = logprobs(logits, alone, 5)
    for threads in (1, 2, 5):
        pool = core.extension.SamplePool(threads)
        assert choose_rows(choosers, logits, uniforms, pool=pool) == alone
        order = np.random.default_rng(threads).permutation(rows).tolist()
        shuffled = choose_rows(
            [choosers[r] for r in order], logits, [uniforms[r] for r in order], rows=order, pool=pool
        )
        assert shuffled == [alone[r] for r in order]
        for one, other in zip(logprobs(logits, alone, 5, pool), chosen, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_pool_takes_vocabularies_of_any_size_in_any_order():
    pool = core.extension.SamplePool(2)
    for size in (100, 5000, 3, 70, 5001):
        choosers, logits, uniforms = mixed_batch(8, max(size, 501))
        alone = [choose_rows([c], logits[[r]], [u])[0] for r, (c, u) in enumerate(zip(choosers, uniforms, strict=True))]
        assert choose_rows(choosers, logits, uniforms, pool=pool) == alone


def test_several_python_threads_may_ask_one_team():
    pool = core.extension.SamplePool(3)
    choosers, logits, uniforms = mixed_batch(12, 2000)
    expected = choose_rows(choosers, logits, uniforms)
    found: list[list[int]] = []

    def ask() -> None:
        for _ in range(50):
            found.append(choose_rows(choosers, logits, uniforms, pool=pool))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(found) == 150
    assert all(tokens == expected for tokens in found)


def test_no_rows_are_no_work():
    assert choose_rows([], np.empty((0, 10), np.float32), []) == []


BAD_CHOOSERS: dict[str, dict[str, Any]] = {
    "vocab: expected 1 or more": {"vocab": 0},
    "temperature, top_k, top_p, min_p: outside": {"top_p": 0.0},
    "biases: expected one for each id": {"biases": [1.0]},
    "token ids: outside the vocabulary": {"prompt": [10]},
}


@each("message", BAD_CHOOSERS)
def test_choosers_are_checked(message):
    good: dict[str, Any] = {"vocab": 10, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_ids": [1]}
    good |= {"min_tokens": 0, "bias_ids": [], "biases": [], "repetition": 1.0, "frequency": 0.0, "presence": 0.0}
    core.extension.Chooser(**good, prompt=[9])
    with pytest.raises(ValueError, match=message):
        core.extension.Chooser(**{**good, "prompt": [9], **BAD_CHOOSERS[message]})


BAD_CALLS: dict[str, dict[str, Any]] = {
    "rows: outside the logits": {"rows": [1]},
    "masked: outside the masks": {"masked": [0]},
    "masks: expected a bit for each token": {"masks": np.zeros((1, 2), np.int32)},
    "uniforms: expected numbers from": {"uniforms": [1.0]},
    "rows, masked, uniforms, tokens: expected one": {"uniforms": [0.5, 0.5]},
    "choosers: of another vocabulary": {"logits": np.zeros((1, 11), np.float32)},
}


@each("message", BAD_CALLS)
def test_calls_are_checked(message):
    call: dict[str, Any] = {"logits": np.zeros((1, 10), np.float32), "uniforms": [0.5], **BAD_CALLS[message]}
    with pytest.raises(ValueError, match=message):
        choose_rows([chooser(Oracle(), 10)], **call)


def test_tokens_outside_the_vocabulary_are_refused():
    native = chooser(Oracle(), 10)
    for token in (-1, 10):
        with pytest.raises(ValueError, match="token: outside the vocabulary"):
            native.accept(token)
        with pytest.raises(ValueError, match="tokens: outside the vocabulary"):
            logprobs(np.zeros((1, 10), np.float32), [token], 1)
    with pytest.raises(ValueError, match="threads: expected 1 to 1024"):
        core.extension.SamplePool(0)
