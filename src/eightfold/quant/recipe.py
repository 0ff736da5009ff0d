"""What a user asks for, and what it means for each linear of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from fnmatch import fnmatchcase

from eightfold.config import ModelConfig
from eightfold.errors import ConfigError, one_of
from eightfold.families import ATTENTION, LM_HEAD, all_linears, input_groups, layer_prefix
from eightfold.quant.methods import ActMethod, AntiOutlier, KVObserve
from eightfold.scheme import LINEAR_TENSORS, NEEDS_CALIBRATION, SCHEMES, QuantType
from eightfold.values import SWITCH, TEXT, TEXTS, choice, setting, whole


@dataclass(frozen=True)
class Recipe:
    """The choices of one quantization: what decides every tensor of the output, apart from the calibration data."""

    # What the command line takes for each: names, which recipe_file.make_recipe() looks up.
    scheme: QuantType = setting(
        MISSING,
        choice(*SCHEMES),
        "w8a8: static int8 activations, needs calibration. w8a8-dynamic: int8 activations, by token. w8a8-mix: a "
        "prompt's tokens dynamic, generated ones static. w8a16: int8 weights only.",
        metavar="SCHEME",
        group="Scheme",
    )
    # False only for W8A16
    weight_symmetric: bool = setting(
        True, SWITCH, "Weights without offset. --no-weight-symmetric is for w8a16.", group="Scheme"
    )
    modules: tuple[tuple[str, QuantType], ...] = ()  # pattern on full module names -> type; the last match wins
    # patterns; of an attention module: only its FAQuant is left out
    keep_float: tuple[str, ...] = setting(
        (),
        TEXTS,
        "Leave linears float: a module name with * and ?. The name of an attention module leaves FAQuant out there.",
        metavar="PATTERN",
        group="What stays float",
    )
    quantize_lm_head: bool = setting(False, SWITCH, "The output head to int8 too.", group="What stays float")
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
        "Range of static inputs: minmax (1), histogram (2), or auto (3) by input. Default: minmax.",
        metavar="METHOD",
        group="Activations and outliers",
    )
    # so many further linears stay float
    disable_level: int = setting(
        0,
        TEXT,
        "Leave the n linears with the widest inputs float, and those that share their input.",
        metavar="Ln",
        group="What stays float",
    )
    # cut through groups with a common input, as the reference tool does
    exact_levels: bool = setting(
        False, SWITCH, "Just n linears, even if that cuts q, k and v apart.", group="What stays float"
    )
    fa_quant: bool = setting(
        False, SWITCH, "FAQuant: q, k and v to int8, and an int8 cache.", group="Attention and its cache"
    )
    # so many layers go without it
    fa_amp: int = setting(
        0, whole(0), "Leave FAQuant out in the N layers it suits least.", group="Attention and its cache"
    )
    kv_int8: bool = setting(
        False, SWITCH, "C8: an int8 key/value cache, scaled by channel.", group="Attention and its cache"
    )
    kv_symmetric: bool = setting(
        True, SWITCH, "The cache without offsets: loaders misread the others.", group="Attention and its cache"
    )
    kv_observe: KVObserve = setting(
        KVObserve.POST_ROPE,
        choice(*(place.value for place in KVObserve)),
        "Take the range of keys after RoPE, as they are cached (post-rope, default), or before it, as msModelSlim does "
        "(pre-rope).",
        metavar="WHERE",
        group="Attention and its cache",
    )
    # store every floating tensor as float32
    save_float32: bool = setting(
        False,
        choice("model", "float32"),
        "Store floating tensors as the model does (model, default), or all as float32.",
        flag="--save-dtype",
        metavar="TYPE",
        group="Output",
    )

    def __post_init__(self) -> None:
        if not self.weight_symmetric and self.scheme is not QuantType.W8A16:
            raise ConfigError(
                "weight_symmetric",
                got=f"scheme {self.scheme.value}",
                expected="W8A16",
                action="Schemes with int8 activations need symmetric weights.",
            )
        if self.fa_quant and self.kv_int8:
            raise ConfigError(
                "attention",
                got="`fa_quant` and `kv_int8`",
                expected="one of them",
                action="FAQuant already keeps the cache in int8.",
            )
        if self.fa_amp and not self.fa_quant:
            raise ConfigError("fa_amp", got=self.fa_amp, expected="it together with `fa_quant`")
        if not self.kv_int8 and (not self.kv_symmetric or self.kv_observe is not KVObserve.POST_ROPE):
            option = "kv_observe" if self.kv_symmetric else "kv_symmetric"
            raise ConfigError(option, got="no `kv_int8`", expected="them together")
        self._check_counts()

    def _check_counts(self) -> None:
        for option, value in (("disable_level", self.disable_level), ("fa_amp", self.fa_amp)):
            if value < 0:
                raise ConfigError(option, got=value, expected="0 or more")
        unknown = [kind.value for _, kind in self.modules if kind not in LINEAR_TENSORS]
        if unknown:
            raise ConfigError("modules", got=unknown[0], expected=one_of(kind.value for kind in LINEAR_TENSORS))

    @property
    def schemes(self) -> frozenset[QuantType]:
        """Every type that this recipe can give a linear."""
        return frozenset({self.scheme, *(kind for _, kind in self.modules)}) - {QuantType.FLOAT}

    @property
    def calibrates(self) -> bool:
        """Whether samples have to run through the layers while they are quantized."""
        return self.fa_quant or bool(self.schemes & NEEDS_CALIBRATION)

    @property
    def has_static_inputs(self) -> bool:
        """Whether activation methods matter."""
        return bool(self.schemes & NEEDS_CALIBRATION)

    @property
    def decides_by_comparison(self) -> bool:
        """Whether all layers have to be looked at before it is known how the first is stored."""
        return self.disable_level > 0 or self.fa_amp > 0

    @property
    def needs_samples(self) -> bool:
        """Whether there is anything to do with calibration samples."""
        return self.calibrates or self.anti_outlier is not None or self.kv_int8 or self.decides_by_comparison


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


def require_level(recipe: Recipe, types: Mapping[str, QuantType]) -> None:
    """Refuse to roll back more linears than would be quantized.

    Raises:
        ConfigError: the level is larger.
    """
    candidates = sum(kind is not QuantType.FLOAT for kind in types.values())
    if recipe.disable_level > candidates:
        raise ConfigError(
            "disable_level",
            got=f"L{recipe.disable_level}",
            expected=f"at most L{candidates}, as many as there are linears to quantize",
        )


def fa_layers(config: ModelConfig, recipe: Recipe) -> frozenset[int]:
    """Return the layers whose attention is quantized by FAQuant; automatic roll-back not included."""
    if not recipe.fa_quant:
        return frozenset()
    return frozenset(
        layer_idx
        for module, layer_idx in attention_modules(config).items()
        if not any(fnmatchcase(module, pattern) for pattern in recipe.keep_float)
    )


def attention_modules(config: ModelConfig) -> dict[str, int]:
    """Return every attention module's full name -> its layer."""
    return {f"{layer_prefix(layer_idx)}{ATTENTION}": layer_idx for layer_idx in range(config.num_layers)}


def _matches(pattern: str, names: Iterable[str], option: str, config: ModelConfig) -> set[str]:
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
        example = near[0] if near else f"*.{input_groups(config)[-1].linears[0].name}"
        raise ConfigError(
            option,
            got=f"{pattern!r}, which matches no linear",
            expected=f"a name or pattern such as {example!r}",
        )
    return found


def split_groups(config: ModelConfig, types: Mapping[str, QuantType]) -> list[str]:
    """Return the groups of linears with a common input whose members are stored differently, as `layer: names`."""
    found = []
    for layer_idx in range(config.num_layers):
        for group in input_groups(config):
            kinds = {types[layer_prefix(layer_idx) + linear.name] for linear in group.linears}
            if len(kinds) > 1:
                found.append(f"layer {layer_idx}: {', '.join(linear.name for linear in group.linears)}")
    return found
