"""Outlier suppression: a scale for each input channel of a group of linears.

    y = x W^T = (x / s) (W s)^T        whoever makes x divides by s: a norm's gain, or the rows of v_proj and up_proj

    m1   s = a**0.5 / w**0.5                                   a: max |x| of a channel, w: max |W|, at least SCALE_MIN
    m2   s = reach**0.5 / w**0.5 where reach > t, else 1;      as m1 when 3 spread >= max reach
         t between spread and max reach, the one of 100 with the least error (see _Readers)
    m3   s = v / sqrt(max v * min v),  v = max(mean|x|**r, 1e-4);     r in 0, 0.05 .. 0.95 of least mse of all linears
    m4   s = a**0.9 / w**0.1
    m5   s = (h / largest h of the ordinary channels)**0.7 for outliers, 1 for the others;     h: max x, and max -x
    m6   s = a**alpha / w**beta,  alpha and beta of least err, searched for each group:
             err = rms(Qa(X / s) Qw(W s)^T - X W^T) / rms(X W^T)
             first    alpha in 0, 1/20 .. 1 with beta = 1 - alpha
             then     beta  in 0, 1/20 .. 1 with that alpha
    iter     as m4, and
    flex     as m6 with another Qa; both take o and down first, and v and up as these leave them
    smooth   static inputs, and inputs that stay float, of int8 weights: s of the least error (least_error.py)
             inputs quantized by token: s = a**alpha / w**beta (EXPONENTS)
             products (down_proj's inputs), unless they stay float: s = max(o**alpha / w**beta, a / (SINK_ROOM limit)),
                 o: a of ordinary tokens;  limit: their largest input, max o / (o**alpha / w**beta)

All but m3 and m5 keep s above SCALE_MIN. m2 tries the quantized input, less its centre, and m3 the quantized
weights; both look at the first sample only. Of equal errors they take the first.

m6: X are the kept tokens, W all linears of the group, one below the other. Qa: asymmetric, one scale for the whole
input, whose range is that of all tokens, kept or not; for flex, symmetric, one scale for each token. Qw: symmetric, one
scale for each row. Of equal errors the last wins. A sum of squares only grows, so a candidate is dropped as soon as it
is worse than the best one; that, and beginning with likely candidates, changes nothing in the result. The wheel
multiplies dequantized float32 values, here the integers are multiplied.

smooth: a static range has to hold every token, so it gains most by even channels, and rows of weights lose by that;
where errors are spread evenly over steps, the best is known. Products are no such inputs: most of their values are far
below a step. A few tokens, mostly the first of a text, carry thousands in one or two channels of down_proj where all
others stay near 1 (massive activations). To clip them ruins the model, and a range that holds them is too coarse for
all else. So these channels, and no others, are divided until they stay within SINK_ROOM of the ordinary range: a few
rows of up_proj become smaller and columns of down_proj larger, which costs nothing, as these columns are large in a few
rows only.

rotate: smooth after a rotation (rotate.py).

Where query heads share a value head, o_proj's channels share v_proj's rows: m4 and iter average s over those heads, the
others take the largest a and the largest w.

Letters: T tokens, K inputs, N outputs, n of one piece of the weights; G key/value heads, Q query heads sharing one,
D head_dim.

Sources: SmoothQuant, Xiao et al. 2023, arXiv:2211.10438 (m1); Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145
(m2); AWQ, Lin et al. 2023, arXiv:2306.00978 (m3); CBQ, Ding et al. 2023, arXiv:2312.07950 (m5); all as the published
msModelSlim wheel does them, its operations traced; iter and flex are iter_smooth and flex_smooth_quant with their
defaults, as its public sources have them in 2026 (processor/anti_outlier). smooth is ours; Massive Activations, Sun et
al. 2024, arXiv:2402.17762, describes the sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.model.reference.linear import asymmetric, float_linear, int_matmul, to_int8_, token_params
from eightfold.quant.least_error import least_error_scale
from eightfold.quant.qparams import quantize_weight
from eightfold.quant.recipe import AntiOutlier
from eightfold.quant.statistics import InputStats
from eightfold.scheme import NEEDS_CALIBRATION, QuantType

# alpha and beta of `smooth` for a norm's output or attention's, and for the products that down_proj reads; None: the
# scale of least error.
EXPONENTS = {
    QuantType.W8A8: (None, (0.9, 0.0)),
    QuantType.W8A8_MIX: (None, (0.9, 0.0)),
    QuantType.W8A8_DYNAMIC: ((0.5, 0.1), (0.3, 0.0)),
    QuantType.W8A16: (None, None),
}

# What `smooth` smooths, those first that ask for more. Linears that stay float have nothing to gain.
SMOOTHED = tuple(EXPONENTS)

# How far sinks may stay above the ordinary range of down_proj's inputs. With a scale for each token, only the few
# tokens that have them become coarse, while columns that make room for them cost every row of the weight.
SINK_ROOM = {QuantType.W8A8: 2.0, QuantType.W8A8_MIX: 2.0, QuantType.W8A8_DYNAMIC: 32.0}

_THRESHOLDS = 100  # m2
_RATIOS = 20  # m3
SCALE_MIN = 1e-5
GRID = 20  # m6

# Where a search begins: alpha near 0.85 and beta near 0.1, as most results, so that other candidates are soon dropped.
_LIKELY_ALPHA, _LIKELY_BETA = 17, 2

# Outputs computed at once: a few MiB, so that the passes over them stay in the cache.
_PIECE_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class HeadSharing:
    """How o_proj's input channels share v_proj's rows: as (G, Q, D)."""

    kv_heads: int
    queries: int  # to one kv head
    head_dim: int

    def split(self, channels: Tensor) -> Tensor:
        """Return (H * D,) as (G, Q, D)."""
        return channels.view(self.kv_heads, self.queries, self.head_dim)

    def expand(self, shared_GD: Tensor) -> Tensor:
        """Return (G, D) as (H * D,), repeated for each query head."""
        return shared_GD[:, None].expand(-1, self.queries, -1).reshape(-1)


@dataclass(frozen=True)
class SmoothScale:
    """What a group's input is divided by, and the columns of its weights multiplied by."""

    scale: Tensor  # (K,) float32, positive
    note: str  # what was chosen, for a report


