"""A mixture of experts in place of a layer's MLP.

    p = softmax(x W_r)                     over all experts, W_r is the router
    S = the k largest of p                 of equal ones, those with the lowest index
    w = p_S                                divided by their sum, in families that normalize
    y = sum_{e in S} w_e MLP_e(x)          in the order of e
      + sigmoid(x w_g) MLP_shared(x)       where there is an expert that all tokens pass through

Letters: T tokens, E hidden size, N experts, J experts of a token.

Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1 and 3, without noise; order and normalization as transformers has
them for Qwen2-MoE, Qwen3-MoE and Mixtral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.model.reference.decoder import MLP, Batch
from eightfold.model.reference.linear import Linear


@dataclass(frozen=True)
class Router:
    """Chooses the experts of each token."""

    linear: Linear  # E to N
    per_token: int  # J
    normalizes: bool

    def __call__(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights, (T, J) float32 and never rising, and the experts that they belong to, (T, J) int64."""
        likelihood_TN = torch.softmax(self.linear(x_TE), -1)
        chosen_TJ = self.choose(likelihood_TN)
        weights_TJ = likelihood_TN.gather(-1, chosen_TJ)
        return (weights_TJ / weights_TJ.sum(-1, keepdim=True) if self.normalizes else weights_TJ), chosen_TJ

    def choose(self, likelihood_TN: Tensor) -> Tensor:
        """Return the likeliest experts, (T, J) int64."""
        # Stable, unlike topk: the result must not depend on what else is in a batch.
        return likelihood_TN.argsort(dim=-1, descending=True, stable=True)[:, : self.per_token]


@dataclass(frozen=True)
class SharedExpert:
    """The expert that all tokens pass through."""

    mlp: MLP
    gate: Linear  # E to 1

    def __call__(self, x_TE: Tensor, batch: Batch) -> Tensor:
        return torch.sigmoid(self.gate(x_TE)) * self.mlp(x_TE, batch)


@dataclass(frozen=True)
class SparseMLP:
    """The experts of a layer; each is called once, with the tokens that chose it."""

    router: Router
    experts: Sequence[MLP]
    shared: SharedExpert | None = None

    def __call__(self, x_TE: Tensor, batch: Batch) -> Tensor:
        weights_TJ, chosen_TJ = self.router(x_TE)
        y_TE = torch.zeros_like(x_TE)
        for index in sorted({*chosen_TJ.flatten().tolist()}):
            rows, places = (chosen_TJ == index).nonzero(as_tuple=True)
            y_RE = self.experts[index](x_TE[rows], batch.pick(rows))
            y_TE.index_add_(0, rows, y_RE.mul_(weights_TJ[rows, places, None]))
        return y_TE if self.shared is None else y_TE.add_(self.shared(x_TE, batch))
