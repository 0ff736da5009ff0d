"""Ranks that share experts compute what one process does, to the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eightfold.format.checkpoint import Checkpoint
from eightfold.model import layers
from eightfold.model.native import load
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, NativeModel
from eightfold.parallel.share import Share
from tests.native.models import DYNAMIC, MIX, W8A8, W8A16
from tests.native.test_experts import VARIANTS, everything, mixtral, patchwork, qwen2, qwen3, write
from tests.native.test_share import Team, outputs

# Three ranks, and numbers that they cannot share out evenly.
THIRDS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 50, "vocab_size": 321}
EIGHT = {"num_experts": 8, "moe_intermediate_size": 70}

KINDS: dict[str, Any] = {
    **{name: (*variant, 2) for name, variant in VARIANTS.items() if "odd" not in name},
    "dynamic thirds": (qwen3(**THIRDS, **EIGHT), everything(DYNAMIC), 3),
    "w8a16 thirds": ({**mixtral(**THIRDS), "num_experts": 8, "num_local_experts": 8}, everything(W8A16), 3),
    "patchwork thirds": (qwen2(**THIRDS, **EIGHT), patchwork, 3),
    "w8a8 quarters": (qwen2(num_experts=3, shared_expert_intermediate_size=30), everything(W8A8), 4),
    "mix without some": (qwen3(num_experts=3), everything(MIX), 4),  # one rank has no expert
}
BOTH = pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole experts"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    known: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in known:
            known[name] = write(tmp_path_factory.mktemp("experts") / "m", *KINDS[name][:2])
        return known[name]

    return get


def alone(checkpoint: Checkpoint) -> NativeModel:
    model = load_model(checkpoint, threads=1)
    model.allocate_cache(2 * PAGE)
    return model


@BOTH
@pytest.mark.parametrize(("name", "by_call"), [*((name, False) for name in KINDS), ("patchwork thirds", True)])
def test_ranks_give_what_one_process_gives(made, name, by_call, whole):
    """Of prompts whose tokens fill blocks, of a few tokens, and of one."""
    checkpoint = made(name)
    vocab = checkpoint.config.vocab_size
    team = Team(checkpoint, KINDS[name][2], by_call, threads=2, expert_parallel=whole)
    expected = outputs(alone(checkpoint), vocab)
    for (logits, best), (logits_0, best_0) in zip(outputs(team, vocab), expected, strict=True):
        assert logits.tobytes() == logits_0.tobytes()
        assert best.tolist() == best_0.tolist()
    team.close()


def test_one_process_has_all_experts_anyway(made):
    checkpoint = made("dynamic shared")
    model = load_model(checkpoint, threads=1, expert_parallel=True)
    model.allocate_cache(2 * PAGE)
    vocab = checkpoint.config.vocab_size
    for (logits, _), (logits_0, _) in zip(outputs(model, vocab), outputs(alone(checkpoint), vocab), strict=True):
        assert logits.tobytes() == logits_0.tobytes()


@BOTH
def test_what_a_rank_holds_of_experts(made, whole):
    checkpoint = made("dynamic shared")
    full = load_model(checkpoint, threads=1).weight_bytes
    shares = [load_model(checkpoint, share=Share(rank, 2), threads=1, expert_parallel=whole) for rank in range(2)]
    config = checkpoint.config
    routers = config.num_layers * 2 * (6 + 1) * config.hidden_size  # bfloat16; all ranks have them
    assert sum(share.weight_bytes for share in shares) == full + routers
    assert shares[0].weight_bytes == pytest.approx(full / 2, rel=0.1)


def test_only_the_experts_that_a_rank_has_are_read(made, monkeypatch):
    read = list[str]()
    read_linear = layers.read_linear

    def read_and_note(checkpoint: Checkpoint, module: str, shape: Any) -> layers.Linear:
        read.append(module)
        return read_linear(checkpoint, module, shape)

    monkeypatch.setattr(layers, "read_linear", read_and_note)
    load_model(made("dynamic thirds"), share=Share(1, 3), threads=1, expert_parallel=True)
    assert {int(name.split(".")[5]) for name in read if ".experts." in name} == {2, 3, 4}


@BOTH
def test_a_part_of_an_expert_is_no_copy(made, monkeypatch, whole):
    parts = list[tuple[np.ndarray, np.ndarray]]()
    hand_over = load._hand_over

    def take(to: Any, linear: layers.Linear, weight: np.ndarray, *others: Any) -> None:
        if "expert" in linear.name:
            parts.append((weight, linear.weight))
        hand_over(to, linear, weight, *others)

    monkeypatch.setattr(load, "_hand_over", take)
    load_model(made("dynamic shared"), share=Share(1, 2), threads=1, expert_parallel=whole)
    assert len(parts) == 2 * 3 * (1 + (3 if whole else 6))
    assert all(np.shares_memory(part, weight) for part, weight in parts)
