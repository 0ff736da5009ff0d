"""What a quantization is made of: the first line of its journal, and how two of them differ.

    version | layers | recipe | layout of the output | device | calibration samples (a digest) | files of the source

A weight file counts by its size and the CRC-32 of its bytes: of all in a small model, of the header and samples of
every tensor in a large one. Times do not count, so that a copy of the source is the same source. What enters the
output of an unfinished run must be one source to the last byte, so there a large one's times count too.

Ranks that share one model also have to agree on the bits of float32 results. Which instructions torch and its libraries
use depends on the CPU and on variables such as ATEN_CPU_CAPABILITY or MKL_CBWR; so besides the name of the instruction
set, results themselves are compared. Threads are not: they change nothing at the shapes here, see
docs/distributed_quantize.md.

Letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold import __version__
from eightfold.errors import shortlist
from eightfold.files import open_regular, write_json
from eightfold.format.directory import CONFIG_NAME, list_sidecars, resolve_auto_map
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.output import Output
from eightfold.format.safetensors import TensorInfo, checksum_of, checksum_of_parts
from eightfold.format.stored import StoredTensors
from eightfold.format.target import QUANTIZE
from eightfold.hub.names import origin_of
from eightfold.quant.outcome import samples_facts
from eightfold.quant.recipe import Recipe, Samples
from eightfold.quant.recipe_file import recipe_content

WHOLE_BYTES = 1 << 30  # up to this size, all of a source counts
_SAMPLE_BYTES = 4096  # of each of these many places of a tensor
_PLACES = 4

_TIMES_NAME = "times.json"

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
        "source": {_name_of(checkpoint, path): _file_identity(checkpoint, path) for path in source_files(checkpoint)},
        **({_ORIGIN: str(origin)} if origin else {}),
    }


def _is_large(checkpoint: StoredTensors) -> bool:
    return sum(path.stat().st_size for path in {info.file for info in checkpoint.tensors.values()}) > WHOLE_BYTES


def source_files(checkpoint: StoredTensors) -> list[Path]:
    """Return the files of a model that a quantization reads, sorted by name."""
    found = {info.file for info in checkpoint.tensors.values()}
    _, modules, _ = resolve_auto_map(checkpoint.config_raw, checkpoint.directory)
    return sorted({checkpoint.directory / CONFIG_NAME, *found, *list_sidecars(checkpoint.directory), *modules})


def _name_of(checkpoint: StoredTensors, path: Path) -> str:
    """Return a file's path inside the model, wherever that is: names alone may be the same in two folders."""
    return path.relative_to(checkpoint.directory).as_posix()


def _file_identity(checkpoint: StoredTensors, path: Path) -> list[int]:
    """Return a file's size and the CRC-32 of what counts of it."""
    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        infos = [info for info in checkpoint.tensors.values() if info.file == path]
        if not infos or not _is_large(checkpoint):
            return [size, checksum_of(file, 0, size)]
        return [size, checksum_of_parts(checksum_of(file, begin, end) for begin, end in _sampled_spans(infos))]
    finally:
        os.close(file)


def _sampled_spans(infos: Sequence[TensorInfo]) -> Iterator[tuple[int, int]]:
    yield 0, min((info.begin for info in infos), default=0)
    for info in infos:
        for place in range(_PLACES):
            begin = info.begin + max(0, info.nbytes - _SAMPLE_BYTES) * place // (_PLACES - 1)
            yield begin, min(begin + _SAMPLE_BYTES, info.end)


def _file_times(checkpoint: StoredTensors) -> dict[str, int]:
    """Return when the weight files of a large model, of which identity() sees samples, were last changed."""
    files = {info.file for info in checkpoint.tensors.values()} if _is_large(checkpoint) else set()
    return {_name_of(checkpoint, path): path.stat().st_mtime_ns for path in files}


def keep_times(checkpoint: StoredTensors, output: Output) -> None:
    """Note for a new start of this run when the weight files were last changed."""
    write_json(output.work / _TIMES_NAME, _file_times(checkpoint))


def require_same_times(checkpoint: StoredTensors, output: Output) -> None:
    """Refuse a large weight file that has changed since the run began, or begin anew where that is wished.

    Raises:
        OutputError: one has changed.
    """
    try:
        before = json.loads((output.work / _TIMES_NAME).read_text())
    except (OSError, ValueError):
        return  # removed at the end: nothing more is read of the source's weights
    changed = [name for name, time in _file_times(checkpoint).items() if before.get(name) != time]
    if changed and not output.overwrite:
        raise output.begun_otherwise([f"source: {shortlist(changed, 3)} changed since"], "a model begun")
    if changed:
        output.restart()


def differences(old: Entry, new: Entry) -> list[str]:
    """Return what differs between two first lines, `option: old -> new` each."""
    before, after = _facts(old), _facts(json.loads(json.dumps(new)))
    names = list({**before, **after})
    found = [
        f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]
    old_files, new_files = old.get("source", {}), new.get("source", {})
    changed = [name for name in sorted({**old_files, **new_files}) if old_files.get(name) != new_files.get(name)]
    if changed and old.get(_ORIGIN) != new.get(_ORIGIN):
        found.append(f"source: {_short_origin(old)} -> {_short_origin(new)}")
    for name in changed[:3]:
        change = (
            "has changed" if name in old_files and name in new_files else "is new" if name in new_files else "is gone"
        )
        found.append(f"source: {name} {change}")
    if len(changed) > 3:
        found.append(f"and {len(changed) - 3} more files of the source")
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
