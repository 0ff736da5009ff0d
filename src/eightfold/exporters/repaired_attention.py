"""Parameters of quantized attention and of an int8 cache, where a loader has these; else they are left out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eightfold.check.directory import RawDirectory
from eightfold.errors import CheckpointError
from eightfold.exporters.repaired import Repair, Stored, Written, narrowed
from eightfold.format.shards import PlannedTensor
from eightfold.model.layers import require_parameters
from eightfold.scheme import FA_TENSORS, KV_OFFSET, KV_TENSORS, TensorSpec


def add_cache(d: RawDirectory, stored: Stored, target: str, out: Repair) -> None:
    """Add the int8 cache of every layer that has one."""
    if not any(map(stored.has, d.kv_tensors())):
        return
    names, scale = d.model.names, KV_TENSORS[0].suffix
    prefixes = [names.layer(layer_idx) for layer_idx in range(d.model.num_layers)]
    layers = [(prefix + names.key, prefix + names.value) for prefix in prefixes]
    found = {modules: [stored.has(f"{module}.{scale}") for module in modules] for modules in layers}
    whole = [modules for modules, scales in found.items() if all(scales)]
    halves = [modules[0] for modules, scales in found.items() if any(scales) and not all(scales)]
    what = "the int8 key/value cache is left out"
    if target == "mindie" and any(map(stored.has, d.fa_tensors())):
        out.lose(f"{what}: quantized attention has its own")
    elif target == "mindie" and len(whole) < len(layers):
        out.lose(f"{what}: MindIE has it in all layers or in none")
    elif d.nonzero(d.kv_tensors(), KV_OFFSET):
        out.lose(f"{what}: {target} misreads its offsets")
    else:
        if halves:
            out.lose(f"{what}: a scale of keys or values is missing", *halves)
        for modules in whole:
            for module in modules:
                for spec in KV_TENSORS:
                    _add(module, spec, spec.shape_for(C=d.model.kv_size), stored, out)


def add_attention(d: RawDirectory, stored: Stored, target: str, out: Repair) -> None:
    """Add quantized attention, which loaders have in all layers or in none."""
    if not any(map(stored.has, d.fa_tensors())):
        return
    names, heads = d.model.names, {"H": d.model.num_heads, "G": d.model.num_kv_heads}
    modules = [names.layer(layer_idx) + names.attention for layer_idx in range(d.model.num_layers)]
    needed = [f"{module}.{spec.suffix}" for module in modules for spec in FA_TENSORS if not spec.optional]
    offsets = [f"{module}.{spec.suffix}" for module in modules for spec in FA_TENSORS if spec.optional]
    what = "quantized attention (FAQuant) is left out"
    if target == "vllm-ascend":
        out.lose(f"{what}: vllm-ascend has none of this kind")
    elif d.absent(needed):
        out.lose(f"{what}: MindIE has it in all layers or in none")
    elif d.nonzero(offsets):
        out.lose(f"{what}: MindIE computes it without offsets")
    else:
        for module in modules:
            for spec in FA_TENSORS:
                _add(module, spec, spec.shape_for(**heads), stored, out)


def _add(module: str, spec: TensorSpec, shape: tuple[int, ...], stored: Stored, out: Repair) -> None:
    """Add one of the parameters; offsets that no file has are zeros."""
    name = f"{module}.{spec.suffix}"
    planned = PlannedTensor(name, spec.dtype.resolve(out.dtype), shape)
    if not stored.has(name):
        out.repair(f"{spec.suffix.rpartition('.')[2]} of zeros is made", module)
        values = np.zeros(shape, np.float32)
    else:
        values = stored.values(name)
        require_parameters(name, values, stored.tensors[name].file)
        if values.size != np.prod(shape):
            values = _by_head(name, values, shape, stored, out)
    made = narrowed(values.reshape(shape), planned.dtype)
    out.tensors[name] = Written(planned, spec.tag, lambda: [made])


def _by_head(
    name: str, values: NDArray[np.float32], shape: tuple[int, ...], stored: Stored, out: Repair
) -> NDArray[np.float32]:
    """Return a value for each head of one for each channel, where these are equal."""
    rows = values.reshape(shape[0], -1) if values.size % shape[0] == 0 else values.reshape(1, -1)
    if len(rows) != shape[0] or np.any(rows != rows[:, :1]):
        info = stored.tensors[name]
        raise CheckpointError(name, where=info.file, got=list(info.shape), expected=list(shape))
    out.repair("attention has a value for each head, not for each channel", name)
    return rows[:, 0]
