"""What a quantization is made of: the first line of its journal, and how two of them differ.

    version | layers | recipe | layout of the output | device | calibration samples (a digest) | files of the source

What counts of the source: format/source.py.

Ranks that share one model also have to agree on the bits of float32 results. Which instructions torch and its libraries
use depends on the CPU and on variables such as ATEN_CPU_CAPABILITY or MKL_CBWR; so besides the name of the instruction
set, results themselves are compared. Threads are not: they change nothing at the shapes here, see
docs/distributed_quantize.md.

Letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eightfold import __version__
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.source import source_differences, source_facts
from eightfold.format.stored import StoredTensors
from eightfold.format.target import QUANTIZE
from eightfold.hub.names import origin_of
from eightfold.quant.outcome import samples_facts
from eightfold.quant.recipe import Recipe, Samples
from eightfold.quant.recipe_file import recipe_content

# (T, K, N): one row, as many as divide evenly and as do not, and sums long enough to be cut into blocks.
_SHAPES = ((1, 64, 64), (64, 576, 192), (257, 1536, 64), (130, 4096, 128), (64, 14336, 32))


_ORIGIN = "origin"  # said for people: what decides is what the files hold


def identity(
    checkpoint: StoredTensors,
    recipe: Recipe,
    samples: Samples,
    anti_samples: Samples = (),
    *,
    layout: Mapping[str, Any],
    device: str = "cpu",
) -> Entry:
    """Return the first line of the journal: all that decides what the output is."""
    origin = origin_of(checkpoint.directory)
    return {
        "format": FORMAT,
        "command": QUANTIZE,
        "eightfold": __version__,
        "layers": checkpoint.num_layers,
        "recipe": recipe_content(recipe),
        "output": dict(layout),
        "device": device,
        "calibration": samples_facts(samples),
        **({"anti_calibration": samples_facts(anti_samples)} if anti_samples else {}),
        "source": source_facts(checkpoint),
        **({_ORIGIN: str(origin)} if origin else {}),
    }


def differences(old: Entry, new: Entry) -> list[str]:
    """Return what differs between two first lines, `option: old -> new` each."""
    before, after = _facts(old), _facts(json.loads(json.dumps(new)))
    names = list({**before, **after})
    found = [
        f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]
    changed = source_differences(old, new)
    if changed and old.get(_ORIGIN) != new.get(_ORIGIN):
        found.append(f"source: {_short_origin(old)} -> {_short_origin(new)}")
    found += changed
    is_same = _without_origin(old) == _without_origin(json.loads(json.dumps(new)))
    return found or ([] if is_same else ["something"])


def _short_origin(head: Entry) -> str:
    name, _, revision = str(head.get(_ORIGIN, "a directory")).partition("@")
    return f"{name}@{revision[:12]}" if revision else name


def _without_origin(head: Entry) -> Entry:
    return {name: value for name, value in head.items() if name != _ORIGIN}


def _facts(head: Entry) -> dict[str, str]:
    """Return what a first line says but for the source, by names that a user knows."""
    options = {**head.get("recipe", {}), **head.get("output", {})}
    return {
        "journal": str(head.get("format")),
        "version of eightfold": str(head.get("eightfold")),
        "`device`": str(head.get("device")),
        **{
            "modules of the recipe" if key == "modules" else f"`{key}`": _shown(value) for key, value in options.items()
        },
        **({"`max_kl`": str(head["asked"]["max_kl"])} if "asked" in head else {}),
        "calibration data": _samples(head.get("calibration", {})),
        "`anti_calib`": _samples(head["anti_calibration"]) if "anti_calibration" in head else "none",
    }


def _samples(facts: dict[str, Any]) -> str:
    digest = str(facts.get("token_ids_sha256"))[:8]
    return f"{facts.get('samples')} samples of {facts.get('tokens')} tokens ({digest})"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def float_facts() -> dict[str, str]:
    """Return what decides the bits of float32 results here, by names that a user is told."""
    return {
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "float32 arithmetic": f"{zlib.crc32(_results().numpy().tobytes()):08x}",
    }


def _results() -> Tensor:
    """Return products, and what else a decoder computes, in one vector."""
    x_TK, heads = _spread(64, 1024), _spread(1, 4, 64, 64)
    results = [
        *(torch.nn.functional.linear(_spread(T, K), _spread(N, K)) for T, K, N in _SHAPES),
        torch.softmax(x_TK, -1),
        torch.nn.functional.silu(x_TK),
        (x_TK * x_TK).mean(-1).rsqrt(),
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    ]
    return torch.cat([result.flatten() for result in results])


def _spread(*shape: int) -> Tensor:
    """Return numbers between -1 and 1, by integer arithmetic, so that they are the same anywhere."""
    numbers = torch.arange(torch.Size(shape).numel(), device="cpu") * 2654435761 % 2**32
    return (numbers.to(torch.float64) / 2**31 - 1).to(torch.float32).reshape(shape)
