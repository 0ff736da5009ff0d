"""What vllm-ascend (modelslim quantization) does with a directory, as a list of rules in the order it runs.

    description -> for each module of vLLM's model: scheme by its label -> parameters -> every stored tensor is copied

q, k, v are one module qkv_proj, gate and up are gate_up_proj. A stored tensor must find a parameter, and is cast to
its type. What vLLM itself does is from reading its code and marked so.

Sources: vllm_ascend/quantization/{modelslim_config,method_adapters}.py, quantization/methods, ops/layernorm.py,
patch/worker; vllm/model_executor: models/llama.py, layers/linear.py, model_loader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from eightfold.check.directory import NONZERO, RawDirectory, cast, differ, entries, head_and_embedding
from eightfold.check.findings import Finding, Outcome, Report, Summary, found
from eightfold.config import CONFIG_DTYPES, DType, load_json_object
from eightfold.errors import EightfoldError, one_of
from eightfold.families import EMBEDDING, KEY, LM_HEAD, LinearShape, layer_of
from eightfold.format.description import SHORT_NAME
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    FA_K,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_OFFSET,
    KV_SCALE,
    LINEAR_TENSORS,
    QUANT_BIAS,
    SCALE,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    linear_tensors,
    weight_name,
)

LOADER = "vllm-ascend"

_FLOAT = QuantType.FLOAT.value
_CHECKED = {kind.value: kind for kind in LINEAR_TENSORS}  # with FLOAT
_REGISTERED = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16", "W4A8_DYNAMIC", "W8A8_MIX", "W4A4_FLATQUANT_DYNAMIC")
_REGISTERED_PREFIXES = ("W8A8_MXFP", "W4A8_MXFP", "W4A4_MXFP", "W4A16_MXFP", "W8A8FP8", "FP8")  # float8 and mx types

# Parameters that may be absent from the files although the loader computes none of them, and what then is wrong.
_MAY_BE_ABSENT = frozenset({WEIGHT_SCALE, WEIGHT_OFFSET, QUANT_BIAS, DEQ_SCALE, BIAS})
_USED = {
    QuantType.FLOAT: {BIAS},
    QuantType.W8A8: {QUANT_BIAS, DEQ_SCALE},
    QuantType.W8A8_DYNAMIC: {WEIGHT_SCALE, BIAS},
    QuantType.W8A8_MIX: {QUANT_BIAS, DEQ_SCALE, WEIGHT_SCALE, BIAS},
    QuantType.W8A16: {WEIGHT_SCALE, WEIGHT_OFFSET, BIAS},
}
_STATIC = (QuantType.W8A8, QuantType.W8A8_MIX)

_INDEX = "model.safetensors.index.json"  # the one name that vLLM looks for
_NORM_BIAS = "norm.bias"  # what vllm-ascend looks for in the description's keys


def check(d: RawDirectory) -> Report:
    """Run every rule over a directory."""
    seen = d.only(_files(d))
    findings = [*index(d), *(finding for rule in RULES for finding in rule(seen))]
    return Report.of(LOADER, str(d.path), findings, summary(seen))


# --- what the loader knows


def _files(d: RawDirectory) -> list[str]:
    """Return the safetensors files that vLLM opens: all, or those that model.safetensors.index.json names."""
    try:
        named = set(load_json_object(d.path / _INDEX)["weight_map"].values())
    except (EightfoldError, KeyError, AttributeError, TypeError):
        return list(d.files)
    return [name for name in d.files if name in named]


def description(d: RawDirectory) -> dict[str, Any]:
    """Return the description under the one name that is looked for; nothing for a float model."""
    return d.descriptions.get(SHORT_NAME, {})


def label(d: RawDirectory, module: str) -> str | None:
    """Return a module's label; FLOAT in a float model, None without an entry."""
    is_float_model = SHORT_NAME not in d.descriptions and not d.has_int8
    value = description(d).get(weight_name(module), _FLOAT if is_float_model else None)
    return None if value is None else str(value)


def _modules(d: RawDirectory) -> dict[str, LinearShape]:
    """Return the modules that have a scheme: the linears, the head of an untied model."""
    return d.linears if d.model.tie_word_embeddings else {**d.linears, LM_HEAD: d.head}


