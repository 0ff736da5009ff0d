"""MindIE-LLM up to its weights: path, description, config.json. What it then knows, and the rules of that stage.

Sources: MindIE-LLM examples/atb_models: atb_llm/models/base/{router,config}.py, atb_llm/utils/file_utils.py,
atb_llm/utils/weights.py (which looks for the description a second time).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.check.directory import RawDirectory
from eightfold.check.findings import Finding, Outcome, found
from eightfold.config import CONFIG_DTYPES, DType, load_json_object
from eightfold.errors import EightfoldError, one_of
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.description import SHORT_NAME
from eightfold.scheme import DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, QUANT_BIAS, WEIGHT_OFFSET, WEIGHT_SCALE, weight_name

LLAMA = "LlamaForCausalLM"
INTEGERS = ("I8", "I32", "I64")  # kept on load; everything else is cast to the model's dtype
KV, FA, REDUCE = "kv_quant_type", "fa_quant_type", "reduce_quant_type"

_STATIC = (DEQ_SCALE, QUANT_BIAS, INPUT_SCALE, INPUT_OFFSET)
_PER_ROW = (WEIGHT_SCALE, WEIGHT_OFFSET)
_W8A8_LABELS = frozenset({"W8A8", "W8A8S", "W8A8_MIX"})


@dataclass(frozen=True)
class Scheme:
    """What a value of `quantize` means for a layer."""

    pack: str  # in the names of pack types
    labels: frozenset[str]  # in the description, that count as quantized
    reads: tuple[str, ...]  # of an int8 linear, besides its weight


SCHEMES = {
    "w8a8": Scheme("W8A8", _W8A8_LABELS, _STATIC),
    "w8a8s": Scheme("W8A8", _W8A8_LABELS, _STATIC),
    "w8a8_pdmix": Scheme("W8A8", _W8A8_LABELS, _PER_ROW + _STATIC),
    "w8a8_dynamic": Scheme("W8A8_DYNAMIC", frozenset({"W8A8_DYNAMIC", "W8A8"}), _PER_ROW),
    "w8a16": Scheme("W8A16", frozenset({"W8A16"}), _PER_ROW),
}
_NO_SCHEME = Scheme("FP", frozenset(), ())
_UNCHECKED = ("w8a8sc", "w4a16", "w4a8_dynamic", "w16a16s", "w16a16sc")  # taken, but their tensors are not known here

_SETTINGS: dict[str, tuple[Any, ...]] = {
    "group_size": (0, 64, 128, 256),
    KV: (None, "C8"),
    FA: (None, "FAQuant", "FAKQuant"),
    REDUCE: (None, "per_channel"),
}

_ROPE_KEYS = {
    *("factor", "type", "long_factor", "short_factor", "low_freq_factor", "high_freq_factor", "rope_type"),
    *("original_max_position_embeddings", "rope_theta", "attention_factor", "beta_fast", "beta_slow"),
    *("mrope_section", "mrope_interleaved"),
}
_ROPE_VALUES = {
    "type": (None, "linear", "dynamic", "yarn", "llama3", "su", "longrope"),
    "rope_type": (None, "dynamic", "yarn", "llama3"),
}
_DEFAULT_ROPE_THETA = 10000.0


# --- what the loader knows afterwards


def _suffixed(kind: Any) -> str:
    return f"quant_model_description_{kind}.json"


def _present(d: RawDirectory, *names: str) -> str | None:
    return next((name for name in names if name in d.descriptions or name in d.damaged), None)


def _router_file(d: RawDirectory) -> str | None:
    return _present(d, SHORT_NAME, _suffixed(d.config.get("quantize")))


def routed(d: RawDirectory) -> dict[str, Any]:
    """Return the description that the router merges: the short name, else the one with config.json's `quantize`."""
    return d.descriptions.get(_router_file(d) or "", {})


def _own_name(kind: str) -> str:
    return "w8a8_pdmix" if kind == "w8a8_mix" else kind


def quantize(d: RawDirectory) -> str | None:
    """Return config.json's `quantize`, else model_quant_type in small letters; None makes it a float model."""
    own, described = d.config.get("quantize"), routed(d).get("model_quant_type")
    return _own_name(str(described or "").lower() if own is None else str(own)) or None


def _description_names(d: RawDirectory) -> list[str]:
    kind = quantize(d)
    fallback = [_suffixed("w8a8")] if kind in ("w8a8_pdmix", "w8a8_dynamic") else []
    return [SHORT_NAME, _suffixed(kind), *fallback]


def description_file(d: RawDirectory) -> str | None:
    """Return the description that Weights reads the labels from."""
    return None if quantize(d) is None else _present(d, *_description_names(d))


