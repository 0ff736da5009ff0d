"""What each scheme costs: KL to the float model, top-1 agreement, perplexity and bytes, over one text.

    python benchmarks/accuracy.py FLOAT_DIR --text wikitext2-test.txt [--name SmolLM2-135M] [--chunks N] [--only w8a8]

Each row is a directory that `eightfold quantize FLOAT_DIR OUT` makes with the options of the row and the texts of the
package. All models see a chunk one after the other, so that the float model's distribution is computed once. Rows are
added to benchmarks/results/accuracy.json, where they replace those of the same model, row and number of chunks;
`make readme` writes them into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eightfold.evaluate import cut_chunks, read_evaluation_text
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.tokenizer import Tokenizer
from measure import RESULTS, eightfold, save_results

CHUNK_LEN, STEP = 512, 128

# Row -> options of quantize, and how a token is quantized by w8a8-dynamic when it is measured.
SCHEMES: dict[str, tuple[str, ...]] = {
    "w8a8": ("--scheme", "w8a8"),
    "w8a8 --target cpu": ("--scheme", "w8a8", "--target", "cpu"),
    "w8a8-dynamic, asymmetric": ("--scheme", "w8a8-dynamic"),
    "w8a8-dynamic, symmetric": ("--scheme", "w8a8-dynamic"),
    "w8a16": ("--scheme", "w8a16"),
    "w8a8 --fa-quant": ("--scheme", "w8a8", "--fa-quant"),
    "w8a8 --kv-int8": ("--scheme", "w8a8", "--kv-int8"),
    "w8a8 --all-static": ("--scheme", "w8a8", "--all-static"),
    "w8a8 --anti-outlier rotate": ("--scheme", "w8a8", "--anti-outlier", "rotate"),
    "w8a8-dynamic --anti-outlier rotate": ("--scheme", "w8a8-dynamic", "--anti-outlier", "rotate"),
    "w8a8 --anti-outlier m4": ("--scheme", "w8a8", "--anti-outlier", "m4"),
    "w8a8 --anti-outlier none": ("--scheme", "w8a8", "--anti-outlier", "none"),
    "w8a8-dynamic --calib none": ("--scheme", "w8a8-dynamic", "--calib", "none"),
}


@dataclass
class Sums:
    """Of one model, over all positions."""

    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    chunks: list[float] = field(default_factory=list)  # mean KL of each

    def add(self, log_q: torch.Tensor, log_p: torch.Tensor, following: torch.Tensor) -> float:
        """Take in (R, V) float32 of this and of the float model; return the sum of KL."""
        kl = float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        self.kl += kl
        self.nll -= float(log_q.gather(1, following[:, None]).sum(dtype=torch.float64))
        self.same += int((log_q.argmax(1) == log_p.argmax(1)).sum())
        return kl


def log_probs(model: NativeModel, tokens: list[int], at: int) -> torch.Tensor:
    """Return log p of what follows tokens `at` to `at` + STEP of a chunk, (R, V) float32."""
    taken = tokens[at:-1][:STEP]
    pages = range(-(-(at + len(taken)) // PAGE))
    logits, _ = model.forward([Chunk(taken, at, pages, len(tokens), wants_all=True)])
    return torch.log_softmax(torch.from_numpy(logits), -1)


def measure(source: Path, outs: dict[str, Path], chunks: list[list[int]]) -> dict[str, Sums]:
    """Return the sums of the float model (by the name "float") and of every output."""
    directories = {"float": source, **outs}
    models = {}
    for name, directory in directories.items():
        symmetric = name.endswith(" symmetric")
        checkpoint = Checkpoint.open(directory)
        models[name] = load_model(checkpoint, dynamic="symmetric" if symmetric else "asymmetric", longest=CHUNK_LEN)
        models[name].allocate_cache(CHUNK_LEN)
    sums = {name: Sums() for name in models}
    for count, chunk in enumerate(chunks, 1):
        of_chunk = dict.fromkeys(models, 0.0)
        for at in range(0, len(chunk) - 1, STEP):
            following = torch.tensor(chunk[at + 1 : at + 1 + STEP])
            exact = log_probs(models["float"], chunk, at)
            for name, model in models.items():
                found = exact if name == "float" else log_probs(model, chunk, at)
                of_chunk[name] += sums[name].add(found, exact, following)
        for name, total in of_chunk.items():
            sums[name].chunks.append(total / (len(chunk) - 1))
        print(f"{count} of {len(chunks)} chunks", end="\r", flush=True)
    return sums


def decode_speeds(directories: dict[str, Path]) -> dict[str, float]:
    """Return new tokens a second of one sequence, over those of the float model: medians of rounds in turn."""
    rounds: dict[str, list[float]] = {name: [] for name in directories}
    for _ in range(3):
        for name, directory in directories.items():
            found = eightfold("bench", directory, "--prompt-len", 16, "--new-tokens", 64, "--json")
            rounds[name].append(json.loads(found.stdout.splitlines()[-1])["decode_tok_s"])
    return {name: median(found) / median(rounds["float"]) for name, found in rounds.items()}


def main() -> None:
    """Make what is missing, measure, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", help="of the model, in the table; default: the directory's")
    parser.add_argument("--chunks", type=int, default=1 << 30)
    parser.add_argument("--only", action="append", choices=SCHEMES)
    parser.add_argument("--speed", action="store_true", help="measure decoding too; needs an idle machine")
    parser.add_argument("--work", type=Path, help="keep the outputs here")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.source, add_bos=False)
    token_ids = tokenizer.encode(read_evaluation_text(args.text), special_tokens=False)
    chunks = cut_chunks(token_ids, args.chunks, CHUNK_LEN)
    with tempfile.TemporaryDirectory(prefix="accuracy") as folder:
        work = args.work or Path(folder)
        outs: dict[str, Path] = {}
        for name in args.only or SCHEMES:
            options = SCHEMES[name]
            outs[name] = work / "-".join([args.source.name, *options]).replace("--", "").replace("/", "_")
            eightfold("quantize", args.source, outs[name], *options)  # one that is there already takes no time
        speeds = decode_speeds({"float": args.source, **outs}) if args.speed else {}
        sums = measure(args.source, outs, chunks)
        opened = {name: Checkpoint.open(path) for name, path in {"float": args.source, **outs}.items()}
        sizes = {name: sum(info.nbytes for info in found.tensors.values()) for name, found in opened.items()}
    predictions = sum(len(chunk) - 1 for chunk in chunks)
    exact = float(torch.tensor(sums["float"].nll / predictions).exp())
    rows: list[dict[str, Any]] = []
    for name, found in sums.items():
        ppl = float(torch.tensor(found.nll / predictions).exp())
        rows.append(
            {
                "model": args.name or args.source.name,
                "scheme": name,
                "chunks": len(chunks),
                "predictions": predictions,
                "kl": found.kl / predictions,
                "kl_error": float(torch.tensor(found.chunks).std() / len(chunks) ** 0.5),
                "top1": found.same / predictions,
                "ppl": ppl,
                "ppl_change": ppl / exact - 1,
                **({"decode": speeds[name]} if speeds else {}),
                "nbytes": sizes[name],
            }
        )
        print(rows[-1])
    path = RESULTS / "accuracy.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    key = lambda row: (row["model"], row["scheme"], row["chunks"])  # noqa: E731
    new = {key(row) for row in rows}
    save_results("accuracy", [*(row for row in old if key(row) not in new), *rows])


if __name__ == "__main__":
    main()
