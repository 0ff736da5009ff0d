"""What loaders want of a mixture of experts, beside what they want of any linear.

experts         one type in a layer, which is that of the loader's kernels
routers         float
entries, keys   what a loader looks up for experts in the description and in config.json
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from eightfold.check.by_name import EXPERTS
from eightfold.check.directory import RawDirectory
from eightfold.errors import UnsupportedError, one_of
from eightfold.exporters.repaired import RepairedLinear
from eightfold.families import family_layout
from eightfold.layouts import EXPERT
from eightfold.quant.mixture import loader_settings, lookup_entries, rules_of
from eightfold.scheme import QuantType, weight_name


def is_expert(module: str) -> bool:
    """Whether a linear is one expert's."""
    return EXPERT.fullmatch(module) is not None


def require_experts(d: RawDirectory, linears: Mapping[str, RepairedLinear], target: str) -> None:
    """Refuse experts that the loader has no kernels for: widening them would take a multiple of the memory.

    Raises:
        UnsupportedError: a type that the loader does not have, several in a layer, or an 8-bit router.
    """
    kinds = defaultdict[str, set[QuantType]](set)
    for name, linear in linears.items():
        if match := EXPERT.fullmatch(name):
            kinds[match[1]].add(linear.was)
        elif linear.shape.is_router and linear.was is not QuantType.FLOAT:
            got, expected = f"{linear.was.value} for a router", "float: it chooses the experts"
            raise UnsupportedError(f"type of {weight_name(name)}", where=d.path, got=got, expected=expected)
    known = EXPERTS[target]
    for module, found in kinds.items():
        if len(found) > 1 or next(iter(found)).value not in known:
            raise UnsupportedError(
                f"type of {module}",
                where=d.path,
                got=one_of(sorted(kind.value for kind in found)).replace(" or ", " and "),
                expected=f"one in a layer, {one_of(known)}, as {target} has for experts",
                action="Quantize the float model again.",
            )


def experts_entries(d: RawDirectory, types: Mapping[str, QuantType]) -> dict[str, QuantType]:
    """Return entries of the description that name no tensor."""
    return lookup_entries(family_layout(d.model.architecture), types)


def experts_settings(d: RawDirectory, types: Mapping[str, QuantType], whole: QuantType) -> dict[str, Any]:
    """Return the keys of config.json by which MindIE knows how experts are stored; none of a dense model."""
    if d.model.experts is None:
        return {}
    parts = {name: rule.part for name, rule in rules_of(d.model).items()}
    return dict(loader_settings(family_layout(d.model.architecture), types, parts, whole))
