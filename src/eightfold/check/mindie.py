"""MindIE-LLM (atb_llm, the llama model class) from its weights on, and what it makes of a directory.

    every *.safetensors -> for each layer: pack types by the labels, tensors by `quantize` and the stored element type

`quantize` alone says which tensors a linear has; a label only says how q, k, v (gate, up) are joined; and an int8
linear is told from a float one by what is stored. What comes before the weights is in mindie_config.py.

Sources: MindIE-LLM examples/atb_models: atb_llm/utils/{weights,hub}.py, atb_llm/utils/quantize/pack_type.py,
atb_llm/models/base/modeling.py, atb_llm/utils/layers: linear, attention/{fa3,kv_cache}.py, norm/fast_layer_norm.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from eightfold.check import mindie_config
from eightfold.check.directory import NONZERO, Packed, RawDirectory, cast, differ, entries, head_and_embedding
from eightfold.check.findings import Finding, Outcome, Report, Summary, found
from eightfold.check.mindie_config import (
    FA,
    INTEGERS,
    KV,
    LLAMA,
    REDUCE,
    description_file,
    label,
    labelled_scheme,
    labels,
    model_dtype,
    quantize,
    scheme,
    setting,
)
from eightfold.config import DType
from eightfold.families import EMBEDDING, LM_HEAD
from eightfold.scheme import (
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_OFFSET,
    LINEAR_TENSORS,
    OFFSET,
    REDUCE_SCALES,
    WEIGHT_OFFSET,
    QuantType,
    bias_name,
    legacy_norm,
    weight_name,
)

LOADER = "mindie"

_ONE_SCHEME = "Write the directory again, in one scheme."

_FLOAT = QuantType.FLOAT.value


def check(d: RawDirectory) -> Report:
    """Run every rule over a directory."""
    rules = (*mindie_config.RULES, *RULES)
    return Report.of(LOADER, str(d.path), (finding for rule in rules for finding in rule(d)), summary(d))


def pack_type(d: RawDirectory, group: Packed) -> str:
    """Return how q, k, v (or gate, up) are joined: by which labels count as quantized under `quantize`."""
    known = scheme(d)
    hits = [label(d, member) in known.labels for member in group.members]
    if not any(hits):
        return "ALL_FP"
    anti = "_ANTI" if weight_name(legacy_norm(group.norm)) in labels(d) else ""
    return f"{'ALL' if all(hits) else 'MIX'}_{known.pack}{anti}"


def is_integer(d: RawDirectory, linear: str) -> bool:
    """Whether a linear's weight stays an integer on load, which is what makes the loader read its scales."""
    return d.dtype_of(weight_name(linear)) in INTEGERS


def _static_linears(d: RawDirectory) -> list[str]:
    return [name for name in d.linears if is_integer(d, name)] if INPUT_SCALE in scheme(d).reads else []


def _mixed_linears(d: RawDirectory) -> list[str]:
    """Return the int8 linears of which the label names another scheme than `quantize` does."""
    known = [name for name in d.linears if is_integer(d, name)] if scheme(d).labels else []
    return [name for name in known if labelled_scheme(d, name) not in (None, scheme(d))]


def _lacking(d: RawDirectory) -> list[str]:
    """Return those of another scheme that have not all tensors which `quantize` asks for."""
    return [name for name in _mixed_linears(d) if any(f"{name}.{s}" not in d.tensors for s in scheme(d).reads)]


def _uncounted(d: RawDirectory) -> list[str]:
    """Return the linears of groups whose label `quantize` does not count as quantized, though it is not FLOAT."""
    known = {*scheme(d).labels, _FLOAT, None}
    members = [member for group in d.packed for member in group.members] if scheme(d).labels else []
    return [member for member in members if label(d, member) not in known]


def _required(d: RawDirectory) -> Iterator[str]:
    """Yield the tensors that every layer asks for, those of cache and attention not counted."""
    yield from head_and_embedding(d.model)
    yield from (weight_name(norm) for norm in d.norms)
    for linear in d.linears:
        yield weight_name(linear)
        yield from (f"{linear}.{suffix}" for suffix in scheme(d).reads if is_integer(d, linear))
    for group in d.packed:
        if pack_type(d, group).endswith("_ANTI"):
            yield from (weight_name(legacy_norm(group.norm)), bias_name(legacy_norm(group.norm)))


