"""Small quantized directories to take apart: made once for each scheme and dtype, copied for each test."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eightfold.check import Report
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import SCHEMES
from tests.conftest import tiny_config, token_samples, write_model

LAYERS = ("model.layers.0", "model.layers.1")
Q, K, V, O = (f"{LAYERS[0]}.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"{LAYERS[0]}.mlp.{name}_proj" for name in ("gate", "up", "down"))
NORM = f"{LAYERS[0]}.input_layernorm"
NORMS = [f"{layer}.{name}" for layer in LAYERS for name in ("input_layernorm", "post_attention_layernorm")]
NORMS.append("model.norm")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 12  # head_dim is hidden_size / heads, as MindIE takes it

_MADE = tempfile.TemporaryDirectory(prefix="check")
atexit.register(_MADE.cleanup)


@functools.cache
def made(scheme: str, dtype: str, architecture: str, options: tuple[tuple[str, Any], ...]) -> Path:
    """Return a directory that no test may change."""
    name = re.sub(r"[^\w.-]+", "_", "-".join([scheme, dtype, architecture, *(f"{k}_{v}" for k, v in options)]))
    config = tiny_config(architecture, head_dim=HEAD_DIM, torch_dtype=dtype)
    if architecture == "LlamaForCausalLM" and dict(options).get("attention_bias"):
        config["attention_bias"] = True
    source = write_model(Path(_MADE.name) / f"{name}-float", config)
    asymmetric = dict(options).get("asymmetric", False)
    modules = tuple((pattern, SCHEMES[kind]) for pattern, kind in dict(options).get("modules", ()))
    recipe = Recipe(SCHEMES[scheme], weight_symmetric=not asymmetric, modules=modules)
    quantize_checkpoint(source, Path(_MADE.name) / name, recipe, token_samples())
    return Path(_MADE.name) / name


class Toy:
    """A quantized directory that a test may change."""

    def __init__(
        self,
        path: Path,
        scheme: str = "w8a8",
        dtype: str = "float16",
        architecture: str = "LlamaForCausalLM",
        **options: Any,
    ) -> None:
        self.path = path / "toy"
        shutil.copytree(made(scheme, dtype, architecture, tuple(options.items())), self.path)
        self.weights = next(self.path.glob("*.safetensors"))
        self.description = self.path / "quant_model_description.json"

    def load(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors."""
        return load_file(str(self.weights))

    def change(self, tensors: Mapping[str, torch.Tensor | None], label: str | None = None) -> Toy:
        """Set or (None) remove tensors; with a label, enter them into the description too."""
        merged = {name: tensor for name, tensor in {**self.load(), **tensors}.items() if tensor is not None}
        self.weights.unlink()
        save_file(merged, str(self.weights))
        return self.describe(dict.fromkeys(tensors, label)) if label else self

    def remove(self, *names: str) -> Toy:
        """Remove tensors and their entries."""
        return self.change(dict.fromkeys(names)).describe(dict.fromkeys(names, ...))

    def describe(self, entries: Mapping[str, Any]) -> Toy:
        """Set or (...) remove entries of the description."""
        return self._edit(self.description, entries)

    def configure(self, **keys: Any) -> Toy:
        """Set or (...) remove keys of config.json."""
        return self._edit(self.path / "config.json", keys)

    def set_tokenizer(self, name: str = "tokenizer_config.json", **keys: Any) -> Toy:
        """Set or (...) remove keys of one of the tokenizer's files."""
        return self._edit(self.path / name, keys)

    def _edit(self, path: Path, entries: Mapping[str, Any]) -> Toy:
        content = {**json.loads(path.read_text()), **entries}
        path.unlink()
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        return self

    def keep_float(self, *linears: str) -> Toy:
        """Store linears as FLOAT, as a quantizer that leaves them out does."""
        stored = self.load()
        names = [name for name in stored if name.rpartition(".")[0] in linears and not name.endswith("weight")]
        self.remove(*names)
        weights = {f"{linear}.weight": stored[f"{linear}.weight"].half() for linear in linears}
        return self.change(weights, "FLOAT")

    def add_kv_cache(self, offset: float = 0.0, keys: tuple[str, ...] = ("kv_quant_type", "kv_cache_type")) -> Toy:
        """Add an int8 key/value cache to every layer."""
        tensors = {}
        for layer in LAYERS:
            for linear in ("k_proj", "v_proj"):
                name = f"{layer}.self_attn.{linear}.kv_cache_"
                tensors[f"{name}scale"] = torch.full((KV_HEADS * HEAD_DIM,), 0.02)
                tensors[f"{name}offset"] = torch.full((KV_HEADS * HEAD_DIM,), offset)
        return self.change(tensors, "C8").describe(dict.fromkeys(keys, "C8"))

    def add_attention(self, columns: int = 1, offset: torch.Tensor | None = None, kind: str = "FAQuant") -> Toy:
        """Add quantized attention to every layer."""
        tensors = {}
        for layer in LAYERS:
            for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                zero = torch.zeros(1, dtype=torch.int8) if offset is None else offset
                tensors[f"{layer}.self_attn.fa_{part}.scale"] = torch.full((heads, columns), 0.02)
                tensors[f"{layer}.self_attn.fa_{part}.offset"] = zero.repeat(heads, columns)
        return self.change(tensors, "FAQuant").describe({"fa_quant_type": kind})

    def add_norm_biases(self, value: float = 0.0, older: bool = False) -> Toy:
        """Add what outlier suppression adds to the norms."""
        below = ".module" if older else ""
        tensors = {f"{norm}{below}.bias": torch.full((48,), value) for norm in NORMS}
        if older:
            tensors.update({f"{norm}.module.weight": torch.ones(48) for norm in NORMS})
        return self.change(tensors, "FLOAT")


