"""What each tensor of a source is, by its name: one linear of a layer, several, or something that is copied.

one            a matrix in a layer, with its bias
several        experts in one tensor, a joined gate and up
copied         what is no matrix of a layer, and what is in none
none           scales, which go with a weight, and what readers do without
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from eightfold.architectures import FAMILIES
from eightfold.config import has_engine
from eightfold.errors import CheckpointError, UnsupportedError, one_of, shortlist
from eightfold.families import stored_names
from eightfold.format.stored import StoredTensors
from eightfold.layouts import Layout, Part, Rule, generic_rule, text_config
from eightfold.quant.name_sources import FETCH_AGAIN, Coding, Source, Sources
from eightfold.scheme import BIAS, WEIGHT, weight_name

OUTSIDE = "others"  # the step of what is in no layer

_NEXT = re.compile(r"mtp\.layers\.\d+\.")  # layers that predict further tokens, of families that name them so


@dataclass
class Found:
    """A linear of a layer.

    Attributes:
        step: of the journal: its layer.
        module: its full name in the output.
        rule: what it is; of a layer behind the last, that it stays float.
        source: its weight.
        bias: its bias.
    """

    step: str
    module: str
    rule: Rule
    source: Source
    bias: Source | None = None


class FoundTensors:
    """All tensors of a source.

    Attributes:
        linears: by their full names in the output.
        copied: (step, name in the output, source) of everything else that is written.
        unknown: linears of a layer that no rule of the family names.
        beyond: the indices of layers behind the last.
        prefix: before the index of a layer.

    Raises:
        CheckpointError: no layers where the family has them, or a linear twice, or of a shape that cannot be.
        UnsupportedError: a type of weights that is not read.
    """

    def __init__(self, stored: StoredTensors, layout: Layout) -> None:
        self.stored, self.layout = stored, layout
        self.linears: dict[str, Found] = {}
        self.copied: list[tuple[str, str, Source]] = []
        self.unknown: list[str] = []
        self.beyond: set[int] = set()
        self.prefix = self._layer_prefix()
        self.in_layer = re.compile(re.escape(self.prefix) + r"(\d+)\.")
        self._sources = Sources(stored)
        for name, source in self._sources.items():
            self._place(name, source)
        self._copy_tied_head()

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

    def _place(self, name: str, source: Source) -> None:
        found, next_found = self.in_layer.match(name), _NEXT.match(name)
        if next_found:
            self._place_in_layer(name, source, next_found[0], OUTSIDE)
        elif found and int(found[1]) < self.stored.num_layers:
            self._place_in_layer(name, source, found[0], f"layer {int(found[1])}")
        elif found:
            self.beyond.add(int(found[1]))
            self._place_in_layer(name, source, found[0], OUTSIDE)
        else:
            self._copy(OUTSIDE, name, source)

    def _copy(self, step: str, name: str, source: Source) -> None:
        if source.scale and len(source.shape) != 2:
            info = self._sources.info(source)
            got, expected = f"{info.dtype} {list(info.shape)}", "a matrix, or experts that this family is known to have"
            action = "Start from the float model."
            raise UnsupportedError(f"shape of {info.name}", where=info.file, got=got, expected=expected, action=action)
        self.copied.append((step, name, source))

    def _copy_tied_head(self) -> None:
        """Write the head of a tied model that can run here, as pipeline.py does."""
        raw = self.stored.config_raw
        if not has_engine(raw):
            return
        names = stored_names(FAMILIES[raw["architectures"][0]], self.stored.tensors)
        embedding, head = self._sources.get(weight_name(names.embedding)), weight_name(names.head)
        if embedding is not None and head not in self._sources:
            self._copy(OUTSIDE, head, embedding)

    def _place_in_layer(self, name: str, source: Source, prefix: str, step: str) -> None:
        inner = name.removeprefix(prefix)
        for before, after in (self.layout.renames or {}).items():
            if inner.startswith(before):
                inner = after + inner.removeprefix(before)
        if self._place_stacked(name, source, prefix, inner, step):
            return
        module, _, last = inner.rpartition(".")
        weight = self._sources.get(name.removesuffix(BIAS) + WEIGHT)
        if last == BIAS and weight is not None and len(weight.shape) == 2:
            return  # goes with its weight
        if last != WEIGHT or len(source.shape) != 2:
            self._copy(step, prefix + inner, source)
            return
        bias = self._bias(name.removesuffix(WEIGHT) + BIAS, source.shape[:1])
        for own, half in self._halves(module, source.shape[0]):
            at = source if half is None else source.part(*half)
            its_bias = bias if half is None or bias is None else bias.part(*half)
            self._add_found(step, prefix, own, at, its_bias)

    def _bias(self, name: str, shape: tuple[int, ...]) -> Source | None:
        """Return the bias of a weight that has so many outputs, or so many experts with these."""
        bias = self._sources.get(name)
        if bias is not None and bias.shape != shape:
            info = self._sources.info(bias)
            raise CheckpointError(
                f"shape of {info.name}",
                where=info.file,
                got=list(bias.shape),
                expected=f"{list(shape)}, as its weight",
                action=FETCH_AGAIN,
            )
        return bias

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
        if rule is None or step == OUTSIDE:
            if step != OUTSIDE:
                self.unknown.append(name)
            rule = Rule(module, Part.OTHER if rule is None else rule.part, stays_float=True)
        if name in self.linears:
            raise CheckpointError(
                weight_name(name),
                where=self.stored.directory,
                got=f"it in {self.linears[name].source.tensor} and in {source.tensor}",
                expected="it once",
                action="Remove the one that does not belong to this model.",
            )
        self.linears[name] = Found(step, name, rule, source, bias)

    def _place_stacked(self, name: str, source: Source, prefix: str, inner: str, step: str) -> bool:
        """Take a tensor of all experts of a layer apart; return whether it is one."""
        experts = self.layout.experts
        if experts is None:
            return False
        base = inner.removesuffix(f".{WEIGHT}")
        for joined, down in experts.stacked:
            if base in (joined, down) and len(source.shape) == 3:
                is_input_major = self._is_input_major(source, base == joined)
                outputs = source.shape[2 if is_input_major else 1]
                bias = self._bias(f"{name.removesuffix(f'.{WEIGHT}')}_{BIAS}", (source.shape[0], outputs))
                for expert in range(source.shape[0]):
                    own = source.of_expert(expert, is_input_major=is_input_major)
                    its_bias = None if bias is None else bias.of_expert(expert, is_input_major=False)
                    for last, weight, part in self._parts(own, its_bias, base == joined):
                        self._add_found(step, prefix, f"{experts.module}.{expert}.{last}", weight, part)
                return True
            if base in (f"{joined}_{BIAS}", f"{down}_{BIAS}"):
                return True  # goes with its weight
        return False

    def _parts(
        self, source: Source, bias: Source | None, is_joined: bool
    ) -> Iterator[tuple[str, Source, Source | None]]:
        """Yield the linears that one expert has in a stacked tensor: the last part of the name, weight and bias."""
        experts = self.layout.experts
        assert experts is not None
        if not is_joined:
            yield experts.down, source, bias
            return
        n = source.shape[0]
        if n % 2:
            info = self._sources.info(source)
            got, expected = f"{n} rows of gate and up", "an even number"
            what = f"shape of {info.name}"
            raise CheckpointError(what, where=info.file, got=got, expected=expected, action=FETCH_AGAIN)
        half, step = n // 2, 2 if experts.is_interleaved else 1
        for i, last in enumerate((experts.gate, experts.up)):
            begin = i if experts.is_interleaved else i * half
            yield last, source.part(begin, half, step), None if bias is None else bias.part(begin, half, step)

    def _is_input_major(self, source: Source, is_joined: bool) -> bool:
        """Decide by the sizes of config.json how an expert's part of a stacked tensor lies; else by the family."""
        experts, text = self.layout.experts, text_config(self.stored.config_raw)
        assert experts is not None
        if source.coding is not Coding.PLAIN:
            return False  # what is packed lies along K
        hidden, (rows, columns) = text.get("hidden_size"), source.shape[1:]
        if rows == columns or hidden not in (rows, columns):
            return experts.is_input_major
        is_output_first = columns == hidden if is_joined else rows == hidden
        return not is_output_first
