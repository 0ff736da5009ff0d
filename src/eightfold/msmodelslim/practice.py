"""What msModelSlim calls a practice, in the words of `eightfold quantize`.

A practice is a YAML file: `apiversion`, and in `spec` either the older tool's settings (modelslim_v0: anti_cfg,
calib_cfg, calib_params) or a list of processors (modelslim_v1: iter_smooth, linear_quant, ...). What has no equal here
is refused by its name, so that nobody gets another model than the practice describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eightfold.errors import InputError, UnsupportedError, one_of
from eightfold.quant.recipe_file import read_yaml
from eightfold.values import shown

_EVERY = ("*",)
_SUBGRAPHS = frozenset({"norm-linear", "linear-linear", "ov", "up-down"})
_LAYER = re.compile(r"(model\.layers\.\d+)\.\*")

# Settings of a v0 practice that are nothing here, with the values that ask for nothing.
_IDLE_V0 = {"mm_tensor": (False, True), "pr": (1.0, 1), "dev_type": ("npu", "cpu"), "dev_id": (0, None)}
_SPARSE = ("co_sparse", "is_lowbit", "do_smooth", "use_sigma")


@dataclass(frozen=True)
class Practice:
    """A quantization as msModelSlim describes one.

    Attributes:
        scheme: as --scheme names it.
        anti_outlier: as --anti-outlier names it.
        options: further words of the command line.
        keep_float: patterns.
        modules: pattern -> scheme or `float`, the last match wins; empty where all linears are of one scheme.
        dataset: the name of its calibration texts.
        notes: what is done otherwise here.
    """

    scheme: str
    anti_outlier: str = "none"
    options: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""
    notes: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return the options of `eightfold quantize`; `modules` needs a recipe file beside them."""
        kept = [word for pattern in self.keep_float for word in ("--keep-float", pattern)]
        return ["--scheme", self.scheme, "--anti-outlier", self.anti_outlier, *kept, *self.options]


def read_practice(path: Path) -> Practice:
    """Read a practice file.

    Raises:
        InputError: it is no YAML, or no practice.
        UnsupportedError: it asks for something that is not made here.
    """
    content = read_yaml(path, "practice")
    try:
        return _practice(content, path)
    except (AttributeError, TypeError, ValueError) as error:  # a value in the place of a mapping or a list
        raise InputError("practice", where=path, got=str(error), expected="the settings of a practice") from None


def _practice(content: Mapping[Any, Any], path: Path) -> Practice:
    version, spec = str(content.get("apiversion")), content.get("spec")
    if not isinstance(spec, dict):
        raise InputError("practice", where=path, got=f"apiversion {version} and no spec", expected="both")
    if version == "modelslim_v0":
        return _of_settings(spec, path)
    if version == "modelslim_v1":
        return _of_processors(spec, path)
    raise _refused(path, "apiversion", version, "modelslim_v0 or modelslim_v1")


def _refused(path: Path, what: str, got: Any, expected: str) -> UnsupportedError:
    return UnsupportedError(f"{what} of a practice", where=path, got=shown(got), expected=expected)


def _require_known(given: Mapping[str, Any], known: Sequence[str], what: str, path: Path) -> None:
    for name in given:
        if name not in known:
            raise _refused(path, what, name, one_of(known))


# --- modelslim_v0


