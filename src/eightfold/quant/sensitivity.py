"""What each group of linears costs with each type: KL divergence at the model's end, from one gradient a sample.

    KL  ~ 1/2 E (sum_t g_t . d_t)**2 / T          for one sample of T tokens; then over all samples
    g   = d (sum_t log p(l_t)) / d y              y: what the group puts out; l_t: drawn from the model's own p
    d   = quantized y - y                         of this group alone, smoothed as it would be stored

KL to second order is 1/2 d' F d with the Fisher matrix F = E g g' (labels drawn from the model make F what it is; real
ones would not). Scores of different positions are uncorrelated, so one pass backwards with a label at every position
has, squared, the sum over positions in the mean. Several draws (probes) of many short samples keep the scatter low.

Samples go through the layers once, float; then gradients come back layer by layer, with one layer in memory. Outputs of
linears are where change is measured, so a group is not passed through the rest of its layer.

Letters: T tokens, E hidden size, K inputs, N outputs, P probes, V vocabulary.

Source: the Gauss-Newton form of KL: Martens 2020, arXiv:1412.1193, sections 5 and 9; Fisher losses to choose types of
weights are in SqueezeLLM, Kim et al. 2023, arXiv:2306.07629.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.families import InputGroup, input_groups
from eightfold.model.reference.attention import soft_cap
from eightfold.model.reference.decoder import Batch, Block, GroupCall, in_parts
from eightfold.model.reference.linear import DynamicMode, FloatLinear
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32
from eightfold.quant.float_pass import LayerStatistics
from eightfold.quant.layer import QuantizedLayer
from eightfold.quant.recipe import Recipe
from eightfold.quant.statistics import unshared
from eightfold.scheme import QuantType, bias_name, weight_name

PROBES = 4

# Positions whose logits are held at a time.
_ROWS = 128


@dataclass
class CapturedGroup:
    """Float linears whose input and outputs are kept, so that gradients can be asked for."""

    weights: tuple[Tensor, ...]  # (N, K) float32
    biases: tuple[Tensor | None, ...]
    group: InputGroup
    input_TK: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()  # (T, N) each

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        pairs = zip(self.weights, self.biases, strict=True)
        # Not float_linear: what it calls has no gradient.
        self.input_TK, self.outputs = x_TK, tuple(torch.nn.functional.linear(x_TK, *pair) for pair in pairs)
        # What follows works in place.
        return in_parts(tuple(output.clone() for output in self.outputs), self.group.parts)


@dataclass
class QuantizedGroup:
    """One group as it would be stored: its outputs on the scale of the float model's."""

    call: GroupCall
    columns_K: Tensor | None  # what the input is divided by
    rows: tuple[Tensor | None, ...]  # what outputs were divided by

    def change(self, captured: CapturedGroup, batch: Batch) -> tuple[Tensor, ...]:
        """Return what quantizing changes of each output, (T, N)."""
        assert captured.input_TK is not None
        x_TK = captured.input_TK if self.columns_K is None else captured.input_TK / self.columns_K
        found = self.call(x_TK, batch)
        whole = [y_TN if rows is None else y_TN * rows for y_TN, rows in zip(found, self.rows, strict=True)]
        return tuple(y_TN - exact for y_TN, exact in zip(whole, captured.outputs, strict=True))


def captured_groups(decoder: Decoder, layer_idx: int) -> list[CapturedGroup]:
    """Return a layer's groups of linears, whose weights are held in float32."""
    checkpoint, prefix = decoder.checkpoint, decoder.checkpoint.config.names.layer(layer_idx)
    return [
        CapturedGroup(
            tuple(load_float32(checkpoint, weight_name(prefix + each.name)) for each in group.linears),
            tuple(
                load_float32(checkpoint, bias_name(prefix + each.name)) if each.has_bias else None
                for each in group.linears
            ),
            group,
        )
        for group in input_groups(checkpoint.config, layer_idx)
    ]


