"""The methods that a user chooses from by name. No torch, so that a command line is checked before it is loaded."""

from __future__ import annotations

from enum import Enum


class AntiOutlier(str, Enum):
    """Outlier suppression, by msModelSlim's names; the formulas are in smooth.py and flex_smooth.py."""

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