def labels(d: RawDirectory) -> dict[str, Any]:
    """Return what Weights looks labels up in."""
    return d.descriptions.get(description_file(d) or "", {})


def label(d: RawDirectory, module: str) -> str | None:
    """Return the label of a module's weight; None without an entry."""
    value = labels(d).get(weight_name(module))
    return None if value is None else str(value)


def scheme(d: RawDirectory) -> Scheme:
    """Return what `quantize` means."""
    return SCHEMES.get(quantize(d) or "", _NO_SCHEME)


def labelled_scheme(d: RawDirectory, module: str) -> Scheme | None:
    """Return what a module's label would mean, were it asked; None for FLOAT and what is not known here."""
    return SCHEMES.get(_own_name((label(d, module) or "").lower()))


def _own_settings(d: RawDirectory) -> dict[str, Any]:
    own = d.config.get("quantization_config")
    return own if isinstance(own, dict) else {}


def setting(d: RawDirectory, key: str) -> Any:
    """Return a key of quantization_config after the description was merged over it."""
    own = _own_settings(d)
    if key == FA and key in own:
        return own[key]
    return routed(d).get(key, own.get(key, _SETTINGS[key][0]))


def model_dtype(d: RawDirectory) -> DType | None:
    """Return the model's dtype as MindIE reads it, from `torch_dtype` only; None if it is not one of the two."""
    kind = CONFIG_DTYPES.get(str(d.config.get("torch_dtype")).removeprefix("torch."))
    return kind if kind in (DType.F16, DType.BF16) else None


# --- the rules


def path_characters(d: RawDirectory) -> Iterator[Finding]:
    """file_utils allows letters, digits and _ . / - in a path of at most 4096 characters: ValueError."""
    here = d.path.resolve()
    paths = [str(path) for path in (here, *(here / name for name in d.files))]
    bad = [path for path in paths if re.search(r"[^0-9A-Za-z_./-]", path) or len(path) > 4096]
    does = "raises ValueError on a path with anything but letters, digits and _ . / -"
    action = "Rename it, or serve it from another path."
    yield from found("mindie.path", Outcome.REFUSES, bad, does, action=action)


def _paths(d: RawDirectory) -> dict[str, os.stat_result]:
    paths = (d.path, *(d.path / name for name in (CONFIG_NAME, *d.descriptions, *d.files)))
    return {str(path): path.stat() for path in paths if path.exists()}


def owner(d: RawDirectory) -> Iterator[Finding]:
    """file_utils wants the caller or a group of the caller as owner; root may read everything: PermissionError."""
    user, groups = os.geteuid(), {os.getegid(), *os.getgroups()}
    foreign = [path for path, s in _paths(d).items() if user and s.st_uid != user and s.st_gid not in groups]
    does = "raises PermissionError on what belongs to another user and group than who serves it"
    action = "chown it to that user."
    yield from found("mindie.owner", Outcome.REFUSES, foreign, does, action=action)


def permissions(d: RawDirectory) -> Iterator[Finding]:
    """file_utils wants nobody else to be able to write: PermissionError."""
    writable = [path for path, status in _paths(d).items() if status.st_mode & 0o002]
    does = "raises PermissionError on what others may write to"
    yield from found("mindie.permission", Outcome.REFUSES, writable, does, action="Run: chmod -R o-w DIR")


def damaged_files(d: RawDirectory) -> Iterator[Finding]:
    """json.load and safe_open raise on a file that is not what its name says; descriptions of other names are left."""
    for name, why in d.damaged.items():
        if name in d.files or name in (_router_file(d), _present(d, *_description_names(d))):
            yield from found("mindie.damaged-file", Outcome.REFUSES, [name], f"opens {name} and fails", action=why)


def description_missing(d: RawDirectory) -> Iterator[Finding]:
    """Weights needs a description when `quantize` is set (AssertionError); when it is not, the model is a float one."""
    others = one_of(d.descriptions) if d.descriptions else "none"
    if quantize(d) is not None and description_file(d) is None:
        does, names = "raises AssertionError: quantize is set, and there is no description", _description_names(d)
        action = f"Name it {SHORT_NAME}."
        yield from found(
            "mindie.description", Outcome.REFUSES, ["quantize"], does, got=others, expected=one_of(names), action=action
        )
    if quantize(d) is None and _router_file(d) is None:
        whole = [weight_name(linear) for linear in d.linears if d.dtype_of(weight_name(linear)) in INTEGERS]
        does = "finds no description and takes integers for the weights of a float model"
        action = f"Name it {SHORT_NAME}, or set quantize in config.json."
        yield from found("mindie.description", Outcome.MISDECODES, whole, does, got=others, action=action)


