"""What a user asks for, and what it means for each linear of a model.

Automatic roll-back keeps the linears with the widest inputs float, and the attention of the layers with the lowest
stretch scores:

    range_param = max(|x|) / std      of a linear's input: the larger, the more of an int8 range a few values take

Source: msModelSlim's `disable_level` and `fa_amp`. No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from eightfold.config import ModelConfig
from eightfold.errors import ConfigError, one_of
from eightfold.families import ATTENTION, LM_HEAD, all_linears, input_groups, layer_prefix
from eightfold.scheme import LINEAR_TENSORS, NEEDS_CALIBRATION, SCHEMES, QuantType
from eightfold.values import SWITCH, TEXT, TEXTS, choice, setting, whole

# So many samples decide what is rolled back and which activation method an input gets.
RANGE_SAMPLES = 5


class AntiOutlier(str, Enum):
    """Outlier suppression, by msModelSlim's names; the formulas are in smooth.py."""

    M1 = "m1"  # SmoothQuant
    M2 = "m2"  # outlier suppression with a grid search
    M3 = "m3"  # weight-aware, as AWQ
    M4 = "m4"  # iterative smooth: also v -> o and up -> down
    M5 = "m5"  # CBQ
    M6 = "m6"  # flex smooth: as m4, exponents searched for each group

    @property
    def smooths_linear_pairs(self) -> bool:
        """Whether v_proj -> o_proj and up_proj -> down_proj are smoothed too."""
        return self in (AntiOutlier.M4, AntiOutlier.M6)

    @property
    def adds_norm_bias(self) -> bool:
        """Whether every norm is written with a bias (of zeros) afterwards."""
        return self is not AntiOutlier.M6


class ActMethod(str, Enum):
    """How a range follows from a static input's values; msModelSlim numbers them 1, 2 and 3."""

    MINMAX = "minmax"
    HISTOGRAM = "histogram"
    AUTO = "auto"  # histogram, or minmax for inputs with far outliers


class KVObserve(str, Enum):
    """Where the keys are watched whose range the int8 cache must hold."""

    POST_ROPE = "post-rope"
    PRE_ROPE = "pre-rope"


