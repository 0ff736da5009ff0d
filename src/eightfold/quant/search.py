"""The passes that find what each group loses with each type, one layer in memory at a time, resumable.

    forward 0 .. L-1     calibration samples -> statistics for smoothing and ranges;  some of them, cut -> float states
    ends                 gradients at the model's end
    backward L-1 .. 0    gradients through a layer; losses of its groups and ranges of their inputs

Everything lies in a folder beside OUT with a journal as quantize has it: each finished step is a line. The float states
of all layers stay on disk until the end: 4 T E L bytes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eightfold.families import input_groups, sliding_window
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import Journal
from eightfold.format.safetensors import checksum_of_file
from eightfold.model.reference.attention import FloatAttention
from eightfold.model.reference.decoder import Block, GroupCall
from eightfold.model.reference.linear import DynamicMode
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import TORCH_DTYPES
from eightfold.progress import Progress
from eightfold.quant.analysis import GroupLoss, InputRange, read_range
from eightfold.quant.choice import types_for
from eightfold.quant.float_pass import FloatPass, LayerStatistics
from eightfold.quant.hidden import BackgroundSync, HiddenStates
from eightfold.quant.plan import OutputPlan, assign_types
from eightfold.quant.recipe import Recipe, Samples, Target
from eightfold.quant.sensitivity import (
    PROBES,
    CapturedGroup,
    LossSums,
    QuantizedGroup,
    backward_through,
    captured_groups,
    end_gradients,
    quantized_groups,
)
from eightfold.quant.smooth import SMOOTHED
from eightfold.quant.statistics import loud_tokens
from eightfold.scheme import QuantType

# Gradients are taken of the beginnings of samples: many short ones tell more than a few long ones.
CUT, MOST_TOKENS = 64, 2048

# So many channels and tokens with the largest inputs are told of each group.
_CHANNELS, _TOKENS = 5, 5

_FLOAT = QuantType.FLOAT.value


@dataclass(frozen=True)
class Question:
    """What is asked about a model.

    Attributes:
        checkpoint: the float model.
        recipe: which scheme, target and smoothing.
        samples: for statistics; the beginnings of some of them for gradients.
        spills: whether hidden states live in files.
        progress: who is told.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    samples: Samples
    spills: bool
    progress: Progress

    @property
    def kinds(self) -> tuple[QuantType, ...]:
        """The types that a group may get, FLOAT last."""
        return types_for(self.recipe)

    @property
    def mode(self) -> DynamicMode:
        """How the target quantizes a token."""
        return "asymmetric" if self.recipe.target is Target.CPU else "symmetric"

    @property
    def pieces(self) -> list[Sequence[int]]:
        """The samples of which gradients are taken."""
        pieces = [sample[:CUT] for sample in self.samples]
        count = max(1, min(len(pieces), MOST_TOKENS // max(map(len, pieces))))
        return [pieces[at * len(pieces) // count] for at in range(count)]


@dataclass(frozen=True)
class Findings:
    """What was found."""

    groups: tuple[GroupLoss, ...]
    ranges: tuple[InputRange, ...]


class Damaged(Exception):
    """What an earlier run has left is not what its journal says."""


class Search:
    """The passes of one question."""

    def __init__(self, question: Question, folder: Path, journal: Journal, sync: BackgroundSync) -> None:
        """Begin, or go on with what an earlier run has left in the folder.

        Raises:
            Damaged: that is not what it should be.
        """
        self._question, self._folder, self._journal, self._sync = question, folder, journal, sync
        self._config, self._recipe = question.checkpoint.config, question.recipe
        self._layers = self._config.num_layers
        self._decoder = Decoder(question.checkpoint)
        types = dict.fromkeys(assign_types(self._config, self._recipe), self._recipe.scheme)
        self._watched: HiddenStates | None = None
        if self._recipe.anti_outlier is not None:
            self._watched = HiddenStates(
                "watched", self._decoder, question.samples, folder, sync, spills=question.spills
            )
            self._pass = FloatPass(self._decoder, self._recipe, types, self._watched, other_kinds=self._smoothed_kinds)
        self._states = HiddenStates(
            "states", self._decoder, question.pieces, folder, sync, spills=True, generations=self._layers + 1
        )
        self._resume()

    @property
    def _streams(self) -> list[HiddenStates]:
        return [self._states] if self._watched is None else [self._states, self._watched]

    def _resume(self) -> None:
        """Check what an earlier run has left."""
        steps = self._journal.steps
        last = [entry for entry in steps.values() if "gradients" in entry][-1:]
        for entry in steps.values():
            for name, checksum in entry.get("files", {}).items():
                is_replaced = "gradients" in entry and entry not in last
                if not is_replaced and _checksum(self._folder / name) != checksum:
                    raise Damaged(name)
        forward = [entry for name, entry in steps.items() if name.startswith("forward")]
        if not forward:
            return
        for stream in self._streams:
            if len(forward) < self._layers and not stream.resume(*forward[-1]["states"][stream.name]):
                raise Damaged(stream.name)

    def find(self) -> Findings:
        """Take the passes that are not taken yet."""
        progress = self._question.progress
        with progress("sensitivity", 2 * self._layers + 1, "step") as task:
            for layer_idx in range(self._layers):
                task.at(f"forward, layer {layer_idx}")
                self._step(f"forward {layer_idx}", lambda layer_idx=layer_idx: self._forward(layer_idx))
                task.advance()
            task.at("head")
            self._step("ends", self._ends)
            task.advance()
            for layer_idx in reversed(range(self._layers)):
                task.at(f"backward, layer {layer_idx}")
                self._step(f"backward {layer_idx}", lambda layer_idx=layer_idx: self._backward(layer_idx))
                task.advance()
        return self._findings()

    def _step(self, name: str, take: Any) -> None:
        if name not in self._journal.steps:
            self._journal.append({"step": name, **take()})

    @torch.inference_mode()
    def _forward(self, layer_idx: int) -> dict[str, Any]:
        files: dict[str, int] = {}
        if self._watched is not None:
            found = self._pass.layer(layer_idx)
            for kind in self._smoothed_kinds:
                scaled = replace(found, scales=self._pass.scales(layer_idx, kind))
                path = self._statistics_path(layer_idx, kind)
                files[path.name] = scaled.save(path)
        self._states.advance(self.float_block(layer_idx, captured_groups(self._decoder, layer_idx)))
        self._decoder.release_block(layer_idx)
        self._sync.wait()
        for stream in self._streams:
            stream.finish()
        return {"files": files, "states": {each.name: [each.layer_idx, each.checksum] for each in self._streams}}

    @property
    def _smoothed_kinds(self) -> list[QuantType]:
        return [kind for kind in self._question.kinds if kind in SMOOTHED]

    def _statistics_path(self, layer_idx: int, kind: QuantType) -> Path:
        return self._folder / f"statistics-{layer_idx:05d}-{kind.value}"

    def float_block(self, layer_idx: int, groups: Sequence[GroupCall]) -> Block:
        """Return a layer of these groups and float attention."""
        calls: list[GroupCall] = list(groups)
        attention = FloatAttention(sliding_window(self._config, layer_idx), self._decoder.scoring)
        return self._decoder.block(layer_idx, calls, attention)

    def _ends(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        parts = self._states.batches(self._layers)
        found = (end_gradients(self._decoder, states, PROBES, generator) for _, _, states in parts)
        return self._keep_gradients(self._layers, found)

    def _keep_gradients(self, layer_idx: int, parts: Iterator[Tensor]) -> dict[str, Any]:
        """Write the gradients at a layer's input, (P, T, E) of each batch; two files take turns."""
        path, checksum = self._folder / f"gradients-{layer_idx % 2}", 0
        with path.open("wb") as file:
            for part in parts:
                data = part.contiguous().numpy().data.cast("B")
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return {"gradients": path.name, "files": {path.name: checksum}}

    def _backward(self, layer_idx: int) -> dict[str, Any]:
        captured = captured_groups(self._decoder, layer_idx)
        layer, quantized = self.float_block(layer_idx, captured), self.quantized(layer_idx)
        sums, watch, width = LossSums({}), _RangeWatch(layer_idx), self._config.hidden_size

        def parts() -> Iterator[Tensor]:
            with (self._folder / f"gradients-{(layer_idx + 1) % 2}").open("rb") as file:
                for tokens, batch, states in self._states.batches(layer_idx):
                    count = PROBES * len(states) * width
                    gradients = torch.from_numpy(np.fromfile(file, np.float32, count)).view(PROBES, -1, width)
                    yield backward_through(layer, captured, quantized, states, batch, gradients, sums)
                    watch.update(captured, tokens.start)

        entry = self._keep_gradients(layer_idx, parts())
        self._decoder.release_block(layer_idx)
        total = sum(self._states.lengths)
        losses = {f"{title} {kind}": value / (2 * PROBES * total) for (title, kind), value in sums.sums.items()}
        ranges = watch.found(self._states.lengths, self._question.pieces)
        return {**entry, "layer": layer_idx, "losses": losses, "ranges": ranges}

    def quantized(self, layer_idx: int) -> dict[str, dict[str, QuantizedGroup]]:
        """Return the groups of a layer by type and title."""
        dtype = TORCH_DTYPES[self._question.checkpoint.dtype]
        found = {}
        with torch.no_grad():
            for kind in self._question.kinds[:-1]:
                known = kind in self._smoothed_kinds and self._watched is not None
                path = self._statistics_path(layer_idx, kind)
                statistics = LayerStatistics.load(path) if known else LayerStatistics()
                recipe = self._recipe if known else replace(self._recipe, scheme=kind, target=None, anti_outlier=None)
                found[kind.value] = quantized_groups(
                    self._decoder, layer_idx, recipe, kind, statistics, dtype, self._question.mode
                )
        return found

    def _findings(self) -> Findings:
        sizes, kept = self._sizes(), self._kept()
        groups, ranges = [], []
        for layer_idx in range(self._layers):
            entry = self._journal.steps[f"backward {layer_idx}"]
            prefix = self._config.names.layer(layer_idx)
            ranges += entry["ranges"]
            for group in input_groups(self._config, layer_idx):
                linears = tuple(prefix + linear.name for linear in group.linears)
                is_kept = any(name in kept for name in linears)
                kinds = [_FLOAT] if is_kept else [kind.value for kind in self._question.kinds]
                loss = {kind: entry["losses"].get(f"{group.title} {kind}", 0.0) for kind in kinds}
                nbytes = {kind: sum(sizes[kind][name] for name in linears) for kind in kinds}
                groups.append(GroupLoss(layer_idx, group.title, linears, nbytes, loss))
        return Findings(tuple(groups), tuple(map(read_range, ranges)))

    def _kept(self) -> set[str]:
        """Return the linears that the user keeps float."""
        types = assign_types(self._config, replace(self._recipe, target=None))
        return {name for name, kind in types.items() if kind is QuantType.FLOAT}

    def _sizes(self) -> dict[str, dict[str, int]]:
        """Return what each linear takes on disk, by type and name."""
        checkpoint, found = self._question.checkpoint, {}
        for kind in self._question.kinds:
            types = dict.fromkeys(assign_types(self._config, self._recipe), kind)
            plan = OutputPlan(checkpoint, replace(self._recipe, anti_outlier=None), types, ())
            sizes: dict[str, int] = dict.fromkeys(types, 0)
            for name, tensor in plan.tensors.items():
                module = name.rpartition(".")[0]
                if module in sizes:
                    sizes[module] += tensor.planned.nbytes
            found[kind.value] = sizes
        return found


def _checksum(path: Path) -> int | None:
    try:
        return checksum_of_file(path)
    except OSError:
        return None


class _RangeWatch:
    """The inputs of a layer's groups, of all samples."""

    def __init__(self, layer_idx: int) -> None:
        self._layer_idx = layer_idx
        self._ends: dict[str, Tensor] = {}  # (2, K): smallest and largest of each channel
        self._tokens: dict[str, list[Tensor]] = {}  # largest |x| of each token

    def update(self, captured: Sequence[CapturedGroup], first_token: int) -> None:
        """Take in what the groups have read last."""
        for group in captured:
            assert group.input_TK is not None
            x_TK, title = group.input_TK.detach(), group.group.title
            ends = torch.stack([x_TK.amin(0), x_TK.amax(0)])
            old = self._ends.get(title, ends)
            self._ends[title] = torch.stack([torch.minimum(old[0], ends[0]), torch.maximum(old[1], ends[1])])
            self._tokens.setdefault(title, []).append(torch.maximum(-x_TK.amin(1), x_TK.amax(1)))

    def found(self, lengths: Sequence[int], samples: Samples) -> list[dict[str, Any]]:
        """Return an InputRange of each group as plain values."""
        places = [(sample, at) for sample, length in enumerate(lengths) for at in range(length)]
        found = []
        for title, (lo_K, hi_K) in self._ends.items():
            largest_K, by_token_T = torch.maximum(-lo_K, hi_K), torch.cat(self._tokens[title])
            channels = torch.topk(largest_K, min(_CHANNELS, len(largest_K)))
            tokens = torch.topk(by_token_T, min(_TOKENS, len(by_token_T)))
            ordinary = by_token_T.sort(descending=True).values[min(loud_tokens(lengths), len(by_token_T) - 1)]
            found.append(
                {
                    "layer": self._layer_idx,
                    "group": title,
                    "lo": float(lo_K.min()),
                    "hi": float(hi_K.max()),
                    "ordinary": float(ordinary),
                    "channels": [[int(i), float(v)] for v, i in zip(*channels, strict=True)],
                    "tokens": [
                        [*places[int(i)], str(samples[places[int(i)][0]][places[int(i)][1]]), float(v)]
                        for v, i in zip(*tokens, strict=True)
                    ],
                }
            )
        return found
