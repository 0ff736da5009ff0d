"""Whether a loader on the NPU host would take a directory, and what it would do with it.

Here: findings of single rules, and the report about one loader that a check returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_KEPT = 8  # places that a finding keeps; the others are counted
_SHOWN = 2  # of those, in text


class Verdict(str, Enum):
    """What the loader does with what a rule found, from harmless to fatal."""

    LOADS = "loads"
    WARNS = "warns"  # loads; a person should know
    IGNORES = "ignores"  # loads and drops something without a word; what it computes is right
    MISDECODES = "misdecodes"  # loads and computes something wrong
    REFUSES = "refuses"

    @property
    def severity(self) -> int:
        return list(Verdict).index(self)

    @property
    def is_harmless(self) -> bool:
        """Whether what the loader computes is right."""
        return self not in (Verdict.MISDECODES, Verdict.REFUSES)


@dataclass(frozen=True)
class Finding:
    """What one rule found."""

    rule: str  # stable, such as mindie.qkv-input-scale
    verdict: Verdict
    where: tuple[str, ...]  # tensors, modules, files or config keys: the first few
    count: int  # all places
    message: str

    @property
    def place(self) -> str:
        more = f" and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
        return ", ".join(self.where[:_SHOWN]) + more

    def as_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "outcome": self.verdict.value,
            "where": list(self.where),
            "count": self.count,
            "message": self.message,
        }


class Rules:
    """The rules about one loader: what each says about the places it applies to.

    Args:
        loader: the loader's name, with which rule ids begin.
        texts: verdict -> rule -> what the loader does, as the first part of an error's message and what follows it.
            Facts of a directory stand in braces. A rule with several texts has a word for each behind a slash.
    """

    def __init__(self, loader: str, texts: Mapping[Verdict, Mapping[str, str]]) -> None:
        self.loader = loader
        self._texts = {rule: (verdict, text) for verdict, own in texts.items() for rule, text in own.items()}

    @property
    def names(self) -> set[str]:
        return {rule.partition("/")[0] for rule in self._texts}

    def found(self, rule: str, where: Iterable[str], **facts: Any) -> Iterator[Finding]:
        """Yield one finding about all places, and nothing when there are none; of a set of facts all are shown."""
        places = tuple(dict.fromkeys(where))
        if places:
            verdict, text = self._texts[rule]
            facts = {key: ", ".join(sorted(fact)) if isinstance(fact, set) else fact for key, fact in facts.items()}
            message = " ".join(text.format(**facts).split())
            name = f"{self.loader}.{rule.partition('/')[0]}"
            yield Finding(name, verdict, places[:_KEPT], len(places), message)


@dataclass(frozen=True)
class Summary:
    """What the loader makes of the directory, when nothing stops it."""

    dtype: str  # activations'; "unknown" when config.json does not say
    linears: dict[str, int]  # scheme -> linears of the layers
    packs: dict[str, dict[str, int]]  # group of linears that become one -> how -> layers
    kv_cache: str  # int8, float, or what is which
    attention: str  # FAQuant, float, ...
    attention_layers: int  # layers whose attention is quantized

    @property
    def text(self) -> str:
        linears = ", ".join(f"{count} linears {scheme}" for scheme, count in self.linears.items())
        packs = ", ".join(
            f"{count} x {group} packed {how}" for group, kinds in self.packs.items() for how, count in kinds.items()
        )
        attention = f"{self.attention} attention"
        if self.attention_layers:
            attention += f" in {self.attention_layers} layers"
        packed = f" ({packs})" if packs else ""
        return f"{self.dtype}: {linears}{packed}, {self.kv_cache} KV cache, {attention}"

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "text": self.text}


@dataclass(frozen=True)
class Report:
    """What one loader does with one directory."""

    loader: str
    directory: str
    findings: tuple[Finding, ...]  # worst first
    summary: Summary

    @classmethod
    def of(cls, loader: str, directory: str, findings: Iterable[Finding], summary: Summary) -> Report:
        """Sort the findings, worst first, and keep the order of the rules otherwise."""
        ordered = sorted(findings, key=lambda finding: -finding.verdict.severity)
        return cls(loader, directory, tuple(ordered), summary)

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings."""
        return self.findings[0].verdict if self.findings else Verdict.LOADS

    @property
    def loads(self) -> bool:
        """Whether the loader takes the directory at all."""
        return self.verdict is not Verdict.REFUSES

    def as_dict(self) -> dict[str, Any]:
        return {
            "loader": self.loader,
            "directory": self.directory,
            "verdict": self.verdict.value,
            "loads": self.loads,
            "findings": [finding.as_dict() for finding in self.findings],
            "summary": self.summary.as_dict(),
        }
