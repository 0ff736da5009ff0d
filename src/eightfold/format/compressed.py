"""compressed-tensors: its names, and what a config.json says of each linear: which int8 it is, or why it is not read.

    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...},
     "input_activations": {...} | null}}, "ignore": [...]}

A target is a module's name, `re:` and a pattern, or the name of a class, in this order of precedence.

Source: compressed-tensors 0.20 (quantization/quant_config, quantization/quant_args, utils/match).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.files import has_file, read_json
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.patterns import PatternError, first_matches
from eightfold.layouts import text_config
from eightfold.values import shown

METHOD = "compressed-tensors"
INT, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"  # formats

# What they call their own tensors.
WEIGHT_PACKED, WEIGHT_SHAPE = "weight_packed", "weight_shape"
WEIGHT_ZERO_POINT, INPUT_ZERO_POINT = "weight_zero_point", "input_zero_point"

_KEYS = ("quantization_config", "compression_config")
_PATTERN = "re:"
_LINEAR = "Linear"


class Inputs(Enum):
    """How the inputs of a linear are read."""

    FLOAT = "float"
    DYNAMIC = "a scale for each token"
    STATIC = "one scale for all tokens"


def settings_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a config.json says of how the model was quantized; None for nothing."""
    for part in (raw, text_config(raw)):
        for key in _KEYS:
            if isinstance(found := part.get(key), dict) and found:
                return found
    return None


def is_int8(source: Path) -> bool:
    """Whether config.json says compressed-tensors, with integers of 8 bits as weights.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    if not source.is_dir() or not has_file(source / CONFIG_NAME):
        return False
    settings = settings_of(read_json(source / CONFIG_NAME))
    if settings is None or settings.get("quant_method") != METHOD:
        return False
    return any(
        isinstance(weights := group.get("weights"), dict)
        and (weights.get("type", "int"), weights.get("num_bits", 8)) == ("int", 8)
        for group in _groups(settings)
    )


def _groups(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict):
            yield group


class Schemes:
    """The groups of one model.

    Raises:
        UnsupportedError: one is of a kind that our layout does not hold; what it has is named.
    """

    def __init__(self, source: Path, raw: Mapping[str, Any]) -> None:
        self._where = source / CONFIG_NAME
        settings = settings_of(raw) or {}
        self._require_plain(settings)
        self._targets: dict[str, Inputs] = {}
        for group in _groups(settings):
            inputs = self._inputs(group)
            targets = group.get("targets")
            for target in targets if isinstance(targets, list) else [_LINEAR]:
                self._targets.setdefault(str(target), inputs)

    def inputs_of(self, modules: Sequence[str]) -> dict[str, Inputs]:
        """Return how the inputs of int8 linears are read.

        Raises:
            CheckpointError: no group names one, or a target is no regular expression or one that takes for ever.
        """
        patterns = [name.removeprefix(_PATTERN) for name in self._targets if name.startswith(_PATTERN)]
        try:
            found = first_matches(patterns, [module for module in modules if module not in self._targets])
        except PatternError as error:
            got, expected = f"{shown(error.pattern)} ({error})", "a regular expression that takes no time"
            raise CheckpointError("targets", where=self._where, got=got, expected=expected) from None
        return {module: self._inputs_by(module, found.get(module)) for module in modules}

    def _inputs_by(self, module: str, pattern: str | None) -> Inputs:
        for target in (module, f"{_PATTERN}{pattern}" if pattern is not None else "", _LINEAR):
            if target in self._targets:
                return self._targets[target]
        raise CheckpointError(f"targets for {module}", where=self._where, got="none", expected="a group that names it")

    def _require_plain(self, settings: Mapping[str, Any]) -> None:
        sparsity = settings.get("sparsity_config")
        form = sparsity.get("format") if isinstance(sparsity, dict) else None
        transforms = settings.get("transform_config")
        for what, got in (
            ("sparsity_config", form if form not in (None, "dense") else None),
            ("kv_cache_scheme", settings.get("kv_cache_scheme")),
            ("transform_config", transforms if transforms and transforms.get("config_groups") else None),
        ):
            if got:
                raise self._refused(f'"{what}"', shown(got), "none")

    def _inputs(self, group: Mapping[str, Any]) -> Inputs:
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict):
            raise self._refused('"weights" of a group', shown(weights), "an object")
        strategy = weights.get("strategy", "channel" if weights.get("group_size") in (None, -1) else "group")
        self._require(weights, "weights", num_bits=(8,), type=("int",), dynamic=(False, None), actorder=(None,))
        if strategy not in ("channel", "tensor"):
            size = weights.get("group_size")
            got = f"{shown(strategy)}" + (f" of {shown(size)}" if size is not None else "")
            raise self._refused('"strategy" of weights', got, "channel or tensor: one scale for each output")
        if group.get("output_activations"):
            raise self._refused('"output_activations"', "quantized outputs", "none")
        if not inputs:
            return Inputs.FLOAT
        is_dynamic = inputs.get("dynamic") is True
        expected = ("token",) if is_dynamic else ("tensor", None)
        self._require(inputs, "input_activations", num_bits=(8,), type=("int", None), strategy=expected)
        return Inputs.DYNAMIC if is_dynamic else Inputs.STATIC

    def _require(self, args: Mapping[str, Any], what: str, **allowed: tuple[Any, ...]) -> None:
        defaults = {"num_bits": 8, "type": "int"}
        for key, values in allowed.items():
            got = args.get(key, defaults.get(key))
            if got not in values:
                raise self._refused(f'"{key}" of {what}', shown(got), shown(values[0]))

    def _refused(self, what: str, got: str, expected: str) -> UnsupportedError:
        action = "Import reads int8 with one scale for each output; otherwise start from the float model."
        return UnsupportedError(what, where=self._where, got=got, expected=expected, action=action)