@dataclass(frozen=True)
class Recipe:
    """The choices of one quantization: what decides every tensor of the output, apart from the calibration data."""

    # What the command line takes for each: names, which recipe_file.make_recipe() looks up.
    scheme: QuantType = setting(
        MISSING,
        choice(*SCHEMES),
        "How linears are quantized. w8a8: static int8 activations, needs calibration. w8a8-dynamic: int8 activations "
        "with a scale for each token. w8a8-mix: w8a8-dynamic for a prompt's tokens, w8a8 for generated ones. w8a16: "
        "int8 weights only.",
        metavar="SCHEME",
        group="Scheme",
    )
    # False only for W8A16
    weight_symmetric: bool = setting(
        True, SWITCH, "Quantize weights without offsets. --no-weight-symmetric is for w8a16.", group="Scheme"
    )
    modules: tuple[tuple[str, QuantType], ...] = ()  # pattern on full module names -> type; the last match wins
    # patterns; of an attention module: only its FAQuant is left out
    keep_float: tuple[str, ...] = setting(
        (),
        TEXTS,
        "Keep linears float: a module name with * and ?. The name of an attention module turns FAQuant off there.",
        metavar="PATTERN",
        group="What stays float",
    )
    quantize_lm_head: bool = setting(False, SWITCH, "Quantize the output head to int8 too.", group="What stays float")
    anti_outlier: AntiOutlier | None = setting(
        None,
        choice(*(method.value for method in AntiOutlier)),
        "Move outliers from activations into weights: m1 SmoothQuant, m2 grid search, m3 weight-aware, m4 iterative "
        "(also o_proj and down_proj: the best for static w8a8), m5 CBQ, m6 searched (slow).",
        metavar="M",
        group="Activations and outliers",
    )
    act_method: ActMethod = setting(
        ActMethod.MINMAX,
        choice(*(method.value for method in ActMethod), "1", "2", "3"),
        "Method for the range of a static input: minmax (1), histogram (2), or auto (3), which chooses by input.",
        metavar="METHOD",
        group="Activations and outliers",
    )
    # so many further linears stay float
    disable_level: int = setting(
        0,
        TEXT,
        "Keep the n linears with the widest inputs float, and those that share their input.",
        metavar="Ln",
        group="What stays float",
    )
    # cut through groups with a common input, as the reference tool does
    exact_levels: bool = setting(
        False, SWITCH, "Keep exactly n linears float, even if that separates q, k and v.", group="What stays float"
    )
    fa_quant: bool = setting(
        False,
        SWITCH,
        "Quantize attention (FAQuant): int8 q, k, v and cache.",
        group="Attention and its cache",
    )
    # so many layers go without it
    fa_amp: int = setting(
        0, whole(0), "Turn FAQuant off in the N layers that it suits least.", group="Attention and its cache"
    )
    kv_int8: bool = setting(
        False,
        SWITCH,
        "Use an int8 key/value cache (C8), scaled by channel.",
        group="Attention and its cache",
    )
    kv_symmetric: bool = setting(
        True, SWITCH, "Quantize the cache without offsets; loaders misread offsets.", group="Attention and its cache"
    )
    kv_observe: KVObserve = setting(
        KVObserve.POST_ROPE,
        choice(*(place.value for place in KVObserve)),
        "Observe the range of keys after RoPE, as they are cached (post-rope), or before it, as msModelSlim does "
        "(pre-rope).",
        metavar="WHERE",
        group="Attention and its cache",
    )
    # store every floating tensor as float32
    save_float32: bool = setting(
        False,
        choice("model", "float32"),
        "Store floating tensors in the model's dtype (model, the default), or all of them in float32.",
        flag="--save-dtype",
        metavar="TYPE",
        group="Output",
    )

    def __post_init__(self) -> None:
        scheme, kinds = self.scheme, [kind.value for kind in LINEAR_TENSORS]
        action = "Schemes with int8 activations need symmetric weights."
        is_allowed = self.weight_symmetric or scheme is QuantType.W8A16
        _require(is_allowed, "weight_symmetric", f"scheme {scheme.value}", "W8A16", action)
        action = "FAQuant already keeps the cache in int8."
        is_allowed = not (self.fa_quant and self.kv_int8)
        _require(is_allowed, "attention", "`fa_quant` and `kv_int8`", "one of them", action)
        _require(self.fa_quant or not self.fa_amp, "fa_amp", self.fa_amp, "it together with `fa_quant`")
        option = "kv_observe" if self.kv_symmetric else "kv_symmetric"
        is_default = self.kv_symmetric and self.kv_observe is KVObserve.POST_ROPE
        _require(self.kv_int8 or is_default, option, "no `kv_int8`", "them together")
        for option, value in (("disable_level", self.disable_level), ("fa_amp", self.fa_amp)):
            _require(value >= 0, option, value, "0 or more")
        for _, kind in self.modules:
            _require(kind.value in kinds, "modules", kind.value, one_of(kinds))

    @property
    def schemes(self) -> frozenset[QuantType]:
        """Every type that this recipe can give a linear."""
        return frozenset({self.scheme, *(kind for _, kind in self.modules)}) - {QuantType.FLOAT}

    @property
    def has_static_inputs(self) -> bool:
        """Whether activation methods matter."""
        return bool(self.schemes & NEEDS_CALIBRATION)

    @property
    def calibrates(self) -> bool:
        """Whether samples have to run through the layers while they are quantized."""
        return self.fa_quant or self.has_static_inputs

    @property
    def decides_by_comparison(self) -> bool:
        """Whether all layers have to be looked at before it is known how the first is stored."""
        return self.disable_level > 0 or self.fa_amp > 0

    @property
    def needs_range_params(self) -> bool:
        """Whether the ratio of largest value to standard deviation decides something."""
        return self.disable_level > 0 or (self.has_static_inputs and self.act_method is ActMethod.AUTO)

    @property
    def needs_float_pass(self) -> bool:
        """Whether anything is taken from the float model."""
        return self.anti_outlier is not None or self.kv_int8 or self.fa_amp > 0 or self.needs_range_params

    def float_samples(self, samples: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the samples that run through the float model, which may be none."""
        if self.anti_outlier is not None or self.kv_int8:
            return samples
        return samples[:RANGE_SAMPLES] if self.needs_float_pass else []

    @property
    def needs_samples(self) -> bool:
        """Whether there is anything to do with calibration samples."""
        return self.calibrates or self.needs_float_pass


def _require(holds: bool, option: str, got: Any, expected: str, action: str = "") -> None:
    if not holds:
        raise ConfigError(option, got=got, expected=expected, action=action)


def assign_types(config: ModelConfig, recipe: Recipe) -> dict[str, QuantType]:
    """Return how each linear is going to be stored, by full module name; automatic roll-back not included.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    linears = all_linears(config)
    types = dict.fromkeys(linears, recipe.scheme)
    for pattern, kind in recipe.modules:
        types.update(dict.fromkeys(_matches(pattern, linears, "modules", config), kind))
    attentions = attention_modules(config) if recipe.fa_quant else {}
    for pattern in recipe.keep_float:
        matches = _matches(pattern, [*linears, *attentions], "keep_float", config)
        types.update(dict.fromkeys(matches & linears.keys(), QuantType.FLOAT))
    if not recipe.quantize_lm_head:
        types[LM_HEAD] = QuantType.FLOAT
    return types


def _matches(pattern: str, names: Iterable[str], option: str, config: ModelConfig) -> set[str]:
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5) if not found else []
    example = near[0] if near else f"*.{input_groups(config)[-1].linears[0].name}"
    got = f"{pattern!r}, which matches no linear"
    _require(bool(found), option, got, f"a name or pattern such as {example!r}")
    return found


