"""Mixtures of experts in the core: what the reference computes, to the same bits in any company, and nothing unused."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eightfold.architectures import Names
from eightfold.config import parse_config
from eightfold.families import all_linears
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import layers
from eightfold.model.native.measure import int8_elements, unread_bytes
from eightfold.model.native.model import Chunk
from eightfold.model.reference.load import Decoder
from eightfold.scheme import QuantType
from tests.conftest import random_tensors, tiny_config, token_samples
from tests.native.models import (
    DYNAMIC,
    FLOAT,
    ISAS,
    MIX,
    W8A8,
    W8A16,
    keys_and_values_in_bfloat16,
    logits_of,
    native,
    require_tokens_of_overflow,
)
from tests.native.test_model import ROUNDING, STEP, WIDE, relative

ISA = pytest.mark.parametrize("isa", ISAS)
SAMPLES = [*token_samples(4, seed=5), [200]]
TOKENS = [token for sample in token_samples(20, seed=3) for token in sample][:150]


def qwen3(**changes: Any) -> dict[str, Any]:
    sizes = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
    return tiny_config("Qwen3MoeForCausalLM", **{**sizes, **changes})


def qwen2(**changes: Any) -> dict[str, Any]:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shared = {"shared_expert_intermediate_size": 88}
    return tiny_config("Qwen2MoeForCausalLM", **{**sizes, **shared, "norm_topk_prob": False, **changes})


def mixtral(**changes: Any) -> dict[str, Any]:
    return tiny_config("MixtralForCausalLM", sliding_window=None, **changes)


ODD = {"hidden_size": 33, "moe_intermediate_size": 27, "vocab_size": 321}

# What each linear becomes, by its name.
Rule = Callable[[str], QuantType]


def everything(kind: QuantType) -> Rule:
    return lambda name: FLOAT if name == Names().head else kind


def patchwork(name: str) -> QuantType:
    """Experts of one layer differ, and the parts of an expert."""
    found = re.search(r"experts\.(\d+)\.(gate|up|down)", name)
    if found is None:
        return DYNAMIC
    kinds = (DYNAMIC, W8A16, FLOAT, W8A8, MIX)
    return kinds[(int(found[1]) + (2 if found[2] == "down" else found[2] == "up" and int(found[1]) > 3)) % 5]


VARIANTS: dict[str, tuple[dict[str, Any], Rule]] = {
    "float": (qwen3(torch_dtype="float32"), everything(FLOAT)),
    "float shared": (qwen2(), everything(FLOAT)),
    "float mixtral": (mixtral(), everything(FLOAT)),
    "dynamic": (qwen3(num_hidden_layers=3, mlp_only_layers=[1]), everything(DYNAMIC)),
    "dynamic odd": (qwen3(**ODD), everything(DYNAMIC)),
    "dynamic shared": (qwen2(norm_topk_prob=True), everything(DYNAMIC)),
    "dynamic mixtral": (mixtral(), everything(DYNAMIC)),
    "dynamic all": (qwen3(num_experts_per_tok=7, norm_topk_prob=False), everything(DYNAMIC)),
    "w8a16": (qwen3(decoder_sparse_step=2), everything(W8A16)),
    "w8a16 shared": (qwen2(), everything(W8A16)),
    "w8a8": (qwen3(), everything(W8A8)),
    "w8a8 shared": (qwen2(), everything(W8A8)),
    "mix": (qwen2(), everything(MIX)),
    "patchwork": (qwen2(), patchwork),
    "patchwork odd": (qwen3(**ODD), patchwork),
}
NAMES = pytest.mark.parametrize("name", VARIANTS)


def quantized(name: str, weight: torch.Tensor, kind: QuantType, seed: int) -> dict[str, torch.Tensor]:
    """Return what a linear stores; every one has an input scale of its own."""
    real = weight.float()
    scale = real.abs().amax(1, keepdim=True) / 127
    offset = torch.zeros_like(scale)
    if kind is W8A16:
        offset += seed % 5 - 2
        scale *= 127 / 120
    stored = (real / scale + offset).round().to(torch.int8)
    found = {"weight": stored, "weight_scale": scale, "weight_offset": offset}
    if kind in (W8A8, MIX):
        input_scale = torch.tensor([0.02 + 0.004 * (seed % 7)]).to(weight.dtype)
        input_offset = torch.tensor([float(seed % 11 - 5)]).to(weight.dtype)
        found["input_scale"], found["input_offset"] = input_scale, input_offset
        found["deq_scale"] = input_scale.float() * scale[:, 0]
        found["quant_bias"] = (-int(input_offset) * stored.sum(1, dtype=torch.int32)).to(torch.int32)
    return {f"{name}.{suffix}": tensor for suffix, tensor in found.items()}


def write(directory: Path, config: dict[str, Any], rule: Rule, **tensors: torch.Tensor) -> Checkpoint:
    """Write a checkpoint whose linears are quantized as they are told, but for biases, which become zeros."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    made = random_tensors(config)
    for name in list(made):
        if name.endswith(".bias"):
            made[name].zero_()
    made |= tensors
    tags: dict[str, str] = {}
    for seed, name in enumerate(all_linears(parse_config(config, directory / "config.json"))):
        kind = FLOAT if re.search(r"(\.gate|shared_expert_gate)$", name) else rule(name)
        if kind is not FLOAT:
            parts = quantized(name, made.pop(f"{name}.weight"), kind, seed)
            made |= parts
            tags |= dict.fromkeys(parts, kind.value)
    save_file(made, str(directory / "quant_model_weight.safetensors" if tags else directory / "model.safetensors"))
    if tags:
        description = {"version": "1.0.0", "model_quant_type": max(tags.values(), key=list(tags.values()).count)}
        description |= {name: tags.get(name, "FLOAT") for name in made}
        (directory / "quant_model_description.json").write_text(json.dumps(description))
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = write(tmp_path_factory.mktemp("experts") / "m", *VARIANTS[name])
        return made[name]

    return get


