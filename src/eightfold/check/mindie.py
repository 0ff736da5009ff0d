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

from eightfold.check import Finding, Report, Rules, Summary, Verdict
from eightfold.check.directory import INTEGERS, SHARED_INPUTS, Packed, RawDirectory, packs
from eightfold.check.mindie_config import FA, KV, LLAMA, REDUCE, MindIE
from eightfold.config import DType
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

_FLOAT = QuantType.FLOAT.value
_PICKS = "picks the tensors of every int8 linear by quantize, whatever its label, and"
_ONE_SCHEME = "got {got} under quantize {kind}, expected one scheme. Write the directory again, in one scheme."
_PART = "q, k, v (or gate, up) of which only some are quantized: got {got}"
_TAKES_ANOTHER = "does not compare the description with the files:"

RULES = Rules(
    "mindie",
    {
        Verdict.REFUSES: {
            "duplicate-tensor": "opens every safetensors file, whatever an index says, and raises AssertionError on a "
            "name in two of them: got {got}. Remove the file that does not belong here.",
            "label-missing": "raises KeyError: the description has no entry for the weight. Add the entries.",
            "mixed-scheme/lacking": f"{_PICKS} raises AssertionError: weight does not exist: {_ONE_SCHEME}",
            "mixed-group": f"raises AssertionError on {_PART}. Keep all of them float, or none.",
            "missing-tensor": "raises AssertionError: weight does not exist; quantize, and no label, says which "
            "tensors an int8 linear has: got quantize {got}. Write the directory again, in one scheme.",
            **{
                rule: f"raises ValueError: {suffix} of linears that become one are not equal. "
                "Quantize the linears that share an input with the same parameters."
                for rule, (_, suffix) in SHARED_INPUTS.items()
            },
            "scalar-input": "raises IndexError on activation parameters without an axis: got [], expected [1]",
            "kv-tensor": "raises AssertionError: an int8 cache needs these tensors in every layer. "
            f"Write all layers, or remove {KV}.",
            "kv-shape": "cannot use cache scales of another length: expected one for each channel of k_proj",
            "fa-tensor": "raises AssertionError: quantized attention needs its six tensors in every layer. "
            f"Quantize the attention of all layers, or remove {FA}.",
            "fa-shape": "raises RuntimeError: it repeats a column for each head, and these do not broadcast: "
            "got {got}, expected [heads, 1]",
            "reduce-tensor": f"raises AssertionError: weight does not exist. Remove {REDUCE}.",
        },
        Verdict.MISDECODES: {
            "label": "takes linears with this label for float ones under quantize {kind}: got {got}. "
            "One directory holds one scheme and FLOAT.",
            "label-and-weight": "tells int8 from float by the stored weight and builds the graph by the label: "
            "got {got}. Correct the labels, or write the directory again.",
            "mixed-scheme/rounded": f"{_PICKS} rounds inputs to int8 that the label keeps float: {_ONE_SCHEME}",
            "shape": "compares no shape with config.json when it loads; the graph fails or computes something else. "
            "config.json and the weights belong to different models.",
            "input-offset": f"casts {INPUT_OFFSET} to int8: expected integers from -128 to 127",
            "deq-scale/float16": "casts a floating deq_scale to float16 before it packs it, about 1 % off or zero for "
            "small ones: got {got}, expected I64. Write it again for this torch_dtype.",
            "deq-scale/bfloat16": "takes deq_scale as it stands for a bfloat16 model: got {got}, expected F32. "
            "Write it again for this torch_dtype.",
            "weight-offset": f"multiplies int8 by int8 without {WEIGHT_OFFSET}: "
            "got values other than zero, expected zeros",
            "norm-bias": "reads no norm bias before float, W8A16 and dynamic linears, and none in the last norm: got "
            "values other than zero, expected zeros. Suppress outliers without a shift, or quantize these layers as "
            "W8A8.",
            "linear-bias": "reads no bias of these linears in its llama class: got values other than zero. "
            "Quantize them as W8A8, which holds the bias in quant_bias.",
            "embedding": "reads this weight alone, without a scale: got {got}, expected float. Keep it float.",
            "lm-head": "reads this weight alone, without a scale: got {got}, expected float. Keep it float.",
            "kv-offset": "takes the bits of a cache offset for an integer, so that only zero is right: "
            "got values other than zero. Quantize the cache symmetrically.",
            "fa-offset": "descales attention without an offset and drops that of v: "
            "got values other than zero, expected zeros",
        },
        Verdict.WARNS: {
            "undocumented": "is said by its documents to support {with_what} only with {supported}: got {got}. "
            "It loads; measure what it answers.",
        },
        Verdict.IGNORES: {
            "mixed-scheme/taken": f"{_PICKS} quantizes inputs, or leaves them float, as quantize says: {_ONE_SCHEME}",
            "tied-head": "reads the embedding for the head of a tied model, and not this int8 head. "
            "Set tie_word_embeddings to false, or remove it.",
            "unread-tensor": "does not read these tensors",
            "entry-without-tensor": f"{_TAKES_ANOTHER} these entries have no tensor: got {{got}}",
        },
        Verdict.LOADS: {
            "unpacked-group": f"keeps apart {_PART}",
            "tensor-without-entry": f"{_TAKES_ANOTHER} these tensors have no entry: got {{got}}",
        },
    },
)