Change = Callable[[Toy], object]


@dataclass(frozen=True)
class Case:
    """A directory with one thing changed, and every finding that this must give."""

    title: str
    change: Change
    expected: frozenset[str]  # of `rule verdict`, the rule without the loader's name
    options: dict[str, Any]  # of Toy

    def __str__(self) -> str:
        return self.title


def case(title: str, change: Change, *expected: str, **options: Any) -> Case:
    """Return a Case; without an expectation nothing may fire."""
    return Case(title, change, frozenset(expected), options)


def findings(report: Report) -> set[str]:
    """Return what fired, as `rule verdict`."""
    return {f"{f.rule.removeprefix(f'{report.loader}.')} {f.verdict.value}" for f in report.findings}


def all_of(*changes: Change) -> Change:
    """Return several changes as one."""
    return lambda toy: [change(toy) for change in changes]


def times(factor: float, *names: str) -> Change:
    """Multiply tensors."""
    return lambda toy: toy.change({name: toy.load()[name] * factor for name in names})


def store_as(dtype: torch.dtype, *names: str) -> Change:
    """Cast tensors."""
    return lambda toy: toy.change({name: toy.load()[name].to(dtype) for name in names})


def fill(value: float, shape: tuple[int, ...], *names: str) -> Change:
    """Set tensors to one value, and enter those that are new as FLOAT."""

    def change(toy: Toy) -> None:
        new = [name for name in names if name not in toy.load()]
        toy.change({name: torch.full(shape, value) for name in names}).describe(dict.fromkeys(new, "FLOAT"))

    return change


def rename_description(name: str) -> Change:
    """Give the description another name."""
    return lambda toy: toy.description.rename(toy.path / name)


def write(name: str, text: str) -> Change:
    """Write a file."""
    return lambda toy: (toy.path / name).write_text(text)


def set_merges(toy: Toy) -> None:
    """Write merges as newer tokenizers do."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    toy.set_tokenizer("tokenizer.json", model=model, added_tokens=[], post_processor=None)


def remove_tokenizer(toy: Toy) -> None:
    """Take the tokenizer out of the folder."""
    for path in toy.path.glob("tokenizer*"):
        path.unlink()


def leave_float_shard(toy: Toy) -> None:
    """Leave a weight of the float model in the folder, in a file that comes before the quantized one."""
    save_file({f"{Q}.weight": toy.load()[f"{Q}.weight"].half()}, str(toy.path / "model.safetensors"))
