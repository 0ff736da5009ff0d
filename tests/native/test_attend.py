"""The attention kernel alone: every kind of cache, on every instruction set, against the same formula in float64.

    S = q . k * q_scale      m_b = max of S over page b      p = e^(S - m_b), rounded to LEVELS where integers are kept
    sum = sum_b e^(m_b - m) sum p                            acc = sum_b e^(m_b - m) p . v

Softened: S = c tanh((q . k * q_scale - q_shift) / c).

Letters: R query rows, C cached positions, D head_dim. U = 2**-24 is half a unit in the last place, relative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from eightfold.model import native as core
from tests.native import KERNELS
from tests.native.operands import each

ISAS = core.extension.available_isas()
ISA = pytest.mark.parametrize("isa", ISAS)

KINDS = {"bf16": 0, "int8": 1, "int8x2": 2}
KIND = each("kind", KINDS)
LEVELS = {"int8": 255, "int8x2": 65535}
PAGE = 128
U = 2.0**-24


@dataclass(frozen=True)
class Case:
    """Queries, keys and values; `q` holds what the integer halves stand for, or the floats."""

    kind: str
    q8: np.ndarray  # (planes * R, D) int8
    qf: np.ndarray  # (R, D) float32
    q_scale: np.ndarray  # (R,)
    last: np.ndarray  # (R,)
    k: np.ndarray  # (C, D)
    v: np.ndarray  # (C, D)
    q_shift: np.ndarray  # (R,), which only softened int8x2 scores have
    softcap: float = 0.0

    @property
    def q(self) -> np.ndarray:
        """What is multiplied with the keys, float64."""
        if self.kind == "bf16":
            return self.qf.astype(np.float64)
        if self.kind == "int8":
            return self.q8.astype(np.float64)
        return self.q8[0::2] * 256.0 + self.q8[1::2]


def case_of(kind: str, rows: int, context: int, dim: int, seed: int = 0) -> Case:
    rng = np.random.default_rng((rows, context, dim, seed))
    planes = 2 if kind == "int8x2" else 1
    q8 = rng.integers(-127, 128, (planes * rows, dim), np.int8)
    q8[0], q8[-1, ::2] = 127, -128 if planes == 2 else -127
    spread = {"bf16": 1.0, "int8": 127.0 * 127 / 3, "int8x2": 127.0 * 32512 / 3}[kind]  # of one product
    q_scale = (rng.uniform(1, 4, rows) / spread / np.sqrt(dim)).astype(np.float32)
    if kind == "bf16":
        k, v = ((rng.normal(0, 1, (context, dim)).astype(np.float32).view(np.uint32) >> 16 << 16) for _ in "kv")
        k, v = k.view(np.float32), v.view(np.float32)
    else:
        k, v = (rng.integers(-128, 128, (context, dim)).astype(np.float32) for _ in "kv")  # type: ignore[assignment]
    qf = (rng.normal(0, 3, (rows, dim)) / np.sqrt(dim)).astype(np.float32)
    last = np.sort(rng.integers(0, context, rows)).astype(np.int32)
    return Case(kind, q8, qf, q_scale, last, k, v, rng.normal(0, 1, rows).astype(np.float32))


State = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(isa: str, case: Case, first: int, end: int, window: int = 0) -> State:
    """Return max (R,), sum (R,) and acc (R, D)."""
    rows, dim = len(case.last), case.k.shape[1]
    top, total = np.full(rows, 77, np.float32), np.full(rows, 77, np.float32)
    acc = np.full((rows, -(-dim // 16) * 16), 77, np.float32)
    KERNELS.attend(
        isa, KINDS[case.kind], case.q8, case.qf, case.q_scale, case.q_shift, case.softcap, case.last, window, case.k,
        case.v, first, end, top, total, acc,
    )  # fmt: skip
    return top, total, acc[:, :dim]


def check(case: Case, found: State, first: int, end: int, window: int = 0) -> None:
    """Compare the three outputs with float64, row by row, page by page."""
    dim = case.k.shape[1]
    for r, last in enumerate(case.last):
        begin, stop = max(first, last - window + 1 if window else 0), min(end, last + 1)
        top, total, acc = (part[r] for part in found)
        if begin >= stop:
            assert (top, total) == (-np.inf, 0) and not acc.any()
            continue
        scale = 1.0 if case.kind == "bf16" else float(case.q_scale[r])
        products = case.k[:stop] * case.q[r]
        scores = products.sum(1) * scale
        # Float scores: D fused products, each with one rounding. Integer ones: the two halves' sum and the scale.
        noise = U * (dim * np.abs(products).sum(1) if case.kind == "bf16" else 2 * np.abs(scores))
        if case.softcap:
            shift = float(case.q_shift[r]) if case.kind == "int8x2" else 0.0
            noise += U * np.abs(scores - shift)
            scores = case.softcap * np.tanh((scores - shift) / case.softcap)
            noise += 10 * U * np.abs(scores)  # tanh is within 7 units; two products
        best = scores[begin:stop].max()
        assert abs(top - best) <= noise[begin:stop].max()
        expected_sum, expected_acc = 0.0, np.zeros(dim)
        sum_bound, acc_bound = 0.0, np.zeros(dim)
        for page in range(begin // PAGE * PAGE, stop, PAGE):
            seen = slice(max(begin, page), min(stop, page + PAGE))
            own = scores[seen].max()
            p, weight = np.exp(scores[seen] - own), np.exp(own - best)
            # e^(s - m): both scores' noise, the difference, and exp itself, which is within 2 units; a weight likewise.
            relative = noise[seen] + 2 * noise.max() + U * np.abs(scores[seen] - own) + 5 * U
            error = p * relative
            if case.kind != "bf16":
                levels = LEVELS[case.kind]
                exact, p = p * levels, np.rint(p * levels)
                near_tie = np.abs(np.abs(exact - p) - 0.5) <= levels * error
                error = near_tie * 1.0  # there the integer may be the other one, elsewhere it must be this
            values = case.v[seen]
            # Sums of up to 128 in float where nothing is an integer; then the pages are weighed and added.
            steps = U * ((PAGE if case.kind == "bf16" else 3) + 4 * len(range(begin, stop, PAGE)) + 8)
            steps += 2 * noise.max() + U * abs(own - best)
            expected_sum += weight * p.sum()
            expected_acc += weight * (p @ values)
            sum_bound += weight * (error.sum() + steps * p.sum())
            acc_bound += weight * (error @ np.abs(values) + steps * (p @ np.abs(values)))
        assert abs(total - expected_sum) <= sum_bound
        assert (np.abs(acc - expected_acc) <= acc_bound).all()


@ISA
@KIND
@each("dim", [2, 6, 16, 20, 64, 80, 128, 256])
def test_every_head_dim(isa, kind, dim):
    case = case_of(kind, 5, 300, dim)
    check(case, run(isa, case, 0, 300), 0, 300)


@ISA
@KIND
@each("rows", range(1, 25))
def test_every_number_of_rows(isa, kind, rows):
    case = case_of(kind, rows, 200, 16)
    check(case, run(isa, case, 0, 200), 0, 200)


@ISA
@KIND
@each("context", [1, 2, 3, 5, 31, 32, 33, 127, 128, 129, 255, 257, 1000])
def test_every_end_of_a_page(isa, kind, context):
    """Positions behind the end hold the largest keys and values: none of them may be seen."""
    case = case_of(kind, 4, context + 140, 16)
    large = 3e38 if kind == "bf16" else 127
    case.k[context:], case.v[context:] = large, large
    case.last[:] = context - 1
    check(case, run(isa, case, 0, context), 0, context)


@ISA
@KIND
@each("window", [1, 2, 31, 127, 128, 129, 300, 5000])
def test_windows(isa, kind, window):
    case = case_of(kind, 24, 600, 16)
    check(case, run(isa, case, 0, 600, window), 0, 600, window)


@ISA
@KIND
def test_a_row_that_sees_nothing_is_empty(isa, kind):
    case = case_of(kind, 3, 400, 16)
    case.last[:] = (5, 127, 300)
    found = run(isa, case, 128, 400)
    check(case, found, 128, 400)
    assert found[0][0] == found[0][1] == -np.inf


@ISA
@KIND
@each(("softcap", "context", "window"), [(0.5, 300, 0), (2.0, 129, 60), (50.0, 257, 0), (1e9, 5, 0)])
def test_softened_scores(isa, kind, softcap, context, window):
    case = replace(case_of(kind, 7, context, 16), softcap=softcap)
    found, plain = run(isa, case, 0, context, window), run(isa, replace(case, softcap=0.0), 0, context, window)
    check(case, found, 0, context, window)
    assert softcap > 10 or not np.allclose(found[0], plain[0], rtol=1e-3)


@ISA
@KIND
@each("softcap", [0.0, 1.5])
def test_a_row_has_the_same_bits_whatever_other_rows_are_there(isa, kind, softcap):
    case = replace(case_of(kind, 24, 300, 20), softcap=softcap)
    planes = len(case.q8) // 24
    whole = run(isa, case, 0, 300)
    for begin, end in ((0, 1), (1, 3), (2, 5), (5, 9), (7, 24), (23, 24)):
        part = Case(
            kind, case.q8[begin * planes : end * planes].copy(), case.qf[begin:end].copy(),
            case.q_scale[begin:end].copy(), case.last[begin:end].copy(), case.k, case.v, case.q_shift[begin:end].copy(),
            softcap,
        )  # fmt: skip
        for found, expected in zip(run(isa, part, 0, 300), whole, strict=True):
            np.testing.assert_array_equal(found, expected[begin:end])


@ISA
@KIND
def test_merging_two_runs_is_one_run(isa, kind):
    case = case_of(kind, 6, 700, 16)
    dim = case.k.shape[1]
    into, other = run(isa, case, 0, 256), run(isa, case, 256, 700)
    arrays = [np.ascontiguousarray(part) for part in (*into, *other)]
    KERNELS.merge(isa, *arrays)
    assert dim % 16 == 0
    check(case, (arrays[0], arrays[1], arrays[2]), 0, 700)


@ISA
def test_merging_nothing_changes_nothing(isa):
    case = case_of("int8", 4, 100, 16)
    state = [np.ascontiguousarray(part) for part in run(isa, case, 0, 100)]
    nothing = [np.full(4, -np.inf, np.float32), np.zeros(4, np.float32), np.zeros((4, 16), np.float32)]
    before = [part.copy() for part in state]
    KERNELS.merge(isa, *state, *nothing)
    for found, expected in zip(state, before, strict=True):
        np.testing.assert_array_equal(found, expected)
    KERNELS.merge(isa, *nothing, *state)
    for found, expected in zip(nothing, before, strict=True):
        np.testing.assert_array_equal(found, expected)


@ISA
@each("context", [10, 11, 140])
def test_what_an_earlier_owner_of_a_page_left_is_not_read(isa, context):
    case = case_of("bf16", 5, context + 20, 16)
    case = replace(case, last=np.full(5, context - 1, np.int32))
    want = run(isa, case, 0, context)
    case.v[context:] = np.nan
    case.k[context:] = np.nan
    for found, expected in zip(run(isa, case, 0, context), want, strict=True):
        assert np.array_equal(found, expected)