def description_name(d: RawDirectory) -> Iterator[Finding]:
    """A suffixed name is read with a warning; with the short name there, no other is looked at."""
    name = description_file(d)
    if name not in (None, SHORT_NAME):
        does = "warns that descriptions of this name are supported until 2026/06/30"
        yield from found("mindie.description-name", Outcome.WARNS, [str(name)], does, action=f"Name it {SHORT_NAME}.")
    if name == SHORT_NAME:
        others = [other for other, content in d.descriptions.items() if content != labels(d)]
        does = f"reads {SHORT_NAME} and not the other description, which says something else"
        yield from found("mindie.description-other", Outcome.IGNORES, others, does, action="Remove the wrong one.")


def quantize_value(d: RawDirectory) -> Iterator[Finding]:
    """`quantize` or model_quant_type must be there (KeyError), and be one of a list (NotImplementedError)."""
    kind, known = quantize(d), [*SCHEMES, *_UNCHECKED]
    if kind is None and _router_file(d) in d.descriptions:
        does = "raises KeyError: neither quantize nor model_quant_type says how the model is quantized"
        action = "Add model_quant_type to the description."
        yield from found("mindie.quantize", Outcome.REFUSES, ["model_quant_type"], does, action=action)
    elif kind is not None and kind not in known:
        does = "raises NotImplementedError for this quantize"
        yield from found("mindie.quantize", Outcome.REFUSES, ["quantize"], does, got=kind, expected=one_of(known))
    elif kind in _UNCHECKED:
        does = "takes this quantize, but what it wants of the tensors is not among the rules here"
        yield from found("mindie.unchecked-scheme", Outcome.WARNS, ["quantize"], does, got=kind)


def quantize_differs(d: RawDirectory) -> Iterator[Finding]:
    """config.json's `quantize` comes before model_quant_type."""
    own, described = d.config.get("quantize"), routed(d).get("model_quant_type")
    where = ["quantize"] if own and described and str(own).lower() != str(described).lower() else []
    does = "takes quantize from config.json and not model_quant_type from the description"
    got, action = f"{own} and {described}", "Remove the wrong one."
    yield from found("mindie.quantize-differs", Outcome.WARNS, where, does, got=got, action=action)


def settings(d: RawDirectory) -> Iterator[Finding]:
    """group_size, kv_quant_type, fa_quant_type and reduce_quant_type have short lists: NotImplementedError."""
    for key, allowed in _SETTINGS.items():
        value = setting(d, key)
        where = [key] if value not in allowed else []
        does, expected = f"raises NotImplementedError for this {key}", one_of(allowed)
        yield from found("mindie.settings", Outcome.REFUSES, where, does, got=repr(value), expected=expected)


def fa_switched_off(d: RawDirectory) -> Iterator[Finding]:
    """A fa_quant_type in config.json keeps its value, null included, whatever the description says."""
    own, described = _own_settings(d).get(FA), routed(d).get(FA)
    where = [f"quantization_config.{FA}"] if FA in _own_settings(d) and own is None and described else []
    does = "computes attention in float: a null in config.json wins over the description"
    action = f"Remove {FA} from config.json."
    yield from found("mindie.fa-switched-off", Outcome.IGNORES, where, does, got=described, action=action)


def kv_not_enabled(d: RawDirectory) -> Iterator[Finding]:
    """kv_quant_type enables the int8 cache; kv_cache_type is not read."""
    stored = [name for name in d.kv_tensors() if name in d.tensors]
    if (other := routed(d).get("kv_cache_type")) is not None:
        stored.append("kv_cache_type")
    does = f"keeps the key/value cache in float: {KV} is not set"
    got = f"kv_cache_type {other}, which it does not read" if other else None
    action = f'Add "{KV}": "C8" to the description.'
    where = stored if setting(d, KV) is None else []
    yield from found("mindie.kv-not-enabled", Outcome.IGNORES, where, does, got=got, action=action)


def fa_not_enabled(d: RawDirectory) -> Iterator[Finding]:
    """fa_quant_type enables quantized attention; the tensors alone do not."""
    said = FA in _own_settings(d) or routed(d).get(FA) is not None
    stored = [] if said else [name for name in d.fa_tensors() if name in d.tensors]
    does = f"computes attention in float: {FA} is not set"
    action = f'Add "{FA}": "FAQuant" to the description.'
    yield from found("mindie.fa-not-enabled", Outcome.IGNORES, stored, does, action=action)


def kv_and_fa(d: RawDirectory) -> Iterator[Finding]:
    """No writer makes both; what the loader does with both is not known."""
    both = [KV, FA] if setting(d, KV) and setting(d, FA) else []
    does = "is not known to be used with an int8 cache and quantized attention in one model"
    yield from found("mindie.kv-and-fa", Outcome.WARNS, both, does, action="Use one of the two.")


