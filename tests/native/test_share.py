"""Shares of a model that compute together give what the whole gives.

Here they are in one process, a thread each, and meet in memory or through a call; tests/engine/test_distributed.py has
real processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eightfold.config import ModelConfig, parse_config
from eightfold.errors import ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.parallel.share import Share, cuts, even_sizes
from tests.conftest import tiny_config
from tests.native.models import VARIANTS, write_variant


def memory_files(count: int) -> list[int]:
    return [os.memfd_create("test") for _ in range(count)]


class Team:
    """All shares of a model."""

    def __init__(self, checkpoint: Checkpoint, size: int, by_call: bool = False, **options: Any) -> None:
        self.models = [load_model(checkpoint, share=Share(rank, size), **options) for rank in range(size)]
        self.files = [] if by_call else memory_files(1 + 2 * size)
        self._barrier, self._parts = threading.Barrier(size), {}
        for rank, model in enumerate(self.models):
            if by_call:
                model.share_by_call(rank, lambda mine, all_, rank=rank: self._meet(rank, mine, all_))  # type: ignore[misc]
            else:
                model.share_memory(rank, self.files)
            model.allocate_cache(2 * PAGE)

    def _meet(self, rank: int, mine: np.ndarray, everybody: np.ndarray) -> None:
        self._parts[rank] = mine
        self._barrier.wait()
        for other, part in self._parts.items():
            everybody[other] = part
        self._barrier.wait()

    def forward(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """Run a step on all; return what rank 0 gives."""
        found: dict[int, Any] = {}

        def run(rank: int) -> None:
            found[rank] = self.models[rank].forward(chunks)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found[0]

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def steps(vocab: int) -> list[list[Chunk]]:
    """Two prompts, one with all logits, and what follows: one sequence with logits, one without, then one alone."""
    random = np.random.default_rng(0)
    first, second = random.integers(0, vocab, 20).tolist(), random.integers(0, vocab, 7).tolist()
    return [
        [Chunk(first, 0, [0], 20, wants_all=True), Chunk(second, 0, [1], 7, logits=False)],
        [Chunk([5], 20, [0], 20), Chunk([vocab - 1], 7, [1], 7, logits=False)],
        [Chunk([7], 21, [0], 20, logits=False)],
    ]


def outputs(model: NativeModel | Team, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [model.forward(chunks) for chunks in steps(vocab)]
    return [(logits.copy(), best) for logits, best in found]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Checkpoint] = {}

    def write(name: str) -> Checkpoint:
        if name not in known:
            known[name] = write_variant(tmp_path_factory.mktemp("share") / "model", VARIANTS[name])
        return known[name]

    return write


# Of every kind of meeting; what ranks tell each other is the same in memory and through a call.
BY_CALL = ("float odd", "w8a16 odd", "w8a8 odd", "dynamic odd", "mixture", "c8 asymmetric")


@pytest.mark.parametrize(
    ("name", "by_call"), [*((name, False) for name in VARIANTS), *((name, True) for name in BY_CALL)]
)
def test_shares_give_what_the_whole_gives(written, name, by_call):
    checkpoint, dynamic = written(name), VARIANTS[name].dynamic
    vocab = checkpoint.config.vocab_size
    whole = load_model(checkpoint, threads=1, dynamic=dynamic)  # type: ignore[arg-type]
    whole.allocate_cache(2 * PAGE)
    expected = outputs(whole, vocab)
    # Of the odd ones 5 ranks share one key head, and nothing is a multiple of anything.
    for size in [n for n in even_sizes(checkpoint.config) if 1 < n <= 5]:
        team = Team(checkpoint, size, by_call, threads=2, dynamic=dynamic)
        for (logits, best), (logits_0, best_0) in zip(outputs(team, vocab), expected, strict=True):
            assert logits.tobytes() == logits_0.tobytes()
            assert best.tolist() == best_0.tolist()
        team.close()


def test_a_prompt_in_float_is_shared_too(written):
    checkpoint = written("faquant")
    whole = load_model(checkpoint, threads=1, attention="mindie")
    whole.allocate_cache(2 * PAGE)
    team = Team(checkpoint, 2, threads=1, attention="mindie")
    vocab = checkpoint.config.vocab_size
    for (logits, best), (logits_0, best_0) in zip(outputs(team, vocab), outputs(whole, vocab), strict=True):
        assert (logits.tobytes(), best.tolist()) == (logits_0.tobytes(), best_0.tolist())
    team.close()


def test_parts_grow_with_the_batch(written):
    """64 KiB are there at first; 400 tokens of 48 numbers need more."""
    checkpoint = written("w8a8")
    team, whole = Team(checkpoint, 2, threads=1), load_model(checkpoint, threads=1)
    tokens = np.random.default_rng(1).integers(0, 320, 400).tolist()
    for model in (*team.models, whole):
        model.allocate_cache(4 * PAGE)
    for chunk in (Chunk(tokens[:3], 0, [0], 400, wants=False), Chunk(tokens[3:], 3, range(4), 400)):
        logits, _ = team.forward([chunk])
        expected, _ = whole.forward([chunk])
        assert logits.tobytes() == expected.tobytes()
    team.close()


def test_a_call_that_fails_ends_the_step_and_the_model_lives_on(written):
    checkpoint = written("w8a8")
    model = load_model(checkpoint, share=Share(0, 2), threads=2)
    model.allocate_cache(PAGE)
    calls = []

    def meet(mine: np.ndarray, everybody: np.ndarray) -> None:
        calls.append(mine.size)
        everybody[:] = 0
        if len(calls) == 3:
            raise KeyError("no such rank")

    model.share_by_call(0, meet)
    chunk = Chunk([1, 2, 3], 0, [0], 3)
    with pytest.raises(KeyError, match="no such rank"):
        model.forward([chunk])
    assert calls == [3 * 48] * 3
    model.forward([chunk])
    assert len(calls) == 3 + 1 + 2 * 2 + 1  # embedding, two in each layer, logits


def test_a_share_alone_does_not_run(written):
    model = load_model(written("w8a8"), share=Share(1, 2), threads=1)
    model.allocate_cache(PAGE)
    with pytest.raises(ValueError, match="has not met the others"):
        model.forward([Chunk([1], 0, [0], 1)])


def test_what_a_share_holds(written):
    checkpoint = written("w8a8")
    whole = load_model(checkpoint, threads=1)
    shares = [load_model(checkpoint, share=Share(rank, 2), threads=1) for rank in range(2)]
    assert sum(share.weight_bytes for share in shares) == whole.weight_bytes
    assert [share.page_bytes for share in shares] == [whole.page_bytes / 2] * 2


EXPERTS = {
    "architecture": "Qwen2MoeForCausalLM", "model_type": "qwen2_moe", "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 80,
}  # fmt: skip


def config_of(**changes: Any) -> ModelConfig:
    return parse_config(tiny_config(**changes), Path("config.json"))


@pytest.mark.parametrize(
    ("heads", "keys", "sizes"),
    [(9, 3, [1, 3, 9]), (32, 8, [1, 2, 4, 8, 16, 32]), (4, 2, [1, 2, 4]), (5, 1, [1, 5]), (12, 6, [1, 2, 3, 6, 12])],
)
def test_which_sizes_are_even(heads, keys, sizes):
    assert even_sizes(config_of(num_attention_heads=heads, num_key_value_heads=keys)) == sizes


def test_an_uneven_size_is_refused_with_those_that_would_work():
    config = config_of(num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(ConfigError) as caught:
        Share(0, 2).require(config, Path("DIR"))
    assert str(caught.value) == (
        "number of processes in DIR: got 2, expected 1, 3 or 9, among which 9 query heads and 3 key/value heads can be "
        "shared out evenly. Change --nproc_per_node or --nnodes of torchrun."
    )


def test_an_mlp_of_fewer_channels_than_ranks_is_refused():
    """One of an expert may be, of which a rank may have nothing."""
    sizes: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 2}
    for config in (config_of(**sizes), config_of(**{**EXPERTS, **sizes, "mlp_only_layers": [1]})):
        Share(0, 2).require(config, Path("DIR"))
        with pytest.raises(ConfigError) as caught:
            Share(0, 3).require(config, Path("DIR"))
        assert str(caught.value) == (
            "number of processes in DIR: got 3, expected at most 2, among which the channels of an MLP can be shared "
            "out. Change --nproc_per_node or --nnodes of torchrun."
        )
    Share(0, 3).require(config_of(**{**EXPERTS, **sizes}), Path("DIR"))


def test_heads_of_every_rank():
    config = config_of(num_attention_heads=12, num_key_value_heads=6)
    of = [Share(rank, 12) for rank in range(12)]
    assert [(share.heads(config), share.kv_heads(config)) for share in of] == [
        (slice(h, h + 1), slice(h // 2, h // 2 + 1)) for h in range(12)
    ]
    assert Share(1, 3).kv_heads(config) == slice(2, 4)


def test_some_of_every_expert():
    config = config_of(**EXPERTS)
    of = [Share(rank, 3) for rank in range(3)]
    assert [share.experts(8) for share in of] == [range(8)] * 3
    assert of[0].expert_cuts(8) == []
    for is_shared, size in ((False, 40), (True, 80)):
        at = cuts(size, 3)
        for part in ("gate", "up"):
            rows = [share.of_expert(config, part, is_shared=is_shared) for share in of]
            assert rows == [slice(*at[r : r + 2]) for r in range(3)]
    at = cuts(48, 3)
    assert [share.of_expert(config, "down", is_shared=False) for share in of] == [
        slice(*at[r : r + 2]) for r in range(3)
    ]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (8, 2, [range(4), range(4, 8)]),
        (8, 3, [range(2), range(2, 5), range(5, 8)]),
        (2, 3, [range(0), range(1), range(1, 2)]),
    ],
)
def test_all_of_some_experts(count, size, expected):
    config = config_of(**EXPERTS)
    of = [Share(rank, size, whole_experts=True) for rank in range(size)]
    assert [share.experts(count) for share in of] == expected
    assert [share.of_expert(config, "down", is_shared=False) for share in of] == [slice(None)] * size
    assert of[0].of_expert(config, "up", is_shared=True) == slice(0, cuts(80, size)[1])


def test_a_dense_model_has_no_experts_to_share_out():
    with pytest.raises(ConfigError, match="expert_parallel: got a dense model, expected one with experts"):
        Share(0, 2, whole_experts=True).require(config_of(), Path("DIR"))


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [
        (49152, 3, [0, 16384, 32768, 49152]),
        (1536, 3, [0, 512, 1024, 1536]),
        (128256, 4, [0, 32064, 64128, 96192, 128256]),
        (80, 2, [0, 40, 80]),
        (77, 3, [0, 24, 52, 77]),
        (5, 4, [0, 1, 2, 3, 5]),
    ],
)
def test_cuts(total, size, expected):
    assert cuts(total, size) == expected