def _read_norm_biases(d: RawDirectory) -> Iterator[str]:
    """Yield the norm biases that a layer's pack types make it read; the final norm reads none."""
    for group in d.packed:
        kind = pack_type(d, group)
        if kind.endswith("_ANTI"):
            yield bias_name(legacy_norm(group.norm))
        elif kind in ("ALL_W8A8", "MIX_W8A8"):
            yield bias_name(group.norm)


# --- files and labels


def duplicate_tensors(d: RawDirectory) -> Iterator[Finding]:
    """Every *.safetensors is opened, an index is not looked at: one name in two files is an AssertionError."""
    twice = d.duplicates()
    files = sorted({file for homes in twice.values() for file in homes})
    does = "opens every safetensors file, whatever an index says, and raises AssertionError on a name in two of them"
    action = "Remove the file that does not belong here."
    yield from found("mindie.duplicate-tensor", Outcome.REFUSES, twice, does, got=", ".join(files), action=action)


def label_missing(d: RawDirectory) -> Iterator[Finding]:
    """The labels of q, k, v, gate and up are looked up one by one: KeyError."""
    wanted = [weight_name(member) for group in d.packed for member in group.members]
    absent = [name for name in wanted if name not in labels(d)] if labels(d) else []
    does = "raises KeyError: the description has no entry for the weight"
    yield from found("mindie.label-missing", Outcome.REFUSES, absent, does, action="Add the entries.")


def label_unknown(d: RawDirectory) -> Iterator[Finding]:
    """A label that `quantize` does not count makes the group a float one, whatever its weights are."""
    strange = _uncounted(d)
    does = f"takes linears with this label for float ones under quantize {quantize(d)}"
    got = ", ".join(sorted({str(label(d, name)) for name in strange}))
    action = "One directory holds one scheme and FLOAT."
    yield from found("mindie.label", Outcome.MISDECODES, strange, does, got=got, action=action)


def label_and_weight(d: RawDirectory) -> Iterator[Finding]:
    """Float or int8 is decided by the stored weight; the label decides the graph and joins the weights."""
    wrong = [
        name
        for name in d.linears
        if label(d, name) is not None and weight_name(name) in d.tensors
        if (label(d, name) == _FLOAT) != (d.dtype_of(weight_name(name)) != DType.I8.value)
    ]
    got = ", ".join(sorted({f"{label(d, name)} stored as {d.dtype_of(weight_name(name))}" for name in wrong}))
    does = "tells int8 from float by the stored weight and builds the graph by the label"
    action = "Correct the labels, or write the directory again."
    yield from found("mindie.label-and-weight", Outcome.MISDECODES, wrong, does, got=got, action=action)


def mixed_schemes(d: RawDirectory) -> Iterator[Finding]:
    """`quantize` picks the tensors of every int8 linear: of another scheme, it lacks some or runs as one of this."""
    lacking, told = _lacking(d), {*_lacking(d), *_uncounted(d)}
    kept = {QuantType.W8A16.value} if scheme(d).pack.startswith("W8A8") else set()  # labels that keep inputs float
    rounded = [name for name in _mixed_linears(d) if name not in told and label(d, name) in kept]
    taken = [name for name in _mixed_linears(d) if name not in told and label(d, name) not in kept]
    does = "picks the tensors of every int8 linear by quantize, whatever its label, and "
    for outcome, where, ends in (
        (Outcome.REFUSES, lacking, "raises AssertionError: weight does not exist"),
        (Outcome.MISDECODES, rounded, "rounds inputs to int8 that the label keeps float"),
        (Outcome.IGNORES, taken, "quantizes inputs, or leaves them float, as quantize says"),
    ):
        got = f"{', '.join(sorted({str(label(d, name)) for name in where}))} under quantize {quantize(d)}"
        yield from found(
            "mindie.mixed-scheme", outcome, where, does + ends, got=got, expected="one scheme", action=_ONE_SCHEME
        )


def mixed_group(d: RawDirectory) -> Iterator[Finding]:
    """A group that is quantized in part stays in pieces with W8A8, and is an AssertionError otherwise."""
    mixed = {group: kind for group in d.packed if (kind := pack_type(d, group)).startswith("MIX_")}
    refused = [group.module for group, kind in mixed.items() if kind not in ("MIX_W8A8", "MIX_W8A8_ANTI")]
    taken = [group.module for group, kind in mixed.items() if kind in ("MIX_W8A8", "MIX_W8A8_ANTI")]
    got, what = ", ".join(sorted(set(mixed.values()))), "q, k, v (or gate, up) of which only some are quantized"
    does = f"raises AssertionError on {what}"
    action = "Keep all of them float, or none."
    yield from found("mindie.mixed-group", Outcome.REFUSES, refused, does, got=got, action=action)
    yield from found("mindie.unpacked-group", Outcome.LOADS, taken, f"keeps apart {what}", got=got)


