"""What vLLM and transformers do with a directory: ours, which vLLM reads by a plugin, or one of compressed-tensors.

They are not asked for unless they are named: a directory for NPUs need not suit them. Float directories they read as
they are.

Sources: vLLM 0.32 (compressed_tensors/compressed_tensors.py, kernels/linear), our plugin (eightfold_vllm), transformers
5.24 (quantizers/quantizer_compressed_tensors.py), compressed-tensors 0.20; tried with small models of each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from eightfold.check import Finding, Report, Rules, Summary, Verdict
from eightfold.check.directory import values_of
from eightfold.config import DType
from eightfold.errors import EightfoldError, one_of
from eightfold.format.compressed import (
    METHOD,
    WEIGHT_PACKED,
    WEIGHT_ZERO_POINT,
    Inputs,
    Schemes,
    settings_of,
)
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.named import NamedDirectory
from eightfold.format.safetensors import MappedFile
from eightfold.layouts import EXPERT
from eightfold.scheme import BIAS, LINEAR_TENSORS, NEEDS_CALIBRATION, WEIGHT, QuantType

LOADERS = ("vllm", "transformers")

_FLOAT = QuantType.FLOAT.value
_KINDS = {
    Inputs.FLOAT: QuantType.W8A16.value,
    Inputs.DYNAMIC: QuantType.W8A8_DYNAMIC.value,
    Inputs.STATIC: QuantType.W8A8.value,
}
_STATIC = {kind.value for kind in NEEDS_CALIBRATION} - {QuantType.W8A8_MIX.value}
_ATTENTION = {QuantType.C8.value, QuantType.FAQUANT.value}
_JOINED = ("{q_proj,k_proj,v_proj}", "{gate_proj,up_proj}")

_EXPORT = "Run: eightfold export DIR OUT --to compressed-tensors"
_UNREAD = "cannot use what config.json says of the quantization: {got}"

RULES = {
    "vllm": Rules(
        "vllm",
        {
            Verdict.REFUSES: {
                "mixed-group": "makes one product of these, and refuses different types: got {got}. "
                "Give them one type.",
                "scheme": f"has no such type by the plugin: got {{got}}, expected {one_of(LINEAR_TENSORS)}",
                "scheme-experts": "has int8 experts with a scale for each token alone: got {got}. "
                "Quantize them as W8A8_DYNAMIC.",
                "norm-bias": "has RMS norms without a bias: got values other than zero. Suppress outliers by smooth.",
                "unread": _UNREAD,
                "method": "reads this model, if at all, by rules that are not checked here: got {got}",
            },
            Verdict.IGNORES: {
                "attention": "leaves int8 caches and quantized attention out: keys and values stay float",
            },
            Verdict.WARNS: {
                "plugin": "reads this directory by a plugin alone. Install it beside vLLM: pip install "
                "'eightfold[vllm]'; or write what it reads by itself: eightfold export DIR OUT --to compressed-tensors",
                "mix": "takes W8A8_MIX for W8A8_DYNAMIC, for generated tokens too",
                "cpu": "has no kernel on CPUs for packed 8-bit weights beside float inputs: GPUs only. "
                "On a CPU let it read the 8-bit directory by the plugin.",
                "zero-points": "has kernels for 8-bit weights with offsets on few GPUs. "
                "Quantize with symmetric weights.",
                "experts": "has int8 experts on GPUs, and on CPUs with AMX",
            },
        },
    ),
    "transformers": Rules(
        "transformers",
        {
            Verdict.REFUSES: {
                "names": f"finds no weights: it looks for model.safetensors, and knows no description. {_EXPORT}",
                "experts": "widens packed experts (W8A16) when it loads them, and raises RuntimeError on others. "
                "vLLM reads them.",
                "unread": _UNREAD,
                "method": "reads this model, if at all, by rules that are not checked here: got {got}",
            },
            Verdict.WARNS: {
                "package": "needs the package compressed-tensors (tried: 0.20.1) and accelerate",
                "static": "computes static inputs with dtype float32 alone: from_pretrained(DIR, dtype=torch.float32)",
                "zero-points": "loads packed offsets with quantization_config=CompressedTensorsConfig(dequantize=True) "
                "alone; otherwise it raises RuntimeError",
            },
        },
    ),
}


def check(d: NamedDirectory, loader: str) -> Report:
    """Run the rules of one of LOADERS over a directory; a float one has nothing to be found."""
    settings = settings_of(d.config)
    if d.description:
        return Report.of(loader, str(d.path), _of_ours(d, loader), _summary(d, d.linears))
    if settings is None:
        return Report.of(loader, str(d.path), (), _summary(d, d.linears))
    found = RULES[loader].found
    if settings.get("quant_method") != METHOD:
        method = str(settings.get("quant_method"))
        return Report.of(loader, str(d.path), found("method", [CONFIG_NAME], got=method), _summary(d, {}))
    try:
        kinds = _kinds_of(d)
    except EightfoldError as error:
        return Report.of(loader, str(d.path), found("unread", [CONFIG_NAME], got=error), _summary(d, {}))
    return Report.of(loader, str(d.path), _of_exported(d, loader, kinds), _summary(d, kinds))


def _summary(d: NamedDirectory, kinds: Mapping[str, str]) -> Summary:
    others = [kind for module, kind in kinds.items() if not EXPERT.fullmatch(module)]
    experts = [kind for module, kind in kinds.items() if EXPERT.fullmatch(module)]
    packs = {"experts": dict(Counter(experts))} if experts else {}
    return Summary(d.dtype, dict(Counter(others)), packs, "float", "float", 0)


def _of_ours(d: NamedDirectory, loader: str) -> Iterator[Finding]:
    found = RULES[loader].found
    if loader == "transformers":
        yield from found("names", [d.description])
        return
    yield from found("plugin", [d.description])
    yield from _joined(d.linears, loader)
    known = {_FLOAT, *LINEAR_TENSORS}
    strange = {module: label for module, label in d.linears.items() if label not in known}
    yield from found("scheme", strange, got=set(strange.values()))
    experts = {module: label for module, label in d.linears.items() if EXPERT.fullmatch(module)}
    dynamic = {_FLOAT, QuantType.W8A8_DYNAMIC.value, QuantType.W8A8_MIX.value}
    other = {module: label for module, label in experts.items() if label not in dynamic}
    yield from found("scheme-experts", other, got=set(other.values()))
    yield from found("experts", [module for module, label in experts.items() if label != _FLOAT])
    yield from found("mix", [module for module, label in d.linears.items() if label == QuantType.W8A8_MIX.value])
    yield from found("attention", [name for name, label in d.labels.items() if label in _ATTENTION])
    yield from found("norm-bias", _biased_norms(d))


def _of_exported(d: NamedDirectory, loader: str, kinds: Mapping[str, str]) -> Iterator[Finding]:
    found = RULES[loader].found
    offsets = [name for name in d.tensors if name.endswith(f".{WEIGHT_ZERO_POINT}")]
    experts = [module for module in kinds if EXPERT.fullmatch(module)]
    if loader == "transformers":
        yield from found("package", [CONFIG_NAME])
        yield from found("static", [module for module, kind in kinds.items() if kind in _STATIC])
        yield from found("zero-points", offsets)
        yield from found("experts", [module for module in experts if kinds[module] != QuantType.W8A16.value])
        return
    yield from _joined({**dict.fromkeys(_floats(d, kinds), _FLOAT), **kinds}, loader)
    yield from found("cpu", [module for module, kind in kinds.items() if kind == QuantType.W8A16.value])
    yield from found("zero-points", offsets)
    yield from found("experts", experts)


def _kinds_of(d: NamedDirectory) -> dict[str, str]:
    """Return the int8 linears of a compressed-tensors directory -> what they would be here."""
    schemes = Schemes(d.path, d.config)
    ends = (f".{WEIGHT_PACKED}", f".{WEIGHT}")
    modules = [
        name.rpartition(".")[0]
        for name, info in d.tensors.items()
        if name.endswith(ends[0]) or (name.endswith(ends[1]) and info.dtype == DType.I8.value)
    ]
    return {module: _KINDS[inputs] for module, inputs in schemes.inputs_of(modules).items()}


def _floats(d: NamedDirectory, kinds: Mapping[str, str]) -> Iterable[str]:
    return [module for module in d.linears if module not in kinds]


def _joined(kinds: Mapping[str, str], loader: str) -> Iterator[Finding]:
    """Find linears that become one and are not stored alike."""
    mixed: dict[str, set[str]] = {}
    for module in kinds:
        parent, _, last = module.rpartition(".")
        for group in _JOINED:
            parts = group.strip("{}").split(",")
            if last == parts[0] and not EXPERT.fullmatch(module):
                labels = {kinds[name] for part in parts if (name := f"{parent}.{part}") in kinds}
                if len(labels) > 1:
                    mixed[f"{parent}.{group}"] = labels
    yield from RULES[loader].found("mixed-group", mixed, got=set().union(*mixed.values()))


def _biased_norms(d: NamedDirectory) -> list[str]:
    maps: dict[Path, MappedFile] = {}
    names = [name for name in d.tensors if name.endswith((f"layernorm.{BIAS}", f".norm.{BIAS}"))]
    return [name for name in names if (values := values_of(d.tensors[name], maps)) is not None and values.any()]