def _parameters(d: RawDirectory) -> Iterator[tuple[str, QuantType, str, tuple[int, ...]]]:
    """Yield (module, scheme, suffix, shape) of every parameter of a linear whose scheme is known here."""
    for module, linear in _modules(d).items():
        kind = _CHECKED.get(label(d, module) or "")
        for spec in linear_tensors(kind, linear.has_bias) if kind else ():
            yield module, kind, spec.suffix, spec.shape_for(N=linear.n, K=linear.k)  # type: ignore[misc]


def model_dtype(d: RawDirectory) -> DType | None:
    """Return the model's dtype, by either key of config.json; None if it is not one of the two."""
    name = d.config.get("torch_dtype") or d.config.get("dtype")
    kind = CONFIG_DTYPES.get(str(name).removeprefix("torch."))
    return kind if kind in (DType.F16, DType.BF16) else None


def _has_norm_biases(d: RawDirectory) -> bool:
    return any(_NORM_BIAS in key for key in description(d))


def _has_kv_cache(d: RawDirectory) -> bool:
    return description(d).get("kv_cache_type") == "C8"


def _kv_layers(d: RawDirectory) -> set[int | None]:
    """Return the layers that get an int8 cache: those whose k_proj has a scale in the description."""
    return {layer_of(key) for key in description(d) if f"{KEY}.{KV_SCALE}" in key} if _has_kv_cache(d) else set()


def _fa_layers(d: RawDirectory) -> list[str]:
    """Return the description's keys that make a layer's attention a quantized one."""
    enabled = description(d).get("fa_quant_type") is not None
    return [key for key in description(d) if f"{FA_K}.{SCALE}" in key] if enabled else []


# --- files and description


def index(d: RawDirectory) -> Iterator[Finding]:
    """vLLM (by its code) opens only the files that model.safetensors.index.json names, if that is there."""
    hidden = [name for name in d.files if name not in _files(d)]
    does = f"opens only the files that {_INDEX} names, and leaves this one"
    action = "Remove the index; it belongs to the float model."
    yield from found("vllm-ascend.index", Outcome.IGNORES, hidden, does, action=action)


def damaged_files(d: RawDirectory) -> Iterator[Finding]:
    """json.load and safe_open raise on a file that is not what its name says; other descriptions are not opened."""
    for name, why in d.damaged.items():
        if name in d.files or name == SHORT_NAME:
            yield from found("vllm-ascend.damaged-file", Outcome.REFUSES, [name], f"opens {name} and fails", action=why)


def description_missing(d: RawDirectory) -> Iterator[Finding]:
    """The short name selects the method; with --quantization ascend and without it: ValueError."""
    where = [SHORT_NAME] if d.has_int8 and SHORT_NAME not in (*d.descriptions, *d.damaged) else []
    does = "raises ValueError, Quantization Config Not Found; it knows one name of the description only"
    got = one_of(d.descriptions) if d.descriptions else "none"
    action = f"Name the description {SHORT_NAME}."
    yield from found("vllm-ascend.description", Outcome.REFUSES, where, does, got=got, action=action)


def description_other(d: RawDirectory) -> Iterator[Finding]:
    """Descriptions of other names are not looked at."""
    others = [name for name, content in d.descriptions.items() if content != description(d)]
    where = others if SHORT_NAME in d.descriptions else []
    does = f"reads {SHORT_NAME} and not the other description, which says something else"
    yield from found("vllm-ascend.description-other", Outcome.IGNORES, where, does, action="Remove the wrong one.")


def quantization_config(d: RawDirectory) -> Iterator[Finding]:
    """vLLM (by its code) builds the method from a quantization_config; the description is then never opened."""
    value = d.config.get("quantization_config")
    does = "takes quantization_config for the description, which it then never reads: KeyError at the first layer"
    where = ["quantization_config"] if value and SHORT_NAME in d.descriptions else []
    action = "Remove quantization_config from config.json."
    yield from found("vllm-ascend.quantization-config", Outcome.REFUSES, where, does, action=action)


def label_missing(d: RawDirectory) -> Iterator[Finding]:
    """Each module's weight is looked up: q, k, v, gate, up one by one, embedding and head too: KeyError."""
    modules = [*_modules(d), EMBEDDING]
    if d.architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        modules.append(LM_HEAD)  # vLLM makes it first and ties it then
    absent = [weight_name(m) for m in modules if SHORT_NAME in d.descriptions and label(d, m) is None]
    does = "raises KeyError: the description has no entry for the weight"
    yield from found("vllm-ascend.label-missing", Outcome.REFUSES, absent, does, action="Add the entries.")


