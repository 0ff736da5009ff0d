"""Automatic roll-back: which linears stay float, and which layers keep their attention float.

    range_param = max(|x|) / std      of a linear's input: the larger, the more of an int8 range a few values take

Source: msModelSlim's `disable_level` and `fa_amp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eightfold.config import ModelConfig
from eightfold.families import LM_HEAD, input_groups, layer_prefix
from eightfold.scheme import QuantType


@dataclass(frozen=True)
class RolledBack:
    """One linear that stays float, and why."""

    module: str
    range_param: float
    of_group: bool  # only because a linear with the same input does


def input_group_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return for every linear of the layers and lm_head the linears that read the same input, itself included."""
    groups: dict[str, tuple[str, ...]] = {LM_HEAD: (LM_HEAD,)}
    for layer_idx in range(config.num_layers):
        for group in input_groups(config):
            members = tuple(layer_prefix(layer_idx) + linear.name for linear in group.linears)
            groups.update(dict.fromkeys(members, members))
    return groups


def roll_back(
    config: ModelConfig, types: Mapping[str, QuantType], range_params: Mapping[str, float], level: int, exact: bool
) -> list[RolledBack]:
    """Choose the linears with the widest inputs.

    Args:
        config: of the model.
        types: of every linear; those that are FLOAT already are no candidates.
        range_params: by linear.
        level: how many linears.
        exact: just these; otherwise whole groups with a common input, so that every loader takes the result.
    """
    candidates = [name for name, kind in types.items() if kind is not QuantType.FLOAT]
    # Stable: linears with a common input have equal values and keep the order of the model.
    chosen = sorted(candidates, key=lambda name: -range_params[name])[:level]
    found = {name: RolledBack(name, range_params[name], of_group=False) for name in chosen}
    if not exact:
        groups = input_group_of(config)
        for name in chosen:
            for member in groups[name]:
                if types[member] is not QuantType.FLOAT and member not in found:
                    found[member] = RolledBack(member, range_params[member], of_group=True)
    return list(found.values())


def attention_back(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the layers, at most `count`, whose attention has the smallest stretch scores."""
    return sorted(sorted(scores, key=lambda layer_idx: scores[layer_idx])[:count])