def smooth_scale(
    method: AntiOutlier,
    stats: InputStats,
    weights: Sequence[Tensor],
    sharing: HeadSharing | None = None,
    *,
    weight_symmetric: bool = True,
    biases: Sequence[Tensor | None] | None = None,
    kind: QuantType = QuantType.W8A8,
    is_product: bool = False,
) -> SmoothScale:
    """Return a group's scale by one of the methods.

    Args:
        method: m1, m2, m3 and m5 are meant for groups that read a norm.
        stats: of the group's input. m2 and m3 need the first sample, m6 needs tokens.
        weights: (N, K) float32 of all linears that read it, in module order. Not modified.
        sharing: for o_proj, how query heads share v_proj's; the scale is then the same for all heads that share.
        weight_symmetric: how weights will be quantized; m3 tries that.
        biases: (N,) float32 or None for each linear, for m2; None means that there are none.
        kind: how the input's readers are going to be stored, one of SMOOTHED, for `smooth`; the statistics have to know
            the rms where takes_rms() says so.
        is_product: whether the input may have sinks, for `smooth`; the statistics then have to know ordinary tokens.
    """
    if method.is_ours:
        if (exponents := EXPONENTS[kind][is_product]) is None:
            return _of_least_error(stats, weights, sharing, rounds_inputs=kind in NEEDS_CALIBRATION)
        room = SINK_ROOM[kind] * is_product
        return _with_room(stats, weight_absmax(weights), sharing, exponents, room)
    if method is AntiOutlier.M2:
        return _above_threshold(stats, weights, biases or [None] * len(weights))
    if method is AntiOutlier.M3:
        return _weight_aware(stats, weights, weight_symmetric)
    if method is AntiOutlier.M5:
        return _clipped_outliers(stats)
    if method.searches_exponents:
        alpha, beta = search_exponents(stats, weights, by_token=method is AntiOutlier.FLEX)
        absmax, weight_max = stats.absmax, weight_absmax(weights)
        if sharing is not None:
            absmax, weight_max = (sharing.expand(sharing.split(end).amax(1)) for end in (absmax, weight_max))
        return SmoothScale(balance(absmax, weight_max, alpha, beta), f"alpha {alpha:.2f}, beta {beta:.2f}")
    if method in (AntiOutlier.M4, AntiOutlier.ITER):
        scale = balance(stats.absmax, weight_absmax(weights), 0.9, 0.1)
        return SmoothScale(scale if sharing is None else sharing.expand(sharing.split(scale).mean(1)), "alpha 0.9")
    return SmoothScale(balance(stats.absmax, weight_absmax(weights), 0.5, 0.5), "alpha 0.5")