# --- tensors


def missing_tensors(d: RawDirectory) -> Iterator[Finding]:
    """Every lookup of a tensor that no file has is an AssertionError."""
    lacking = set(_lacking(d))
    absent = [name for name in _required(d) if name not in d.tensors and name.rpartition(".")[0] not in lacking]
    does = "raises AssertionError: weight does not exist; quantize, and no label, says which tensors an int8 linear has"
    got = f"quantize {quantize(d)}"
    yield from found("mindie.missing-tensor", Outcome.REFUSES, absent, does, got=got, action=_ONE_SCHEME)


def shapes(d: RawDirectory) -> Iterator[Finding]:
    """Nothing compares a weight's shape with config.json before the graph runs."""
    linears = {**d.linears, LM_HEAD: d.head} if not d.model.tie_word_embeddings else d.linears
    wrong = [
        weight_name(name)
        for name, linear in linears.items()
        if d.shape_of(weight_name(name)) not in (None, (linear.n, linear.k))
    ]
    does = "compares no shape with config.json when it loads; the graph fails or computes something else"
    action = "config.json and the weights belong to different models."
    yield from found("mindie.shape", Outcome.MISDECODES, wrong, does, action=action)


def shared_inputs(d: RawDirectory) -> Iterator[Finding]:
    """Joined linears share one input_scale and one input_offset, after the cast to the model's dtype: ValueError."""
    kind = model_dtype(d) or DType.F16
    for title, suffix in ((t, s) for t in ("qkv", "gate_up") for s in (INPUT_SCALE, INPUT_OFFSET)):
        unequal = [
            group.module
            for group in d.packed
            if group.title == title and suffix in scheme(d).reads and pack_type(d, group).startswith("ALL_W8A8")
            if all(is_integer(d, member) for member in group.members)
            if differ([cast(v, kind) for m in group.members if (v := d.values(f"{m}.{suffix}")) is not None])
        ]
        rule = f"mindie.{title}-{suffix}".replace("_", "-")
        does = f"raises ValueError: {suffix} of linears that become one are not equal"
        action = "Quantize the linears that share an input with the same parameters."
        yield from found(rule, Outcome.REFUSES, unequal, does, action=action)


def scalar_inputs(d: RawDirectory) -> Iterator[Finding]:
    """Activation parameters are read as a slice of their first axis, which a scalar has not: IndexError."""
    names = [f"{name}.{suffix}" for name in _static_linears(d) for suffix in (INPUT_SCALE, INPUT_OFFSET)]
    scalars = [name for name in names if d.shape_of(name) == ()]
    does = "raises IndexError on activation parameters without an axis"
    yield from found("mindie.scalar-input", Outcome.REFUSES, scalars, does, got="[]", expected="[1]")


def input_offsets(d: RawDirectory) -> Iterator[Finding]:
    """input_offset is cast to int8."""
    names = [f"{name}.{INPUT_OFFSET}" for name in _static_linears(d)]
    does = f"casts {INPUT_OFFSET} to int8"
    wrong, expected = [name for name in names if not d.fits_int8(name)], "integers from -128 to 127"
    yield from found("mindie.input-offset", Outcome.MISDECODES, wrong, does, expected=expected)


def deq_scales(d: RawDirectory) -> Iterator[Finding]:
    """deq_scale is packed in int64 for float16, where a float is cast to float16 first; it is float32 for bfloat16."""
    kind = model_dtype(d)
    wanted = {DType.F16: "I64", DType.BF16: "F32"}.get(kind) if kind else None
    names = [f"{name}.{DEQ_SCALE}" for name in _static_linears(d)]
    wrong = [name for name in names if wanted and d.dtype_of(name) not in (None, wanted)]
    does = {
        DType.F16: "casts a floating deq_scale to float16 before it packs it, about 1 % off or zero for small ones",
        DType.BF16: "takes deq_scale as it stands for a bfloat16 model",
    }.get(kind or DType.F16, "")
    got = ", ".join(sorted({str(d.dtype_of(name)) for name in wrong}))
    action = "Write it again for this torch_dtype."
    yield from found("mindie.deq-scale", Outcome.MISDECODES, wrong, does, got=got, expected=wanted, action=action)