def _of_settings(spec: Mapping[str, Any], path: Path) -> Practice:
    parts = {name: spec.get(name) or {} for name in ("calib_cfg", "anti_cfg", "calib_params", "calib_save_params")}
    _require_known(spec, (*parts, "calib_dataset", "anti_dataset", "anti_params", "anti_save_params"), "spec", path)
    calib, anti = parts["calib_cfg"], parts["anti_cfg"]
    _require_known(anti, ("anti_method", "dev_type", "dev_id"), "anti_cfg", path)
    _require_known(parts["calib_params"], ("disable_level",), "calib_params", path)
    _require_known(
        calib,
        ("w_bit", "a_bit", "w_sym", "act_method", "disable_names", "pdmix", "is_dynamic", "use_kvcache_quant",
         "use_fa_quant", "fa_amp", "fraction", "sigma_factor", *_SPARSE, *_IDLE_V0),
        "calib_cfg",
        path,
    )  # fmt: skip
    for name in _SPARSE:
        if calib.get(name):
            raise _refused(path, name, True, "False: sparse and low-bit weights are not made")
    for name, values in _IDLE_V0.items():
        if name in calib and calib[name] not in values:
            raise _refused(path, name, calib[name], one_of(values))
    if calib.get("w_bit", 8) != 8:
        raise _refused(path, "w_bit", calib["w_bit"], "8")
    level = str(parts["calib_params"].get("disable_level", "L0"))
    scheme = "w8a16" if calib.get("a_bit", 8) == 16 else "w8a8-mix" if calib.get("pdmix") else "w8a8"
    scheme = "w8a8-dynamic" if calib.get("is_dynamic") else scheme
    options = ["--no-weight-symmetric"] if scheme == "w8a16" and calib.get("w_sym") is False else []
    if scheme in ("w8a8", "w8a8-mix"):
        options += ["--act-method", str(calib.get("act_method", 1))]
    options += [] if level == "L0" else ["--disable-level", level]
    options += ["--kv-int8", "--kv-observe", "pre-rope"] if calib.get("use_kvcache_quant") else []
    options += ["--fa-quant"] if calib.get("use_fa_quant") else []
    options += ["--fa-amp", str(calib["fa_amp"])] if calib.get("fa_amp") else []
    return Practice(
        scheme,
        str(anti.get("anti_method") or "none"),
        (*options, *_part_size(parts["calib_save_params"])),
        tuple(map(str, calib.get("disable_names") or ())),
        dataset=str(spec.get("calib_dataset") or ""),
    )


def _part_size(save: Mapping[str, Any]) -> list[str]:
    size = save.get("part_file_size")
    return ["--part-size-gb", str(size)] if size else []


# --- modelslim_v1


def _of_processors(spec: Mapping[str, Any], path: Path) -> Practice:
    _require_known(spec, ("process", "save", "dataset", "runner"), "spec", path)
    found = _Processors(path)
    for processor in _flattened(spec.get("process") or ()):
        found.take(processor)
    if not found.linears:
        raise _refused(path, "process", "no linear_quant", "one")
    sizes = [word for each in spec.get("save") or () for word in _part_size(_saver(each, path))]
    return found.practice(sizes, str(spec.get("dataset") or ""))


def _flattened(process: Any) -> Iterator[Mapping[str, Any]]:
    for each in process:
        if isinstance(each, dict) and each.get("type") == "group":
            yield from _flattened(each.get("configs") or ())
        else:
            yield each


def _saver(each: Any, path: Path) -> Mapping[str, Any]:
    kind = each.get("type") if isinstance(each, dict) else each
    if kind != "ascendv1_saver":
        raise _refused(path, "save", kind, "ascendv1_saver; `eightfold quantize --legacy-names` writes older names")
    return dict(each)