def _with_room(
    stats: InputStats, weight_max: Tensor, sharing: HeadSharing | None, exponents: tuple[float, float], room: float
) -> SmoothScale:
    """smooth; `room` is 0 where there are no sinks."""
    absmax, ordinary = stats.absmax, stats.ordinary if room else stats.absmax
    if sharing is not None:
        absmax, ordinary, weight_max = (
            sharing.expand(sharing.split(end).amax(1)) for end in (absmax, ordinary, weight_max)
        )
    scale, note = balance(ordinary, weight_max, *exponents), "alpha {}, beta {}".format(*exponents)
    if room:
        least = absmax / (room * (ordinary / scale).amax()).clamp(min=SCALE_MIN)
        scale, sinks = torch.maximum(scale, least), int((least > scale).sum())
        note += f", {sinks} channels of sinks" if sinks else ""
    return SmoothScale(scale, note)


def takes_rms(kind: QuantType, is_product: bool) -> bool:
    """Return whether `smooth` looks at the rms of an input whose readers are stored so."""
    return kind in EXPONENTS and EXPONENTS[kind][is_product] is None


def _of_least_error(
    stats: InputStats, weights: Sequence[Tensor], sharing: HeadSharing | None, *, rounds_inputs: bool
) -> SmoothScale:
    """smooth where inputs are static, or not rounded."""
    assert stats.rms is not None
    spread = None if sharing is None else lambda channels: sharing.expand(sharing.split(channels).sum(1))
    ends = (stats.lo, stats.hi) if rounds_inputs else None
    return SmoothScale(least_error_scale(weights, stats.rms, ends, spread), "least error")


def source_scale(scale: Tensor, sharing: HeadSharing) -> Tensor:
    """Return what v_proj's rows are divided by, (G * D,), from o_proj's scale, (H * D,)."""
    return sharing.split(scale)[:, 0].reshape(-1)


def balance(absmax: Tensor, weight_absmax: Tensor, alpha: float, beta: float) -> Tensor:
    """Return max(a**alpha / w**beta, SCALE_MIN) for tensors of one shape, float32.

    A product, as in the wheel's search: another last bit of s tips a few integers, and with them a near tie. On the
    first layer of SmolLM2 two pairs are within 3e-5; there a quotient decides otherwise, and so does the wheel itself
    when its inputs change by 1e-7.
    """
    return (absmax**alpha * weight_absmax**-beta).clamp(min=SCALE_MIN)


def weight_absmax(weights: Sequence[Tensor]) -> Tensor:
    """Return each channel's largest |W| over linears (N, K) that share an input, (K,) float32, at least SCALE_MIN."""
    # Two passes, and no copy of |W|.
    ends = [torch.maximum(weight_NK.amax(0), -weight_NK.amin(0)) for weight_NK in weights]
    return torch.stack(ends).amax(0).clamp(min=SCALE_MIN)


