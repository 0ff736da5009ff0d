"""Analyses to draw: of SmolLM2's shape, without its weights."""

from __future__ import annotations

import math
import random

from eightfold.quant.analysis import Analysis, Choice, GroupLoss, InputRange

HIDDEN, WIDE, KV = 576, 1536, 192
GROUPS = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), HIDDEN * (HIDDEN + 2 * KV), 8.0, 0.0004),
    "o": (("self_attn.o_proj",), HIDDEN * HIDDEN, 2.0, 0.0006),
    "gate_up": (("mlp.gate_proj", "mlp.up_proj"), 2 * HIDDEN * WIDE, 9.0, 0.0005),
    "down": (("mlp.down_proj",), HIDDEN * WIDE, 1.3, 0.006),
}
FACTORS = {"W8A8": 1.0, "W8A8_DYNAMIC": 0.05, "W8A16": 0.006, "FLOAT": 0.0}
WHY = {
    "W8A8": "loses less than a byte of the others is worth",
    "FLOAT": "products have tails that 256 levels cannot hold",
    "W8A16": "a sink token reaches 3,512",
}


def small_model(model: str = "SmolLM2-135M-Instruct", layers: int = 30, *, is_chosen: bool = True) -> Analysis:
    """Return an analysis with a sink token in down_proj of layer 11."""
    groups, ranges, choices = [], [], []
    draw = random.Random(8)
    for layer in range(layers):
        for title, (names, weights, usual, loss) in GROUPS.items():
            linears = tuple(f"model.layers.{layer}.{name}" for name in names)
            sink = title == "down" and layer == min(11, layers - 1)
            level = loss * math.exp(draw.gauss(0, 0.5)) * (70 if sink else 1 + 3 * (layer > layers - 3))
            nbytes = {
                kind: weights * (2 if kind == "FLOAT" else 1) + 8 * HIDDEN * (kind != "FLOAT") for kind in FACTORS
            }
            losses = {kind: level * share * draw.uniform(0.7, 1.4) for kind, share in FACTORS.items()}
            groups.append(GroupLoss(layer, title, linears, nbytes, losses))
            ordinary = usual * math.exp(draw.gauss(0, 0.25)) * (1 + layer / layers)
            most = 3512.0 if sink else ordinary * draw.uniform(1.02, 3.0)
            channels = ((1149, most), (37, most / 2.8), (903, ordinary))
            tokens = ((0, 0, "<|im_start|>", most), (14, 61, "\n", ordinary * 1.01), (3, 5, " the", ordinary))
            ranges.append(InputRange(layer, title, -0.6 * most, most, ordinary, channels, tokens))
            kind = "W8A16" if sink else "FLOAT" if title == "down" and draw.random() < 0.8 else "W8A8"
            choices += [Choice(linear, kind, WHY[kind]) for linear in linears]
    choices.append(Choice("lm_head", "FLOAT", "the head stays float unless --quantize-lm-head is given"))
    return Analysis(
        model=model,
        scheme="W8A8",
        target="vllm-ascend",
        samples=64,
        tokens=18_734,
        float_bytes=269_030_016,
        out_bytes=221_874_912 if is_chosen else None,
        groups=tuple(groups),
        ranges=tuple(ranges),
        choices=tuple(choices) if is_chosen else (),
        kl=0.00632 if is_chosen else None,
        top1=0.954 if is_chosen else None,
        held_out_tokens=8_176 if is_chosen else None,
    )
