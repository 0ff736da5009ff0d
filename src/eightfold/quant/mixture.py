"""What a recipe makes of a mixture of experts, and what its loaders want beside the tensors.

    attention             the recipe's scheme
    experts               W8A8_DYNAMIC, which every loader takes, unless `modules` names W8A16 or float
    shared experts, MLPs  the recipe's scheme; W8A8_DYNAMIC where that needs calibration
    routers, gates        float

msModelSlim's recipes do that: static attention beside dynamic experts. Experts are never static: no loader but MindIE's
older one takes that, and each of them would need samples of its own.

No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

from eightfold.config import ModelConfig
from eightfold.errors import shortlist
from eightfold.families import all_linears, family_layout, layer_of
from eightfold.layouts import EXPERT, Layout, Part, Rule
from eightfold.quant.recipe import Recipe, require
from eightfold.scheme import NEEDS_CALIBRATION, QuantType, weight_name

_DENSE = (Part.FFN, Part.SHARED)  # of a layer, beside attention and experts

_W8A16_GIVEN = "experts are W8A16, which only MindIE's ATB models load: vllm-ascend and SGLang refuse it."
_W8A16_AVOIDED = (
    "experts are W8A8_DYNAMIC: only MindIE's ATB models load W8A16 experts. `modules` of a recipe file "
    '("*.experts.*": w8a16) makes them W8A16 all the same.'
)


def default_type(rule: Rule, scheme: QuantType, layout: Layout) -> QuantType:
    """Return how a linear of a layer is stored unless the recipe names it."""
    if rule.stays_float:
        return QuantType.FLOAT
    follows_experts = rule.part in _DENSE and layout.experts is not None and scheme in NEEDS_CALIBRATION
    return QuantType.W8A8_DYNAMIC if rule.part is Part.EXPERT or follows_experts else scheme


def rules_of(config: ModelConfig) -> dict[str, Rule]:
    """Return what each linear in the layers of a model is, by its full module name."""
    layout = family_layout(config.architecture)
    of_name = functools.cache(layout.rule_of)  # the same in every layer
    inner = {name: linear.name for name, linear in all_linears(config).items() if layer_of(name) is not None}
    return {name: rule for name, own in inner.items() if (rule := of_name(own)) is not None}


def lookup_entries(layout: Layout, types: Mapping[str, QuantType]) -> dict[str, QuantType]:
    """Return entries of the description that name no tensor: loaders without a row for the family look them up."""
    found: dict[str, QuantType] = {}
    for name, kind in types.items():
        if entry := layout.entry_of(name):
            found.setdefault(weight_name(entry), kind)
    return found


def expert_notes(recipe: Recipe, types: Mapping[str, QuantType]) -> list[str]:
    """Return what a user should know about the types of experts, one line each."""
    kinds = {kind for name, kind in types.items() if EXPERT.fullmatch(name)}
    if QuantType.W8A16 in kinds:
        return [_W8A16_GIVEN]
    return [_W8A16_AVOIDED] if kinds and recipe.scheme is QuantType.W8A16 else []


def require_dynamic_experts(types: Mapping[str, QuantType]) -> None:
    """Refuse experts of a type that needs calibration.

    Raises:
        ConfigError: names the first of them.
    """
    for name, kind in types.items():
        if kind in NEEDS_CALIBRATION and EXPERT.fullmatch(name):
            got, expected = f"{kind.value} for {name}", "w8a8-dynamic, w8a16 or float for experts"
            require(False, "modules", got, expected, "No expert would see enough calibration data.")


def loader_settings(
    layout: Layout, types: Mapping[str, QuantType], parts: Mapping[str, Part], scheme: QuantType
) -> dict[str, str]:
    """Return the keys of config.json by which MindIE knows how attention and experts are stored.

    Where nothing of a part is quantized, its key has the scheme.
    """
    found = {}
    for key, part in layout.mindie_keys.items():
        kinds = Counter(types[name] for name, own in parts.items() if own is part)
        kinds.pop(QuantType.FLOAT, None)
        found[key] = max(kinds, key=lambda kind: kinds[kind], default=scheme).value.lower()
    return found


def idle_notes(idle: Mapping[int, Sequence[int]]) -> list[str]:
    """Say how many experts no sample has reached; nothing where there are none."""
    layers = [f"{len(experts)} in layer {layer_idx}" for layer_idx, experts in idle.items() if experts]
    count = sum(map(len, idle.values()))
    named = f"{shortlist(layers, 3)}; eightfold_report.json names them"
    return [f"{count} experts saw no calibration token ({named}): more texts would reach them."] if count else []