def mixed_group(d: RawDirectory) -> Iterator[Finding]:
    """Linears that become one module must have one label: ValueError."""
    kinds = {group.module: {label(d, member) for member in group.members} - {None} for group in d.packed}
    mixed = {name: sorted(map(str, labels)) for name, labels in kinds.items() if len(labels) > 1}
    does = "raises ValueError: q, k, v (or gate, up) have different labels"
    got = "; ".join(sorted({" and ".join(labels) for labels in mixed.values()}))
    action = "Keep all of them float, or none."
    yield from found("vllm-ascend.mixed-group", Outcome.REFUSES, mixed, does, got=got, action=action)


def unknown_scheme(d: RawDirectory) -> Iterator[Finding]:
    """A label without a registered scheme is a NotImplementedError; W8A8S and W8A8SC are for another device."""
    others = {m: kind for m in _modules(d) if (kind := label(d, m)) is not None and kind not in _CHECKED}
    taken = [m for m, kind in others.items() if kind in _REGISTERED or kind.startswith(_REGISTERED_PREFIXES)]
    refused = [m for m in others if m not in taken]
    does = "raises NotImplementedError for this scheme"
    got = ", ".join(sorted({others[m] for m in refused}))
    yield from found("vllm-ascend.scheme", Outcome.REFUSES, refused, does, got=got, expected=one_of(_REGISTERED))
    does = "has this scheme, but its parameters are not among the rules here"
    got = ", ".join(sorted({others[m] for m in taken}))
    yield from found("vllm-ascend.unchecked-scheme", Outcome.WARNS, taken, does, got=got)


def torch_dtype(d: RawDirectory) -> Iterator[Finding]:
    """Schemes run in float16 and bfloat16, and the type decides how deq_scale is read."""
    where = ["torch_dtype"] if model_dtype(d) is None else []
    does = "runs in float16 or bfloat16, and which one it chooses here decides how deq_scale is read"
    got = d.config.get("torch_dtype") or d.config.get("dtype") or "none"
    yield from found("vllm-ascend.torch-dtype", Outcome.WARNS, where, does, got=got, action="Serve with --dtype.")


# --- parameters


def duplicate_tensors(d: RawDirectory) -> Iterator[Finding]:
    """vLLM (by its code) copies every tensor of every file, the files in order of their names: the last one stays."""
    twice = d.duplicates()
    does = "copies a tensor that two files have twice, and keeps that of the last file"
    files = ", ".join(sorted({file for homes in twice.values() for file in homes}))
    action = "Remove the file that does not belong here."
    yield from found("vllm-ascend.duplicate-tensor", Outcome.WARNS, twice, does, got=files, action=action)


def missing_tensors(d: RawDirectory) -> Iterator[Finding]:
    """A parameter that no tensor was copied to is a ValueError, but for biases and what counts as computed."""
    wanted = [*head_and_embedding(d.model), *(weight_name(norm) for norm in d.norms)]
    wanted += [f"{module}.{suffix}" for module, _, suffix, _ in _parameters(d) if suffix not in _MAY_BE_ABSENT]
    absent = [name for name in wanted if name not in d.tensors]
    does, action = "raises ValueError: not initialized from checkpoint", "Write the directory again."
    yield from found("vllm-ascend.missing-tensor", Outcome.REFUSES, absent, does, action=action)


def empty_parameters(d: RawDirectory) -> Iterator[Finding]:
    """Some parameters count as computed, and nothing computes them: they stay what the memory held."""
    names = [
        f"{module}.{suffix}"
        for module, kind, suffix, _ in _parameters(d)
        if suffix in _MAY_BE_ABSENT and suffix in _USED[kind]
    ]
    absent = [name for name in names if name not in d.tensors]
    does, action = "lets these parameters be absent and then computes with uninitialized memory", "Write them."
    yield from found("vllm-ascend.empty-parameter", Outcome.MISDECODES, absent, does, action=action)


