"""What a user asks for, on the command line or in a file (recipe_file.py).

No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from eightfold.config import DType
from eightfold.errors import ConfigError, one_of
from eightfold.scheme import LINEAR_TENSORS, NEEDS_CALIBRATION, SCHEMES, QuantType
from eightfold.values import SWITCH, TEXT, TEXTS, choice, setting, whole

if TYPE_CHECKING:
    pass

# So many samples decide what is rolled back and which activation method an input gets.
RANGE_SAMPLES = 5


# Token ids of each sample.
Samples = Sequence[Sequence[int]]


class AntiOutlier(str, Enum):
    """Outlier suppression, by msModelSlim's names; the formulas are in smooth.py."""

    M1 = "m1"  # SmoothQuant
    M2 = "m2"  # outlier suppression with a grid search
    M3 = "m3"  # weight-aware, as AWQ
    M4 = "m4"  # iterative smooth: also v -> o and up -> down
    M5 = "m5"  # CBQ
    M6 = "m6"  # flex smooth: as m4, exponents searched for each group
    ITER = "iter"  # iter_smooth of newer versions: m4, from the layer's end to its beginning
    FLEX = "flex"  # flex_smooth_quant of newer versions: m6 for inputs quantized by token, in the same order
    SMOOTH = "smooth"  # ours: by how each input is quantized, with room for the sink tokens of down_proj
    ROTATE = "rotate"  # the same, of a model whose residual stream and values are rotated before

    @property
    def smooths_linear_pairs(self) -> bool:
        """Whether v_proj -> o_proj and up_proj -> down_proj are smoothed too."""
        return self not in (AntiOutlier.M1, AntiOutlier.M2, AntiOutlier.M3, AntiOutlier.M5)

    @property
    def goes_backwards(self) -> bool:
        """Whether o_proj and down_proj come first, and v_proj and up_proj count as these leave them."""
        return self in (AntiOutlier.ITER, AntiOutlier.FLEX) or self.is_ours

    @property
    def is_ours(self) -> bool:
        """Whether it smooths by our formula, with or without a rotation."""
        return self in (AntiOutlier.SMOOTH, AntiOutlier.ROTATE)

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated first (rotate.py); a tied one has a head of its own then."""
        return self is AntiOutlier.ROTATE

    @property
    def searches_exponents(self) -> bool:
        """Whether alpha and beta are searched for each group, on tokens of its input."""
        return self in (AntiOutlier.M6, AntiOutlier.FLEX)

    @property
    def adds_norm_bias(self) -> bool:
        """Whether every norm is written with a bias (of zeros) afterwards."""
        return self in (AntiOutlier.M1, AntiOutlier.M2, AntiOutlier.M3, AntiOutlier.M4, AntiOutlier.M5)


class ActMethod(str, Enum):
    """How a range follows from a static input's values; msModelSlim numbers them 1, 2 and 3."""

    MINMAX = "minmax"
    HISTOGRAM = "histogram"
    AUTO = "auto"  # histogram, or minmax for inputs with far outliers
    EXTREMES = "extremes"  # all of what the float pass has seen


class Target(str, Enum):
    """Who reads the output."""

    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"
    CPU = "cpu"  # eightfold itself