class _Processors:
    """The processors of a practice, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._anti = "none"
        self._options: dict[tuple[str, ...], None] = {}  # each with its value, in order, once
        self._float_attention: list[str] = []
        self.linears: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []  # scheme, include, exclude

    def take(self, processor: Mapping[str, Any]) -> None:
        kinds = {
            "iter_smooth": self._smooth,
            "flex_smooth_quant": self._smooth,
            "linear_quant": self._linear,
            "dynamic_cache": self._cache,
            "fa3_quant": self._attention,
        }
        kind = processor.get("type") if isinstance(processor, dict) else processor
        if kind not in kinds:
            raise _refused(self._path, "processor", kind, one_of(kinds))
        kinds[kind](processor)

    def _require(self, holds: bool, what: str, got: Any, expected: str) -> None:
        if not holds:
            raise _refused(self._path, what, got, expected)

    def _smooth(self, processor: Mapping[str, Any]) -> None:
        kind = processor["type"]
        known = ("type", "alpha", "scale_min", "symmetric", "enable_subgraph_type", "include", "exclude", "beta")
        _require_known(processor, known, kind, self._path)
        alpha = processor.get("alpha")
        searched, fixed = (None,), (None, 0.9)
        self._require(alpha in (fixed if kind == "iter_smooth" else searched), f"alpha of {kind}", alpha, "its default")
        self._require(processor.get("beta") is None, f"beta of {kind}", processor.get("beta"), "its default")
        self._require(float(processor.get("scale_min", 1e-5)) == 1e-5, "scale_min", processor.get("scale_min"), "1e-5")
        self._require(processor.get("symmetric", True) is True, "symmetric of smoothing", False, "True")
        graphs = processor.get("enable_subgraph_type")
        self._require(graphs is None or {*graphs} == _SUBGRAPHS, "enable_subgraph_type", graphs, "all four")
        self._require(_is_everything(processor), f"include of {kind}", processor.get("include"), "every module")
        self._require(self._anti == "none", "smoothing", "two methods", "one")
        self._anti = {"iter_smooth": "iter", "flex_smooth_quant": "flex"}[kind]

    def _linear(self, processor: Mapping[str, Any]) -> None:
        _require_known(processor, ("type", "qconfig", "include", "exclude"), "linear_quant", self._path)
        config = processor.get("qconfig") or {}
        act, weight = config.get("act") or {}, config.get("weight") or {}
        shape = (weight.get("dtype", "int8"), weight.get("scope", "per_channel"), weight.get("method", "minmax"))
        self._require(shape == ("int8", "per_channel", "minmax"), "weight", shape, "int8, per_channel, minmax")
        include, exclude = (tuple(processor.get(name) or ()) for name in ("include", "exclude"))
        self.linears.append((self._scheme(act, weight), include or _EVERY, exclude))

    def _scheme(self, act: Mapping[str, Any], weight: Mapping[str, Any]) -> str:
        is_symmetric = weight.get("symmetric", True)
        if not act or act.get("dtype") in ("float", "bfloat16", "float16"):
            if not is_symmetric:
                self._options[("--no-weight-symmetric",)] = None
            return "w8a16"
        schemes = {"per_tensor": "w8a8", "per_token": "w8a8-dynamic", "pd_mix": "w8a8-mix"}
        scope, dtype = act.get("scope"), act.get("dtype")
        self._require(is_symmetric, "weight with int8 activations", "symmetric: False", "True")
        self._require(dtype == "int8", "act dtype", dtype, "int8")
        self._require(scope in schemes, "act scope", scope, one_of(schemes))
        by_token = scope == "per_token"
        expected = "True, as ranges of tokens have no zero point" if by_token else "False, as ranges have a zero point"
        self._require(act.get("symmetric", by_token) is by_token, f"symmetric of {scope}", not by_token, expected)
        method = act.get("method", "minmax")
        self._require(method in ("minmax", "histogram"), "act method", method, "minmax or histogram")
        if not by_token:
            self._options["--act-method", method] = None
        return schemes[str(scope)]

    def _cache(self, processor: Mapping[str, Any]) -> None:
        config = processor.get("qconfig") or {}
        shape = (config.get("dtype", "int8"), config.get("scope", "per_channel"), config.get("method", "minmax"))
        self._require(shape == ("int8", "per_channel", "minmax"), "dynamic_cache", shape, "int8, per_channel, minmax")
        self._require(config.get("symmetric", True) is True, "symmetric of dynamic_cache", False, "True")
        self._require(_is_everything(processor), "include of dynamic_cache", processor.get("include"), "every module")
        self._options["--kv-int8", "--kv-observe", "pre-rope"] = None

    def _attention(self, processor: Mapping[str, Any]) -> None:
        _require_known(processor, ("type", "include", "exclude"), "fa3_quant", self._path)
        self._require(tuple(processor.get("include") or _EVERY) == _EVERY, "include", processor["include"], "*")
        for pattern in processor.get("exclude") or ():
            layer = _LAYER.fullmatch(str(pattern))
            self._require(layer is not None, "exclude of fa3_quant", pattern, "layers, such as model.layers.0.*")
            self._float_attention.append(f"{layer[1] if layer else ''}.self_attn")
        self._options[("--fa-quant",)] = None

    def practice(self, sizes: list[str], dataset: str) -> Practice:
        """Return what all of them together ask for."""
        scheme, include, exclude = self.linears[0]
        words = (*(word for option in self._options for word in option), *sizes)
        kept = (*self._float_attention,)
        if len(self.linears) == 1 and include == _EVERY:
            return Practice(scheme, self._anti, words, (*exclude, *kept), dataset=dataset)
        modules: dict[str, str] = {"*": "float"}
        for number, (kind, included, excluded) in enumerate(self.linears):
            unsaid = [pattern for pattern in excluded if modules.get(pattern) != "float"]
            self._require(not number or not unsaid, "exclude of a later linear_quant", unsaid, "one of the first")
            for pattern, value in (*((each, kind) for each in included), *((each, "float") for each in excluded)):
                modules.pop(pattern, None)  # the last one wins, so it has to stand last
                modules[pattern] = value
        return Practice(scheme, self._anti, words, kept, modules, dataset)


def _is_everything(processor: Mapping[str, Any]) -> bool:
    return tuple(processor.get("include") or _EVERY) == _EVERY and not processor.get("exclude")
