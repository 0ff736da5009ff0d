"""Do estimated losses rank as measured ones? Quantizes one group at a time in the reference decoder.

    python benchmarks/sensitivity.py FLOAT_DIR FOLDER --layers 0,6,12 --out benchmarks/results/sensitivity-NAME.json

FOLDER keeps the search, which goes on there when it is stopped. A measurement: float hidden states up to a layer, that
layer with one group quantized, the float layers behind it, and the KL divergence of the logits on held-out samples.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from eightfold.cli.console import require_torch
from eightfold.families import input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import Journal
from eightfold.model.reference.decoder import Batch, GroupCall, in_parts
from eightfold.model.reference.load import Decoder
from eightfold.progress import bars
from eightfold.quant import dataset
from eightfold.quant.hidden import BackgroundSync
from eightfold.quant.recipe import with_defaults
from eightfold.quant.recipe_file import make_recipe
from eightfold.quant.search import Question, Search
from eightfold.quant.sensitivity import CapturedGroup, QuantizedGroup, captured_groups
from eightfold.quant.within import find_losses, held_out, question_of, restart, search_head
from eightfold.scheme import QuantType
from eightfold.tokenizer import Tokenizer

Key = tuple[int, str, str]


class OneQuantized:
    """A group of which the outputs are those of its quantized form."""

    def __init__(self, captured: CapturedGroup, quantized: QuantizedGroup) -> None:
        self._captured, self._quantized = captured, quantized

    def __call__(self, x_TK: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        self._captured(x_TK, batch)
        changes = self._quantized.change(self._captured, batch)
        pairs = zip(self._captured.outputs, changes, strict=True)
        return in_parts(tuple(y + change for y, change in pairs), self._captured.group.parts)


@torch.no_grad()
def measure(
    question: Question, folder: Path, journal: Journal, samples: list[list[int]], layers: set[int]
) -> dict[Key, float]:
    """Return the KL divergence of each group and type of some layers, in nats."""
    decoder, config = Decoder(question.checkpoint), question.checkpoint.config
    batch = Batch.of([len(sample) for sample in samples], decoder.turns())
    x = decoder.embed([token for sample in samples for token in sample])
    streams: dict[Key, Tensor] = {}
    with BackgroundSync() as sync:
        search = Search(question, folder, journal, sync)
        for layer_idx in range(config.num_layers):
            captured = captured_groups(decoder, layer_idx)
            layer, made = search.float_block(layer_idx, captured), {}
            for kind, groups in search.quantized(layer_idx).items() if layer_idx in layers else ():
                for at, group in enumerate(input_groups(config, layer_idx)):
                    calls: list[GroupCall] = list(captured)
                    calls[at] = OneQuantized(captured[at], groups[group.title])
                    made[layer_idx, group.title, kind] = search.float_block(layer_idx, calls)(x, batch)
            streams = {key: layer(states, batch) for key, states in streams.items()} | made
            x = layer(x, batch)
            print(f"layer {layer_idx}: {len(streams)} measurements under way", flush=True)
    head, sums = decoder.head(), dict.fromkeys(streams, 0.0)
    for at in range(0, len(x), 128):
        p = head(x[at : at + 128]).log_softmax(-1)
        for key, states in streams.items():
            q = head(states[at : at + 128]).log_softmax(-1)
            sums[key] += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return {key: total / len(x) for key, total in sums.items()}


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Return the correlation of ranks."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Search, measure and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--more", type=int, default=0, help="measure on so many rows behind, not on those held out")
    parser.add_argument("--tokens", type=int, default=48, help="of each held-out sample")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    checkpoint, tokenizer = Checkpoint.open(given.source), Tokenizer(given.source)
    rows, config = dataset.default_rows()[: given.rows + given.more], checkpoint.config
    samples = dataset.tokenize(
        rows, tokenizer, dataset.silent, where=None, vocab_size=config.vocab_size, context=config.context
    )
    rest, held = held_out(samples[: given.rows])
    held = samples[given.rows :] or held
    recipe = make_recipe(with_defaults({"scheme": QuantType.W8A8, "target": "cpu"}, has_texts=True))
    question, head = question_of(checkpoint, recipe, rest, None, bars), search_head(checkpoint, recipe, rest)
    given.folder.mkdir(exist_ok=True)
    with closing(Journal(given.folder)) as journal:
        if journal.head != head:
            restart(given.folder, journal, head)
        found = find_losses(question, given.folder, journal, head)
        layers = set(map(int, given.layers.split(",")))
        measured = measure(question, given.folder, journal, [sample[: given.tokens] for sample in held], layers)
    losses = {(each.layer, each.group, kind): loss for each in found.groups for kind, loss in each.loss.items()}
    kinds = {"all": list(measured)} | {
        kind.value: [key for key in measured if key[2] == kind.value] for kind in question.kinds[:-1]
    }
    result = {
        "model": given.source.name,
        "gradient_tokens": sum(map(len, question.pieces)),
        "measured_tokens": sum(len(sample[: given.tokens]) for sample in held),
        "spearman": {
            name: round(spearman([(losses[key], measured[key]) for key in keys]), 3) for name, keys in kinds.items()
        },
        "estimated": {name: float(f"{sum(losses[key] for key in keys):.4g}") for name, keys in kinds.items()},
        "measured": {name: float(f"{sum(measured[key] for key in keys):.4g}") for name, keys in kinds.items()},
        "groups": [[*key, float(f"{losses[key]:.3g}"), float(f"{measured[key]:.3g}")] for key in measured],
    }
    given.out.write_text(json.dumps(result) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "groups"}, indent=1))


if __name__ == "__main__":
    require_torch("benchmarks/sensitivity.py")
    torch.set_num_threads(1)
    main()
