"""The experts of a layer while samples pass: each in memory only while it is called, and who has chosen it.

Outlier suppression stops before experts, as msModelSlim's does: their router reads the same norm, and rounding would
decide between experts of nearly equal weight. For that reason too, a proof that two models are equal goes by the
experts that one of them has chosen; with others, equal models differ.

Letters: T tokens, E hidden size, N experts, J experts of a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.families import ExpertShapes, LinearShape, expert_block
from eightfold.machine import return_freed
from eightfold.model.reference.decoder import MLP, Batch, GatedMLP, LinearGroup
from eightfold.model.reference.experts import Router, SharedExpert, SparseMLP
from eightfold.model.reference.linear import Linear
from eightfold.model.reference.load import Decoder
from eightfold.scheme import weight_name

# Each expert has another number of tokens. Their temporary values leave holes in the heap: of one layer of 128 experts
# a gigabyte, unless it is given back after so many calls.
_CALLS = 8


class RouterWatch:
    """What routers have chosen for the tokens of some samples.

    Attributes:
        tokens_N: how many tokens each expert had, int64.
        first_TJ: the choices for the first tokens that came together; None before them.
    """

    def __init__(self, experts: int) -> None:
        self.tokens_N = torch.zeros(experts, dtype=torch.int64)
        self.first_TJ: Tensor | None = None

    def update(self, chosen_TJ: Tensor) -> None:
        """Take in more choices."""
        self.tokens_N += torch.bincount(chosen_TJ.flatten(), minlength=len(self.tokens_N))
        if self.first_TJ is None:
            self.first_TJ = chosen_TJ.clone()


@dataclass(frozen=True)
class WatchedRouter(Router):
    """A router whose choices somebody sees."""

    watch: RouterWatch

    def choose(self, likelihood_TN: Tensor) -> Tensor:
        chosen_TJ = super().choose(likelihood_TN)
        self.watch.update(chosen_TJ)
        return chosen_TJ


@dataclass(frozen=True)
class FixedRouter(Router):
    """A router whose choices are made."""

    chosen_TJ: Tensor

    def choose(self, likelihood_TN: Tensor) -> Tensor:
        return self.chosen_TJ


def passing_experts(
    decoder: Decoder,
    layer_idx: int,
    member: Callable[[LinearShape], Linear],
    *,
    watch: RouterWatch | None = None,
    chosen_TJ: Tensor | None = None,
) -> MLP | None:
    """Return a layer's experts, which let go of what they have read of the source after each call.

    Args:
        decoder: the float model.
        layer_idx: which; of a layer without experts, None is returned.
        member: makes a linear of an expert. It is called for each batch anew.
        watch: sees what the router chooses.
        chosen_TJ: what it chooses, instead.
    """
    checkpoint, prefix = decoder.checkpoint, decoder.checkpoint.config.names.layer(layer_idx)
    block, sizes = expert_block(checkpoint.config, layer_idx), checkpoint.config.experts
    if block is None or sizes is None:
        return None

    calls = itertools.count(1)

    def expert(shapes: ExpertShapes) -> MLP:
        def call(x_TE: Tensor, batch: Batch) -> Tensor:
            gate, up, down = map(member, shapes)
            y_TE = GatedMLP(LinearGroup((gate, up)), LinearGroup((down,)))(x_TE, batch)
            checkpoint.release(weight_name(prefix + shape.name) for shape in shapes)
            if next(calls) % _CALLS == 0:
                return_freed()
            return y_TE

        return call

    router = Router(decoder.linear(prefix, block.router), sizes.per_token, sizes.normalizes)
    if watch is not None:
        router = WatchedRouter(**vars(router), watch=watch)
    elif chosen_TJ is not None:
        router = FixedRouter(**vars(router), chosen_TJ=chosen_TJ)
    shared = None
    if block.shared is not None and block.shared_gate is not None:
        shared = SharedExpert(expert(block.shared), decoder.linear(prefix, block.shared_gate))
    return SparseMLP(router, [expert(shapes) for shapes in block.experts], shared)
