"""The pool of threads under stress: every chunk once, every phase after the one before, and an end."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from eightfold.model.native.model import Chunk, NativeModel
from tests.native import KERNELS
from tests.native.models import ISAS, logits_of, native

pool_runs = KERNELS.pool_runs

LIMIT = 2**64


def expected_sum(chunks: list[int]) -> int:
    """Return the sum of all numbers that a run makes; see Chain in csrc/bind_test.cc."""
    total, before = 0, list[int]()
    for count in chunks:
        made = [31 * before[i % len(before)] + i if before else i + 1 for i in range(count)]
        made = [number % LIMIT for number in made]
        total, before = (total + sum(made)) % LIMIT, made
    return total


@contextmanager
def busy_core() -> Iterator[None]:
    """Let another process burn a core."""
    code = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    burner = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def random_runs(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    kinds = ((0, 1), (1, 3), (0, 9), (30, 60))
    return [[rng.randint(*rng.choice(kinds)) for _ in range(rng.randint(0, 12))] for _ in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
def test_runs_of_any_shape_while_a_core_is_busy(threads):
    runs = random_runs(4000, seed=threads)
    with busy_core():
        assert pool_runs(threads, runs) == [expected_sum(run) for run in runs]


def test_many_short_runs():
    """More than the 256 that one byte tells apart, on more threads than there are cores."""
    runs = [[1], [3, 1], [], [2, 2, 2]] * 1000
    assert pool_runs(4, runs) == [expected_sum(run) for run in runs]


def test_one_run_of_many_phases():
    phases = random_runs(400, seed=9)
    run = [count for phase in phases for count in phase]
    assert pool_runs(3, [run, run]) == [expected_sum(run)] * 2


def test_pools_come_and_go():
    for threads in (2, 7, 1, 40):
        for _ in range(20):
            assert pool_runs(threads, [[2, 3]]) == [expected_sum([2, 3])]


def test_a_model_with_more_threads_than_cores_beside_a_busy_one(checkpoint_of):
    checkpoint, tokens = checkpoint_of("mixture"), list(range(60))
    cuts = list(range(5, 60))  # steps of one token
    expected = logits_of(native(checkpoint, ISAS[-1]), tokens)
    with busy_core():
        for threads in (2, 8):
            model = native(checkpoint, ISAS[-1], threads)
            assert (logits_of(model, tokens, cuts) == expected).all()
            del model  # its threads end


def test_two_python_threads_may_ask_one_model(checkpoint_of):
    """Steps queue up; NativeModel's own logits buffer is shared, so each thread brings its own."""
    checkpoint = checkpoint_of("float32")
    model = native(checkpoint, ISAS[-1], threads=2)
    model.allocate_cache(2 * 128)
    want = {page: model.forward([Chunk([5 + page, 6, 7], 0, [page], 3)])[0].copy() for page in (0, 1)}
    found: dict[int, list[bool]] = {0: [], 1: []}

    def ask(page: int) -> None:
        own = NativeModel(model._model, model.config, model.isa)
        for _ in range(200):
            logits, _ = own.forward([Chunk([5 + page, 6, 7], 0, [page], 3)])
            found[page].append(np.array_equal(logits, want[page]))

    askers = [threading.Thread(target=ask, args=(page,)) for page in (0, 1)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert all(found[0]) and all(found[1]) and len(found[0]) == len(found[1]) == 200