class ModelDType(str, Enum):
    """The dtype of a model, by the names that people use."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def stored(self) -> DType:
        """The element type in a file."""
        return {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32}[self.value]


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
    # None: every linear as the scheme says
    target: Target | None = setting(
        None,
        choice(*(target.value for target in Target)),
        "Store down_proj, whose inputs no static range suits, as this reader takes it beside static linears: float "
        "(mindie; the others read that too), or w8a16 (vllm-ascend, cpu), which is smaller; and for cpu o_proj as "
        "w8a8-dynamic. Default: mindie with smooth, else as the scheme says.",
        metavar="READER",
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
        choice("none", *(method.value for method in AntiOutlier)),
        "Move outliers from activations into weights: m1 SmoothQuant, m2 grid search, m3 weight-aware, m4 iterative "
        "(also o_proj and down_proj), m5 CBQ, m6 searched (slow), as msModelSlim has them; iter, flex: iter_smooth and "
        "flex_smooth_quant (slow) of its newer versions; smooth: ours, by how each input is quantized; rotate: "
        "the same, after the residual stream and the values are rotated; both balance the heads of FAQuant. Default: "
        "smooth, but none without calibration texts.",
        metavar="M",
        group="Activations and outliers",
    )
    act_method: ActMethod = setting(
        ActMethod.MINMAX,
        choice(*(method.value for method in ActMethod), "1", "2", "3"),
        "Method for the range of a static input: minmax (1), histogram (2), auto (3), which chooses by input, or "
        "extremes: all that the float model shows, which smooth takes unless one is named.",
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
    # steps of each layer
    train_steps: int = setting(
        0,
        whole(0),
        "Train the scales of smooth and the ranges of static inputs so many steps in each layer, against what the "
        "float layer gives: 60 take seven times as long, and gain something with --all-static. Default: 0.",
        group="Activations and outliers",
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
    # None: the source's
    dtype: ModelDType | None = setting(
        None,
        choice(*(dtype.value for dtype in ModelDType)),
        "Make OUT a bf16, fp16 or fp32 model, in config.json and in its tensors; MindIE refuses fp32. Default: the "
        "source's dtype, which is that of its weights where config.json says float32, auto or nothing.",
        metavar="TYPE",
        group="Output",
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
        require(is_allowed, "weight_symmetric", f"scheme {scheme.value}", "W8A16", action)
        action = "FAQuant already keeps the cache in int8."
        is_allowed = not (self.fa_quant and self.kv_int8)
        require(is_allowed, "attention", "`fa_quant` and `kv_int8`", "one of them", action)
        require(self.fa_quant or not self.fa_amp, "fa_amp", self.fa_amp, "it together with `fa_quant`")
        option = "kv_observe" if self.kv_symmetric else "kv_symmetric"
        is_default = self.kv_symmetric and self.kv_observe is KVObserve.POST_ROPE
        require(self.kv_int8 or is_default, option, "no `kv_int8`", "them together")
        counts = {option: getattr(self, option) for option in ("disable_level", "fa_amp", "train_steps")}
        for option, value in counts.items():
            require(value >= 0, option, value, "0 or more")
        if self.train_steps:
            self._require_trainable()
        self._require_readable()
        for _, kind in self.modules:
            require(kind.value in kinds, "modules", kind.value, one_of(kinds))

    def _require_trainable(self) -> None:
        """Refuse what training cannot begin with, or not in time."""
        found = "no `anti_outlier`" if self.anti_outlier is None else f"anti_outlier {self.anti_outlier.value}"
        require(self.smooths_by_use, "train_steps", found, "smooth or rotate, whose scales are trained")
        knows_ends = self.takes_extremes or not self.has_static_inputs
        require(knows_ends, "train_steps", f"act_method {self.act_method.value}", "extremes, which are trained")
        option = "disable_level" if self.disable_level else "fa_amp"
        expected = "them apart: that compares all layers before the first is quantized"
        require(not self.decides_by_comparison, "train_steps", f"{option} beside it", expected)

    def _require_readable(self) -> None:
        """Refuse what the target is known not to read, or to misread."""
        if self.target is Target.VLLM_ASCEND:
            expected = "it left out: vllm-ascend has none for this kind of attention"
            require(not self.fa_quant, "fa_quant", "it with target vllm-ascend", expected)
            expected = "symmetric weights: vllm-ascend drops the sign of an offset"
            require(self.weight_symmetric, "weight_symmetric", "False with target vllm-ascend", expected)
        kinds = self.schemes
        if self.target is Target.MINDIE and len(kinds) > 1:
            got, expected = " and ".join(sorted(kind.value for kind in kinds)), "one scheme and FLOAT in one directory"
            require(False, "modules", f"{got} with target mindie", expected)

    def dtype_of(self, source: DType) -> DType:
        """Return the dtype of the output of a source of this one."""
        return source if self.dtype is None else self.dtype.stored

    @property
    def schemes(self) -> frozenset[QuantType]:
        """Every type that this recipe can give a linear."""
        kinds = {self.scheme, *self.types_beside.values(), *(kind for _, kind in self.modules)}
        return frozenset(kinds) - {QuantType.FLOAT}

    @property
    def types_beside(self) -> dict[str, QuantType]:
        """How groups of linears are stored that are not as well off with static inputs, by their titles."""
        if self.target is None or self.scheme not in NEEDS_CALIBRATION:
            return {}
        found = {"down": QuantType.FLOAT if self.target is Target.MINDIE else QuantType.W8A16}
        # Tokens are asymmetric here; on NPUs they are symmetric, which was not measured.
        return {**found, "o": QuantType.W8A8_DYNAMIC} if self.target is Target.CPU else found

    @property
    def smooths_by_use(self) -> bool:
        """Whether scales are by our formula, which goes by how each input is quantized."""
        return self.anti_outlier is not None and self.anti_outlier.is_ours

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated first."""
        return self.anti_outlier is not None and self.anti_outlier.rotates

    @property
    def has_static_inputs(self) -> bool:
        """Whether activation methods matter."""
        return bool(self.schemes & NEEDS_CALIBRATION)

    @property
    def calibrates(self) -> bool:
        """Whether samples have to run through the layers while they are quantized."""
        return self.fa_quant or self.train_steps > 0 or (self.has_static_inputs and not self.takes_extremes)

    @property
    def takes_extremes(self) -> bool:
        """Whether the ranges of static inputs are those that the float pass sees."""
        return self.has_static_inputs and self.act_method is ActMethod.EXTREMES

    @property
    def decides_by_comparison(self) -> bool:
        """Whether all layers have to be looked at before it is known how the first is stored."""
        return self.disable_level > 0 or self.fa_amp > 0

    @property
    def needs_range_params(self) -> bool:
        """Whether the ratio of largest value to standard deviation decides something."""
        return self.disable_level > 0 or (self.has_static_inputs and self.act_method is ActMethod.AUTO)

    @property
    def observes_float(self) -> bool:
        """Whether the float model shows more than what outlier suppression asks for."""
        return self.kv_int8 or self.fa_amp > 0 or self.needs_range_params or self._needs_all_samples

    @property
    def _needs_all_samples(self) -> bool:
        """Whether all calibration samples have to run through the float model."""
        return self.kv_int8 or self.takes_extremes or self.train_steps > 0

    @property
    def needs_float_pass(self) -> bool:
        """Whether anything is taken from the float model."""
        return self.anti_outlier is not None or self.observes_float

    def float_samples(self, samples: Samples, anti_samples: Samples = ()) -> Samples:
        """Return the samples that run through the float model, which may be none.

        Args:
            samples: for calibration.
            anti_samples: for outlier suppression alone; where more is observed, they run through it too.
        """
        if self._needs_all_samples or (self.anti_outlier is not None and not anti_samples):
            return samples
        return samples[:RANGE_SAMPLES] if self.observes_float else anti_samples

    def needs_samples(self, has_anti_samples: bool = False) -> bool:
        """Return whether there is anything to do with calibration samples."""
        smooths = self.anti_outlier is not None and not has_anti_samples
        return self.calibrates or self.observes_float or smooths


def require(holds: bool, option: str, got: Any, expected: str, action: str = "") -> None:
    """Raise a ConfigError about an option unless something holds."""
    if not holds:
        raise ConfigError(option, got=got, expected=expected, action=action)


def with_defaults(choices: dict[str, Any], *, has_texts: bool) -> dict[str, Any]:
    """Return checked choices with what makes a model accurate in place of what was not chosen.

    Args:
        choices: of a command line and a file.
        has_texts: whether there is something to calibrate on; data-free schemes are not smoothed without.
    """
    found, scheme = dict(choices), choices.get("scheme")
    is_static = scheme in NEEDS_CALIBRATION
    if is_static or (scheme in SCHEMES.values() and has_texts):
        found.setdefault("anti_outlier", AntiOutlier.SMOOTH.value)
    if found.get("anti_outlier") in (AntiOutlier.SMOOTH.value, AntiOutlier.ROTATE.value):
        found.setdefault("act_method", ActMethod.EXTREMES.value)
        others = {kind for _, kind in found.get("modules", ())} - {scheme, QuantType.FLOAT}
        if is_static:
            # The one that all read, unless some linear has a type beside it that MindIE does not take.
            found.setdefault("target", (Target.CPU if others else Target.MINDIE).value)
    return found
