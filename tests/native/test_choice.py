"""The likeliest token without all logits: always the one that all logits give."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.model import Chunk, NativeModel
from tests.conftest import tiny_config, token_samples, write_model
from tests.native.models import ISAS, VARIANTS, native

ISA = pytest.mark.parametrize("isa", ISAS)
NOTHING, NO_INTEGERS = np.zeros(0, np.float32), np.zeros(0, np.int32)
HIDDEN = 24


def both(model: NativeModel, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest tokens of all positions: by all logits, and without them."""
    found = []
    for logits in (True, False):
        model.allocate_cache(128 * len(prompts))
        chunks = [Chunk(ids, 0, [i], len(ids), wants_all=True, logits=logits) for i, ids in enumerate(prompts)]
        shown, best = model.forward(chunks)
        assert len(shown) == (sum(map(len, prompts)) if logits else 0)
        found.append(best)
    return found[0], found[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_choice_is_the_largest_logit(checkpoint_of, name):
    for isa in ISAS:
        model = native(checkpoint_of(name), isa, threads=3)
        for count in (1, 2, 4, 30):
            expected, found = both(model, token_samples(count, seed=count))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["w8a8", "w8a8 odd"])
def test_the_margin_is_that_of_all_logits(checkpoint_of, name):
    for isa in ISAS:
        model = native(checkpoint_of(name), isa, threads=3)
        prompts = token_samples(30, seed=2)
        model.allocate_cache(128 * len(prompts))
        chunks = [Chunk(ids, 0, [i], len(ids), wants_all=True) for i, ids in enumerate(prompts)]
        logits, best = model.forward(chunks)
        top = np.sort(logits, axis=1)[:, -2:]
        expected = np.minimum(top[:, 1] - top[:, 0], 2)
        assert (expected > 0).any()
        found, margins = model.likeliest([dataclasses.replace(chunk, logits=False) for chunk in chunks])
        np.testing.assert_array_equal(found, best)
        np.testing.assert_allclose(margins, expected, atol=1e-5)


@ISA
def test_rows_of_both_kinds_come_in_the_order_of_the_chunks(checkpoint_of, isa):
    model = native(checkpoint_of("w8a8"), isa, 2)
    prompts = token_samples(6, seed=1)
    model.allocate_cache(128 * 6)
    kinds = (True, False, False, True, True, False)
    chunks = [
        Chunk(ids, 0, [i], len(ids), wants=i != 4, wants_all=i in (1, 3), logits=kinds[i])
        for i, ids in enumerate(prompts)
    ]
    logits, best = (array.copy() for array in model.forward(chunks))
    expected_best, expected_logits = [], []
    for i, ids in enumerate(prompts):
        shown, likeliest = model.forward([Chunk(ids, 0, [i], len(ids), wants_all=True)])
        rows = slice(None) if i in (1, 3) else slice(0, 0) if i == 4 else slice(-1, None)
        expected_best += likeliest[rows].tolist()
        expected_logits += [row.copy() for row in shown[rows]] if kinds[i] else []
    assert best.tolist() == expected_best
    np.testing.assert_array_equal(logits, expected_logits)


def head_only(isa: str, head: np.ndarray, embedding: np.ndarray, gain: float = 1.0) -> NativeModel:
    """Return a model without layers: logits are head @ (x / rms(x)), x a row of the embedding; its first times gain."""
    model = core.extension.Model(
        isa=isa, threads=2, num_layers=0, hidden=[0, HIDDEN], intermediate=[0, 4], vocab=[0, len(head)], rank=0,
        heads=1, kv_heads=1, head_dim=4, eps=0.0, symmetric_tokens=False, inv_freq=np.ones(2, np.float32),
    )  # fmt: skip
    model.set_embedding(embedding)
    model.set_final_norm(np.array([gain, *[1.0] * (HIDDEN - 1)], np.float32), NOTHING)
    model.add_linear(
        -1, "head", "float", head, scale=NOTHING, offset=NOTHING, bias=NOTHING, deq_scale=NOTHING,
        quant_bias=NO_INTEGERS, inv_input_scale=0.0, input_offset=0.0,
    )  # fmt: skip
    assert model.finish() == -1

    class Config:
        vocab_size = len(head)

    return NativeModel(model, Config(), isa)  # type: ignore[arg-type]


def hostile_heads() -> dict[str, np.ndarray]:
    """Return heads whose largest logits are hard to tell apart."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(700, HIDDEN)).astype(np.float32)
    near = np.repeat(head[:1], 700, 0)
    near[:, 0] += rng.normal(size=700).astype(np.float32) * 1e-6
    sizes = head * np.exp(rng.normal(size=(700, 1)) * 8).astype(np.float32)
    outliers = head.copy()
    outliers[:, 3] *= 1e6
    exact = np.clip(np.rint(head * 30), -126, 126)  # in int8: only x is rounded
    exact[:, 4], exact[:, 5] = 127.0, 0.0  # and its outlier does not count
    return {
        "random": head,
        "all equal": np.repeat(head[:1], 700, 0),
        "nearly equal": near,
        "twins": np.concatenate([head[:350], head[:350]]),
        "zeros": np.zeros_like(head),
        "of all sizes": sizes,
        "outliers": outliers,
        "exact": exact,
        "tiny": head * np.float32(1e-38),
        "huge": head * np.float32(1e37),
        "one row": head[:1].copy(),
    }


@ISA
@pytest.mark.parametrize("name", hostile_heads())
def test_ties_and_near_ties_are_settled_as_all_logits_settle_them(isa, name):
    head = hostile_heads()[name]
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(len(head), HIDDEN)).astype(np.float32)
    embedding[: len(head) // 2, 5] *= 1000.0  # an outlier channel: the rest of x gets few of its 16 bits
    model = head_only(isa, head, embedding)
    for count in (1, 5, 40):
        ids = rng.integers(0, len(head), count).tolist()
        expected, found = both(model, [ids])
        np.testing.assert_array_equal(found, expected)


@ISA
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_floats_too(isa, dtype):
    head = hostile_heads()["outliers"] / 1e5
    stored = head.astype(np.float16) if dtype == "float16" else (head.view(np.uint32) >> 16).astype(np.uint16)
    embedding = np.random.default_rng(2).normal(size=head.shape).astype(np.float32)
    for count in (1, 40):
        expected, found = both(head_only(isa, stored, embedding), [list(range(count))])
        np.testing.assert_array_equal(found, expected)


@ISA
@pytest.mark.parametrize("gain", [np.nan, np.inf, -np.inf, 1e30, -1e38])
def test_states_without_bounds(isa, gain):
    head = hostile_heads()["random"]
    embedding = np.random.default_rng(3).normal(size=head.shape).astype(np.float32)
    for ids in ([7], list(range(20))):
        expected, found = both(head_only(isa, head, embedding, gain), [ids])
        np.testing.assert_array_equal(found, expected)


def test_a_step_reads_half_of_a_bfloat16_head(tmp_path):
    config = tiny_config(num_hidden_layers=1)
    checkpoint = Checkpoint.open(write_model(tmp_path / "float", config, tokenizer=False))
    model = native(checkpoint, ISAS[-1])
    linears = sum(
        2 * int(np.prod(info.shape)) for name, info in checkpoint.tensors.items() if name.endswith("_proj.weight")
    )
    assert model.weight_bytes == linears + config["vocab_size"] * config["hidden_size"]
