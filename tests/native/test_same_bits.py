"""A token's logits have the same bits however a prompt is cut, whatever else is in the step, on any number of threads.

Long contexts run in parts of 256 positions, which threads share when there are few of them; pages hold 128.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.model import Chunk, NativeModel
from eightfold.quant.recipe import Recipe
from tests.conftest import tiny_config, token_samples
from tests.native.models import DYNAMIC, ISAS, W8A8, W8A16, Variant, logits_of, native, write_variant

ISA = pytest.mark.parametrize("isa", ISAS)
SCHEMES = [
    "float32", "float16", "bfloat16", "float odd", "float many heads", "w8a16 odd", "w8a8 odd", "w8a8 qk-norm",
    "dynamic", "mix", "mixture", "faquant", "faquant many heads", "c8 asymmetric", "c8 window",
]  # fmt: skip
SCHEME = pytest.mark.parametrize("name", SCHEMES)

TOKENS = [token for sample in token_samples(20, seed=3) for token in sample][:90]


@ISA
@SCHEME
def test_any_cut_of_a_prompt(checkpoint_of, name, isa):
    model = native(checkpoint_of(name), isa, threads=2)
    whole = logits_of(model, TOKENS)
    for cuts in ([1], [2, 3], [8, 9, 17, 81], [63], [64, 65, 66], list(range(1, 90)), list(range(7, 90, 7))):
        np.testing.assert_array_equal(logits_of(model, TOKENS, cuts), whole)


@ISA
@pytest.mark.parametrize("name", ["mix", "mixture"])
def test_what_was_generated_is_computed_so_in_any_cut(checkpoint_of, name, isa):
    """As after a recomputation, where a prompt and its answer run in one step."""
    model = native(checkpoint_of(name), isa)
    whole = logits_of(model, TOKENS, prompt_len=40)
    assert not np.array_equal(whole[40:], logits_of(model, TOKENS)[40:])
    for cuts in ([40], [39, 41], [10, 60], list(range(40, 90))):
        np.testing.assert_array_equal(logits_of(model, TOKENS, cuts, prompt_len=40), whole)


@ISA
@SCHEME
def test_any_company_in_a_step(checkpoint_of, name, isa):
    """Sequences that begin, that go on and that generate, together; each as if it were alone."""
    model = native(checkpoint_of(name), isa, threads=2)
    sequences = [TOKENS[i : i + length] for i, length in enumerate((1, 2, 5, 19, 33, 64, 70))]
    alone = [logits_of(model, tokens) for tokens in sequences]
    model.allocate_cache(128 * len(sequences))
    rng = random.Random(name + isa)
    pages = rng.sample(range(len(sequences)), len(sequences))
    done = [0] * len(sequences)
    while any(at < len(tokens) for at, tokens in zip(done, sequences, strict=True)):
        going = [s for s in range(len(sequences)) if done[s] < len(sequences[s])]
        going = rng.sample(going, rng.randint(1, len(going)))
        lengths = {s: rng.randint(1, min(30, len(sequences[s]) - done[s])) for s in going}
        chunks = [
            Chunk(sequences[s][done[s] : done[s] + lengths[s]], done[s], [pages[s]], len(sequences[s]), wants_all=True)
            for s in going
        ]
        logits, _ = model.forward(chunks)
        for s in going:
            np.testing.assert_array_equal(logits[: lengths[s]], alone[s][done[s] : done[s] + lengths[s]])
            logits, done[s] = logits[lengths[s] :], done[s] + lengths[s]


@ISA
@SCHEME
def test_any_number_of_threads(checkpoint_of, name, isa):
    checkpoint = checkpoint_of(name)
    whole = logits_of(native(checkpoint, isa), TOKENS)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(logits_of(native(checkpoint, isa, threads), TOKENS, [60, 61, 62, 70]), whole)


CONTEXT = 2200
LONG = {
    kind: Variant(recipe, tiny_config("MistralForCausalLM", num_hidden_layers=1, sliding_window=window, vocab_size=64,
                                      hidden_size=32, intermediate_size=16, head_dim=8, max_position_embeddings=4096))
    for kind, recipe, window in (
        ("bf16", Recipe(W8A8), None),
        ("int8", Recipe(DYNAMIC, fa_quant=True), None),
        ("int8x2", Recipe(W8A16, kv_int8=True, kv_symmetric=False), None),
        ("bf16 window", Recipe(W8A8), 1100),
        ("int8 window", Recipe(DYNAMIC, fa_quant=True), 129),
        ("int8x2 window", Recipe(W8A16, kv_int8=True), 1025),
    )
}  # fmt: skip
LONG_TOKENS = np.random.default_rng(0).integers(0, 64, CONTEXT).tolist()
# Of pages, of parts and of parts' ends, and a step of several tokens across one.
STEPS = [127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 1026, 1030, 1151, 1152, 2047, 2048, 2049, 2050, 2199]


@pytest.fixture(scope="module")
def long_checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    made = {}
    for name, variant in LONG.items():
        with pytest.MonkeyPatch.context() as patch:  # its samples must lie in this vocabulary
            patch.setattr("tests.native.models.token_samples", lambda: token_samples(vocab=64))
            made[name] = write_variant(tmp_path_factory.mktemp("long"), variant)
    return made


def shuffled_pages(model: NativeModel) -> list[int]:
    model.allocate_cache(CONTEXT + 500)
    return random.Random(1).sample(range(model.pages), model.pages)


def check_steps(checkpoint: Checkpoint, isa: str, threads: int, whole: np.ndarray) -> None:
    """Steps of one and of some tokens, pages in any order."""
    model = native(checkpoint, isa, threads)
    pieces = logits_of(model, LONG_TOKENS, STEPS, pages=shuffled_pages(model))
    np.testing.assert_array_equal(pieces, whole)


def check_batch(checkpoint: Checkpoint, isa: str, whole: np.ndarray) -> None:
    """Four sequences, whose pages are interleaved, and their next tokens together."""
    model = native(checkpoint, isa, threads=3)
    lengths = [2150, 1024, 1500, 2]
    model.allocate_cache(128 * 4 * 18)
    pages = [range(s, 4 * 18, 4) for s in range(4)]

    def chunk(s: int, begin: int, end: int) -> Chunk:
        return Chunk(LONG_TOKENS[begin:end], begin, pages[s][: -(-end // 128)], CONTEXT)

    model.forward([chunk(s, 0, length - 1) for s, length in enumerate(lengths)])
    for step in range(3):
        ends = [length + step for length in lengths]
        logits, _ = model.forward([chunk(s, end - 1, end) for s, end in enumerate(ends)])
        np.testing.assert_array_equal(logits, whole[[end - 1 for end in ends]])


@pytest.mark.parametrize("name", LONG)
def test_long_contexts(long_checkpoints, name):
    """One step for all on one thread; then other steps, threads and company, on every instruction set.

    Of several instruction sets integers are the same; floats differ by rounding, and now and then by a value that
    crossed a middle.
    """
    checkpoint, found = long_checkpoints[name], list[np.ndarray]()
    for isa in ISAS:
        whole = logits_of(native(checkpoint, isa), LONG_TOKENS)
        assert np.isfinite(whole).all()
        # Cuts and threads are the same code on all instruction sets, and scalar kernels take long.
        for threads in (1, 2, 4) if isa != "scalar" else (3,):
            check_steps(checkpoint, isa, threads, whole)
        if isa != "scalar" or len(ISAS) == 1:
            check_batch(checkpoint, isa, whole)
        found.append(whole)
    for a, b in itertools.pairwise(found):
        apart = np.abs(a - b).max(1) / np.abs(a).max()
        # Median of 2200 tokens: noise of float sums over up to 2200 positions; largest: one step of an integer.
        assert np.median(apart) <= 2e-5
        assert apart.max() <= 0.05


def test_a_new_cache_and_other_lengths_leave_nothing_behind(checkpoint_of):
    """Steps that make buffers grow, between steps of one token."""
    model = native(checkpoint_of("faquant"), ISAS[-1], threads=3)
    expected = logits_of(model, TOKENS)
    for count in (1, 3, 2, 90, 1, 17, 64, 65, 90, 8, 9):
        np.testing.assert_array_equal(logits_of(model, TOKENS[:count]), expected[:count])
