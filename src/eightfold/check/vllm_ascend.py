"""What vllm-ascend (modelslim quantization) does with a directory, by rules in the order in which it runs.

    description -> for each module of vLLM's model: scheme by its label -> parameters -> every stored tensor is copied

q, k, v are one module qkv_proj, gate and up are gate_up_proj. A stored tensor must find a parameter, and is cast to
its type. What vLLM itself does is from reading its code and marked so.

Sources: vllm_ascend/quantization/{modelslim_config,method_adapters}.py, quantization/methods, ops/layernorm.py,
patch/worker; vllm/model_executor: models/llama.py, layers/linear.py, model_loader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from eightfold.architectures import FAMILIES
from eightfold.check import Finding, Report, Rules, Summary, Verdict
from eightfold.check.directory import INTEGERS, SHARED_INPUTS, RawDirectory, cast, packs
from eightfold.config import CONFIG_DTYPES, DType
from eightfold.errors import EightfoldError, one_of
from eightfold.families import layer_of
from eightfold.files import read_json
from eightfold.format.description import SHORT_NAME
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.tokenizer_files import SETTINGS
from eightfold.model.layers import rope_scale
from eightfold.rope import fit_rope, read_rope
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
from eightfold.values import shown
from eightfold.vocabulary import TOKENIZER

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
_HEAD_FIRST = ("LlamaForCausalLM", "MistralForCausalLM")  # vLLM makes their head, and ties it then

_INDEX = "model.safetensors.index.json"  # the one name that vLLM looks for
_NORM_BIAS = "norm.bias"  # what vllm-ascend looks for in the description's keys

RULES = Rules(
    "vllm-ascend",
    {
        Verdict.REFUSES: {
            "damaged-file": "opens {file} and fails. {why}",
            "description": "raises ValueError, Quantization Config Not Found; it knows one name of the description "
            f"only: got {{got}}. Name the description {SHORT_NAME}.",
            "quantization-config": "takes quantization_config for the description, which it then never reads: KeyError "
            "at the first layer. Remove quantization_config from config.json.",
            "label-missing": "raises KeyError: the description has no entry for the weight. Add the entries.",
            "mixed-group": "raises ValueError: q, k, v (or gate, up) have different labels: got {got}. "
            "Keep all of them float, or none.",
            "scheme": f"raises NotImplementedError for this scheme: got {{got}}, expected {one_of(_REGISTERED)}",
            "missing-tensor": "raises ValueError: not initialized from checkpoint. Write the directory again.",
            "shape": "raises AssertionError: tensor and parameter differ in shape: got {got}, expected {expected}",
            "fa-scheme": "raises NotImplementedError for this kind of attention: got {got}. "
            "Quantize without attention for vllm-ascend.",
            "fa-scheme/latent": "has quantized attention for multi-head latent attention only, which this "
            "architecture has not: got FAKQuant. Quantize without attention for vllm-ascend.",
            "model-type": "raises ValueError: transformers picks the class of config.json by model_type: got {got}, "
            "expected {expected}. Correct config.json.",
            "tokenizer": "raises OSError: it loads a tokenizer with the model, and there is none. Copy tokenizer.json "
            "and tokenizer_config.json from the float model, or serve with --skip-tokenizer-init.",
            "tokenizer/damaged": "cannot read the tokenizer, or comes to grief with it. {why}",
            "unknown-tensor": "raises KeyError: no parameter for a stored tensor. Remove it, or add what enables it.",
        },
        Verdict.MISDECODES: {
            "empty-parameter": "lets these parameters be absent and then computes with uninitialized memory. "
            "Write them.",
            "label-and-weight": "casts the weight to the type its label asks for: got {got}. "
            "Correct the labels, or write it again.",
            "deq-scale": "casts deq_scale by value: floats become the integer 0, packed integers enormous floats: "
            "got {got}, expected {expected}. Write it again for this torch_dtype.",
            **{
                rule: f"keeps one {suffix} for linears that become one, and these are not equal. "
                "Quantize the linears that share an input with the same parameters."
                for rule, (_, suffix) in SHARED_INPUTS.items()
            },
            "input-offset": f"casts {INPUT_OFFSET} to int8: expected integers from -128 to 127",
            "input-scale-range": f"multiplies by 1 / {INPUT_SCALE}, which is infinite in the model's dtype",
            "w8a16-offset": "adds the offset of an asymmetric weight where it must subtract it: "
            "got values other than zero. Quantize symmetrically for vllm-ascend.",
            "weight-offset": f"multiplies int8 by int8 without {WEIGHT_OFFSET}: "
            "got values other than zero, expected zeros",
            "norm-bias": f"gives no norm a bias, as none of the description's keys contains {_NORM_BIAS}: "
            "got values other than zero",
            "linear-bias": "passes over a bias that this architecture and config.json do not have: "
            "got values other than zero. config.json may lack a setting such as attention_bias.",
            "rope-attention": "multiplies cosines and sines by what follows from how much longer contexts become, and "
            "reads neither attention_factor nor mscale, nor longrope's factor: got {got}",
            "kv-scale": "quantizes the cache of these layers by a scale of 1. Write scales for k and v.",
            "kv-offset": "leaves cache offsets out when it generates: got values other than zero. "
            "Quantize the cache symmetrically.",
        },
        Verdict.IGNORES: {
            "index": f"opens only the files that {_INDEX} names, and leaves this one. "
            "Remove the index; it belongs to the float model.",
            "description-other": f"reads {SHORT_NAME} and not the other description, which says something else. "
            "Remove the wrong one.",
            "tied-head": "reads the embedding for the head of a tied model, and not this int8 head. "
            "Set tie_word_embeddings to false, or remove it.",
            "kv-layer": "keeps the cache of these layers in float",
            "entry-without-tensor": "does not compare the description with the files: these entries have no tensor",
        },
        Verdict.WARNS: {
            "bos": "puts BOS and EOS around a text by tokenizer.json in releases with transformers 5, and by "
            "add_bos_token and add_eos_token, which say something else, in those with 4",
            "tokenizer-dialect": "reads this in releases with transformers 5; those with 4 refuse it: got {got}. "
            "Write the directory again for both.",
            "unchecked-scheme": "has this scheme, but its parameters are not among the rules here: got {got}",
            "rope-dynamic": "stretches dynamic rope scaling for factor times the context at every length, where "
            "transformers and eightfold are plain within it: got {got}",
            "torch-dtype": "runs in float16 or bfloat16, and which one it chooses here decides how deq_scale is read: "
            "got {got}. Serve with --dtype.",
            "duplicate-tensor": "copies a tensor that two files have twice, and keeps that of the last file: "
            "got {got}. Remove the file that does not belong here.",
            "head-scheme": "gives it a linear's scheme; no source says that this works. Keep it float.",
            "norm-bias-missing": f"gives every norm a bias, as one of the description's keys contains {_NORM_BIAS}; "
            "these stay zero. Write all of them, or none.",
        },
        Verdict.LOADS: {
            "tensor-without-entry": "does not compare the description with the files: these tensors have no entry",
        },
    },
)


def check(d: RawDirectory) -> Report:
    """Run every rule over a directory."""
    opened = _opened_files(d)
    loader = _VllmAscend(d.only(opened))
    hidden = RULES.found("index", [name for name in d.files if name not in opened])
    return Report.of(RULES.loader, str(d.path), [*hidden, *loader.findings()], loader.summary())


def _opened_files(d: RawDirectory) -> list[str]:
    """Return the files that vLLM (by its code) opens: all, or those that model.safetensors.index.json names."""
    try:
        named = set(read_json(d.path / _INDEX)["weight_map"].values())
    except (EightfoldError, KeyError, AttributeError, TypeError):
        return list(d.files)
    return [name for name in d.files if name in named]


class _Parameter(NamedTuple):
    """A parameter of a linear whose scheme is known here."""

    name: str
    kind: QuantType
    suffix: str
    shape: tuple[int, ...]


class _VllmAscend:
    """What the loader knows of a directory, and does with it.

    Attributes:
        d: the directory, with the files that are opened.
        description: under the one name that is looked for; nothing for a float model.
        dtype: the model's, by either key of config.json; None if it is not one of the two.
        modules: those that have a scheme: the linears, the head of an untied model.
        labels: the labels of these, of embedding and of head; FLOAT in a float model.
    """

    def __init__(self, d: RawDirectory) -> None:
        self.d = d
        self._is_described = SHORT_NAME in d.descriptions
        self.description = d.descriptions.get(SHORT_NAME, {})
        self._dtype_name = d.config.get("torch_dtype") or d.config.get("dtype")
        dtype = CONFIG_DTYPES.get(str(self._dtype_name).removeprefix("torch."))
        self.dtype = dtype if dtype in (DType.F16, DType.BF16) else None
        self.modules = d.linears if d.model.tie_word_embeddings else {**d.linears, d.model.names.head: d.head}
        unlabelled = None if self._is_described or d.has_int8 else _FLOAT
        ends = d.model.names.embedding, d.model.names.head
        said = {m: self.description.get(weight_name(m), unlabelled) for m in (*self.modules, *ends)}
        self.labels = {module: str(label) for module, label in said.items() if label is not None}
        kinds = {m: kind for m in self.modules if (kind := _CHECKED.get(self.labels.get(m, "")))}
        self._static = [module for module, kind in kinds.items() if kind in _STATIC]
        self._parameters = [
            _Parameter(f"{m}.{spec.suffix}", kind, spec.suffix, spec.shape_for(N=linear.n, K=linear.k))
            for m, linear in self.modules.items()
            if (kind := kinds.get(m))
            for spec in linear_tensors(kind, linear.has_bias)
        ]
        self._has_norm_biases = any(_NORM_BIAS in key for key in self.description)
        self._has_kv_cache = self.description.get("kv_cache_type") == "C8"
        scale = f"{d.model.names.key}.{KV_SCALE}"
        keys = [key for key in self.description if scale in key] if self._has_kv_cache else []
        self._kv_layers = {layer_of(key) for key in keys}
        self._attention = self.description.get("fa_quant_type")
        fa_keys = [key for key in self.description if f"{FA_K}.{SCALE}" in key]
        self._fa_layers = fa_keys if self._attention is not None else []

    def findings(self) -> Iterator[Finding]:
        yield from self._files()
        yield from self._config_and_tokenizer()
        yield from self._schemes()
        yield from self._tensors()
        yield from self._weights()
        yield from self._inputs()
        yield from self._norms_and_biases()
        yield from self._cache_and_attention()
        yield from self._left_over()

    def _files(self) -> Iterator[Finding]:
        """The short name selects the method; vLLM (by its code) takes a quantization_config for it."""
        d = self.d
        for name, why in d.damaged.items():
            if name in d.files or name == SHORT_NAME:
                yield from RULES.found("damaged-file", [name], file=name, why=why)
        if d.has_int8 and SHORT_NAME not in (*d.descriptions, *d.damaged):
            yield from RULES.found(
                "description", [SHORT_NAME], got=one_of(d.descriptions) if d.descriptions else "none"
            )
        if self._is_described:
            others = [name for name, content in d.descriptions.items() if content != self.description]
            yield from RULES.found("description-other", others)
            if d.config.get("quantization_config"):
                yield from RULES.found("quantization-config", ["quantization_config"])

    def _config_and_tokenizer(self) -> Iterator[Finding]:
        """vLLM (by its code) leaves both to transformers."""
        d, name = self.d, self.d.config.get("model_type")
        expected = FAMILIES[d.model.architecture].model_type
        if name != expected:
            got = "nothing" if name is None else shown(name)
            yield from RULES.found("model-type", ["model_type"], got=got, expected=expected)
        if not d.has_tokenizer:
            yield from RULES.found("tokenizer", [TOKENIZER])
        elif d.tokenizer_fault:
            yield from RULES.found("tokenizer/damaged", [TOKENIZER], why=d.tokenizer_fault)
        if d.tokenizer.is_ambiguous:
            yield from RULES.found("bos", [SETTINGS])
        new = {got for rule, got in d.tokenizer.gaps().items() if rule in ("tokenizer-class", "extra-tokens")}
        yield from RULES.found("tokenizer-dialect", [SETTINGS] if new else [], got=new)
        yield from self._rope()

    def _rope(self) -> Iterator[Finding]:
        """Of yarn it reads neither attention_factor nor mscale; of longrope it knows lengths and divisors only."""
        config, where = self.d.model, self.d.path / CONFIG_NAME
        try:
            rope = fit_rope(read_rope(self.d.config, where), config.head_dim, config.max_position_embeddings, where)
        except EightfoldError:  # what vLLM makes of that is not known here
            return
        if rope.rope_type == "dynamic":
            yield from RULES.found("rope-dynamic", ["rope_parameters"], got=f"factor {rope.factor:g}")
        if rope.rope_type not in ("yarn", "longrope"):
            return
        growth = config.max_position_embeddings / rope.original_max_position_embeddings
        factor = rope.factor if rope.rope_type == "yarn" else growth
        theirs = replace(rope, attention_factor=None, mscale=0.0, mscale_all_dim=0.0, factor=factor)
        if not math.isclose(rope_scale(rope), rope_scale(theirs), rel_tol=1e-6):
            got = f"{rope_scale(rope):.6g}, expected {rope_scale(theirs):.6g}"
            yield from RULES.found("rope-attention", ["rope_parameters"], got=got)

    def _schemes(self) -> Iterator[Finding]:
        """Each module's weight is looked up: q, k, v, gate, up one by one, embedding and head too."""
        d, labels = self.d, self.labels
        embedding, head = d.model.names.embedding, d.model.names.head
        asked = [*self.modules, embedding, *([head] if d.model.architecture in _HEAD_FIRST else [])]
        yield from RULES.found(
            "label-missing", [weight_name(m) for m in asked if self._is_described and m not in labels]
        )
        kinds = {group.module: {labels[m] for m in group.members if m in labels} for group in d.packed}
        mixed = {module: " and ".join(sorted(found)) for module, found in kinds.items() if len(found) > 1}
        yield from RULES.found("mixed-group", mixed, got=set(mixed.values()))
        others = {m: labels[m] for m in self.modules if m in labels and labels[m] not in _CHECKED}
        taken = [m for m, kind in others.items() if kind in _REGISTERED or kind.startswith(_REGISTERED_PREFIXES)]
        refused = [m for m in others if m not in taken]
        for rule, where in (("scheme", refused), ("unchecked-scheme", taken)):
            yield from RULES.found(rule, where, got={others[m] for m in where})
        if self.dtype is None:
            yield from RULES.found("torch-dtype", ["torch_dtype"], got=self._dtype_name or "none")

    def _tensors(self) -> Iterator[Finding]:
        """vLLM (by its code) copies every tensor of every file by name to a parameter of its shape.

        One that nothing was copied to is a ValueError, but for biases and what counts as computed and is not: that
        stays what the memory held.
        """
        d, parameters = self.d, self._parameters
        twice, files = d.duplicates()
        yield from RULES.found("duplicate-tensor", twice, got=files)
        wanted = [*d.outer_weights, *(weight_name(norm) for norm in d.norms)]
        wanted += [p.name for p in parameters if p.suffix not in _MAY_BE_ABSENT]
        yield from RULES.found("missing-tensor", d.absent(wanted))
        used = [p.name for p in parameters if p.suffix in _MAY_BE_ABSENT & _USED[p.kind]]
        yield from RULES.found("empty-parameter", d.absent(used))
        shapes = {p.name: p.shape for p in parameters}
        shapes.update({weight_name(norm): (size,) for norm, size in d.norms.items()})
        shapes[weight_name(d.model.names.embedding)] = (d.head.n, d.head.k)
        wrong = d.misshapen(shapes)
        first = {"got": list(d.tensors[wrong[0]].shape), "expected": list(shapes[wrong[0]])} if wrong else {}
        yield from RULES.found("shape", wrong, **first)

    def _weights(self) -> Iterator[Finding]:
        """Values are copied and cast: floats cut to int8, or int8 taken for floats, without a scale."""
        d = self.d
        kinds = {p.name: p.kind for p in self._parameters if p.suffix == WEIGHT}
        kinds[weight_name(d.model.names.embedding)] = QuantType.FLOAT
        stored = {name: kind for name in kinds if (kind := d.dtype_of(name)) is not None}
        integers = (*INTEGERS, "U8")
        wrong = [name for name, kind in stored.items() if (kinds[name] is QuantType.FLOAT) is (kind in integers)]
        got = {f"{kinds[name].value} stored as {stored[name]}" for name in wrong}
        yield from RULES.found("label-and-weight", wrong, got=got)
        # An int64 parameter for float16 and a float32 one for bfloat16.
        wanted = {DType.F16: ("I64",), DType.BF16: ("F32", "F16", "BF16")}.get(self.dtype or DType.I8, ())
        kept = {name: d.dtype_of(name) for name in (f"{module}.{DEQ_SCALE}" for module in self._static)}
        cut = {name: kind for name, kind in kept.items() if wanted and kind is not None and kind not in wanted}
        yield from RULES.found("deq-scale", cut, got=set(cut.values()), expected="".join(wanted[:1]))

    def _inputs(self) -> Iterator[Finding]:
        """A joined module has one input_scale and one input_offset: that of the last linear copied (vLLM, by its code).

        Activations are multiplied by 1 / input_scale, which is taken in the model's dtype. W8A16 passes the offset of
        weights on without turning its sign.
        """
        d, dtype = self.d, self.dtype or DType.F16
        joined = [group for group in d.packed if set(self._static).issuperset(group.members)]
        for rule, modules in d.unequal_inputs(joined, dtype):
            yield from RULES.found(rule, modules)
        yield from RULES.found("input-offset", d.beyond_int8(f"{module}.{INPUT_OFFSET}" for module in self._static))
        values = {name: d.values(name) for name in (f"{module}.{INPUT_SCALE}" for module in self._static)}
        with np.errstate(divide="ignore"):
            inverse = {name: cast(1 / cast(value, dtype), dtype) for name, value in values.items() if value is not None}
        infinite = [name for name, value in inverse.items() if not np.all(np.isfinite(value))]
        yield from RULES.found("input-scale-range", infinite)
        offsets = {p.name: p.kind is QuantType.W8A16 for p in self._parameters if p.suffix == WEIGHT_OFFSET}
        used = d.nonzero(offsets)
        yield from RULES.found("w8a16-offset", [name for name in used if offsets[name]])
        yield from RULES.found("weight-offset", [name for name in used if not offsets[name]])

    def _norms_and_biases(self) -> Iterator[Finding]:
        """If any of the description's keys contains norm.bias, every norm has a bias, zero until one is copied.

        vLLM (by its code) passes over a bias that the class has no parameter for. Embedding and head get the scheme of
        their label, as linears do.
        """
        d = self.d
        ends = d.model.names.embedding, d.model.names.head
        names = [weight_name(m) for m in ends if self.labels.get(m, _FLOAT) != _FLOAT]
        yield from RULES.found("head-scheme", [name for name in names if name in d.outer_weights])
        yield from RULES.found("tied-head", [name for name in names if name not in d.outer_weights])
        biases = [bias_name(norm) for norm in d.norms]
        if self._has_norm_biases:
            yield from RULES.found("norm-bias-missing", d.absent(biases))
        else:
            yield from RULES.found("norm-bias", d.nonzero(biases))
        without = [m for m, linear in self.modules.items() if not linear.has_bias and m not in self._static]
        yield from RULES.found("linear-bias", d.nonzero(map(bias_name, without)))

    def _cache_and_attention(self) -> Iterator[Finding]:
        """A layer whose k_proj has a scale in the description gets an int8 cache; a scale that is not copied stays 1.

        The attention scheme is looked up by fa_quant_type: only FAKQuant, for latent attention, is there.
        """
        d = self.d
        if self._has_kv_cache:
            absent = [name for name in d.absent(d.kv_tensors()) if name.endswith(KV_SCALE)]
            yield from RULES.found("kv-scale", [name for name in absent if layer_of(name) in self._kv_layers])
            yield from RULES.found("kv-layer", [name for name in absent if layer_of(name) not in self._kv_layers])
            yield from RULES.found("kv-offset", d.nonzero(d.kv_tensors(), KV_OFFSET))
        rule = "fa-scheme/latent" if self._attention == "FAKQuant" else "fa-scheme"
        yield from RULES.found(rule, self._fa_layers, got=self._attention)

    def _left_over(self) -> Iterator[Finding]:
        """vLLM (by its code) looks a parameter up for every stored tensor, but for biases."""
        d = self.d
        known = {parameter.name for parameter in self._parameters}
        known |= {weight_name(d.model.names.embedding), *(weight_name(norm) for norm in d.norms)}
        known |= {name for name in d.kv_tensors() if layer_of(name) in self._kv_layers}
        known |= set(d.fa_tensors()) if self._fa_layers else set()
        unchecked = [m for m in self.modules if self.labels.get(m, "") not in _CHECKED]
        unchecked += [d.model.names.head] if d.model.tie_word_embeddings else []
        strange = [name for name in d.tensors if name not in known and name.rpartition(".")[0] not in unchecked]
        strange = [name for name in strange if not name.endswith((f".{BIAS}", "rotary_emb.inv_freq"))]
        yield from RULES.found("unknown-tensor", strange)
        idle, bare = d.unmatched(self.description)
        yield from RULES.found("entry-without-tensor", idle)
        yield from RULES.found("tensor-without-entry", bare)

    def summary(self) -> Summary:
        said = {name: self.labels.get(name) or "unlabelled" for name in self.d.linears}
        kinds = {group: {said[member] for member in group.members} for group in self.d.packed}
        return Summary(
            dtype=str(self._dtype_name or "unknown").removeprefix("torch."),
            linears=dict(Counter(said.values())),
            packs=packs({group: kind.pop() if len(kind) == 1 else "mixed" for group, kind in kinds.items()}),
            kv_cache="int8" if self._has_kv_cache else "float",
            attention=str(self._attention) if self._fa_layers else "float",
            attention_layers=len(self._fa_layers),
        )
