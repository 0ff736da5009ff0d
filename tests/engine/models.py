"""Small models for the engine, what each answers alone, and a way to run many requests at once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import CompletionOutput, RequestOutput
from eightfold.engine.sampler import Sampled, Sampler, choose_all
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, NativeModel
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from tests.conftest import tiny_config, token_samples, write_model
from tests.native.models import DYNAMIC, MIX, W8A8, W8A16, answer_of

CONTEXT = 1024
EOS = 257

RECIPES: dict[str, Recipe | None] = {
    "float": None,
    "w8a8": Recipe(W8A8),
    "mix": Recipe(MIX),
    "faquant": Recipe(DYNAMIC, fa_quant=True),
    "c8": Recipe(W8A16, kv_int8=True),
}

# Mixtures of experts, which are quantized by the names of their tensors.
SPARSE: dict[str, tuple[str, Recipe]] = {
    "qwen3 experts": ("Qwen3MoeForCausalLM", Recipe(DYNAMIC)),
    "mixtral": ("MixtralForCausalLM", Recipe(W8A16)),
}


@dataclass
class Small:
    """A checkpoint, and what its model answers when nothing else runs."""

    directory: Path
    alone: NativeModel
    known: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    def answer(self, prompt: Sequence[int], count: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        """Return the greedy answer of the native model."""
        key = (tuple(prompt), count, stop_ids)
        if key not in self.known:
            self.known[key] = answer_of(self.alone, prompt, count, stop_ids)
        return self.known[key]

    def engine(self, **limits: Any) -> Engine:
        """Load an engine."""
        return Engine.load(self.directory, config(**limits))

    @property
    def page_bytes(self) -> int:
        """Memory of a block."""
        return self.alone.page_bytes


def config(**limits: Any) -> EngineConfig:
    """Return limits as tests want them: few sequences, small steps, `pages` of memory."""
    return EngineConfig(**{"max_num_seqs": 8, "max_batched_tokens": 64, "threads": 1, **limits})


def make(directory: Path, name: str) -> Small:
    """Write a model of one layer and load it."""
    sizes = {"max_position_embeddings": CONTEXT, "hidden_size": 32, "intermediate_size": 48}
    architecture, recipe = SPARSE[name] if name in SPARSE else ("LlamaForCausalLM", RECIPES[name])
    source = write_model(directory / "float", tiny_config(architecture, **sizes))
    if name in SPARSE:
        assert recipe is not None
        quantize_by_name(plan_by_name(source, recipe), directory / "out")
        source = directory / "out"
    elif recipe is not None:
        quantize_checkpoint(source, directory / "out", recipe, token_samples())
        source = directory / "out"
    return Small(source, load_model(Checkpoint.open(source), threads=1))


def greedy(count: int, **changes: Any) -> SamplingParams:
    """Return the parameters of an answer of so many of the likeliest tokens."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **changes})


def tokens(rng: random.Random, count: int) -> list[int]:
    """Return random tokens that the tokenizer knows as bytes."""
    return [rng.randrange(256) for _ in range(count)]


def step(engine: Engine) -> list[RequestOutput]:
    """Run a step and prove every count before and after it."""
    outputs = engine.step()
    engine.check_integrity()
    return outputs


def run(engine: Engine) -> dict[str, list[CompletionOutput]]:
    """Run to the end; return the answers of each request, by index."""
    found: dict[str, list[CompletionOutput]] = {}
    while engine.has_unfinished:
        for output in step(engine):
            if output.finished:
                found[output.request_id] = output.outputs
    assert_idle(engine)
    return found


def assert_idle(engine: Engine) -> None:
    """Nothing is left: every block is free or cached."""
    engine.check_integrity()
    stats = engine.stats
    assert (stats.waiting, stats.running, stats.blocks_used) == (0, 0, 0)
    assert engine.blocks.available == engine.blocks.total


def answers(engine: Engine, requests: Mapping[str, tuple[Sequence[int], SamplingParams]]) -> dict[str, list[list[int]]]:
    """Answer requests that arrive at once; return the tokens of each request's answers."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    return {request_id: [each.token_ids for each in outputs] for request_id, outputs in run(engine).items()}


def choose(one: Sampler, logits: np.ndarray | None, best: int) -> Sampled:
    """Choose the next token of a single answer from its logits (V,); None where it needs none."""
    rows = np.empty((0, 0), np.float32) if logits is None else logits[None]
    return choose_all([one], rows, [best])[0]


def pages_for(lengths: Iterable[int]) -> int:
    """Return the blocks that sequences of these lengths take."""
    return sum(-(-length // PAGE) for length in lengths)
