"""The reference backend for many requests: each layer is built once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eightfold.format.checkpoint import Checkpoint
from eightfold.reference.decoder import Block, GroupCall, Norm
from eightfold.reference.kvcache import Attention
from eightfold.reference.load import Decoder, Head


@dataclass(frozen=True)
class LoadedDecoder(Decoder):
    """A decoder that builds each layer once."""

    _blocks: dict[int, Block] = field(default_factory=dict, compare=False)
    _heads: list[Head] = field(default_factory=list, compare=False)

    def block(
        self,
        layer_idx: int,
        groups: Sequence[GroupCall] | None = None,
        attention: Attention | None = None,
        norms: Mapping[str, Norm] | None = None,
    ) -> Block:
        """Return a layer as the checkpoint stores it, or build one with other parts."""
        if groups or attention or norms:
            return super().block(layer_idx, groups, attention, norms)
        if layer_idx not in self._blocks:
            self._blocks[layer_idx] = super().block(layer_idx)
        return self._blocks[layer_idx]

    def head(self) -> Head:
        """Return the final norm and the output head."""
        if not self._heads:
            self._heads.append(super().head())
        return self._heads[0]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LoadedDecoder:
        """Load a whole model, to compute as MindIE on an NPU."""
        decoder = cls(checkpoint, dynamic="symmetric", attention="mindie")
        for layer_idx in range(checkpoint.config.num_layers):
            decoder.block(layer_idx)
        decoder.head()
        return decoder