def _above_threshold(stats: InputStats, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> SmoothScale:
    """m2."""
    weight_max = weight_absmax(weights)
    spread, top = torch.tensor(stats.spread), stats.reach.max()
    if 3 * spread >= top:
        return SmoothScale(balance(stats.absmax, weight_max, 0.5, 0.5), "alpha 0.5")
    centre, smoothed = (stats.lo + stats.hi) / 2, balance(stats.reach, weight_max, 0.5, 0.5)
    readers = _Readers(stats.first, weights, biases)
    best, found, note = math.inf, torch.ones_like(centre), ""
    tried: Tensor | None = None
    for i in range(_THRESHOLDS):
        share = i / (_THRESHOLDS - 1)
        # Exactly `top` at last, so that no channel is above it: s = 1 is always tried. This deviates: the wheel's sum
        # may round to one bit below `top`, as the last bits of spread have it, and then s = 1 is not tried.
        threshold = (1 - share) * spread + share * top
        above = stats.reach > threshold
        if tried is not None and torch.equal(above, tried):
            continue
        tried = above
        scale = torch.where(above, smoothed, 1.0)
        error = readers.error(_input_error(stats.first, centre, scale))
        if error < best:
            best, found, note = error, scale, f"{int(above.sum())} channels above {float(threshold):.3g}"
    return SmoothScale(found, note)


def _input_error(x_TK: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Return by how much x changes when (x - centre) / scale is quantized, (T, K)."""
    scaled = (x_TK - centre).div_(scale)
    x_scale, x_offset = asymmetric(scaled.amin()[None], scaled.amax()[None])
    quantized = to_int8_(scaled.div_(x_scale), x_offset).to(torch.float32)
    return quantized.sub_(x_offset).mul_(x_scale).mul_(scale).add_(centre).sub_(x_TK)


class _Readers:
    """What m2 compares: the first linear's output, or for q, k and v something like attention.

    That is softmax(q_i k^T / sqrt(N)) v without mask, RoPE or heads: k (T, N) is taken whole, q in pieces as wide.
    """

    def __init__(self, x_TK: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        is_qkv = len(weights) == 3 and len(weights[0]) % len(weights[1]) == 0 and len(weights[1]) == len(weights[2])
        self._weights = weights if is_qkv else weights[:1]
        self._outputs = [float_linear(x_TK, *linear) for linear in zip(self._weights, biases, strict=False)]
        self._exact = self._combine(self._outputs)

    def error(self, input_error_TK: Tensor) -> float:
        """Return the mean squared error that follows from an error of the input."""
        pairs = zip(self._outputs, self._weights, strict=True)
        changed = [output + float_linear(input_error_TK, weight_NK, None) for output, weight_NK in pairs]
        return float(torch.nn.functional.mse_loss(self._combine(changed), self._exact))

    def _combine(self, outputs: Sequence[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        q, k, v = outputs
        width = k.shape[1]
        pieces = [torch.softmax(piece @ k.T / math.sqrt(width), dim=-1) @ v for piece in torch.split(q, width, dim=1)]
        return torch.cat(pieces, dim=1)


def _weight_aware(stats: InputStats, weights: Sequence[Tensor], weight_symmetric: bool) -> SmoothScale:
    """m3."""
    mean = stats.first.abs().mean(0)
    best, found, index = math.inf, torch.ones_like(mean), 0
    for i in range(_RATIOS):
        scale = (mean ** (i / _RATIOS)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(_rounding_error(stats.first, weight_NK, scale, weight_symmetric) for weight_NK in weights)
        if error < best:
            best, found, index = error, scale, i
    return SmoothScale(found, f"ratio {index / _RATIOS:.2f}")


def _rounding_error(x_TK: Tensor, weight_NK: Tensor, scale: Tensor, weight_symmetric: bool) -> float:
    """Return the mean squared error of x W^T when W * scale is quantized."""
    quantized = quantize_weight(weight_NK * scale, is_symmetric=weight_symmetric)
    real = (quantized.values.to(torch.float32) - quantized.offset) * quantized.scale / scale
    return float(float_linear(x_TK, real - weight_NK, None).square().mean())


def _clipped_outliers(stats: InputStats) -> SmoothScale:
    """m5."""
    scale = torch.maximum(_outlier_scale(stats.hi), _outlier_scale(-stats.lo))
    return SmoothScale(scale, f"{int((scale > 1).sum())} outliers")


def _outlier_scale(peaks: Tensor) -> Tensor:
    """Return the scale by which peaks (K,) that stand out come nearer to the largest ordinary one."""
    low, high = torch.quantile(peaks, torch.tensor([0.2, 0.8]))
    limit = high + 1.5 * (high - low)
    candidates = peaks[peaks > limit].sort().values
    if len(candidates) > 1:
        limit = _widest_gap(candidates)
    ordinary = peaks[peaks <= limit].amax()
    if ordinary <= 0:  # nothing to measure against
        return torch.ones_like(peaks)
    return torch.where(peaks > limit, (peaks / ordinary) ** 0.7, torch.ones_like(peaks))


def _widest_gap(ascending: Tensor) -> Tensor:
    """Return the last value below the cut with the widest gap, less the variance of what lies below it."""
    below = ascending[:-1].double()
    count = torch.arange(1, len(ascending), dtype=torch.float64)
    variance = (below.square().cumsum(0) - below.cumsum(0).square() / count) / (count - 1).clamp(min=1)
    metric = ascending[1:].double() - below - variance.clamp(min=0)
    return ascending[int(metric.argmax())]


def search_exponents(stats: InputStats, weights: Sequence[Tensor], *, by_token: bool = False) -> tuple[float, float]:
    """Return the alpha and beta of least error, given an input with tokens and the weights (N, K) that read it.

    Args:
        stats: of the input.
        weights: not modified.
        by_token: whether each token has a symmetric scale, or the whole input an asymmetric one.
    """
    error = _Error(stats, weights, by_token)
    alpha, best = _least(lambda i, limit: error(i, GRID - i, limit), _LIKELY_ALPHA)
    # The best pair of the first step is among these candidates again.
    beta, _ = _least(lambda i, limit: error(alpha, i, limit), _LIKELY_BETA, (GRID - alpha, best))
    return alpha / GRID, beta / GRID


def _least(
    error: Callable[[int, float], float], likely: int, known: tuple[int, float] = (-1, math.inf)
) -> tuple[int, float]:
    """Return the grid point of least error, and that error; `error` may return infinity above the limit."""
    found, best = known
    for i in sorted(set(range(GRID + 1)) - {found}, key=lambda i: abs(i - likely)):
        value = error(i, best)
        if value < best or (value == best and i > found):
            found, best = i, value
    return found, best


class _Error:
    """Squared error of one group's products, for exponents in steps of 1 / GRID.

    That is err**2 times what is the same for all exponents.
    """

    def __init__(self, stats: InputStats, weights: Sequence[Tensor], by_token: bool = False) -> None:
        self._stats, self._by_token = stats, by_token
        self._weight_absmax = weight_absmax(weights)
        rows = max(1, _PIECE_ELEMENTS // max(1, len(stats.tokens)))
        pieces = [piece_nK for weight_NK in weights for piece_nK in torch.split(weight_NK, rows)]
        self._pieces = [(piece_nK, float_linear(stats.tokens, piece_nK, None)) for piece_nK in pieces]

    def __call__(self, alpha: int, beta: int, limit: float) -> float:
        """Return the sum of squared differences; infinity once it passes the limit."""
        scale_K = balance(self._stats.absmax, self._weight_absmax, alpha / GRID, beta / GRID)
        x_TK = self._stats.tokens / scale_K
        if self._by_token:
            x_scale, x_offset = token_params(x_TK, "symmetric")
        else:
            lo, hi = (self._stats.lo / scale_K).amin(), (self._stats.hi / scale_K).amax()
            x_scale, x_offset = asymmetric(lo[None], hi[None])
        xq_TK = to_int8_(x_TK.div_(x_scale), x_offset)
        total = 0.0
        for weight_nK, exact_Tn in self._pieces:
            weight = quantize_weight(weight_nK * scale_K, is_symmetric=True)
            scale = x_scale * weight.scale[:, 0]  # of each output, or of each token and output
            products = int_matmul(xq_TK, weight.values).to(torch.float32)
            torch.addcmul(exact_Tn, products, scale, value=-1, out=products)
            if not self._by_token:
                products.add_(scale * x_offset * weight.sum())  # (xq - offset) wq^T = xq wq^T - offset * sum_k wq
            total += float(torch.linalg.vector_norm(products)) ** 2
            if total > limit:
                return math.inf
        return total
