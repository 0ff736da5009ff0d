"""How long a quantization with calibration takes, beside the float passes through the model that it stands for.

    python benchmarks/float_passes.py FLOAT_DIR WORK_DIR --calib-ids FILE [--rounds 2] -- OPTIONS

OPTIONS are quantize's. The samples are token ids, since the tokenizer of a synthetic model makes a token of each byte.

A float pass here is all samples through all layers in float32 and nothing else: each layer's weights are widened once,
hidden states stay in memory, nothing is watched, rounded or written. A plain tool makes two: one to find outliers, and
one to calibrate. The passes and the quantizer take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eightfold.architectures import Names
from eightfold.families import input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch, LinearGroup
from eightfold.model.reference.linear import FloatLinear
from eightfold.model.reference.load import Decoder
from eightfold.quant import dataset
from eightfold.quant.hidden import sample_batches
from measure import save_results
from scale import quantize


def float_pass(checkpoint: Checkpoint, samples: list[list[int]]) -> float:
    """Run the samples through all layers; return the seconds."""
    decoder = Decoder(checkpoint)
    batches = [[samples[index] for index in batch] for batch in sample_batches([len(sample) for sample in samples])]
    began = time.perf_counter()
    with torch.inference_mode():
        states = [decoder.embed([token for sample in batch for token in sample]) for batch in batches]
        layouts = [Batch.of([len(sample) for sample in batch], decoder.turns()) for batch in batches]
        for layer_idx in range(checkpoint.config.num_layers):
            block = decoder.block(layer_idx, groups=_widened(decoder, layer_idx))
            states = [block(state, layout) for state, layout in zip(states, layouts, strict=True)]
            decoder.release_block(layer_idx)
    return time.perf_counter() - began


def _widened(decoder: Decoder, layer_idx: int) -> list[LinearGroup]:
    """Return a layer's linears with float32 weights."""
    found = []
    for group in input_groups(decoder.checkpoint.config, layer_idx):
        linears = [decoder.linear(Names().layer(layer_idx), linear) for linear in group.linears]
        assert all(isinstance(linear, FloatLinear) for linear in linears)
        found.append(LinearGroup(tuple(replace(linear, weight=linear.weight.float()) for linear in linears)))
    return found


def main() -> None:
    """Take turns, and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calib-ids", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    words.work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(words.source)
    context = checkpoint.config.max_position_embeddings
    samples, _ = dataset.truncate(dataset.read_token_ids(words.calib_ids, None, checkpoint.config.vocab_size), context)
    row: dict[str, Any] = {"model": words.source.name, "layers": checkpoint.config.num_layers}
    row |= {"tokens": sum(map(len, samples)), "options": " ".join(options), "float_pass_s": [], "quantize_s": []}
    for _ in range(words.rounds):
        row["float_pass_s"].append(round(float_pass(checkpoint, samples), 1))
        document = quantize(words.source, words.work, ["--calib-ids", str(words.calib_ids), *options])
        row["quantize_s"].append(document["seconds"])
        row["peak_rss_mib"] = document["peak_rss_mib"]
    ratios = [whole / (2 * one) for whole, one in zip(row["quantize_s"], row["float_pass_s"], strict=True)]
    row["of_two_float_passes"] = [round(ratio, 2) for ratio in ratios]
    print(json.dumps(row), f"median {statistics.median(ratios):.2f}", flush=True)
    save_results(f"float-passes-{words.source.name}", [row])


if __name__ == "__main__":
    main()
