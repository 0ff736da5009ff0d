"""Small random models of every kind, as the native core and as the reference see them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.model.reference import attention
from eightfold.model.reference.attention import FloatAttention, attend
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model

ISAS = core.extension.available_isas()

W8A8, DYNAMIC, MIX, W8A16, FLOAT = (
    QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX, QuantType.W8A16, QuantType.FLOAT
)  # fmt: skip

# Nothing is a multiple of anything.
ODD = tiny_config(
    hidden_size=33, intermediate_size=77, vocab_size=321, head_dim=6, num_attention_heads=5, num_key_value_heads=1
)
# More query heads of a key head than one call of the attention kernel takes.
MANY_HEADS = tiny_config(num_attention_heads=27, num_key_value_heads=1, head_dim=4)
LAYERED_WINDOW = tiny_config("Qwen2ForCausalLM", sliding_window=5, use_sliding_window=True, max_window_layers=1)


@dataclass(frozen=True)
class Variant:
    """A model: its config, how it is quantized (None: not), and how dynamic linears read a token."""

    recipe: Recipe | None = None
    config: dict[str, Any] = field(default_factory=tiny_config)
    dynamic: str = "asymmetric"


MIXTURE = Recipe(
    W8A8, modules=(("*.q_proj", DYNAMIC), ("*.up_proj", W8A16), ("*.0.mlp.down_proj", MIX)), keep_float=("*.v_proj",)
)

VARIANTS = {
    "float32": Variant(config=tiny_config(torch_dtype="float32")),
    "float16": Variant(config=tiny_config(torch_dtype="float16")),
    "bfloat16": Variant(),
    "float tied": Variant(config=tiny_config(tie_word_embeddings=True)),
    "float bias": Variant(config=tiny_config(attention_bias=True, mlp_bias=True)),
    "float odd": Variant(config={**ODD, "torch_dtype": "float32"}),
    "float many heads": Variant(config=MANY_HEADS),
    "float window": Variant(config=tiny_config("MistralForCausalLM", sliding_window=5)),
    "w8a16": Variant(Recipe(W8A16)),
    "w8a16 asymmetric": Variant(Recipe(W8A16, weight_symmetric=False)),
    "w8a16 odd": Variant(Recipe(W8A16, weight_symmetric=False), ODD),
    "w8a16 bias": Variant(Recipe(W8A16, weight_symmetric=False), tiny_config(attention_bias=True, mlp_bias=True)),
    "w8a8": Variant(Recipe(W8A8)),
    "w8a8 odd": Variant(Recipe(W8A8, quantize_lm_head=True), ODD),
    "w8a8 tied": Variant(Recipe(W8A8), tiny_config(tie_word_embeddings=True)),
    "w8a8 float16": Variant(Recipe(W8A8), tiny_config(torch_dtype="float16")),
    "w8a8 bias": Variant(Recipe(W8A8), tiny_config("Qwen2ForCausalLM")),
    "w8a8 window": Variant(Recipe(W8A8), LAYERED_WINDOW),
    "w8a8 qk-norm": Variant(Recipe(W8A8), tiny_config("Qwen3ForCausalLM")),
    "w8a8 smooth": Variant(Recipe(W8A8, anti_outlier=AntiOutlier.M1)),
    "w8a8 levels": Variant(Recipe(W8A8, disable_level=3, exact_levels=True)),
    "dynamic": Variant(Recipe(DYNAMIC)),
    "dynamic symmetric": Variant(Recipe(DYNAMIC, quantize_lm_head=True), dynamic="symmetric"),
    "dynamic odd": Variant(Recipe(DYNAMIC), ODD),
    "dynamic bias": Variant(Recipe(DYNAMIC), tiny_config("Qwen2ForCausalLM")),
    "mix": Variant(Recipe(MIX, quantize_lm_head=True)),
    "mix bias": Variant(Recipe(MIX), tiny_config("Qwen2ForCausalLM")),
    "mixture": Variant(MIXTURE),
    "faquant": Variant(Recipe(W8A8, fa_quant=True)),
    "faquant odd": Variant(Recipe(W8A16, fa_quant=True), ODD),
    "faquant many heads": Variant(Recipe(DYNAMIC, fa_quant=True), MANY_HEADS),
    "faquant window": Variant(Recipe(W8A8, fa_quant=True), tiny_config("MistralForCausalLM", sliding_window=5)),
    "faquant one layer": Variant(Recipe(W8A8, fa_quant=True, fa_amp=1), tiny_config("Qwen3ForCausalLM")),
    "c8": Variant(Recipe(W8A16, kv_int8=True)),
    "c8 asymmetric": Variant(Recipe(W8A16, kv_int8=True, kv_symmetric=False)),
    "c8 odd": Variant(Recipe(W8A8, kv_int8=True, kv_symmetric=False), ODD),
    "c8 window": Variant(Recipe(W8A8, kv_int8=True), LAYERED_WINDOW),
}


def write_variant(directory: Path, variant: Variant) -> Checkpoint:
    """Write a variant's checkpoint."""
    source = write_model(directory / "float", variant.config, tokenizer=False)
    if variant.recipe is None:
        return Checkpoint.open(source)
    quantize_checkpoint(source, directory / "out", variant.recipe, token_samples())
    return Checkpoint.open(directory / "out")


