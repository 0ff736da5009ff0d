"""What a data-free scheme makes of a checkpoint by its tensors' names: every tensor of the output before one is read.

A tensor of the source becomes one linear, several (stacked experts, a joined gate and up), or is copied. Weights that
the source has quantized in float8 or int8 come with a tensor of scales, which may lie in another file.

No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eightfold.config import CONFIG_DTYPES, DType, ModelConfig, has_engine, parse_config
from eightfold.errors import CheckpointError, one_of, shortlist
from eightfold.families import all_linears
from eightfold.format.checkpoint import quantized_already
from eightfold.format.description import find_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.shards import PlannedTensor
from eightfold.format.stored import StoredTensors
from eightfold.layouts import EXPERT, GROUPS, Layout, Part, engine_names, layout_of, text_config
from eightfold.quant.mixture import default_type, expert_notes, lookup_entries
from eightfold.quant.name_checks import require_complete
from eightfold.quant.name_linears import OUTSIDE, FoundTensors
from eightfold.quant.name_sources import FLOATS, Source
from eightfold.quant.plan import OutputTensor
from eightfold.quant.recipe import Recipe, require
from eightfold.scheme import BIAS, QuantType, linear_tensors, weight_name
from eightfold.values import shown

DATA_FREE = (QuantType.W8A8_DYNAMIC, QuantType.W8A16)

# Options that change more than linears, or need the model to run.
_BEYOND = ("anti_outlier", "fa_quant", "kv_int8", "disable_level", "quantize_lm_head", "dtype", "save_float32")


@dataclass(frozen=True)
class Unit:
    """One linear of the output, or one tensor that is in none.

    Attributes:
        step: of the journal: its layer.
        name: the linear's module, or the tensor's name.
        kind: how the linear is stored; FLOAT for other tensors too.
        source: its weight.
        bias: its bias.
        is_linear: whether `name` is a module.
    """

    step: str
    name: str
    kind: QuantType
    source: Source
    bias: Source | None = None
    is_linear: bool = True


@dataclass
class NamePlan:
    """All tensors of the output.

    Attributes:
        types: of every linear in a layer, by its full name in the output.
        parts: what each of them is.
        units: in the order in which they are written.
        tensors: of the output, by name.
        entries: of the description, for loaders, that name no tensor.
        notes: for the user.
    """

    stored: StoredTensors
    recipe: Recipe
    layout: Layout
    types: dict[str, QuantType] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    tensors: dict[str, OutputTensor] = field(default_factory=dict)
    entries: dict[str, QuantType] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_data_free(self.recipe, self.stored.config_raw)
        self.num_layers = self.stored.num_layers
        self.dtype = self._model_dtype()
        self._found = FoundTensors(self.stored, self.layout)
        require_complete(self._found)
        self._assign_types()
        self._build()
        self._add_entries()
        self._take_notes()

    def _model_dtype(self) -> DType:
        raw = self.stored.config_raw
        said = [part.get(key) for part in (text_config(raw), raw) for key in ("dtype", "torch_dtype")]
        named = next((str(name).removeprefix("torch.") for name in said if name is not None), "")
        dtype = CONFIG_DTYPES.get(named)
        if dtype in (DType.BF16, DType.F16):
            return dtype
        kinds = [info.dtype for info in self.stored.tensors.values() if len(info.shape) > 1 and info.dtype in FLOATS]
        return FLOATS[kinds[0]] if kinds else DType.BF16

    def _assign_types(self) -> None:
        names = [name for name, found in self._found.linears.items() if found.step != OUTSIDE]
        self.parts = {name: self._found.linears[name].rule.part for name in names}
        self.types = {
            name: default_type(self._found.linears[name].rule, self.recipe.scheme, self.layout) for name in names
        }
        others = [name for name in names if self.parts[name] is not Part.ROUTER]  # no loader has another type for one
        for option, patterns, known in (
            ("modules", self.recipe.modules, others),
            ("keep_float", [(pattern, QuantType.FLOAT) for pattern in self.recipe.keep_float], names),
        ):
            for pattern, kind in patterns:
                matches = [name for name in known if fnmatchcase(name, pattern)]
                near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5) if not matches else []
                example = near[0] if near else known[-1]
                got = f"{shown(pattern)}, which matches no linear"
                require(bool(matches), option, got, f"a name or pattern such as {example!r}")
                self.types.update(dict.fromkeys(matches, kind))

    def _build(self) -> None:
        units = [
            Unit(found.step, name, self.types.get(name, QuantType.FLOAT), found.source, found.bias)
            for name, found in self._found.linears.items()
        ]
        units += [
            Unit(step, name, QuantType.FLOAT, source, is_linear=False) for step, name, source in self._found.copied
        ]
        order = {step: i for i, step in enumerate(self.steps)}
        self.units = sorted(units, key=lambda unit: order[unit.step])
        for unit in self.units:
            if not unit.is_linear:
                self._add(unit.name, self._float_dtype(unit.source), unit.source.shape, QuantType.FLOAT)
                continue
            sizes = dict(zip("NK", unit.source.shape, strict=True))
            for spec in linear_tensors(unit.kind, unit.bias is not None):
                source = unit.bias if spec.suffix == BIAS else unit.source
                dtype = spec.dtype.resolve(self.dtype, self._float_dtype(source) if source else None)
                self._add(f"{unit.name}.{spec.suffix}", dtype, spec.shape_for(**sizes), spec.tag)

    def names_of(self, unit: Unit) -> list[str]:
        """Return the names of the tensors that a unit becomes."""
        if not unit.is_linear:
            return [unit.name]
        return [f"{unit.name}.{spec.suffix}" for spec in linear_tensors(unit.kind, unit.bias is not None)]

    @property
    def steps(self) -> list[str]:
        """The steps of the journal, in order."""
        return [*(f"layer {i}" for i in range(self.num_layers)), OUTSIDE]

    def _float_dtype(self, source: Source) -> DType:
        return self.dtype if source.scale else DType(self.stored.tensors[source.tensor].dtype)

    def _add(self, name: str, dtype: DType, shape: tuple[int, ...], tag: QuantType) -> None:
        if name in self.tensors:
            raise CheckpointError(f"tensor {name}", where=self.stored.directory, got="it twice", expected="it once")
        self.tensors[name] = OutputTensor(PlannedTensor(name, dtype, shape), tag)

    def _add_entries(self) -> None:
        """Add what loaders look up without there being such a tensor."""
        self.entries.update(lookup_entries(self.layout, self.types))
        if not any(name.endswith(("lm_head.weight", "output.weight", "output_layer.weight")) for name in self.tensors):
            outer = "language_model." if self._found.prefix.startswith("language_model.model.") else ""
            self.entries[f"{outer}lm_head.weight"] = QuantType.FLOAT

    def _take_notes(self) -> None:
        self.notes += expert_notes(self.recipe, self.types)
        if split := self._split_groups():
            self.notes.append(
                f"{len(split)} groups of linears that loaders join are stored in two ways (such as {split[0]}): "
                "they refuse that, or misread it. Give whole groups one type."
            )
        if all(kind is QuantType.FLOAT for kind in self.types.values()):
            self.notes.append("every linear is kept float: nothing is quantized.")
        if self._found.unknown:
            count, names = len(self._found.unknown), shortlist(self._found.unknown, 2)
            self.notes.append(f"{count} weights that this family is not known to have stay float ({names}).")
        if self._found.beyond:
            others = shortlist(sorted(self._found.beyond), 4)
            self.notes.append(
                f"behind the {self.num_layers} layers of config.json lie others ({others}): they predict further "
                "tokens, and stay float."
            )
        if self.dtype is DType.F32:
            self.notes.append("OUT is a float32 model, which MindIE refuses: save the source in bfloat16 first.")
        if not has_engine(self.stored.config_raw):
            loaders = engine_names(self.layout)
            self.notes.append(f"OUT is for other engines ({loaders}): eightfold itself does not run this family.")

    def _split_groups(self) -> list[str]:
        groups: dict[str, set[QuantType]] = {}
        for name, kind in self.types.items():
            parent, _, last = name.rpartition(".")
            if match := EXPERT.fullmatch(name):
                groups.setdefault(match[1], set()).add(kind)
            else:
                group = next((group for group in GROUPS if last in group), None)
                groups.setdefault(name if group is None else f"{parent}.{', '.join(group)}", set()).add(kind)
        return [name for name, kinds in groups.items() if len(kinds) > 1]


def require_data_free(recipe: Recipe, raw: Mapping[str, Any]) -> None:
    """Refuse what needs the model to run, or changes more than linears, where only names are known.

    Raises:
        ConfigError: the scheme or another option.
    """
    named = (raw.get("architectures") or ["this model"])[0]
    for option, got in beyond_names(recipe).items():
        if option == "scheme":
            expected = f"{one_of(kind.value for kind in DATA_FREE)}, which need no calibration"
            require(False, option, f"{got} for {named}", expected, "eightfold does not run this model.")
        require(False, option, f"it for {named}", "it left out, as the model is known by its names only")


def beyond_names(recipe: Recipe) -> dict[str, str]:
    """Return what in a recipe needs the model to run, or changes more than linears: option -> what was asked for."""
    kinds = {recipe.scheme, *(kind for _, kind in recipe.modules)} - {*DATA_FREE, QuantType.FLOAT}
    found = {"scheme": ", ".join(sorted(kind.value for kind in kinds))} if kinds else {}
    return found | {option: str(value) for option in _BEYOND if (value := getattr(recipe, option))}


def plan_by_name(source: Path, recipe: Recipe, *, is_generic: bool = False) -> NamePlan:
    """Plan a model of any family.

    Args:
        source: the model directory. Only read.
        recipe: W8A8_DYNAMIC or W8A16, and what stays float.
        is_generic: take an architecture without a row in layouts.py for one shaped like Llama.

    Raises:
        CheckpointError: no model, one of this format, or one of which something is missing or in the wrong shape.
        UnsupportedError: an architecture without a row, or weights of a type that is not read.
        ConfigError: a recipe that needs the model to run.
    """
    stored = StoredTensors.read(source)
    layout = layout_of(stored.config_raw, source / CONFIG_NAME, is_generic=is_generic)
    if find_description(source) is not None:
        raise quantized_already(source)
    config = parse_config(stored.config_raw, source / CONFIG_NAME) if has_engine(stored.config_raw) else None
    plan = NamePlan(stored, recipe, layout)
    if config is not None and config.experts is not None:
        _require_sizes(plan, config)
    return plan


def _require_sizes(plan: NamePlan, config: ModelConfig) -> None:
    """Refuse a mixture of experts that runs here, but whose linears are not those of its config.json.

    Raises:
        CheckpointError: names the first.
    """
    for name, linear in all_linears(config).items():
        planned, expected = plan.tensors.get(weight_name(name)), (linear.n, linear.k)
        if planned is None and name == config.names.head and config.tie_word_embeddings:
            continue
        if planned is None or planned.planned.shape != expected:
            raise CheckpointError(
                f"shape of {weight_name(name)}",
                where=plan.stored.directory,
                got="no such tensor" if planned is None else list(planned.planned.shape),
                expected=list(expected),
                action="config.json and the weights belong to different models.",
            )