def require_level(recipe: Recipe, types: Mapping[str, QuantType]) -> None:
    """Refuse to roll back more linears than would be quantized.

    Raises:
        ConfigError: the level is larger.
    """
    candidates = sum(kind is not QuantType.FLOAT for kind in types.values())
    expected = f"at most L{candidates}, as many as there are linears to quantize"
    _require(recipe.disable_level <= candidates, "disable_level", f"L{recipe.disable_level}", expected)


def fa_layers(config: ModelConfig, recipe: Recipe) -> frozenset[int]:
    """Return the layers whose attention is quantized by FAQuant; automatic roll-back not included."""
    modules = attention_modules(config) if recipe.fa_quant else {}
    return frozenset(
        layer_idx
        for module, layer_idx in modules.items()
        if not any(fnmatchcase(module, pattern) for pattern in recipe.keep_float)
    )


def attention_modules(config: ModelConfig) -> dict[str, int]:
    """Return every attention module's full name -> its layer."""
    return {f"{layer_prefix(layer_idx)}{ATTENTION}": layer_idx for layer_idx in range(config.num_layers)}


@dataclass(frozen=True)
class RolledBack:
    """One linear that stays float, and why."""

    module: str
    range_param: float
    of_group: bool  # only because a linear with the same input does


def roll_back(
    config: ModelConfig, recipe: Recipe, types: Mapping[str, QuantType], range_params: Mapping[str, float]
) -> list[RolledBack]:
    """Choose `recipe.disable_level` linears with the widest inputs; whole groups, unless recipe.exact_levels.

    A group has a common input: every loader takes the result when its linears are stored alike.

    Args:
        config: of the model.
        recipe: how many, and whether the groups of these are kept float with them.
        types: of every linear; those that are FLOAT already are no candidates.
        range_params: by linear.
    """
    candidates = [name for name, kind in types.items() if kind is not QuantType.FLOAT]
    # Stable: linears with a common input have equal values and keep the order of the model.
    chosen = sorted(candidates, key=lambda name: -range_params[name])[: recipe.disable_level]
    found = {name: RolledBack(name, range_params[name], of_group=False) for name in chosen}
    if not recipe.exact_levels:
        groups = _input_group_of(config)
        members = [member for name in chosen for member in groups.get(name, ())]
        for name in members:
            if types[name] is not QuantType.FLOAT and name not in found:
                found[name] = RolledBack(name, range_params[name], of_group=True)
    return list(found.values())


def _input_group_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return for every linear of the layers the linears that read the same input, itself included."""
    groups: dict[str, tuple[str, ...]] = {}
    for layer_idx in range(config.num_layers):
        for group in input_groups(config):
            members = tuple(layer_prefix(layer_idx) + linear.name for linear in group.linears)
            groups.update(dict.fromkeys(members, members))
    return groups


def attention_back(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the layers, at most `count`, whose attention has the smallest stretch scores."""
    return sorted(sorted(scores, key=lambda layer_idx: scores[layer_idx])[:count])