def native(checkpoint: Checkpoint, isa: str, threads: int = 1, **options: Any) -> NativeModel:
    """Load a checkpoint on one instruction set."""
    with mock.patch.dict(os.environ, {core.ISA_VARIABLE: isa}):
        model = load_model(checkpoint, threads=threads, **options)
    assert (model.isa, model.threads) == (isa, threads)
    return model


def logits_of(
    model: NativeModel,
    token_ids: Sequence[int],
    cuts: Sequence[int] = (),
    prompt_len: int | None = None,
    pages: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the logits of all tokens of one sequence, (T, V), in pieces that begin at 0 and at each cut."""
    count = -(-len(token_ids) // PAGE)
    if pages is None:
        model.allocate_cache(len(token_ids))
        pages = range(count)
    found = []
    for begin, end in zip((0, *cuts), (*cuts, len(token_ids)), strict=True):
        used = list(pages)[: -(-end // PAGE)]
        prompt = len(token_ids) if prompt_len is None else prompt_len
        logits, best = model.forward([Chunk(token_ids[begin:end], begin, used, prompt, wants_all=True)])
        np.testing.assert_array_equal(best, logits.argmax(1))
        found.append(logits.copy())
    return np.concatenate(found)


def answer_of(
    model: NativeModel, prompt_ids: Sequence[int], count: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """Return a greedy answer that nothing else runs beside, without its stop token."""
    model.allocate_cache(len(prompt_ids) + count)
    tokens, at, chosen = list(prompt_ids), 0, list[int]()
    while len(chosen) < count:
        piece = tokens[at:] if model.float_prompts else tokens[at : at + 512]
        end = at + len(piece)
        used = range(-(-end // PAGE))
        _, best = model.forward([Chunk(piece, at, used, len(prompt_ids), wants=end == len(tokens), logits=False)])
        at = end
        if end == len(tokens):
            if int(best[0]) in stop_ids:
                break
            chosen.append(int(best[0]))
            tokens.append(chosen[-1])
    return chosen


def _in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


@contextmanager
def keys_and_values_in_bfloat16() -> Iterator[None]:
    """Let the reference round float keys and values as the core's cache does."""
    call = FloatAttention.__call__

    def rounding_call(self, q, k, v, cache, prompt_len):
        return call(self, q, _in_bfloat16(k), _in_bfloat16(v), cache, prompt_len)

    with mock.patch.object(FloatAttention, "__call__", rounding_call):
        yield


@contextmanager
def fresh_ones_in_bfloat16() -> Iterator[None]:
    """The same for prompts in mode `mindie`, whatever the cache holds."""

    def rounding_attend(q, k, v, window, scoring):
        return attend(q, _in_bfloat16(k), _in_bfloat16(v), window, scoring)

    with mock.patch.object(attention, "attend", rounding_attend):
        yield


def require_tokens_of_overflow(checkpoint: Checkpoint, directory: Path, isa: str) -> None:
    """Let a copy of a model, in `directory`, compute on activations that overflow: it still has to find tokens."""
    shutil.copytree(checkpoint.directory, directory)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for gain in [tensor for tensor in tensors if tensor.endswith("layernorm.weight")]:
            tensors[gain].fill_(3e38)
        path.chmod(0o600)
        save_file(tensors, path)
    model = native(Checkpoint.open(directory), isa)
    model.allocate_cache(2 * PAGE)
    tokens = [*range(PAGE + 2)]
    for begin, end in ((0, PAGE + 1), (PAGE + 1, PAGE + 2)):  # a prompt, and what is generated
        chunk = Chunk(tokens[begin:end], begin, range(2), PAGE + 1, wants_all=True, logits=False)
        _, best = model.forward([chunk])
        assert ((best >= 0) & (best < model.config.vocab_size)).all()
