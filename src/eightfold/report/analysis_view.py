"""An analysis as its page needs it: what it is called, what was chosen, and sums."""

from __future__ import annotations

from functools import cached_property

from eightfold.families import layer_of
from eightfold.quant.analysis import Analysis, GroupLoss
from eightfold.scheme import QuantType

FLOAT = QuantType.FLOAT.value

_STYLES = {
    QuantType.FLOAT: "t-float",
    QuantType.W8A16: "t-w8a16",
    QuantType.W8A8_DYNAMIC: "t-dynamic",
    QuantType.W8A8: "t-static",
    QuantType.W8A8_MIX: "t-mix",
}
_MEANINGS = {
    QuantType.FLOAT: "not quantized",
    QuantType.W8A16: "int8 weights, float inputs",
    QuantType.W8A8_DYNAMIC: "int8 weights and inputs, a range for each token",
    QuantType.W8A8: "int8 weights and inputs, one fixed range",
    QuantType.W8A8_MIX: "as W8A8_DYNAMIC in prompts, as W8A8 afterwards",
}


class View:
    """An analysis, as its pictures need it."""

    def __init__(self, found: Analysis) -> None:
        self.found = found
        self.losses = {(each.layer, each.group): each for each in found.groups}

    @cached_property
    def layers(self) -> list[int]:
        """All layers up to the last one that anything is known of."""
        named = [layer for choice in self.found.choices if (layer := layer_of(choice.linear)) is not None]
        known = [layer for layer, _ in self._places]
        return list(range(max([*named, *known], default=-1) + 1))

    @property
    def _places(self) -> list[tuple[int, str]]:
        return [
            *((each.layer, each.group) for each in self.found.groups),
            *((each.layer, each.group) for each in self.found.ranges),
        ]

    @property
    def names(self) -> list[str]:
        return [str(layer) for layer in self.layers]

    @cached_property
    def titles(self) -> list[str]:
        """The groups of a layer, in the order of the model."""
        return list(dict.fromkeys(group for _, group in self._places))

    @cached_property
    def labels(self) -> dict[str, str]:
        """What a reader calls a group: its linears."""
        found = dict(zip(self.titles, self.titles, strict=True))
        found.update({each.group: _label([_short(linear) for linear in each.linears]) for each in self.found.groups})
        return {title: label if len(label) <= 10 else title for title, label in found.items()}

    def label(self, title: str) -> str:
        return self.labels.get(title, title)

    @cached_property
    def types(self) -> list[str]:
        """The types whose loss is known, the one that was asked for first; not float, which loses nothing."""
        known = {kind: None for each in self.found.groups for kind in each.loss if kind != FLOAT}
        return sorted(known, key=lambda kind: (kind != self.found.scheme, list(known).index(kind)))

    @cached_property
    def scheme(self) -> str:
        """The type whose losses a sentence is about."""
        return self.types[0] if self.types else self.found.scheme

    @cached_property
    def total(self) -> float:
        """The losses of all groups with that type, added up."""
        return sum(each.loss.get(self.scheme, 0.0) for each in self.found.groups)

    @cached_property
    def worst(self) -> list[GroupLoss]:
        """The groups that lose most with that type first."""
        known = [each for each in self.found.groups if self.scheme in each.loss]
        return sorted(known, key=lambda each: -each.loss[self.scheme])

    @cached_property
    def chosen(self) -> dict[str, str]:
        return {choice.linear: choice.type for choice in self.found.choices}

    def type_of(self, group: GroupLoss) -> str | None:
        """Return the type that a group's linears got; None where nothing was chosen."""
        return next((self.chosen[linear] for linear in group.linears if linear in self.chosen), None)

    @cached_property
    def token_bytes(self) -> tuple[int, int] | None:
        """Return bytes of the linears in the layers that a token reads: in float, and with the types chosen."""
        if not self.found.groups or not all(FLOAT in each.bytes for each in self.found.groups):
            return None
        kinds = [(each, self.type_of(each)) for each in self.found.groups]
        if not all(kind in each.bytes for each, kind in kinds):
            return None
        return sum(each.bytes[FLOAT] for each, _ in kinds), sum(each.bytes[kind] for each, kind in kinds if kind)


def style_of(kind: str) -> str:
    """Return the colour of a type."""
    return next((style for each, style in _STYLES.items() if each.value == kind), "t-other")


def meaning_of(kind: str) -> str:
    """Return a type and what it means."""
    return next((f"{kind}: {text}" for each, text in _MEANINGS.items() if each.value == kind), kind)


def _short(linear: str) -> str:
    return linear.rpartition(".")[2]


def _label(linears: list[str]) -> str:
    return linears[0] if len(linears) == 1 else ", ".join(name.removesuffix("_proj") for name in linears)