def weight_offsets(d: RawDirectory) -> Iterator[Finding]:
    """Int8 activations need symmetric weights; only W8A16 has a use for an offset."""
    names = [f"{name}.{WEIGHT_OFFSET}" for name in d.linears if is_integer(d, name)]
    wrong = [name for name in names if d.is_nonzero(name)] if scheme(d).pack.startswith("W8A8") else []
    does = f"multiplies int8 by int8 without {WEIGHT_OFFSET}"
    yield from found("mindie.weight-offset", Outcome.MISDECODES, wrong, does, got=NONZERO, expected="zeros")


def norm_biases(d: RawDirectory) -> Iterator[Finding]:
    """Only norms before W8A8 read a bias; those before FLOAT, W8A16 and dynamic linears and the last one do not."""
    read = set(_read_norm_biases(d))
    lost = [name for name in sorted(d.norm_tensors()) if name.endswith(bias_name("")) and name not in read]
    lost = [name for name in lost if d.is_nonzero(name)]
    does = "reads no norm bias before float, W8A16 and dynamic linears, and none in the last norm"
    got, action = NONZERO, "Suppress outliers without a shift, or quantize these layers as W8A8."
    yield from found("mindie.norm-bias", Outcome.MISDECODES, lost, does, got=got, expected="zeros", action=action)


def linear_biases(d: RawDirectory) -> Iterator[Finding]:
    """The llama class asks for no bias: what is not in quant_bias is lost."""
    folded = set(_static_linears(d)) if quantize(d) != "w8a8_pdmix" else set()
    lost = [bias_name(name) for name in d.linears if d.architecture == LLAMA and name not in folded]
    lost = [name for name in lost if d.is_nonzero(name)]
    does = "reads no bias of these linears in its llama class"
    action = "Quantize them as W8A8, which holds the bias in quant_bias."
    yield from found("mindie.linear-bias", Outcome.MISDECODES, lost, does, got=NONZERO, action=action)


def embedding_and_head(d: RawDirectory) -> Iterator[Finding]:
    """Embedding and head are loaded as float weights, whatever `quantize` says: no scale is looked for."""
    does, action = "reads this weight alone, without a scale", "Keep it float."
    for name in (name for name in head_and_embedding(d.model) if d.dtype_of(name) in INTEGERS):
        rule = "mindie.lm-head" if name == weight_name(LM_HEAD) else "mindie.embedding"
        got = d.dtype_of(name)
        yield from found(rule, Outcome.MISDECODES, [name], does, got=got, expected="float", action=action)
    idle = [weight_name(LM_HEAD)] if d.model.tie_word_embeddings else []
    idle = [name for name in idle if d.dtype_of(name) in INTEGERS]
    does = "reads the embedding for the head of a tied model, and not this int8 head"
    action = "Set tie_word_embeddings to false, or remove it."
    yield from found("mindie.tied-head", Outcome.IGNORES, idle, does, action=action)


# --- cache, attention, communication


def kv_tensors(d: RawDirectory) -> Iterator[Finding]:
    """An int8 cache wants scale and offset of k and v in every layer, one for each channel."""
    names = d.kv_tensors() if setting(d, KV) else {}
    absent = [name for name in names if name not in d.tensors]
    wrong = [name for name, shape in names.items() if d.shape_of(name) not in (None, shape)]
    does = "raises AssertionError: an int8 cache needs these tensors in every layer"
    yield from found("mindie.kv-tensor", Outcome.REFUSES, absent, does, action=f"Write all layers, or remove {KV}.")
    does, expected = "cannot use cache scales of another length", "one for each channel of k_proj"
    yield from found("mindie.kv-shape", Outcome.REFUSES, wrong, does, expected=expected)


def kv_offsets(d: RawDirectory) -> Iterator[Finding]:
    """The offset's float bits are taken for an integer: -3.0 quantizes as 0, and dequantizes as its raw bits."""
    names = [name for name in d.kv_tensors() if name.endswith(KV_OFFSET)] if setting(d, KV) else []
    wrong = [name for name in names if d.is_nonzero(name)]
    does = "takes the bits of a cache offset for an integer, so that only zero is right"
    action = "Quantize the cache symmetrically."
    yield from found("mindie.kv-offset", Outcome.MISDECODES, wrong, does, got=NONZERO, action=action)


