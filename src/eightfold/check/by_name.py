"""What loaders do with a directory of any family, by the names in it: description, groups, experts, registries.

For families of which only names are known. Sources: vllm_ascend/quantization/modelslim_config.py and methods (0.18.0
and main), sglang's modelslim.py, MindIE-LLM atb_llm/models and mindie_llm/runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from eightfold.check import Finding, Report, Rules, Summary, Verdict
from eightfold.check.directory import differ, values_of
from eightfold.config import DType
from eightfold.errors import one_of
from eightfold.format.description import SHORT_NAME
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.named import NamedDirectory
from eightfold.format.safetensors import MappedFile
from eightfold.layouts import EXPERT
from eightfold.scheme import (
    BIAS,
    INPUT_OFFSET,
    INPUT_SCALE,
    LINEAR_TENSORS,
    WEIGHT,
    QuantType,
    linear_tensors,
    weight_name,
)

_FLOAT = QuantType.FLOAT.value
_INT8 = DType.I8.value
_KINDS = {kind.value: kind for kind in LINEAR_TENSORS}

LOADERS = ("mindie", "mindie-aclgraph", "vllm-ascend", "sglang")

# What each has for a linear, and for experts.
LINEARS = {
    "mindie": ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16"),
    "mindie-aclgraph": ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX"),
    "vllm-ascend": ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16"),
    "sglang": ("W8A8", "W8A8_DYNAMIC"),
}
EXPERTS = {
    "mindie": (_FLOAT, "W8A8", "W8A8_DYNAMIC", "W8A16"),
    "mindie-aclgraph": (_FLOAT, "W8A8_DYNAMIC"),
    "vllm-ascend": (_FLOAT, "W8A8_DYNAMIC"),
    "sglang": ("W8A8_DYNAMIC",),
}

_NORM_BIAS = "norm.bias"  # in any key: SGLang and vllm-ascend then give norms a bias

_REFUSES = {
    "description": f"knows the description by the name {SHORT_NAME} alone: got {{got}}. Rename it.",
    "quantization-config": "takes quantization_config of config.json for the description. Remove it, "
    "in text_config too.",
    "label-missing": "raises KeyError: the description has no entry for these. Add the entries.",
    "mixed-group": "raises ValueError: linears that become one have different labels: got {got}. Give them one type.",
    "missing-tensor": "raises KeyError: an int8 linear needs these. Write the directory again.",
    "shape": "raises AssertionError on parameters of another shape than one value for each row",
}
_COMMON: dict[Verdict, dict[str, str]] = {
    Verdict.MISDECODES: {
        "mixed-experts": "reads the label of expert 0 and takes all experts of the layer for that: got {got}. "
        "Give all experts of a layer one type.",
        "label-and-weight": "casts the weight to the type its label asks for: got {got}. Write the directory again.",
    },
    Verdict.WARNS: {
        "family": "has no model of this family, by its sources: got {got}",
    },
    Verdict.IGNORES: {
        "entry-without-tensor": "does not compare the description with the files: these entries have no tensor",
    },
}


def _rules(loader: str, **others: dict[str, str]) -> Rules:
    linears, experts = one_of((_FLOAT, *LINEARS[loader])), one_of(EXPERTS[loader])
    refuses = {
        **_REFUSES,
        "scheme": f"has no such scheme for linears: got {{got}}, expected {linears}",
        "scheme-experts": f"has no such scheme for experts: got {{got}}, expected {experts}. "
        "Quantize them as W8A8_DYNAMIC.",
    }
    texts: dict[Verdict, Mapping[str, str]] = {Verdict.REFUSES: refuses, **_COMMON}
    for verdict, own in others.items():
        texts[Verdict(verdict)] = {**texts.get(Verdict(verdict), {}), **own}
    return Rules(loader, texts)


_INPUTS = {
    "inputs": "takes one input_scale and input_offset for linears that become one, and these are not equal. "
    "Quantize the linears that share an input with the same parameters."
}
_NORMS = {
    "norm-bias": f"gives every norm a bias, as keys contain {_NORM_BIAS!r}; where some have none, it may not load"
}

RULES = {
    "vllm-ascend": _rules(
        "vllm-ascend",
        refuses={
            "entry": "does not know of which parts this consists, and looks this entry up: KeyError. "
            "Add it, with their type.",
            "kv-b": "raises AssertionError: latent attention takes kv_b_proj apart as a float matrix. Keep it float.",
            "fa-scheme": "has quantized attention for latent attention alone. Quantize without it for vllm-ascend.",
            "joined": "looks gate and up up by their own names: KeyError. Quantize again: they are split.",
        },
        misdecodes=_INPUTS,
        warns={
            **_NORMS,
            "head-entry": "looks this up where it builds a head of its own for a tied model. Add it as FLOAT.",
        },
    ),
    "sglang": _rules(
        "sglang",
        refuses={"fa-scheme": "has no quantized attention. Quantize without attention for SGLang."},
        misdecodes=_INPUTS,
        warns=_NORMS,
    ),
    "mindie": _rules(
        "mindie",
        refuses={"inputs": f"raises ValueError: it {_INPUTS['inputs']}"},
        misdecodes={
            "config-key": "takes attention or experts for another scheme without this key of config.json: got {got}, "
            "expected {expected}. Add it.",
            "one-scheme": "reads every int8 linear by the one scheme that `quantize` names: got {got}",
        },
    ),
    "mindie-aclgraph": _rules(
        "mindie-aclgraph",
        misdecodes={
            **_INPUTS,
            "scheme/float": "takes int8 of a scheme that it has not for float, with a warning: got {got}",
        },
    ),
}


def check(d: NamedDirectory, loader: str) -> Report:
    """Run the rules of one loader over a directory."""
    return Report.of(loader, str(d.path), _Check(d, loader).findings() if d.description else (), _summary(d))


def _summary(d: NamedDirectory) -> Summary:
    others = [label for module, label in d.linears.items() if not EXPERT.fullmatch(module)]
    kinds = Counter(next(iter(labels)) if len(labels) == 1 else "mixed" for labels in d.experts.values())
    packs = {"experts": dict(kinds)} if kinds else {}
    labels = {*d.labels.values()}
    cache = "int8 (not checked)" if QuantType.C8.value in labels else "float"
    attention = "FAQuant (not checked)" if QuantType.FAQUANT.value in labels else "float"
    return Summary(d.dtype, dict(Counter(others)), packs, cache, attention, 0)


class _Check:
    """The rules of one loader on one directory."""

    def __init__(self, d: NamedDirectory, loader: str) -> None:
        self._d, self._loader, self._rules = d, loader, RULES[loader]

    def findings(self) -> Iterator[Finding]:
        """Yield what every rule finds."""
        d, found = self._d, self._rules.found
        if self._loader != "mindie" and d.description != SHORT_NAME:
            yield from found("description", [d.description], got=d.description)
        if self._loader != "mindie":
            nested = [
                name for name, part in d.config.items() if isinstance(part, dict) and "quantization_config" in part
            ]
            top = ["quantization_config"] if "quantization_config" in d.config else []
            yield from found("quantization-config", [*top, *(f"{name}.quantization_config" for name in nested)])
        if not d.layout.takes_any and self._loader not in d.layout.engines:
            yield from found("family", [CONFIG_NAME], got=d.layout.model_type)
        yield from self._entries()
        yield from self._types()
        yield from self._tensors()
        yield from getattr(self, f"_{self._loader.replace('-', '_')}")()

    def _entries(self) -> Iterator[Finding]:
        d = self._d
        yield from self._rules.found("label-missing", [name for name in d.tensors if name not in d.labels])
        known = {weight_name(module) for module in (*d.experts, *map(d.layout.entry_of, d.linears))}
        extra = [name for name in d.labels if name not in d.tensors and name not in known]
        extra = [name for name in extra if not name.endswith("lm_head.weight")]
        yield from self._rules.found("entry-without-tensor", extra)

    def _types(self) -> Iterator[Finding]:
        d, found = self._d, self._rules.found
        mixed = {name: labels for name, labels in d.groups.items() if len(labels) > 1}
        yield from found("mixed-group", mixed, got=set().union(*mixed.values()))
        mixed_experts = {name: labels for name, labels in d.experts.items() if len(labels) > 1}
        yield from found("mixed-experts", mixed_experts, got={label for c in mixed_experts.values() for label in c})
        known = (_FLOAT, *LINEARS[self._loader])
        strange = {m: label for m, label in d.linears.items() if label not in known and not EXPERT.fullmatch(m)}
        rule = "scheme/float" if self._loader == "mindie-aclgraph" else "scheme"
        yield from found(rule, strange, got=set(strange.values()))
        wrong = {name: labels for name, labels in d.experts.items() if not labels.keys() <= {*EXPERTS[self._loader]}}
        got = {label for labels in wrong.values() for label in labels} - {*EXPERTS[self._loader]}
        yield from found("scheme-experts", wrong, got=got)

    def _tensors(self) -> Iterator[Finding]:
        d = self._d
        missing, odd, misfit, kinds = [], [], [], set()
        for module, label in d.linears.items():
            info = d.tensors[weight_name(module)]
            if (info.dtype == _INT8) != (label != _FLOAT):
                misfit.append(module)
                kinds.add(f"{info.dtype} under {label}")
            if label not in _KINDS or label == _FLOAT:
                continue
            for spec in linear_tensors(_KINDS[label], has_bias=False):
                name, shape = f"{module}.{spec.suffix}", spec.shape_for(N=info.shape[0], K=info.shape[1])
                if name not in d.tensors:
                    missing += [] if spec.optional else [name]
                elif d.tensors[name].shape not in (shape, tuple(side for side in shape if side != 1)):
                    odd.append(name)
        yield from self._rules.found("inputs", self._unequal_inputs())
        yield from self._rules.found("missing-tensor", missing)
        yield from self._rules.found("shape", odd)
        yield from self._rules.found("label-and-weight", misfit, got=kinds)

    def _unequal_inputs(self) -> list[str]:
        """Return what loaders join although the static parameters of its inputs are not the same."""
        maps: dict[Path, MappedFile] = {}
        found = []
        for group, modules in self._d.joined.items():
            for suffix in (INPUT_SCALE, INPUT_OFFSET):
                values = [values_of(self._d.tensors.get(f"{module}.{suffix}"), maps) for module in modules]
                if differ([each for each in values if each is not None]):
                    found.append(group)
        return found

    def _norm_biases(self) -> Iterator[Finding]:
        """Outlier suppression gives every norm one; that of a part of the model alone is another thing."""
        d = self._d
        norms = [name for name, info in d.tensors.items() if name.endswith(f"norm.{WEIGHT}") and len(info.shape) == 1]
        bare = [name for name in norms if name.removesuffix(WEIGHT) + BIAS not in d.tensors]
        yield from self._rules.found("norm-bias", [name for name in d.labels if _NORM_BIAS in name] if bare else [])

    def _vllm_ascend(self) -> Iterator[Finding]:
        d, found = self._d, self._rules.found
        entries = {weight_name(entry) for module in d.linears if (entry := d.layout.entry_of(module))}
        yield from found("entry", sorted(entries - d.labels.keys()))
        yield from found("fa-scheme", [name for name, label in d.labels.items() if label == QuantType.FAQUANT.value])
        latent = [module for module, label in d.linears.items() if module.endswith(".kv_b_proj") and label != _FLOAT]
        yield from found("kv-b", latent)
        ends = tuple(f".{name}.{WEIGHT}" for name in d.layout.halves or ()) or ("\0",)
        yield from found("joined", [name for name in d.labels if name.endswith(ends)])
        heads = [name for name in d.labels if name.endswith(("lm_head.weight", "output.weight", "output_layer.weight"))]
        yield from found("head-entry", [] if heads else ["lm_head.weight"])
        yield from self._norm_biases()

    def _sglang(self) -> Iterator[Finding]:
        quantized = [name for name, label in self._d.labels.items() if label == QuantType.FAQUANT.value]
        yield from self._rules.found("fa-scheme", quantized)
        yield from self._norm_biases()

    def _mindie(self) -> Iterator[Finding]:
        d, found = self._d, self._rules.found
        mixed: list[str] = []
        for key, labels in self._labels_by_key().items():
            if d.config.get(key) not in {label.lower() for label in labels} and key in d.layout.mindie_keys:
                expected = one_of(sorted(label.lower() for label in labels))
                yield from found("config-key", [key], got=d.config.get(key, "nothing"), expected=expected)
            mixed += labels if len(labels) > 1 else []
        yield from found("one-scheme", [CONFIG_NAME] if mixed else [], got=set(mixed))

    def _labels_by_key(self) -> dict[str, set[str]]:
        """Return the labels of what each key of config.json speaks of: one part, or with `quantize` all others too."""
        keys = {part: key for key, part in self._d.layout.mindie_keys.items()}
        found: dict[str, set[str]] = {}
        for module, label in self._d.linears.items():
            if label != _FLOAT:
                found.setdefault(keys.get(self._d.part_of(module), "quantize"), set()).add(label)
        return found

    def _mindie_aclgraph(self) -> Iterator[Finding]:
        return iter(())