def shapes(d: RawDirectory) -> Iterator[Finding]:
    """A tensor is copied only to a parameter of its shape: AssertionError."""
    sizes = {f"{module}.{suffix}": shape for module, _, suffix, shape in _parameters(d)}
    sizes.update({weight_name(norm): (size,) for norm, size in d.norms.items()})
    sizes[weight_name(EMBEDDING)] = (d.head.n, d.head.k)
    wrong = [name for name, shape in sizes.items() if d.shape_of(name) not in (None, shape)]
    does = "raises AssertionError: tensor and parameter differ in shape"
    got = f"{list(d.shape_of(wrong[0]) or ())}" if wrong else None
    expected = str(list(sizes[wrong[0]])) if wrong else None
    yield from found("vllm-ascend.shape", Outcome.REFUSES, wrong, does, got=got, expected=expected)


def label_and_weight(d: RawDirectory) -> Iterator[Finding]:
    """Values are copied and cast: floats cut to int8, or int8 taken for floats, without a scale."""
    kinds = {weight_name(module): kind for module, kind, suffix, _ in _parameters(d) if suffix == WEIGHT}
    kinds[weight_name(EMBEDDING)] = QuantType.FLOAT
    wrong = [
        name
        for name, kind in kinds.items()
        if name in d.tensors and (kind is QuantType.FLOAT) != (d.dtype_of(name) not in ("I8", "I32", "I64", "U8"))
    ]
    got = ", ".join(sorted({f"{kinds[name].value} stored as {d.dtype_of(name)}" for name in wrong}))
    does, action = "casts the weight to the type its label asks for", "Correct the labels, or write it again."
    yield from found("vllm-ascend.label-and-weight", Outcome.MISDECODES, wrong, does, got=got, action=action)


def _static_linears(d: RawDirectory) -> list[str]:
    return [module for module in _modules(d) if _CHECKED.get(label(d, module) or "") in _STATIC]


def deq_scales(d: RawDirectory) -> Iterator[Finding]:
    """deq_scale is an int64 parameter for float16 and a float32 one for bfloat16; the other is cast by value."""
    kind = model_dtype(d)
    wanted = {DType.F16: ("I64",), DType.BF16: ("F32", "F16", "BF16")}[kind] if kind else ()
    names = [f"{module}.{DEQ_SCALE}" for module in _static_linears(d)]
    wrong = [name for name in names if wanted and d.dtype_of(name) not in (None, *wanted)]
    got = one_of(sorted({str(d.dtype_of(name)) for name in wrong})) if wrong else None
    does = "casts deq_scale by value: floats become the integer 0, packed integers enormous floats"
    action = "Write it again for this torch_dtype."
    expected = wanted[0] if wanted else None
    yield from found(
        "vllm-ascend.deq-scale", Outcome.MISDECODES, wrong, does, got=got, expected=expected, action=action
    )


def shared_inputs(d: RawDirectory) -> Iterator[Finding]:
    """A joined module has one input_scale and one input_offset: that of the last linear copied (vLLM, by its code)."""
    kind, static = model_dtype(d) or DType.F16, set(_static_linears(d))
    for title, suffix in ((t, s) for t in ("qkv", "gate_up") for s in (INPUT_SCALE, INPUT_OFFSET)):
        unequal = [
            group.module
            for group in d.packed
            if group.title == title and static.issuperset(group.members)
            if differ([cast(v, kind) for m in group.members if (v := d.values(f"{m}.{suffix}")) is not None])
        ]
        rule = f"vllm-ascend.{title}-{suffix}".replace("_", "-")
        does = f"keeps one {suffix} for linears that become one, and these are not equal"
        action = "Quantize the linears that share an input with the same parameters."
        yield from found(rule, Outcome.MISDECODES, unequal, does, action=action)


def input_offsets(d: RawDirectory) -> Iterator[Finding]:
    """input_offset is cast to int8."""
    wrong = [f"{name}.{INPUT_OFFSET}" for name in _static_linears(d)]
    wrong = [name for name in wrong if not d.fits_int8(name)]
    does, expected = f"casts {INPUT_OFFSET} to int8", "integers from -128 to 127"
    yield from found("vllm-ascend.input-offset", Outcome.MISDECODES, wrong, does, expected=expected)


def reciprocals(d: RawDirectory) -> Iterator[Finding]:
    """Activations are multiplied by 1 / input_scale, which is taken in the model's dtype."""
    kind = model_dtype(d) or DType.F16
    values = {name: d.values(name) for name in (f"{module}.{INPUT_SCALE}" for module in _static_linears(d))}
    with np.errstate(divide="ignore"):
        inverse = {name: cast(1 / cast(value, kind), kind) for name, value in values.items() if value is not None}
    wrong = [name for name, value in inverse.items() if not np.all(np.isfinite(value))]
    does = f"multiplies by 1 / {INPUT_SCALE}, which is infinite in the model's dtype"
    yield from found("vllm-ascend.input-scale-range", Outcome.MISDECODES, wrong, does)


