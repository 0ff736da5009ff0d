"""The page of a quantization: what it knows without another pass over the model, drawn as an analysis is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from eightfold.config import ModelConfig
from eightfold.families import input_groups, layer_of
from eightfold.files import read_json
from eightfold.format.directory import CONFIG_NAME, read_tensors
from eightfold.format.safetensors import TensorInfo
from eightfold.layouts import Part
from eightfold.quant.analysis import Analysis, Choice, GroupLoss
from eightfold.quant.mixture import rules_of
from eightfold.quant.outcome import Outcome
from eightfold.quant.plan import types_beside
from eightfold.report.analysis_page import render as render_analysis
from eightfold.scheme import QuantType

_CALIBRATION = "calibration"  # as Outcome.samples calls it


def render(
    outcome: Outcome,
    source: Mapping[str, TensorInfo],
    model: str,
    out: Path,
    config: ModelConfig | None,
    analysis: Analysis | None = None,
) -> str:
    """Return the page of a quantization.

    Args:
        outcome: what was done.
        source: the float model's tensors by name.
        model: what to call it.
        out: the directory that was made.
        config: the float model's; None where it is known by the names of its tensors only.
        analysis: by which types were chosen, if they were.
    """
    smoothing = {} if outcome.smoothing is None else outcome.smoothing.choices
    made, _ = read_tensors(out, read_json(out / CONFIG_NAME), is_quantized=True)
    found = analysis or _Quantized(outcome, source, made, model, config).analysis()
    return render_analysis(found, smoothing, tuple(_notes(outcome)))


def _notes(outcome: Outcome) -> Iterator[str]:
    if outcome.smoothing is not None and outcome.smoothing.max_logit:
        yield (
            f"Smoothing moves the float model's logits by {outcome.smoothing.max_logit_difference:.2g} at most, where "
            f"the largest is {outcome.smoothing.max_logit:.3g}: it is the same model."
        )
    if outcome.layers_resumed and not outcome.restarted:
        yield f"{outcome.layers_resumed} layers were finished by an earlier run; what they read was not seen here."
    yield from outcome.notes


@dataclass(frozen=True)
class _Quantized:
    """What is known of a model that was quantized, for the page."""

    outcome: Outcome
    source: Mapping[str, TensorInfo]
    made: Mapping[str, TensorInfo]
    model: str
    config: ModelConfig | None

    def analysis(self) -> Analysis:
        recipe, samples = self.outcome.recipe, self.outcome.samples.get(_CALIBRATION, {})
        return Analysis(
            model=self.model,
            scheme=recipe.scheme.value,
            target=recipe.target.value if recipe.target is not None and recipe.types_beside else None,
            samples=samples.get("samples", 0),
            tokens=samples.get("tokens", 0),
            float_bytes=sum(each.nbytes for each in self.source.values()),
            out_bytes=sum(each.nbytes for each in self.made.values()),
            groups=tuple(self._groups()),
            ranges=tuple(self.outcome.ranges),
            choices=tuple(
                Choice(name, kind.value, self._reason(name, kind)) for name, kind in self.outcome.types.items()
            ),
        )

    def _groups(self) -> Iterator[GroupLoss]:
        """Yield the groups of linears with what they take, in float and as stored; their losses are not known."""
        if self.config is None:
            return
        before, after = _bytes_of(self.source), _bytes_of(self.made)
        for layer in range(self.config.num_layers):
            for group in input_groups(self.config, layer):
                names = tuple(self.config.names.layer(layer) + linear.name for linear in group.linears)
                if all(name in before and name in after for name in names):
                    sizes = {QuantType.FLOAT.value: sum(before[name] for name in names)}
                    sizes[self.outcome.types[names[0]].value] = sum(after[name] for name in names)
                    yield GroupLoss(layer, group.title, names, sizes, {})

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return {} if self.config is None else {name: rule.part for name, rule in rules_of(self.config).items()}

    @cached_property
    def _beside(self) -> dict[str, QuantType]:
        """The linears that the target takes as another type."""
        return {} if self.config is None else types_beside(self.config, self.outcome.recipe)

    def _reason(self, name: str, kind: QuantType) -> str:
        """Return why a linear has its type: by what plan.assign_types() and plan.roll_back() go."""
        recipe = self.outcome.recipe
        rolled_back = next((row for row in self.outcome.rolled_back if row.module == name), None)
        if rolled_back is not None:
            if rolled_back.of_group:
                return "shares the input of a linear that --disable-level keeps float"
            return f"--disable-level: its inputs reach {rolled_back.range_param:.1f} times their deviation"
        if pattern := next((each for each in recipe.keep_float if fnmatchcase(name, each)), None):
            return f"--keep-float {pattern}"
        if layer_of(name) is None and kind is QuantType.FLOAT:
            return "the head stays float unless --quantize-lm-head is given"
        if pattern := next(
            (each for each, chosen in recipe.modules if chosen is kind and fnmatchcase(name, each)), None
        ):
            return f"the recipe's module {pattern}"
        return self._usual_reason(name, kind)

    def _usual_reason(self, name: str, kind: QuantType) -> str:
        recipe, part = self.outcome.recipe, self._parts.get(name)
        if kind is recipe.scheme:
            return f"--scheme {kind.value.lower().replace('_', '-')}"
        if kind is self._beside.get(name) and recipe.target is not None:
            takes = f"{recipe.target.value} takes {kind.value} beside {recipe.scheme.value}"
            if kind is QuantType.W8A8_DYNAMIC:
                return f"a range for each token loses less; {takes}"
            return f"it reads products, whose tails 256 fixed levels cannot hold; {takes}"
        if part is Part.ROUTER:
            return "a router stays float in every scheme"
        if part in (Part.EXPERT, Part.SHARED):
            return "experts take a range from each token, and need no calibration"
        return "always so in this family"


def _bytes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the bytes of each module."""
    found: dict[str, int] = {}
    for name, info in tensors.items():
        module = name.rpartition(".")[0]
        found[module] = found.get(module, 0) + info.nbytes
    return found
