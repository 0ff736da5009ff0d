"""MindIE-LLM up to its weights: path, description, config.json. What it then knows, and the rules of that stage.

Sources: MindIE-LLM examples/atb_models: atb_llm/models/base/{router,config}.py, atb_llm/utils/file_utils.py,
atb_llm/utils/weights.py (which looks for the description a second time).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eightfold.architectures import FAMILIES
from eightfold.check import Finding, Rules, Verdict
from eightfold.check.directory import INTEGERS, RawDirectory
from eightfold.config import CONFIG_DTYPES, DType
from eightfold.errors import EightfoldError, one_of
from eightfold.files import read_json
from eightfold.format.description import SHORT_NAME
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.tokenizer_files import FAST, SETTINGS
from eightfold.scheme import DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, QUANT_BIAS, WEIGHT_OFFSET, WEIGHT_SCALE, weight_name
from eightfold.values import shown
from eightfold.vocabulary import TOKENIZER

LLAMA = "LlamaForCausalLM"
KV, FA, REDUCE = "kv_quant_type", "fa_quant_type", "reduce_quant_type"

_STATIC = (DEQ_SCALE, QUANT_BIAS, INPUT_SCALE, INPUT_OFFSET)
_PER_ROW = (WEIGHT_SCALE, WEIGHT_OFFSET)
_W8A8_LABELS = frozenset({"W8A8", "W8A8S", "W8A8_MIX"})


@dataclass(frozen=True)
class Scheme:
    """What a value of `quantize` means for a layer."""

    pack: str  # its name in pack types
    labels: frozenset[str]  # labels in the description that count as quantized
    reads: tuple[str, ...]  # tensors of an int8 linear, besides its weight


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

RULES = Rules(
    "mindie",
    {
        Verdict.REFUSES: {
            "path": "raises ValueError on a path with anything but letters, digits and _ . / -. "
            "Rename it, or serve it from another path.",
            "owner": "raises PermissionError on what belongs to another user and group than who serves it. "
            "chown it to that user.",
            "permission": "raises PermissionError on what others may write to. Run: chmod -R o-w DIR",
            "damaged-file": "opens {file} and fails. {why}",
            "description": "raises AssertionError: quantize is set, and there is no description: "
            f"got {{got}}, expected {{expected}}. Name it {SHORT_NAME}.",
            "quantize/none": "raises KeyError: neither quantize nor model_quant_type says how the model is quantized. "
            "Add model_quant_type to the description.",
            "quantize": "raises NotImplementedError for this quantize: got {got}, expected {expected}",
            "settings": "raises NotImplementedError for this {key}: got {got!r}, expected {expected}",
            "torch-dtype": "refuses a model whose torch_dtype is not a 16-bit one: "
            "got {got}, expected float16 or bfloat16",
            "rope-scaling": "raises an error for a key, type or range of rope_scaling that it does not know: got {got}",
            "config-sizes": "raises ValueError: not initialized. Add it to config.json.",
            "model-type/none": "raises KeyError: it picks its class by model_type: got nothing, expected {expected}. "
            "Add it to config.json.",
            "model-type": "raises NotImplementedError: it picks its class by model_type: got {got}, expected "
            "{expected}. Correct it in config.json.",
            "tokenizer": "raises an error: it loads a tokenizer with the model, and there is none. "
            "Copy tokenizer.json and tokenizer_config.json from the float model.",
            "tokenizer/damaged": "cannot read the tokenizer, or comes to grief with it. {why}",
            "tokenizer-class": "raises ValueError: transformers 4 has no tokenizer class of this name: got {got}, "
            f"expected {FAST}. Correct tokenizer_config.json.",
            "tokenizer-merges": "raises an error: tokenizers 0.19 reads merges as texts, such as 'a b': got {got}. "
            "Write the directory again.",
            "tokenizer-part": "raises an error: tokenizers 0.19 does not have a part of tokenizer.json: got {got}",
            "generation-config": "merges generation_config.json into the config and cannot read it. {why}",
        },
        Verdict.MISDECODES: {
            "description/float": "finds no description and takes integers for the weights of a float model: got {got}. "
            f"Name it {SHORT_NAME}, or set quantize in config.json.",
            "rope-dialect": "does not read rope_parameters and rotates by the default, base 10000 without scaling: "
            "got {got}. Say it in both dialects.",
            "rope-attention": "multiplies yarn's attention_factor by 0.1 ln(factor) + 1, in whose place it stands: "
            "got {got}",
            "bos": "puts BOS before a text, which tokenizer.json does not, unless add_bos_token is false: got {got}. "
            "Add it to tokenizer_config.json.",
            "head-dim": "takes hidden_size // num_attention_heads for the size of a head and does not read head_dim: "
            "got {got}, expected {expected}",
        },
        Verdict.IGNORES: {
            "description-other": f"reads {SHORT_NAME} and not the other description, which says something else. "
            "Remove the wrong one.",
            "fa-switched-off": "computes attention in float: a null in config.json wins over the description: "
            f"got {{got}}. Remove {FA} from config.json.",
            "kv-not-enabled": f"keeps the key/value cache in float: {KV} is not set{{got}}. "
            f'Add "{KV}": "C8" to the description.',
            "fa-not-enabled": f"computes attention in float: {FA} is not set. "
            f'Add "{FA}": "FAQuant" to the description.',
        },
        Verdict.WARNS: {
            "extra-tokens": "passes over a list under extra_special_tokens in transformers 4.43, which from 4.48 on "
            "refuses it: got {got}. Put it under additional_special_tokens.",
            "chat-template": "reads chat templates in tokenizer_config.json only: got {got}. Write it there too.",
            "description-name": "warns that descriptions of this name are supported until 2026/06/30. "
            f"Name it {SHORT_NAME}.",
            "unchecked-scheme": "takes this quantize, but what it wants of the tensors is not among the rules here: "
            "got {got}",
            "quantize-differs": "takes quantize from config.json and not model_quant_type from the description: "
            "got {own} and {described}. Remove the wrong one.",
            "kv-and-fa": "is not known to be used with an int8 cache and quantized attention in one model. "
            "Use one of the two.",
            "model-class": "runs this architecture in a class of its own, while these are the rules of its llama "
            "class: got {got}. Biases of q, k, v and the head size are for that class to read and not checked here.",
        },
    },
)


def _suffixed(kind: Any) -> str:
    return f"quant_model_description_{kind}.json"


def _own_name(kind: str) -> str:
    return "w8a8_pdmix" if kind == "w8a8_mix" else kind


class MindIE:
    """What the loader knows of a directory before it opens the weights.

    Attributes:
        d: the directory.
        described: the description that the router merges: the short name, else the one with config.json's `quantize`.
        quantize: config.json's value, else model_quant_type in small letters; None makes it a float model.
        scheme: what `quantize` means.
        description_file: the description that Weights reads the labels from; None if there is none.
        labels: what Weights looks labels up in.
        dtype: the model's, from `torch_dtype` only; None if it is not one of the two.
    """

    def __init__(self, d: RawDirectory) -> None:
        self.d = d
        own = d.config.get("quantize")
        self._router_file = self._present(SHORT_NAME, _suffixed(own))
        self.described = d.descriptions.get(self._router_file or "", {})
        kind = str(self.described.get("model_quant_type") or "").lower() if own is None else str(own)
        self.quantize = _own_name(kind) or None
        self.scheme = SCHEMES.get(self.quantize or "", _NO_SCHEME)
        fallback = [_suffixed("w8a8")] if self.quantize in ("w8a8_pdmix", "w8a8_dynamic") else []
        self._description_names = [SHORT_NAME, _suffixed(self.quantize), *fallback]
        self._weights_file = self._present(*self._description_names)
        self.description_file = None if self.quantize is None else self._weights_file
        self.labels = d.descriptions.get(self.description_file or "", {})
        dtype = CONFIG_DTYPES.get(str(d.config.get("torch_dtype")).removeprefix("torch."))
        self.dtype = dtype if dtype in (DType.F16, DType.BF16) else None
        settings = d.config.get("quantization_config")
        self._settings = settings if isinstance(settings, dict) else {}

    def _present(self, *names: str) -> str | None:
        return next((name for name in names if name in self.d.descriptions or name in self.d.damaged), None)

    def setting(self, key: str) -> Any:
        """Return a key of quantization_config after the description was merged over it."""
        if key == FA and key in self._settings:
            return self._settings[key]
        return self.described.get(key, self._settings.get(key, _SETTINGS[key][0]))

    def label(self, module: str) -> str | None:
        value = self.labels.get(weight_name(module))
        return None if value is None else str(value)

    def labelled_scheme(self, module: str) -> Scheme | None:
        """Return what a module's label would mean, were it asked; None for FLOAT and what is not known here."""
        return SCHEMES.get(_own_name((self.label(module) or "").lower()))

    def is_integer(self, linear: str) -> bool:
        """Whether a linear's weight stays an integer on load, which is what makes the loader read its scales."""
        return self.d.dtype_of(weight_name(linear)) in INTEGERS

    def findings(self) -> Iterator[Finding]:
        yield from self._files()
        yield from self._description()
        yield from self._enabled()
        yield from self._rope()
        yield from self._sizes()
        yield from self._tokenizer()

    def _files(self) -> Iterator[Finding]:
        """file_utils looks at paths of at most 4096 characters, their owners and permissions; root may read all."""
        d, here = self.d, self.d.path.resolve()
        paths = [str(path) for path in (here, *(here / name for name in d.files))]
        yield from RULES.found("path", [p for p in paths if re.search(r"[^0-9A-Za-z_./-]", p) or len(p) > 4096])
        looked_at = (d.path, *(d.path / name for name in (CONFIG_NAME, *d.descriptions, *d.files)))
        status = {str(path): path.stat() for path in looked_at if path.exists()}
        user, groups = os.geteuid(), {os.getegid(), *os.getgroups()}
        foreign = [path for path, s in status.items() if user and s.st_uid != user and s.st_gid not in groups]
        yield from RULES.found("owner", foreign)
        yield from RULES.found("permission", [path for path, s in status.items() if s.st_mode & 0o002])
        for name, why in d.damaged.items():
            if name in d.files or name in (self._router_file, self._weights_file):
                yield from RULES.found("damaged-file", [name], file=name, why=why)

    def _description(self) -> Iterator[Finding]:
        d, kind, known = self.d, self.quantize, [*SCHEMES, *_UNCHECKED]
        others = one_of(d.descriptions) if d.descriptions else "none"
        if kind is not None and self.description_file is None:
            yield from RULES.found("description", ["quantize"], got=others, expected=one_of(self._description_names))
        if kind is None and self._router_file is None:
            yield from RULES.found(
                "description/float", [weight_name(x) for x in d.linears if self.is_integer(x)], got=others
            )
        if self.description_file not in (None, SHORT_NAME):
            yield from RULES.found("description-name", [str(self.description_file)])
        if self.description_file == SHORT_NAME:
            other = [name for name, content in d.descriptions.items() if content != self.labels]
            yield from RULES.found("description-other", other)
        if kind is None and self._router_file in d.descriptions:
            yield from RULES.found("quantize/none", ["model_quant_type"])
        elif kind is not None and kind not in known:
            yield from RULES.found("quantize", ["quantize"], got=kind, expected=one_of(known))
        elif kind in _UNCHECKED:
            yield from RULES.found("unchecked-scheme", ["quantize"], got=kind)
        own, described = d.config.get("quantize"), self.described.get("model_quant_type")
        if own and described and str(own).lower() != str(described).lower():
            yield from RULES.found("quantize-differs", ["quantize"], own=own, described=described)

    def _enabled(self) -> Iterator[Finding]:
        """What the merged settings enable: kv_quant_type the int8 cache, fa_quant_type quantized attention."""
        d, stored = self.d, self.d.tensors
        for key, allowed in _SETTINGS.items():
            if (value := self.setting(key)) not in allowed:
                yield from RULES.found("settings", [key], key=key, got=value, expected=one_of(allowed))
        described = self.described.get(FA)
        if FA in self._settings and self._settings[FA] is None and described:
            yield from RULES.found("fa-switched-off", [f"quantization_config.{FA}"], got=described)
        if self.setting(KV) is None:
            other = self.described.get("kv_cache_type")
            where = [name for name in d.kv_tensors() if name in stored] + ["kv_cache_type"] * (other is not None)
            got = f": got kv_cache_type {other}, which it does not read" if other else ""
            yield from RULES.found("kv-not-enabled", where, got=got)
        if FA not in self._settings and described is None:
            yield from RULES.found("fa-not-enabled", [name for name in d.fa_tensors() if name in stored])
        if self.setting(KV) and self.setting(FA):
            yield from RULES.found("kv-and-fa", [KV, FA])
        if self.dtype is None:
            value = d.config.get("torch_dtype")
            got = "dtype, which it does not read" if value is None and "dtype" in d.config else value or "none"
            yield from RULES.found("torch-dtype", ["torch_dtype"], got=got)

    def _rope(self) -> Iterator[Finding]:
        """rope_theta and rope_scaling are read, rope_parameters is not; rope_scaling becomes a record: TypeError."""
        config = self.d.config
        new, old = (
            found if isinstance(found := config.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling")
        )
        absent = {
            "rope_theta": new.get("rope_theta", _DEFAULT_ROPE_THETA) != _DEFAULT_ROPE_THETA,
            "rope_scaling": new.get("rope_type", "default") != "default",
        }
        where = [key for key, is_said in absent.items() if is_said and config.get(key) is None]
        yield from RULES.found("rope-dialect", where, got=new)
        bad = [key for key in old if key not in _ROPE_KEYS]
        bad += [key for key, allowed in _ROPE_VALUES.items() if old.get(key) not in allowed]
        for key in ("low_freq_factor", "high_freq_factor"):
            value = old.get(key, 1)
            if value is not None and not (isinstance(value, (int, float)) and 1 <= value <= 4):
                bad.append(key)
        yield from RULES.found("rope-scaling", [f"rope_scaling.{key}" for key in bad], got=old)
        if "yarn" in (old.get("type"), old.get("rope_type")) and (own := old.get("attention_factor")) not in (None, 1):
            yield from RULES.found("rope-attention", ["rope_scaling.attention_factor"], got=own)

    def _tokenizer(self) -> Iterator[Finding]:
        """transformers 4.43 with tokenizers 0.19 loads the tokenizer (requirements.txt), and config.json's class."""
        d, name = self.d, self.d.config.get("model_type")
        expected = FAMILIES[d.model.architecture].model_type
        if name != expected:
            rule = "model-type/none" if name is None else "model-type"
            yield from RULES.found(rule, ["model_type"], got=shown(name), expected=expected)
        if not d.has_tokenizer:
            yield from RULES.found("tokenizer", [TOKENIZER])
        elif d.tokenizer_fault:
            yield from RULES.found("tokenizer/damaged", [TOKENIZER], why=d.tokenizer_fault)
        places = {
            **dict.fromkeys(("tokenizer-class", "extra-tokens", "chat-template", "bos"), SETTINGS),
            **dict.fromkeys(("tokenizer-merges", "tokenizer-part"), TOKENIZER),
        }
        gaps = d.tokenizer.gaps() if d.has_tokenizer else {}
        for rule, place in places.items():
            if rule in gaps:
                yield from RULES.found(rule, [place], got=gaps[rule])

    def _sizes(self) -> Iterator[Finding]:
        d = self.d
        sizes = ("max_position_embeddings", "vocab_size")
        yield from RULES.found("config-sizes", [key for key in sizes if not d.config.get(key)])
        path = d.path / "generation_config.json"
        if path.exists():
            try:
                read_json(path)
            except EightfoldError as error:
                yield from RULES.found("generation-config", [path.name], why=error)
        if d.model.architecture != LLAMA:
            yield from RULES.found("model-class", ["architectures"], got=d.model.architecture)
            return
        size = d.model.hidden_size // d.model.num_heads
        if d.model.head_dim != size:
            yield from RULES.found("head-dim", ["head_dim"], got=d.model.head_dim, expected=size)