def weight_offsets(d: RawDirectory) -> Iterator[Finding]:
    """W8A16 passes the offset on without turning its sign; schemes with int8 activations have no use for one."""
    by_rule: dict[bool, list[str]] = {True: [], False: []}
    for module, kind, suffix, _ in _parameters(d):
        if suffix == WEIGHT_OFFSET and d.is_nonzero(f"{module}.{suffix}"):
            by_rule[kind is QuantType.W8A16].append(f"{module}.{suffix}")
    does, got = "adds the offset of an asymmetric weight where it must subtract it", NONZERO
    action = "Quantize symmetrically for vllm-ascend."
    yield from found("vllm-ascend.w8a16-offset", Outcome.MISDECODES, by_rule[True], does, got=got, action=action)
    does = f"multiplies int8 by int8 without {WEIGHT_OFFSET}"
    yield from found("vllm-ascend.weight-offset", Outcome.MISDECODES, by_rule[False], does, got=got, expected="zeros")


def embedding_and_head(d: RawDirectory) -> Iterator[Finding]:
    """Embedding and head get the scheme of their label, as linears do."""
    names = [weight_name(m) for m in (EMBEDDING, LM_HEAD) if label(d, m) not in (None, _FLOAT)]
    read, idle = ([n for n in names if (n in head_and_embedding(d.model)) is is_read] for is_read in (True, False))
    does, action = "gives it a linear's scheme; no source says that this works", "Keep it float."
    yield from found("vllm-ascend.head-scheme", Outcome.WARNS, read, does, action=action)
    does = "reads the embedding for the head of a tied model, and not this int8 head"
    action = "Set tie_word_embeddings to false, or remove it."
    yield from found("vllm-ascend.tied-head", Outcome.IGNORES, idle, does, action=action)


# --- norms, cache, attention


def norm_biases(d: RawDirectory) -> Iterator[Finding]:
    """If any of the description's keys contains norm.bias, every norm has a bias, zero until one is copied."""
    names = [bias_name(norm) for norm in d.norms]
    absent = [name for name in names if name not in d.tensors] if _has_norm_biases(d) else []
    does = "gives every norm a bias, as one of the description's keys contains norm.bias; these stay zero"
    yield from found("vllm-ascend.norm-bias-missing", Outcome.WARNS, absent, does, action="Write all of them, or none.")
    lost = [] if _has_norm_biases(d) else [name for name in names if d.is_nonzero(name)]
    does = "gives no norm a bias, as none of the description's keys contains norm.bias"
    yield from found("vllm-ascend.norm-bias", Outcome.MISDECODES, lost, does, got=NONZERO)


def linear_biases(d: RawDirectory) -> Iterator[Finding]:
    """vLLM (by its code) passes over a bias that the class has no parameter for."""
    lost = [bias_name(module) for module, linear in _modules(d).items() if not linear.has_bias]
    lost = [name for name in lost if d.is_nonzero(name) and name.removesuffix(f".{BIAS}") not in _static_linears(d)]
    does = "passes over a bias that this architecture and config.json do not have"
    action = "config.json may lack a setting such as attention_bias."
    yield from found("vllm-ascend.linear-bias", Outcome.MISDECODES, lost, does, got=NONZERO, action=action)


def kv_layers(d: RawDirectory) -> Iterator[Finding]:
    """Where a layer has an int8 cache, a scale that no tensor is copied to stays 1; other layers keep a float cache."""
    scales = [name for name in d.kv_tensors() if name.endswith(KV_SCALE) and name not in d.tensors]
    absent = [name for name in scales if layer_of(name) in _kv_layers(d)]
    does, action = "quantizes the cache of these layers by a scale of 1", "Write scales for k and v."
    yield from found("vllm-ascend.kv-scale", Outcome.MISDECODES, absent, does, action=action)
    plain = [name for name in scales if _has_kv_cache(d) and layer_of(name) not in _kv_layers(d)]
    does = "keeps the cache of these layers in float"
    yield from found("vllm-ascend.kv-layer", Outcome.IGNORES, plain, does)