def quantized_groups(
    decoder: Decoder,
    layer_idx: int,
    recipe: Recipe,
    kind: QuantType,
    statistics: LayerStatistics,
    stored_dtype: torch.dtype,
    mode: DynamicMode,
) -> dict[str, QuantizedGroup]:
    """Return a layer's groups by title, all of them of one type."""
    config = decoder.checkpoint.config
    prefix, groups = config.names.layer(layer_idx), input_groups(config, layer_idx)
    types = {prefix + linear.name: kind for group in groups for linear in group.linears}
    layer = QuantizedLayer(
        decoder,
        layer_idx,
        recipe,
        types,
        False,
        statistics,
        lambda name: stored_dtype,
        in_order=unshared,
        chosen=slice(None),
        passes=False,
        dynamic=mode,
    )
    return {
        group.title: QuantizedGroup(layer.observed_group(group), *layer.smoothed.factors(group)) for group in groups
    }


def end_gradients(decoder: Decoder, states_TE: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    """Return d log p(labels) / d hidden states before the final norm, (P, T, E); labels are drawn from p.

    The gradient of a logit's log-likelihood is (one-hot label - p): what p brings is the same for all probes.
    """
    head = decoder.head()
    assert isinstance(head.linear, FloatLinear)
    weight_VE, found = head.linear.weight, torch.zeros(probes, *states_TE.shape)
    for at in range(0, len(states_TE), _ROWS):
        x = states_TE[at : at + _ROWS].detach().requires_grad_()
        with torch.enable_grad():
            normed = head.norm(x)
        raw = (normed.detach() @ weight_VE.T).requires_grad_()
        with torch.enable_grad():
            logits = soft_cap(raw * head.multiplier, head.softcap)
            (slope,) = torch.autograd.grad(logits.sum(), raw)  # of each logit by itself
        p = torch.softmax(logits.detach(), -1)
        labels_TP = torch.multinomial(p, probes, replacement=True, generator=generator)
        mean = (p * slope) @ weight_VE
        for probe in range(probes):
            label = labels_TP[:, probe]
            own = weight_VE[label] * slope.gather(1, label[:, None])
            (found[probe, at : at + _ROWS],) = torch.autograd.grad(normed, x, own - mean, retain_graph=True)
    return found


@dataclass
class LossSums:
    """Sums of squared first-order changes of the samples' log-likelihood, by group and type."""

    sums: dict[tuple[str, str], float]

    def add(self, key: tuple[str, str], gradients: Sequence[Tensor], changes: Sequence[Tensor], batch: Batch) -> None:
        """Take in one probe of a batch: gradients and changes of the outputs of each linear, (T, N) each."""
        pairs = zip(gradients, changes, strict=True)
        by_token_T = torch.stack([(gradient * change).sum(1) for gradient, change in pairs]).double().sum(0)
        by_sample = (float(by_token_T[begin:end].sum()) ** 2 for begin, end in batch.spans)
        self.sums[key] = self.sums.get(key, 0.0) + sum(by_sample)


def backward_through(
    layer: Block,
    captured: Sequence[CapturedGroup],
    quantized: Mapping[str, Mapping[str, QuantizedGroup]],
    states_TE: Tensor,
    batch: Batch,
    gradients_PTE: Tensor,
    sums: LossSums,
) -> Tensor:
    """Take gradients from a layer's output to its input, and add what each group's change would cost.

    Args:
        layer: float, made of `captured`.
        captured: its groups.
        quantized: by type, and then by title.
        states_TE: what enters the layer.
        batch: of the samples.
        gradients_PTE: at its output, of each probe.
        sums: where to add.

    Returns:
        The gradients at the layer's input, (P, T, E).
    """
    x_TE = states_TE.detach().requires_grad_()
    with torch.enable_grad():
        out_TE = layer(x_TE, batch)
    outputs = [output for group in captured for output in group.outputs]
    with torch.no_grad():
        changes = {
            (group.group.title, kind): groups[group.group.title].change(group, batch)
            for group in captured
            for kind, groups in quantized.items()
            if group.group.title in groups
        }
    found = torch.empty_like(gradients_PTE)
    for probe, gradient_TE in enumerate(gradients_PTE):
        is_last = probe == len(gradients_PTE) - 1
        found[probe], *own = torch.autograd.grad(out_TE, [x_TE, *outputs], gradient_TE, retain_graph=not is_last)
        at = 0
        for group in captured:
            of_group = own[at : at + len(group.outputs)]
            at += len(group.outputs)
            for (title, kind), change in changes.items():
                if title == group.group.title:
                    sums.add((title, kind), of_group, change, batch)
    return found