def torch_dtype(d: RawDirectory) -> Iterator[Finding]:
    """`torch_dtype` must be float16 or bfloat16; `dtype`, as newer transformers write it, is not looked at."""
    value = d.config.get("torch_dtype")
    got = "dtype, which it does not read" if value is None and "dtype" in d.config else value or "none"
    where = ["torch_dtype"] if model_dtype(d) is None else []
    does, expected = "refuses a model whose torch_dtype is not a 16-bit one", "float16 or bfloat16"
    yield from found("mindie.torch-dtype", Outcome.REFUSES, where, does, got=got, expected=expected)


def rope_dialect(d: RawDirectory) -> Iterator[Finding]:
    """rope_theta and rope_scaling are read; rope_parameters, as newer transformers write it, is not."""
    new = d.config.get("rope_parameters")
    new = new if isinstance(new, dict) else {}
    base = new.get("rope_theta", _DEFAULT_ROPE_THETA)
    stretched = new.get("rope_type", "default") != "default"
    absent = {
        "rope_theta": d.config.get("rope_theta") is None and base != _DEFAULT_ROPE_THETA,
        "rope_scaling": d.config.get("rope_scaling") is None and stretched,
    }
    does = "does not read rope_parameters and rotates by the default, base 10000 without scaling"
    where, action = [key for key, missing in absent.items() if missing], "Say it in both dialects."
    yield from found("mindie.rope-dialect", Outcome.MISDECODES, where, does, got=new, action=action)


def rope_scaling(d: RawDirectory) -> Iterator[Finding]:
    """rope_scaling becomes a record with fixed fields (TypeError), whose types and ranges are checked."""
    scaling = d.config.get("rope_scaling")
    scaling = scaling if isinstance(scaling, dict) else {}
    bad = [f"rope_scaling.{key}" for key in scaling if key not in _ROPE_KEYS]
    bad += [f"rope_scaling.{key}" for key, allowed in _ROPE_VALUES.items() if scaling.get(key) not in allowed]
    for key in ("low_freq_factor", "high_freq_factor"):
        value = scaling.get(key, 1)
        if value is not None and not (isinstance(value, (int, float)) and 1 <= value <= 4):
            bad.append(f"rope_scaling.{key}")
    does = "raises an error for a key, type or range of rope_scaling that it does not know"
    yield from found("mindie.rope-scaling", Outcome.REFUSES, bad, does, got=scaling)


def config_sizes(d: RawDirectory) -> Iterator[Finding]:
    """max_position_embeddings and vocab_size must be said: ValueError, "not initialized"."""
    where = [key for key in ("max_position_embeddings", "vocab_size") if not d.config.get(key)]
    does, action = "raises ValueError: not initialized", "Add it to config.json."
    yield from found("mindie.config-sizes", Outcome.REFUSES, where, does, action=action)


def generation_config(d: RawDirectory) -> Iterator[Finding]:
    """generation_config.json, if there, is merged into the config."""
    path: Path = d.path / "generation_config.json"
    if path.exists():
        try:
            load_json_object(path)
        except EightfoldError as error:
            does = "merges generation_config.json into the config and cannot read it"
            yield from found("mindie.generation-config", Outcome.REFUSES, [path.name], does, action=str(error))


def model_class(d: RawDirectory) -> Iterator[Finding]:
    """Every architecture but Llama has a class of its own; the rules here are those of the llama class."""
    where = [] if d.architecture == LLAMA else ["architectures"]
    does = "runs this architecture in a class of its own, while these are the rules of its llama class"
    action = "Biases of q, k, v and the head size are for that class to read and not checked here."
    yield from found("mindie.model-class", Outcome.WARNS, where, does, got=d.architecture, action=action)


def head_size(d: RawDirectory) -> Iterator[Finding]:
    """The llama class takes hidden_size // num_attention_heads and does not read head_dim."""
    size = d.model.hidden_size // d.model.num_heads
    where = ["head_dim"] if d.architecture == LLAMA and d.model.head_dim != size else []
    does = "takes hidden_size // num_attention_heads for the size of a head and does not read head_dim"
    yield from found("mindie.head-dim", Outcome.MISDECODES, where, does, got=d.model.head_dim, expected=size)


RULES = (
    path_characters,
    owner,
    permissions,
    damaged_files,
    description_missing,
    description_name,
    quantize_value,
    quantize_differs,
    settings,
    fa_switched_off,
    kv_not_enabled,
    fa_not_enabled,
    kv_and_fa,
    torch_dtype,
    rope_dialect,
    rope_scaling,
    config_sizes,
    generation_config,
    model_class,
    head_size,
)