def fa_tensors(d: RawDirectory) -> Iterator[Finding]:
    """Quantized attention wants six tensors in every layer, of shape [heads, 1]."""
    names = d.fa_tensors() if setting(d, FA) else {}
    absent = [name for name in names if name not in d.tensors]
    wrong = [name for name, shape in names.items() if d.shape_of(name) not in (None, shape)]
    does = "raises AssertionError: quantized attention needs its six tensors in every layer"
    action = f"Quantize the attention of all layers, or remove {FA}."
    yield from found("mindie.fa-tensor", Outcome.REFUSES, absent, does, action=action)
    does, expected = "raises RuntimeError: it repeats a column for each head, and these do not broadcast", "[heads, 1]"
    got = str(list(d.shape_of(wrong[0]) or ())) if wrong else None
    yield from found("mindie.fa-shape", Outcome.REFUSES, wrong, does, got=got, expected=expected)


def fa_offsets(d: RawDirectory) -> Iterator[Finding]:
    """The offset of v is dropped, and what comes out is descaled without any."""
    names = [name for name in d.fa_tensors() if name.endswith(f".{OFFSET}")] if setting(d, FA) else []
    wrong = [name for name in names if d.is_nonzero(name)]
    does = "descales attention without an offset and drops that of v"
    yield from found("mindie.fa-offset", Outcome.MISDECODES, wrong, does, got=NONZERO, expected="zeros")


def reduce_tensors(d: RawDirectory) -> Iterator[Finding]:
    """Quantized communication wants two scales of o_proj and down_proj in every layer."""
    names = [f"{name}.{suffix}" for name in d.unpacked for suffix in REDUCE_SCALES] if setting(d, REDUCE) else []
    absent = [name for name in names if name not in d.tensors]
    does, action = "raises AssertionError: weight does not exist", f"Remove {REDUCE}."
    yield from found("mindie.reduce-tensor", Outcome.REFUSES, absent, does, action=action)


# --- what is left over


def unread_tensors(d: RawDirectory) -> Iterator[Finding]:
    """A tensor that nothing asks for is not read."""
    suffixes = {spec.suffix for specs in LINEAR_TENSORS.values() for spec in specs} | set(REDUCE_SCALES)
    known = {f"{linear}.{suffix}" for linear in d.linears for suffix in suffixes}
    known |= {weight_name(EMBEDDING), *(f"{LM_HEAD}.{suffix}" for suffix in suffixes)}
    known |= d.norm_tensors() | set(d.kv_tensors()) | set(d.fa_tensors())
    unread = [name for name in d.tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
    yield from found("mindie.unread-tensor", Outcome.IGNORES, unread, "does not read these tensors")


def unused_entries(d: RawDirectory) -> Iterator[Finding]:
    """The description is asked for the labels it needs and never compared with the files."""
    tags = entries(labels(d))
    idle = [name for name in tags if name not in d.tensors]
    bare = [name for name in d.tensors if name not in tags] if tags else []
    does = "does not compare the description with the files: these entries have no tensor"
    yield from found("mindie.entry-without-tensor", Outcome.IGNORES, idle, does, got=description_file(d))
    does = "does not compare the description with the files: these tensors have no entry"
    yield from found("mindie.tensor-without-entry", Outcome.LOADS, bare, does, got=description_file(d))


RULES = (
    duplicate_tensors,
    label_missing,
    label_unknown,
    label_and_weight,
    mixed_schemes,
    mixed_group,
    missing_tensors,
    shapes,
    shared_inputs,
    scalar_inputs,
    input_offsets,
    deq_scales,
    weight_offsets,
    norm_biases,
    linear_biases,
    embedding_and_head,
    kv_tensors,
    kv_offsets,
    fa_tensors,
    fa_offsets,
    reduce_tensors,
    unread_tensors,
    unused_entries,
)


def summary(d: RawDirectory) -> Summary:
    """Return what MindIE makes of the directory, if nothing stops it."""
    packs: dict[str, Counter[str]] = {group.title: Counter() for group in d.packed}
    for group in d.packed:
        packs[group.title][pack_type(d, group)] += 1
    linears = Counter((quantize(d) or _FLOAT).upper() if is_integer(d, name) else _FLOAT for name in d.linears)
    attention = setting(d, FA)
    cache = {"FAQuant": "int8", "FAKQuant": "int8 key, float value"}.get(str(attention), "float")
    return Summary(
        dtype=str(d.config.get("torch_dtype") or "unknown").removeprefix("torch."),
        linears=dict(linears),
        packs={title: dict(counts) for title, counts in packs.items()},
        kv_cache="int8" if setting(d, KV) else cache,
        attention=str(attention or "float"),
        attention_layers=d.model.num_layers if attention else 0,
    )
