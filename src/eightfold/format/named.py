"""A model directory of any family, of which only the names, types and shapes of tensors are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eightfold.config import DType
from eightfold.errors import CheckpointError
from eightfold.files import read_json
from eightfold.format.description import find_description, read_description
from eightfold.format.directory import CONFIG_NAME, read_tensors
from eightfold.format.journal import require_finished
from eightfold.format.safetensors import TensorInfo
from eightfold.layouts import EXPERT, GROUPS, Layout, Part, generic_rule, layer_count, layout_of, text_config
from eightfold.scheme import WEIGHT, QuantType

_FLOAT = QuantType.FLOAT.value
_INT8 = DType.I8.value


@dataclass
class NamedDirectory:
    """A directory of which only names, types and shapes are known.

    Attributes:
        path: the folder.
        config: config.json as it stands.
        layout: the row of the family.
        description: the name of its description; empty for a float model.
        labels: its entries.
        tensors: every stored tensor by name.
    """

    path: Path
    config: dict[str, Any]
    layout: Layout
    description: str
    labels: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> NamedDirectory:
        """Gather a directory.

        Raises:
            CheckpointError: no directory, an unfinished one, or one whose files are missing or damaged.
            UnsupportedError: an architecture that is not known, over weights without a description.
        """
        require_finished(path)
        return cls.gather(path)

    @classmethod
    def gather(cls, path: Path) -> NamedDirectory:
        """Gather a directory as open() does, or one that is being made."""
        if not path.is_dir():
            raise CheckpointError(f"no directory {path}", expected="a model directory", action="Check the path.")
        config = read_json(path / CONFIG_NAME)
        found = find_description(path)
        layout = layout_of(config, path / CONFIG_NAME, is_generic=found is not None)
        tensors, _ = read_tensors(path, config, is_quantized=found is not None)
        labels = read_description(found).tags if found else {}
        return cls(path, config, layout, found.name if found else "", labels, tensors)

    @cached_property
    def in_layer(self) -> re.Pattern[str]:
        """The names in a layer: its index, and what comes behind it."""
        prefix = next((each for each in self.layout.layers if any(n.startswith(each) for n in self.tensors)), "\0")
        return re.compile(re.escape(prefix) + r"(\d+)\.(.+)")

    @cached_property
    def num_layers(self) -> int:
        """How many layers config.json says that the model has."""
        return layer_count(self.config, self.path / CONFIG_NAME)

    @property
    def dtype(self) -> str:
        """What config.json says of the dtype, by transformers' name."""
        text = text_config(self.config)
        return str(text.get("dtype") or text.get("torch_dtype") or self.config.get("torch_dtype") or "unknown")

    @cached_property
    def linears(self) -> dict[str, str]:
        """The linears of the layers by module -> label; those of layers behind the last only where they are int8."""
        found = {}
        for name, info in self.tensors.items():
            module, _, last = name.rpartition(".")
            inner = self.in_layer.fullmatch(module)
            is_inside = inner is not None and int(inner[1]) < self.num_layers
            is_known = inner is not None and (self.layout.takes_any or self.layout.rule_of(inner[2]) is not None)
            if last == WEIGHT and len(info.shape) == 2 and ((is_inside and is_known) or info.dtype == _INT8):
                found[module] = self.labels.get(name, _FLOAT)
        return found

    def part_of(self, module: str) -> Part:
        """Return what a linear is."""
        inner = self.in_layer.fullmatch(module)
        if inner is None:
            return Part.OTHER
        rule = generic_rule(inner[2]) if self.layout.takes_any else self.layout.rule_of(inner[2])
        return Part.OTHER if rule is None else rule.part

    @cached_property
    def experts(self) -> dict[str, Counter[str]]:
        """The experts of each layer: module of all -> how many of its linears have each label."""
        found: dict[str, Counter[str]] = {}
        for module, label in self.linears.items():
            if match := EXPERT.fullmatch(module):
                found.setdefault(match[1], Counter())[label] += 1
        return found

    @cached_property
    def joined(self) -> dict[str, list[str]]:
        """What loaders join, outside of experts and in each: how it may be called -> modules."""
        found: dict[str, list[str]] = {}
        for module in self.linears:
            parent, _, last = module.rpartition(".")
            for group in GROUPS:
                if last in group:
                    found.setdefault(f"{parent}.{{{','.join(group)}}}", []).append(module)
        return found

    @property
    def groups(self) -> dict[str, set[str]]:
        """The labels of what loaders join."""
        return {group: {self.linears[module] for module in modules} for group, modules in self.joined.items()}
