"""A float model with its residual stream and its values rotated: the same logits, and no channel that stands out.

    Q: (E, E), of the residual stream; R: (D, D), of each value head; both orthogonal (orthogonal.py)

    embedding                   rows e            e Q
    q, k, v, gate, up           W                 W diag(g) Q         g: gain of the norm before them, which becomes 1
    o, down, and their biases   W, b              Q^T W, Q^T b
    head                        W                 W diag(g) Q         a tensor of its own, also in a tied model
    v, and its bias             rows of a head    R^T (those rows)
    o                           columns of one    (those columns) R

RMS norm divides by a length, which Q leaves as it is, so norm(x Q) = norm(x) Q. Attention mixes tokens and leaves
channels apart, so what R does to values it does to attention's output; query heads that share a value head share its R.
Queries and keys are not rotated: RoPE and their norms are for channels as they are.

The rotated tensors are float32, made when they are asked for, from the source's; those of a layer stay until it is
released. They are rounded once, when they are stored, or quantized.

Letters: E hidden size, G key/value heads, D head_dim, N outputs, K inputs.

Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4, without what has to be rotated online.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.families import DOWN, dense_groups, layer_of, smooth_pairs
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.layers import read_norm
from eightfold.model.reference.linear import row_pieces
from eightfold.model.reference.tensors import as_tensor, load_float32, picked_rows, require_finite
from eightfold.quant.orthogonal import Orthogonal, random_orthogonal
from eightfold.quant.recipe import Recipe
from eightfold.scheme import weight_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STREAM_SEED, _VALUE_SEED = 0, 1  # fixed: the same model becomes the same bytes


def rotated(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Return the float model that a recipe quantizes."""
    return RotatedCheckpoint(checkpoint) if recipe.rotates else checkpoint


@dataclass(frozen=True)
class _Change:
    """What becomes of a linear's weight, and of its bias, if they are rotated at all."""

    gain: str = ""  # the norm whose gain its columns take
    columns: Orthogonal | None = None
    rows: Orthogonal | None = None  # its transpose
    values: tuple[int, ...] = ()  # rows that are rotated by heads


class RotatedCheckpoint(Checkpoint):
    """A float model whose tensors are those of another one, rotated; see above.

    Entries of `tensors` have the dtype of the source, in which they are going to be stored; arrays of rotated ones are
    float32.
    """

    def __init__(self, source: Checkpoint) -> None:
        """Rotate a model that plan.require_rotatable() lets pass."""
        names, used = source.config.names, source.head_weight()
        head = weight_name(names.head)
        tensors = {**source.tensors, head: replace(source.tensors[used], name=head)}
        super().__init__(source.directory, {**source.config_raw, "tie_word_embeddings": False}, tensors, None)
        self.notes = source.notes
        self._source, self._sources = source, {head: used}
        self._made: dict[str, NDArray[Any]] = {}
        self._values = random_orthogonal(self.config.head_dim, _VALUE_SEED)
        stream = random_orthogonal(self.config.hidden_size, _STREAM_SEED)
        self._ends = {
            weight_name(names.embedding): _Change(columns=stream),
            head: _Change(gain=names.final_norm, columns=stream),
        }
        self._norms = {names.before_attention, names.before_ffn}
        self._changes = _changes(self.config, stream, self._values)

    def array(self, name: str) -> NDArray[Any]:
        if name in self._ends:
            return self.pick(name, slice(None))
        if name not in self._made:
            made = self._make(name)
            if made is None:
                return self._source.array(name)
            self._made[name] = made.cpu().numpy()
        return self._made[name]

    def pick(self, name: str, rows: slice | Iterable[int]) -> NDArray[Any]:
        if name not in self._ends:
            return super().pick(name, rows)
        stored = self._sources.get(name, name)
        picked = picked_rows(self._source, stored, rows).to(torch.get_default_device()).to(torch.float32, copy=True)
        if not torch.isfinite(picked.sum()):
            require_finite(as_tensor(self._source.array(stored)), stored, self._source)
        return self._columns(picked, self._ends[name]).cpu().numpy()

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self._made.pop(name, None)
            self.release_part(name, 0, self.tensors[name].nbytes)

    def release_part(self, name: str, begin: int, end: int) -> None:
        self._source.release_part(self._sources.get(name, name), begin, end)

    def _make(self, name: str) -> Tensor | None:
        """Return a rotated tensor of a layer, or the gain of a norm; None for what stays as it is."""
        prefix = "" if layer_of(name) is None else self.config.names.layer(layer_of(name) or 0)
        module, _, suffix = name.removeprefix(prefix).rpartition(".")
        if module in self._norms or module == self.config.names.final_norm:
            return torch.ones(self.config.hidden_size) - self.config.norm_offset
        change = self._changes.get(module)
        if change is None or (suffix == "bias" and change.rows is None and not change.values):
            return None
        made = load_float32(self._source, name)
        if suffix == "weight":
            made = self._columns(made, replace(change, gain=change.gain and prefix + change.gain))
        if change.rows is not None:
            made = change.rows.rows(made)
        if change.values:
            heads_GDK = made[list(change.values)].view(self.config.num_kv_heads, self.config.head_dim, -1)
            turned = self._values.columns(heads_GDK.transpose(1, 2)).transpose(1, 2)
            made[list(change.values)] = turned.reshape(len(change.values), *made.shape[1:])
        return made

    def _columns(self, weight_NK: Tensor, change: _Change) -> Tensor:
        """Return W diag(g) Q. Modifies `weight_NK`."""
        if change.gain:
            weight_NK.mul_(as_tensor(read_norm(self._source, change.gain).gain))
        if change.columns is not None:
            for rows in row_pieces(weight_NK):
                weight_NK[rows] = change.columns.columns(weight_NK[rows])
        return weight_NK


def _changes(config: ModelConfig, stream: Orthogonal, values: Orthogonal) -> dict[str, _Change]:
    """Return what becomes of each linear of a layer, by its name inside it."""
    gains = {pair.group: pair.source for pair in smooth_pairs(config) if pair.source_is_norm}
    found: dict[str, _Change] = {}
    for group in dense_groups(config):
        for linear in group.linears:
            if group.title in gains:
                found[linear.name] = _Change(gains[group.title], columns=stream)
            else:
                found[linear.name] = _Change(columns=None if group.title == DOWN else values, rows=stream)
    (pair,) = (pair for pair in smooth_pairs(config) if pair.group == "o")
    (source,) = (linear for linear in dense_groups(config)[0].linears if linear.name == pair.source)
    rows = source.parts[pair.part].indices() if source.parts else range(source.n)
    found[pair.source] = replace(found[pair.source], values=tuple(rows))
    return found