def check(d: RawDirectory) -> Report:
    """Run every rule over a directory."""
    weights = _Weights(MindIE(d))
    findings = [*weights.loader.findings(), *weights.findings()]
    return Report.of(RULES.loader, str(d.path), findings, weights.summary())


class _Weights:
    """What the loader does with the stored tensors.

    Attributes:
        pack_types: how q, k, v (or gate, up) are joined: by which labels count as quantized under `quantize`.
        int8: the linears that stay integers on load.
        static: those of which activation parameters are read.
    """

    def __init__(self, loader: MindIE) -> None:
        self.loader, self.d, self._scheme = loader, loader.d, loader.scheme
        self.pack_types = {group: self._pack_type(group) for group in self.d.packed}
        self.int8 = dict.fromkeys(name for name in self.d.linears if loader.is_integer(name))
        self.static = self.int8 if INPUT_SCALE in self._scheme.reads else {}
        known = {*self._scheme.labels, _FLOAT, None}  # other labels `quantize` does not count as quantized
        members = [member for group in self.d.packed for member in group.members if self._scheme.labels]
        self._uncounted = [member for member in members if loader.label(member) not in known]

    def _pack_type(self, group: Packed) -> str:
        hits = [self.loader.label(member) in self._scheme.labels for member in group.members]
        if not any(hits):
            return "ALL_FP"
        anti = "_ANTI" if weight_name(legacy_norm(group.norm)) in self.loader.labels else ""
        return f"{'ALL' if all(hits) else 'MIX'}_{self._scheme.pack}{anti}"

    def findings(self) -> Iterator[Finding]:
        yield from self._labels()
        yield from self._schemes()
        yield from self._inputs()
        yield from self._parameters()
        yield from self._embedding_and_head()
        yield from self._cache_and_attention()
        yield from self._left_over()

    def _said(self, linears: list[str]) -> set[str]:
        return {str(self.loader.label(name)) for name in linears}

    def _labels(self) -> Iterator[Finding]:
        """The labels of q, k, v, gate and up are looked up one by one, and say how these are joined."""
        d, m = self.d, self.loader
        twice, files = d.duplicates()
        yield from RULES.found("duplicate-tensor", twice, got=files)
        names = [weight_name(member) for group in d.packed for member in group.members]
        yield from RULES.found("label-missing", [name for name in names if m.labels and name not in m.labels])
        yield from RULES.found("label", self._uncounted, kind=m.quantize, got=self._said(self._uncounted))
        labels = {name: label for name in d.linears if (label := m.label(name)) is not None}
        stored = {name: kind for name in labels if (kind := d.dtype_of(weight_name(name))) is not None}
        wrong = [name for name, kind in stored.items() if (labels[name] == _FLOAT) is (kind == DType.I8.value)]
        yield from RULES.found(
            "label-and-weight", wrong, got={f"{labels[name]} stored as {stored[name]}" for name in wrong}
        )

    def _schemes(self) -> Iterator[Finding]:
        """Of another scheme than `quantize` names, an int8 linear lacks tensors or runs as one of this."""
        m, scheme = self.loader, self._scheme
        another = [name for name in self.int8 if scheme.labels and m.labelled_scheme(name) not in (None, scheme)]
        lacking = [name for name in another if self.d.absent(f"{name}.{suffix}" for suffix in scheme.reads)]
        others = [name for name in another if name not in {*lacking, *self._uncounted}]
        rounds = scheme.pack.startswith("W8A8")  # the inputs, which this label keeps float
        rounded = [name for name in others if rounds and m.label(name) == QuantType.W8A16.value]
        taken = [name for name in others if name not in rounded]
        for rule, where in (("lacking", lacking), ("rounded", rounded), ("taken", taken)):
            yield from RULES.found(f"mixed-scheme/{rule}", where, got=self._said(where), kind=m.quantize)
        mixed = {group.module: kind for group, kind in self.pack_types.items() if kind.startswith("MIX_")}
        rule = "unpacked-group" if scheme.pack == "W8A8" else "mixed-group"
        yield from RULES.found(rule, mixed, got=set(mixed.values()))
        required = [name for name in self._required() if name.rpartition(".")[0] not in lacking]
        yield from RULES.found("missing-tensor", self.d.absent(required), got=m.quantize)

    def _required(self) -> Iterator[str]:
        """Yield the tensors that every layer asks for, besides those of cache and attention."""
        yield from self.d.outer_weights
        yield from (weight_name(norm) for norm in self.d.norms)
        for linear in self.d.linears:
            yield weight_name(linear)
            yield from (f"{linear}.{suffix}" for suffix in self._scheme.reads if linear in self.int8)
        for group, kind in self.pack_types.items():
            if kind.endswith("_ANTI"):
                yield from (weight_name(legacy_norm(group.norm)), bias_name(legacy_norm(group.norm)))

    def _inputs(self) -> Iterator[Finding]:
        """Joined linears share one input_scale and input_offset, after the cast to the model's dtype: ValueError."""
        d, dtype = self.d, self.loader.dtype or DType.F16
        linears = d.linears if d.model.tie_word_embeddings else {**d.linears, d.model.names.head: d.head}
        yield from RULES.found("shape", d.misshapen({weight_name(x): (size.n, size.k) for x, size in linears.items()}))
        joined = [group for group, kind in self.pack_types.items() if kind.startswith("ALL_W8A8")]
        joined = [group for group in joined if set(self.static).issuperset(group.members)]
        for rule, modules in d.unequal_inputs(joined, dtype):
            yield from RULES.found(rule, modules)
        names = [f"{name}.{suffix}" for name in self.static for suffix in (INPUT_SCALE, INPUT_OFFSET)]
        scalars = [name for name in names if name in d.tensors and d.tensors[name].shape == ()]
        yield from RULES.found("scalar-input", scalars)  # read as a slice of their first axis
        yield from RULES.found("input-offset", d.beyond_int8(f"{name}.{INPUT_OFFSET}" for name in self.static))

    def _parameters(self) -> Iterator[Finding]:
        """deq_scale is packed in int64 for float16 and float32 for bfloat16; only W8A16 has a use for offsets."""
        d, m = self.d, self.loader
        if m.dtype is not None:
            rule, wanted = ("float16", "I64") if m.dtype is DType.F16 else ("bfloat16", "F32")
            kinds = {name: d.dtype_of(name) for name in (f"{linear}.{DEQ_SCALE}" for linear in self.static)}
            wrong = {name: kind for name, kind in kinds.items() if kind is not None and kind != wanted}
            yield from RULES.found(f"deq-scale/{rule}", wrong, got=set(wrong.values()))
        if self._scheme.pack.startswith("W8A8"):
            yield from RULES.found("weight-offset", d.nonzero(f"{name}.{WEIGHT_OFFSET}" for name in self.int8))
        older = [legacy_norm(group.norm) for group, kind in self.pack_types.items() if kind.endswith("_ANTI")]
        read = [*older, *(group.norm for group, kind in self.pack_types.items() if kind in ("ALL_W8A8", "MIX_W8A8"))]
        unread = d.norm_tensors() - {bias_name(norm) for norm in read}
        yield from RULES.found("norm-bias", d.nonzero(sorted(unread), bias_name("")))
        if d.model.architecture == LLAMA:
            folded = self.static if m.quantize != "w8a8_pdmix" else {}
            yield from RULES.found("linear-bias", d.nonzero(bias_name(x) for x in d.linears if x not in folded))

    def _embedding_and_head(self) -> Iterator[Finding]:
        """Both are loaded as float weights, whatever `quantize` says: no scale is looked for."""
        d, head = self.d, weight_name(self.d.model.names.head)
        for name in d.outer_weights:
            if d.dtype_of(name) in INTEGERS:
                yield from RULES.found("lm-head" if name == head else "embedding", [name], got=d.dtype_of(name))
        if d.model.tie_word_embeddings and d.dtype_of(head) in INTEGERS:
            yield from RULES.found("tied-head", [head])

    def _cache_and_attention(self) -> Iterator[Finding]:
        """An int8 cache has scales and offsets of k and v in every layer, attention six tensors [heads, 1]."""
        d, m = self.d, self.loader
        yield from self._undocumented()
        if m.setting(KV):
            kv = d.kv_tensors()
            yield from RULES.found("kv-tensor", d.absent(kv))
            yield from RULES.found("kv-shape", d.misshapen(kv))
            yield from RULES.found("kv-offset", d.nonzero(kv, KV_OFFSET))  # -3.0 quantizes as 0, dequantizes as bits
        if m.setting(FA):
            fa = d.fa_tensors()
            yield from RULES.found("fa-tensor", d.absent(fa))
            wrong = d.misshapen(fa)
            yield from RULES.found("fa-shape", wrong, got=next((list(d.tensors[name].shape) for name in wrong), None))
            yield from RULES.found("fa-offset", d.nonzero(fa, f".{OFFSET}"))
        if m.setting(REDUCE):
            joined = {member for group in d.packed for member in group.members}
            names = [f"{name}.{suffix}" for name in d.linears if name not in joined for suffix in REDUCE_SCALES]
            yield from RULES.found("reduce-tensor", d.absent(names))

    def _undocumented(self) -> Iterator[Finding]:
        """What the pages about each feature leave out, although nothing in the code refuses it."""
        d, m = self.d, self.loader
        is_qwen = d.model.architecture.startswith("Qwen")
        kinds, got = {"w8a8"} if is_qwen else {"w8a8", "w8a16"}, str(m.quantize)
        is_smoothed = any(bias_name(norm) in d.tensors for norm in d.norms)
        if m.setting(KV) and is_qwen and is_smoothed:
            kinds, got = set(), f"{got} with norm biases, which outlier suppression adds"
        if m.setting(KV) and m.quantize not in kinds:
            supported = "W8A8 without outlier suppression" if is_qwen else "W8A8 and W8A16"
            yield from RULES.found("undocumented", [KV], with_what="an int8 cache", supported=supported, got=got)
        if m.setting(FA) and m.quantize != "w8a8":
            yield from RULES.found(
                "undocumented", [FA], with_what="quantized attention", supported="W8A8", got=str(m.quantize)
            )

    def _left_over(self) -> Iterator[Finding]:
        d = self.d
        suffixes = {spec.suffix for specs in LINEAR_TENSORS.values() for spec in specs} | set(REDUCE_SCALES)
        known = {f"{module}.{suffix}" for module in (*d.linears, d.model.names.head) for suffix in suffixes}
        known |= {weight_name(d.model.names.embedding)} | d.norm_tensors() | set(d.kv_tensors()) | set(d.fa_tensors())
        unread = [name for name in d.tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
        yield from RULES.found("unread-tensor", unread)
        idle, bare = d.unmatched(self.loader.labels)
        yield from RULES.found("entry-without-tensor", idle, got=self.loader.description_file)
        yield from RULES.found("tensor-without-entry", bare, got=self.loader.description_file)

    def summary(self) -> Summary:
        d, m, attention = self.d, self.loader, self.loader.setting(FA)
        integer = (m.quantize or _FLOAT).upper()
        cache = {"FAQuant": "int8", "FAKQuant": "int8 key, float value"}.get(str(attention), "float")
        return Summary(
            dtype=str(d.config.get("torch_dtype") or "unknown").removeprefix("torch."),
            linears=dict(Counter(integer if name in self.int8 else _FLOAT for name in d.linears)),
            packs=packs(self.pack_types),
            kv_cache="int8" if m.setting(KV) else cache,
            attention=str(attention or "float"),
            attention_layers=d.model.num_layers if attention else 0,
        )