def tokens_apart(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the largest difference of each token, of the largest logit."""
    largest: np.ndarray = np.abs(found - expected).max(1) / np.abs(expected).max()
    return largest


@NAMES
def test_logits_are_the_references(variant, name):
    checkpoint = variant(name)
    decoder = Decoder(checkpoint)
    with keys_and_values_in_bfloat16():
        expected = [decoder.logits(sample).numpy() for sample in SAMPLES]
    wide = "w8a16" in name or "patchwork" in name
    for isa in ISAS:
        model = native(checkpoint, isa)
        apart = [relative(logits_of(model, s), logits) for s, logits in zip(SAMPLES, expected, strict=True)]
        assert min(apart) <= (WIDE if wide else ROUNDING), (isa, apart)
        tokens = np.concatenate([tokens_apart(logits_of(model, s), e) for s, e in zip(SAMPLES, expected, strict=True)])
        # 16 bit may choose another expert for a token whose two last ones are closer than 2e-4.
        assert np.sort(tokens)[-2 if wide else -1] <= STEP, (isa, tokens)


@ISA
@pytest.mark.parametrize("name", ["mix", "patchwork"])
def test_generated_tokens_are_computed_as_the_reference_does(variant, name, isa):
    checkpoint = variant(name)
    model, decoder = native(checkpoint, isa), Decoder(checkpoint)
    for sample in SAMPLES[:2]:
        with keys_and_values_in_bfloat16():
            hidden = decoder.hidden_states([sample], origin="generated")
            expected = decoder.head()(hidden, "generated").numpy()
            as_prompt = decoder.logits(sample).numpy()
        assert relative(logits_of(model, sample, prompt_len=0), expected) <= STEP
        assert relative(as_prompt, expected) > STEP / 4  # or the comparison says nothing


@ISA
@NAMES
def test_any_cut_company_and_number_of_threads(variant, name, isa):
    """Steps of one token, of a few, of some and of many; then all of several sequences' at once."""
    checkpoint = variant(name)
    whole = logits_of(native(checkpoint, isa), TOKENS, prompt_len=70)
    for threads, cuts in ((1, [1]), (2, [2, 3, 11, 12]), (3, [8, 9, 17, 81]), (5, [64, 130]), (2, [*range(1, 150, 9)])):
        model = native(checkpoint, isa, threads)
        np.testing.assert_array_equal(logits_of(model, TOKENS, cuts, prompt_len=70), whole)
    model = native(checkpoint, isa, threads=2)
    model.allocate_cache(3 * 256)
    chunks = [Chunk(TOKENS[:n], 0, [2 * i, 2 * i + 1], 70, wants_all=True) for i, n in enumerate((150, 1, 33))]
    logits, _ = model.forward(chunks)
    np.testing.assert_array_equal(logits, np.concatenate([whole, whole[:1], whole[:33]]))


@ISA
@pytest.mark.parametrize("name", ["dynamic shared", "patchwork"])
def test_activations_that_overflow_overflow_no_integer(variant, tmp_path, name, isa):
    """And routers whose logits are no numbers still choose experts."""
    require_tokens_of_overflow(variant(name), tmp_path / "m", isa)


@ISA
def test_of_equal_experts_the_first_are_chosen(variant, tmp_path, isa):
    """The router does not tell them apart; others are damaged so that whoever reads them is found out."""
    config = qwen3(torch_dtype="float32")
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[:] = tensor[0]
    checkpoint = write(tmp_path / "m", config, everything(FLOAT), **tensors)
    for name in tensors:
        if re.search(r"experts\.[3-9]", name):
            tensors[name].fill_(1e30)
    other = write(tmp_path / "other", config, everything(FLOAT), **tensors)
    decoder = Decoder(checkpoint)
    with keys_and_values_in_bfloat16():
        expected = decoder.logits(TOKENS[:20]).numpy()
    for made in (checkpoint, other):
        assert relative(logits_of(native(made, isa), TOKENS[:20]), expected) <= ROUNDING


def apart(weight: np.ndarray) -> np.ndarray:
    """Return a copy in a mapping of its own, of which nothing has been read."""
    file = os.memfd_create("expert")
    os.write(file, weight.tobytes())
    memory = mmap.mmap(file, weight.nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    os.close(file)
    return np.frombuffer(memory, weight.dtype).reshape(weight.shape)


def residents() -> dict[int, bool]:
    """Return whether this process has read anything of a mapping, by where it begins."""
    found, begin = dict[int, bool](), 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if entry := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            begin = int(entry[1], 16)
        elif line.startswith("Rss:"):
            found[begin] = line.split()[1] != "0"
    return found


@pytest.mark.parametrize("name", ["float", "dynamic", "w8a16"])
def test_experts_that_nobody_chooses_are_never_read(variant, name):
    """Neither when the model is loaded nor in any step; those that are chosen are, so the test would notice."""
    checkpoint, read = variant(name), list[layers.Experts]()
    read_experts = layers.read_experts

    def read_apart(*args: Any) -> layers.Experts | None:
        found = read_experts(*args)
        if found is None:
            return None
        chosen = np.zeros_like(found.router.weight)
        experts = [layers.Expert(*(replace(part, weight=apart(part.weight)) for part in e)) for e in found.experts]
        read.append(replace(found, router=replace(found.router, weight=chosen), experts=tuple(experts)))
        return read[-1]

    with mock.patch.object(layers, "read_experts", read_apart):
        model = native(checkpoint, ISAS[-1], threads=2)
    found = residents()
    assert not any(found[part.weight.ctypes.data] for layer in read for expert in layer.experts for part in expert)
    logits_of(model, TOKENS[:60], [50, 51, 53])
    found = residents()
    for layer in read:
        for index, expert in enumerate(layer.experts):
            assert [found[part.weight.ctypes.data] for part in expert] == [index < 3] * 3


def test_the_bytes_of_a_token_are_those_of_its_experts(variant):
    checkpoint = variant("dynamic shared")
    config = checkpoint.config
    expert, shared = 3 * 48 * 32, 3 * 48 * 88
    attention = 48 * (64 + 2 * 32) + 64 * 48
    assert int8_elements(checkpoint) == 2 * (attention + 2 * expert + shared)
    total = native(checkpoint, ISAS[-1]).weight_bytes
    routed = config.num_layers * 6 * expert
    assert total - unread_bytes(checkpoint, 1) == pytest.approx(total - routed + routed * 2 / 6)
    assert unread_bytes(checkpoint, 100) == pytest.approx(0, abs=1e-6)
    assert unread_bytes(variant("float"), 1) > 0


def arguments(rows: int, columns: int) -> dict[str, Any]:
    nothing = np.zeros(0, np.float32)
    return {
        "kind": "dynamic", "weight": np.ones((rows, columns), np.int8), "scale": np.ones(rows, np.float32),
        "offset": nothing, "bias": nothing, "deq_scale": nothing, "quant_bias": np.zeros(0, np.int32),
        "inv_input_scale": 0.0, "input_offset": 0.0,
    }  # fmt: skip


def test_bad_shapes_are_refused(variant, checkpoint_of):
    core = native(variant("dynamic shared"), ISAS[-1])._model
    for expert, part, rows, columns, message in (
        (7, "gate", 32, 48, "expert: outside of the experts"),
        (-1, "gate", 32, 48, "expert: outside of the experts"),
        (0, "side", 32, 48, "part: expected gate, up or down"),
        (0, "gate", 31, 48, "expert: expected (intermediate size, hidden size)"),
        (0, "gate", 48, 32, "expert: expected (intermediate size, hidden size)"),
        (0, "down", 32, 48, "expert: expected (intermediate size, hidden size)"),
        (6, "gate", 32, 48, "expert: expected (intermediate size, hidden size)"),
        (0, "gate", 32, 48, "expert: expected gate, up and down once each"),
        (0, "up", 32, 48, "expert: expected gate, up and down once each"),
        (6, "down", 48, 88, "expert: expected gate, up and down once each"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            core.add_expert(0, expert, part, **arguments(rows, columns))
    with pytest.raises(IndexError):
        core.add_expert(2, 0, "gate", **arguments(32, 48))
    router = np.ones((6, 48), np.float32)
    with pytest.raises(ValueError, match="router: expected one a layer"):
        core.add_router(0, router)
    with pytest.raises(ValueError, match=re.escape("router: expected (experts, hidden size)")):
        native(variant("dynamic"), ISAS[-1])._model.add_router(1, router)
    with pytest.raises(ValueError, match="router: the model has no experts"):
        native(checkpoint_of("dynamic"), ISAS[-1])._model.add_router(1, router)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"experts": [4, 2, 32]}, "experts: expected how many"),
        ({"experts": [0, 2]}, "experts: expected 1 to 65536"),
        ({"experts": [4, 5]}, "experts of a token: expected 1 to all of them"),
        ({"experts": [4, 0]}, "experts of a token: expected 1 to all of them"),
        ({"expert_sizes": [0, 0]}, "expert_sizes, shared_sizes, expert_owners: expected rising cuts"),
        ({"expert_sizes": [0, 20, 40]}, "expert_sizes, shared_sizes, expert_owners: expected rising cuts"),
        ({"shared_sizes": [0, -1]}, "expert_sizes, shared_sizes, expert_owners: expected rising cuts"),
        ({"expert_owners": [0, 6]}, "expert_owners: expected cuts of the experts"),
    ],
)
def test_bad_sizes_are_refused(variant, changed, message):
    sizes = {"experts": [7, 3], "expert_sizes": [0, 40], "shared_sizes": [0, 0], "expert_owners": []}
    with (
        mock.patch("eightfold.model.native.load._expert_sizes", return_value={**sizes, **changed}),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        native(variant("dynamic"), ISAS[-1])


def test_a_missing_expert_is_refused(variant):
    """What the reader would have refused before."""
    read_experts = layers.read_experts

    def read_some(*args: Any) -> layers.Experts | None:
        found = read_experts(*args)
        return None if found is None else replace(found, experts=found.experts[:-1])

    with (
        mock.patch.object(layers, "read_experts", read_some),
        pytest.raises(ValueError, match="experts: expected gate, up and down of each"),
    ):
        native(variant("dynamic"), ISAS[-1])
