"""What a data-free scheme makes of a checkpoint by its tensors' names: every tensor of the output before one is read.

A tensor of the source becomes one linear, several (stacked experts, a joined gate and up), or is copied. Weights that
the source has quantized in float8 or int8 come with a tensor of scales, which may lie in another file.

No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eightfold.config import CONFIG_DTYPES, DType, has_engine
from eightfold.errors import CheckpointError, one_of, shortlist
from eightfold.families import EMBEDDING, LM_HEAD
from eightfold.format.checkpoint import find_description, quantized_already
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.safetensors import TensorInfo
from eightfold.format.shards import PlannedTensor
from eightfold.format.stored import StoredTensors
from eightfold.layouts import (
    EXPERT,
    GROUPS,
    Layout,
    Part,
    Rule,
    engine_names,
    expert_count,
    generic_rule,
    layout_of,
    text_config,
)
from eightfold.quant.name_sources import FLOATS, UNREAD, Source, Sources
from eightfold.quant.plan import OutputTensor
from eightfold.quant.recipe import Recipe, require
from eightfold.scheme import BIAS, WEIGHT, QuantType, linear_tensors, weight_name
from eightfold.values import shown

DATA_FREE = (QuantType.W8A8_DYNAMIC, QuantType.W8A16)

_OUTSIDE = "others"  # the step of what is in no layer

_NEXT = re.compile(r"mtp\.layers\.\d+\.")  # layers that predict further tokens, of families that name them so


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
class _Found:
    """A linear that could be quantized."""

    step: str
    module: str
    rule: Rule
    source: Source
    bias: Source | None = None


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
        self._where = self.stored.directory / CONFIG_NAME
        self._found: dict[str, _Found] = {}
        self._copied: list[tuple[str, str, Source]] = []
        self._unknown: list[str] = []
        self._beyond: set[int] = set()
        self._prefix = self._layer_prefix()
        self._in_layer = re.compile(re.escape(self._prefix) + r"(\d+)\.")
        self._sources = Sources(self.stored)
        self.dtype = self._model_dtype()
        for info in self.stored.tensors.values():
            self._place(info)
        self._copy_tied_head()
        self._require_experts()
        self._require_layers()
        self._assign_types()
        self._build()
        self._add_entries()
        self._take_notes()

    # --- where the layers are, and what goes with a weight

    def _layer_prefix(self) -> str:
        names = self.stored.tensors
        for prefix in self.layout.layers:
            if any(name.startswith(prefix) and name[len(prefix) : len(prefix) + 1].isdigit() for name in names):
                return prefix
        raise CheckpointError(
            "tensor names",
            where=self.stored.directory,
            got=shortlist(names, 2) or "none",
            expected=f"layers below {one_of(self.layout.layers)}",
            action="config.json and the weights belong to different models.",
        )

    def _model_dtype(self) -> DType:
        raw = self.stored.config_raw
        said = [part.get(key) for part in (text_config(raw), raw) for key in ("dtype", "torch_dtype")]
        named = next((str(name).removeprefix("torch.") for name in said if name is not None), "")
        dtype = CONFIG_DTYPES.get(named)
        if dtype in (DType.BF16, DType.F16):
            return dtype
        kinds = [info.dtype for info in self.stored.tensors.values() if len(info.shape) > 1 and info.dtype in FLOATS]
        return FLOATS[kinds[0]] if kinds else DType.BF16

    # --- what each tensor becomes

    def _place(self, info: TensorInfo) -> None:
        name = info.name
        if name.endswith(UNREAD) or self._sources.is_scale(name):
            return
        found, next_found = self._in_layer.match(name), _NEXT.match(name)
        if next_found:
            self._place_in_layer(info, next_found[0], _OUTSIDE)
        elif found and int(found[1]) < self.num_layers:
            self._place_in_layer(info, found[0], f"layer {int(found[1])}")
        elif found:
            self._beyond.add(int(found[1]))
            self._place_in_layer(info, found[0], _OUTSIDE)
        else:
            self._copied.append((_OUTSIDE, name, self._sources.of(info)))

    def _copy_tied_head(self) -> None:
        """Write the head of a tied model that can run here, as pipeline.py does."""
        raw, embedding = self.stored.config_raw, self.stored.tensors.get(weight_name(EMBEDDING))
        head = weight_name(LM_HEAD)
        if has_engine(raw) and embedding is not None and head not in self.stored.tensors:
            self._copied.append((_OUTSIDE, head, self._sources.of(embedding)))

    def _place_in_layer(self, info: TensorInfo, prefix: str, step: str) -> None:
        inner = info.name.removeprefix(prefix)
        for before, after in (self.layout.renames or {}).items():
            if inner.startswith(before):
                inner = after + inner.removeprefix(before)
        if self._place_stacked(info, prefix, inner, step):
            return
        module, _, last = inner.rpartition(".")
        weight = self.stored.tensors.get(info.name.removesuffix(BIAS) + WEIGHT)
        if last == BIAS and weight is not None and len(weight.shape) == 2:
            return  # goes with its weight
        if last != WEIGHT or len(info.shape) != 2:
            self._copied.append((step, prefix + inner, self._sources.of(info)))
            return
        bias = self.stored.tensors.get(info.name.removesuffix(WEIGHT) + BIAS)
        source, of_bias = self._sources.of(info), None if bias is None else self._sources.of(bias)
        for own, half in self._halves(module, info.shape[0]):
            at = source if half is None else source.part(*half)
            its_bias = of_bias if half is None or of_bias is None else of_bias.part(*half)
            self._add_found(step, prefix, own, at, its_bias)

    def _halves(self, module: str, n: int) -> Iterator[tuple[str, tuple[int, int] | None]]:
        pair = (self.layout.halves or {}).get(module)
        if pair is None or n % 2:
            yield module, None
            return
        for i, half in enumerate(pair):
            yield half, (i * (n // 2), n // 2)

    def _add_found(self, step: str, prefix: str, module: str, source: Source, bias: Source | None) -> None:
        rule = generic_rule(module) if self.layout.takes_any else self.layout.rule_of(module)
        name = prefix + module
        if rule is None or step == _OUTSIDE:
            if step != _OUTSIDE:
                self._unknown.append(name)
            rule = Rule(module, Part.OTHER if rule is None else rule.part, stays_float=True)
        if name in self._found:
            raise CheckpointError(
                weight_name(name),
                where=self.stored.directory,
                got=f"it in {self._found[name].source.tensor} and in {source.tensor}",
                expected="it once",
                action="Remove the one that does not belong to this model.",
            )
        self._found[name] = _Found(step, name, rule, source, bias)

    def _place_stacked(self, info: TensorInfo, prefix: str, inner: str, step: str) -> bool:
        """Take a tensor of all experts of a layer apart; return whether it is one."""
        experts = self.layout.experts
        if experts is None:
            return False
        base = inner.removesuffix(f".{WEIGHT}")
        for joined, down in experts.stacked:
            if base in (joined, down) and len(info.shape) == 3:
                for expert in range(info.shape[0]):
                    for last, source, bias in self._slices(info, base == joined, expert):
                        self._add_found(step, prefix, f"{experts.module}.{expert}.{last}", source, bias)
                return True
            if base in (f"{joined}_{BIAS}", f"{down}_{BIAS}"):
                return True  # goes with its weight
        return False

    def _slices(self, info: TensorInfo, is_joined: bool, expert: int) -> Iterator[tuple[str, Source, Source | None]]:
        """Yield the linears that one expert has in a stacked tensor: the last part of the name, weight and bias."""
        experts = self.layout.experts
        assert experts is not None
        is_input_major = self._is_input_major(info, is_joined)
        rows, columns = info.shape[1:]
        n, k = (columns, rows) if is_input_major else (rows, columns)
        whole = replace(self._sources.of_stack(info), shape=(n, k), expert=expert, is_input_major=is_input_major)
        biases = self.stored.tensors.get(f"{info.name.removesuffix(f'.{WEIGHT}')}_{BIAS}")
        bias = None if biases is None else Source(biases.name, (n,), expert=expert)
        if not is_joined:
            yield experts.down, whole, bias
            return
        if n % 2:
            got, expected = f"{n} rows of gate and up", "an even number"
            raise CheckpointError(f"shape of {info.name}", where=info.file, got=got, expected=expected)
        half, step = n // 2, 2 if experts.is_interleaved else 1
        for i, last in enumerate((experts.gate, experts.up)):
            begin = i if experts.is_interleaved else i * half
            yield last, whole.part(begin, half, step), None if bias is None else bias.part(begin, half, step)

    def _is_input_major(self, info: TensorInfo, is_joined: bool) -> bool:
        """Decide by the sizes of config.json how an expert's part of a stacked tensor lies; else by the family."""
        experts, text = self.layout.experts, text_config(self.stored.config_raw)
        assert experts is not None
        hidden, (rows, columns) = text.get("hidden_size"), info.shape[1:]
        if rows == columns or hidden not in (rows, columns):
            return experts.is_input_major
        is_output_first = columns == hidden if is_joined else rows == hidden
        return not is_output_first

    # --- what must be there

    def _require_layers(self) -> None:
        steps = {found.step for found in self._found.values()}
        absent = [f"layer {i}" for i in range(self.num_layers) if f"layer {i}" not in steps]
        if absent:
            raise CheckpointError(
                "layers",
                where=self.stored.directory,
                got=f"no weights of {shortlist(absent, 3)}",
                expected=f"all {self.num_layers} of config.json",
                action="Fetch the missing files, or correct config.json.",
            )
        present = {name.rpartition(".")[0] for name in self._found}
        for parent in present:
            for group in GROUPS[:3]:
                members = [f"{parent}.{name}" for name in group]
                absent = [name for name in members if name not in self._found]
                has_some = any(name in self._found for name in members[1:])
                if has_some and absent and not EXPERT.fullmatch(members[0]):
                    raise CheckpointError(
                        f"linears of {parent}",
                        where=self.stored.directory,
                        got=f"no {shortlist(absent)}",
                        expected=shortlist(members),
                        action="Fetch the model again, with all of its files.",
                    )

    def _require_experts(self) -> None:
        """Refuse layers whose experts are not all there, or not of one shape, or whose router is for others."""
        layers: dict[str, dict[int, dict[str, Source]]] = {}
        for name, found in self._found.items():
            if (match := EXPERT.fullmatch(name)) and found.rule.part is Part.EXPERT:
                layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = found.source
        if not layers and self.layout.experts is not None and not self.layout.takes_any:
            expected = f"{self.layout.experts.module} in some layers of {self.layout.model_type}"
            action = "config.json and the weights belong to different models."
            raise CheckpointError("experts", where=self.stored.directory, got="none", expected=expected, action=action)
        for module, experts in layers.items():
            self._require_whole(module, experts)
            self._require_router(module, len(experts))

    def _require_whole(self, module: str, experts: Mapping[int, Mapping[str, Source]]) -> None:
        given, own = self._in_layer.match(module + "."), self.layout.experts
        said = expert_count(self.stored.config_raw, int(given[1])) if given else None
        count = max(max(experts) + 1, said or 0)
        names = own.names if own is not None and not self.layout.takes_any else tuple(next(iter(experts.values())))
        missing = [f"{i}.{name}" for i in range(count) for name in names if name not in experts.get(i, {})]
        where = self.stored.directory
        if missing or (said is not None and count != said):
            got = f"no {shortlist(missing, 4)}" if missing else f"{count} of them"
            expected = f"{said or count} experts with {', '.join(names)}"
            action = "Fetch the model again, with all of its files."
            raise CheckpointError(f"experts of {module}", where=where, got=got, expected=expected, action=action)
        for name in names:
            shape = experts[0][name].shape
            for i, other in experts.items():
                if other[name].shape != shape:
                    got, expected = f"{list(other[name].shape)}", f"{list(shape)}, as expert 0 has"
                    raise CheckpointError(f"shape of {module}.{i}.{name}", where=where, got=got, expected=expected)

    def _require_router(self, module: str, count: int) -> None:
        own = self.layout.experts
        if own is None or self.layout.takes_any or not module.endswith(own.module):
            return
        name = module.removesuffix(own.module) + own.router
        router = self._found.get(name)
        if router is None:
            got, expected = f"no {weight_name(name)}", f"the router of {module}"
            raise CheckpointError("router", where=self.stored.directory, got=got, expected=expected)
        hidden = text_config(self.stored.config_raw).get("hidden_size")
        expected_shape = (count, hidden if isinstance(hidden, int) else router.source.shape[1])
        if router.source.shape != expected_shape:
            raise CheckpointError(
                f"shape of {weight_name(name)}",
                where=self.stored.directory,
                got=list(router.source.shape),
                expected=f"{list(expected_shape)}, one row for each of {count} experts",
            )

    # --- how each is stored

    def _assign_types(self) -> None:
        names = [name for name, found in self._found.items() if found.step != _OUTSIDE]
        self.parts = {name: self._found[name].rule.part for name in names}
        self.types = {name: self._default(self._found[name].rule) for name in names}
        for option, patterns in (
            ("modules", self.recipe.modules),
            ("keep_float", [(pattern, QuantType.FLOAT) for pattern in self.recipe.keep_float]),
        ):
            for pattern, kind in patterns:
                matches = [name for name in names if fnmatchcase(name, pattern)]
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5) if not matches else []
                example = near[0] if near else names[-1]
                got = f"{shown(pattern)}, which matches no linear"
                require(bool(matches), option, got, f"a name or pattern such as {example!r}")
                self.types.update(dict.fromkeys(matches, kind))

    def _default(self, rule: Rule) -> QuantType:
        if rule.stays_float:
            return QuantType.FLOAT
        return QuantType.W8A8_DYNAMIC if rule.part is Part.EXPERT else self.recipe.scheme

    def _build(self) -> None:
        units = [
            Unit(found.step, name, self.types.get(name, QuantType.FLOAT), found.source, found.bias)
            for name, found in self._found.items()
        ]
        units += [Unit(step, name, QuantType.FLOAT, source, is_linear=False) for step, name, source in self._copied]
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
        return [*(f"layer {i}" for i in range(self.num_layers)), _OUTSIDE]

    def _float_dtype(self, source: Source) -> DType:
        return self.dtype if source.scale else DType(self.stored.tensors[source.tensor].dtype)

    def _add(self, name: str, dtype: DType, shape: tuple[int, ...], tag: QuantType) -> None:
        if name in self.tensors:
            raise CheckpointError(f"tensor {name}", where=self.stored.directory, got="it twice", expected="it once")
        self.tensors[name] = OutputTensor(PlannedTensor(name, dtype, shape), tag)

    def _add_entries(self) -> None:
        """Add what loaders look up without there being such a tensor."""
        if self.layout.experts is not None and self.layout.experts.needs_entry:
            for name, kind in self.types.items():
                if (match := EXPERT.fullmatch(name)) and self.parts[name] is Part.EXPERT:
                    self.entries.setdefault(weight_name(match[1]), kind)
        if not any(name.endswith(("lm_head.weight", "output.weight", "output_layer.weight")) for name in self.tensors):
            outer = "language_model." if self._prefix.startswith("language_model.model.") else ""
            self.entries[f"{outer}lm_head.weight"] = QuantType.FLOAT

    def _take_notes(self) -> None:
        kinds = {self.types[name] for name, part in self.parts.items() if part is Part.EXPERT}
        if self.recipe.scheme is QuantType.W8A16 and kinds:
            self.notes.append(
                "experts are W8A8_DYNAMIC: only MindIE's ATB models load W8A16 experts. `modules` of a recipe file "
                '("*.experts.*": w8a16) makes them W8A16 all the same.'
                if QuantType.W8A16 not in kinds
                else "experts are W8A16, which only MindIE's ATB models load: vllm-ascend and SGLang refuse it."
            )
        if split := self._split_groups():
            self.notes.append(
                f"{len(split)} groups of linears that loaders join are stored in two ways (such as {split[0]}): "
                "they refuse that, or misread it. Give whole groups one type."
            )
        if all(kind is QuantType.FLOAT for kind in self.types.values()):
            self.notes.append("every linear is kept float: nothing is quantized.")
        if self._unknown:
            count, names = len(self._unknown), shortlist(self._unknown, 2)
            self.notes.append(f"{count} weights that this family is not known to have stay float ({names}).")
        if self._beyond:
            others = shortlist(sorted(self._beyond), 4)
            self.notes.append(
                f"behind the {self.num_layers} layers of config.json lie others ({others}): they predict further "
                "tokens, and stay float."
            )
        if self.dtype is DType.F32:
            self.notes.append("OUT is a float32 model, which MindIE refuses: save the source in bfloat16 first.")
        if not has_engine(self.stored.config_raw):
            loaders = "loaders of Llama-shaped models" if self.layout.takes_any else engine_names(self.layout)
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
    kinds = {recipe.scheme, *(kind for _, kind in recipe.modules)} - {*DATA_FREE, QuantType.FLOAT}
    got = f"{', '.join(sorted(kind.value for kind in kinds))} for {named}"
    expected = f"{one_of(kind.value for kind in DATA_FREE)}, which need no calibration"
    require(not kinds, "scheme", got, expected, "eightfold does not run this model.")
    unusual = {
        "anti_outlier": recipe.anti_outlier,
        "fa_quant": recipe.fa_quant,
        "kv_int8": recipe.kv_int8,
        "disable_level": recipe.disable_level,
        "quantize_lm_head": recipe.quantize_lm_head,
        "dtype": recipe.dtype,
        "save_float32": recipe.save_float32,
    }
    for option, value in unusual.items():
        require(not value, option, f"it for {named}", "it left out, as the model is known by its names only")


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
    return NamePlan(stored, recipe, layout)