def kv_offsets(d: RawDirectory) -> Iterator[Finding]:
    """The fast path of generation does not look at cache offsets."""
    names = [name for name in d.kv_tensors() if name.endswith(KV_OFFSET)] if _has_kv_cache(d) else []
    wrong = [name for name in names if d.is_nonzero(name)]
    does, action = "leaves cache offsets out when it generates", "Quantize the cache symmetrically."
    yield from found("vllm-ascend.kv-offset", Outcome.MISDECODES, wrong, does, got=NONZERO, action=action)


def fa_scheme(d: RawDirectory) -> Iterator[Finding]:
    """The attention scheme is looked up by fa_quant_type: only FAKQuant, for multi-head latent attention, is there."""
    kind, where = description(d).get("fa_quant_type"), _fa_layers(d)
    does = "raises NotImplementedError for this kind of attention"
    if kind == "FAKQuant":
        does = "has quantized attention for multi-head latent attention only, which this architecture has not"
    action = "Quantize without attention for vllm-ascend."
    yield from found("vllm-ascend.fa-scheme", Outcome.REFUSES, where, does, got=kind, action=action)


# --- what is left over


def unknown_tensors(d: RawDirectory) -> Iterator[Finding]:
    """vLLM (by its code) looks a parameter up for every stored tensor, but for biases: KeyError."""
    known = {f"{module}.{suffix}" for module, _, suffix, _ in _parameters(d)}
    known |= {weight_name(EMBEDDING), *(weight_name(norm) for norm in d.norms)}
    known |= {name for name in d.kv_tensors() if layer_of(name) in _kv_layers(d)}
    known |= set(d.fa_tensors()) if _fa_layers(d) else set()
    open_ends = [m for m in _modules(d) if (label(d, m) or "") not in _CHECKED]
    open_ends += [LM_HEAD] if d.model.tie_word_embeddings else []
    strange = [
        name
        for name in d.tensors
        if name not in known and not name.endswith((f".{BIAS}", "rotary_emb.inv_freq"))
        if name.rpartition(".")[0] not in open_ends
    ]
    does, action = "raises KeyError: no parameter for a stored tensor", "Remove it, or add what enables it."
    yield from found("vllm-ascend.unknown-tensor", Outcome.REFUSES, strange, does, action=action)


def unused_entries(d: RawDirectory) -> Iterator[Finding]:
    """The description is asked for labels and never compared with the files."""
    tags = entries(description(d))
    idle = [name for name in tags if name not in d.tensors]
    bare = [name for name in d.tensors if name not in tags] if tags else []
    does = "does not compare the description with the files: these entries have no tensor"
    yield from found("vllm-ascend.entry-without-tensor", Outcome.IGNORES, idle, does)
    does = "does not compare the description with the files: these tensors have no entry"
    yield from found("vllm-ascend.tensor-without-entry", Outcome.LOADS, bare, does)


RULES = (
    damaged_files,
    description_missing,
    description_other,
    quantization_config,
    label_missing,
    mixed_group,
    unknown_scheme,
    torch_dtype,
    duplicate_tensors,
    missing_tensors,
    empty_parameters,
    shapes,
    label_and_weight,
    deq_scales,
    shared_inputs,
    input_offsets,
    reciprocals,
    weight_offsets,
    embedding_and_head,
    norm_biases,
    linear_biases,
    kv_layers,
    kv_offsets,
    fa_scheme,
    unknown_tensors,
    unused_entries,
)


def summary(d: RawDirectory) -> Summary:
    """Return what vllm-ascend makes of the directory, if nothing stops it."""
    packs: dict[str, Counter[str]] = {group.title: Counter() for group in d.packed}
    for group in d.packed:
        labels = {label(d, member) or "unlabelled" for member in group.members}
        packs[group.title][labels.pop() if len(labels) == 1 else "mixed"] += 1
    return Summary(
        dtype=str(d.config.get("torch_dtype") or d.config.get("dtype") or "unknown").removeprefix("torch."),
        linears=dict(Counter(label(d, name) or "unlabelled" for name in d.linears)),
        packs={title: dict(counts) for title, counts in packs.items()},
        kv_cache="int8" if _has_kv_cache(d) else "float",
        attention=str(description(d)["fa_quant_type"]) if _fa_layers(d) else "float",
        attention_layers=len(_fa_layers(d)),
    )
