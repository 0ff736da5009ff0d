"""Which type each group of linears gets, so that a model keeps a KL divergence with the fewest bytes a token.

Losses of groups add up: each is the square of a small change of the logits, and changes of different groups are nearly
uncorrelated. So this is a knapsack with several types to a group, done in two steps, both greedy:

    bytes     every group has its least loss among the types of fewest bytes; while the sum is too large, the group
              whose float weights save the most loss a byte becomes float; at last those that need not be become int8
    speed     the int8 types cost the same bytes; with what is left of the budget, groups take faster types, those first
              that lose least a byte

No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from eightfold.config import ModelConfig
from eightfold.errors import ConfigError
from eightfold.quant.analysis import GroupLoss
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe, Target
from eightfold.scheme import QuantType

# The types of int8 weights, fastest first: a static scale is multiplied in, a token's own is looked for, and inputs of
# 16 bits take two products.
BY_SPEED = (QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16)

# What linears may have beside each other in one directory. MindIE takes one scheme and FLOAT.
_BESIDE = {
    QuantType.W8A8: BY_SPEED,
    QuantType.W8A8_DYNAMIC: BY_SPEED[1:],
    QuantType.W8A16: BY_SPEED[2:],
}

_FLOAT = QuantType.FLOAT.value


def types_for(recipe: Recipe) -> tuple[QuantType, ...]:
    """Return the types that the loader of a recipe's target takes for a linear, fastest first, FLOAT last."""
    several = recipe.target in (Target.VLLM_ASCEND, Target.CPU)
    return (*(_BESIDE[recipe.scheme] if several else (recipe.scheme,)), QuantType.FLOAT)


def require_known_losses(what: str, recipe: Recipe, config: ModelConfig) -> None:
    """Refuse what losses are not known of, in the name of the option or command that needs them.

    Raises:
        ConfigError: says what.
    """
    is_smooth = recipe.anti_outlier is AntiOutlier.SMOOTH and recipe.act_method is ActMethod.EXTREMES
    is_plain = recipe.anti_outlier is None and recipe.scheme is QuantType.W8A16
    refused = (
        (recipe.scheme is QuantType.W8A8_MIX, "scheme w8a8-mix", "w8a8, w8a8-dynamic or w8a16"),
        (config.experts is not None, "a mixture of experts", "a dense model: losses of experts are not known"),
        (not (is_smooth or is_plain), f"anti_outlier {recipe.anti_outlier and recipe.anti_outlier.value}", "smooth"),
        (recipe.target is None and recipe.scheme is QuantType.W8A8, "every linear static", "a `target`"),
        (bool(recipe.modules), "`modules` of a recipe", "a recipe without: types are chosen by loss"),
        (recipe.train_steps > 0, "it with `train_steps`", "one of them: losses of trained ranges are not known"),
        (recipe.disable_level > 0, "it with `disable_level`", "one of them"),
        (recipe.fa_quant or recipe.kv_int8, "int8 attention", "float attention: its loss is not predicted"),
        (recipe.quantize_lm_head, "it with `quantize_lm_head`", "a float head"),
        (recipe.exact_levels, "it with `exact_levels`", "one of them"),
    )
    for is_refused, got, expected in refused:
        if is_refused:
            raise ConfigError(what, got=got, expected=expected)


def choose(groups: Sequence[GroupLoss], limit: float) -> list[str] | None:
    """Return the type of each group; None where even the least loss passes the limit.

    Args:
        groups: losses and bytes of each group by type; FLOAT among them, or what stays as it is has one type.
        limit: of the sum of losses, in nats.
    """
    found = [_cheapest(group) for group in groups]
    _make_float(groups, found, limit)
    if total_loss(groups, found) > limit:
        return None
    _make_faster(groups, found, limit)
    return found


def total_loss(groups: Sequence[GroupLoss], types: Sequence[str]) -> float:
    """Return the predicted KL divergence of a choice."""
    return sum(group.loss[kind] for group, kind in zip(groups, types, strict=True))


def total_bytes(groups: Sequence[GroupLoss], types: Sequence[str]) -> int:
    """Return what a choice stores of the groups, all of which a token reads."""
    return sum(group.bytes[kind] for group, kind in zip(groups, types, strict=True))


def _int8(group: GroupLoss) -> list[str]:
    """Return a group's types but float, unless that is all it has."""
    return [kind for kind in group.loss if kind != _FLOAT] or [_FLOAT]


def _cheapest(group: GroupLoss) -> str:
    return min(_int8(group), key=lambda kind: group.loss[kind])


def _make_float(groups: Sequence[GroupLoss], found: list[str], limit: float) -> None:
    """Make groups float, those that gain most a byte first, until the limit is kept; take back what was too much."""

    def gain(at: int) -> float:
        group = groups[at]
        return (group.loss[found[at]] - group.loss[_FLOAT]) / max(1, group.bytes[_FLOAT] - group.bytes[found[at]])

    may = [at for at, group in enumerate(groups) if _FLOAT in group.loss and found[at] != _FLOAT]
    order = sorted(may, key=gain, reverse=True)
    made: list[int] = []
    total = total_loss(groups, found)
    for at in order:
        if total <= limit:
            break
        total += groups[at].loss[_FLOAT] - groups[at].loss[found[at]]
        found[at] = _FLOAT
        made.append(at)
    for at in sorted(made, key=lambda at: groups[at].bytes[_FLOAT], reverse=True):
        back = _cheapest(groups[at])
        without = total + groups[at].loss[back] - groups[at].loss[_FLOAT]
        if without <= limit:
            total, found[at] = without, back


def _make_faster(groups: Sequence[GroupLoss], found: list[str], limit: float) -> None:
    """Give int8 groups the fastest types that the limit leaves room for."""
    total = total_loss(groups, found)
    for kind in (each.value for each in BY_SPEED):
        may = [
            at for at, group in enumerate(groups) if found[at] != _FLOAT and kind in group.loss and found[at] != kind
        ]
        may = [at for at in may if _rank(kind) < _rank(found[at])]
        for at in sorted(
            may, key=lambda at: (groups[at].loss[kind] - groups[at].loss[found[at]]) / groups[at].bytes[kind]
        ):
            after = total + groups[at].loss[kind] - groups[at].loss[found[at]]
            if after <= limit:
                total, found[at] = after, kind


def _rank(kind: str) -> int:
    return [each.value for each in BY_SPEED].index(kind)
