"""How faithful is the quantizer? SmolLM2-135M-Instruct against checkpoints made by msModelSlim, as one table.

    EIGHTFOLD_SMOL=... EIGHTFOLD_GOLDEN=... python benchmarks/fidelity.py --text wikitext2-test.txt --calib boolq.jsonl

Needs the float model as $EIGHTFOLD_SMOL/smol-fp16 and the reference's tensors and digests in $EIGHTFOLD_GOLDEN. Every
figure comes from an `eightfold` command, except for the two rows `float32 products`: they run W8A8_DYNAMIC as
the reference tool simulates it, with fake-quantized float32 matrices, to tell our arithmetic from our exactness.

The table goes to stdout, the figures to benchmarks/results/fidelity.json. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eightfold.evaluate import cut_chunks, evaluate_reference
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import tame_malloc
from eightfold.model.reference.linear import Q_MAX, Q_MIN, W8A8DynamicLinear, token_params
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor
from eightfold.scheme import INPUT_OFFSET, INPUT_SCALE
from eightfold.tokenizer import Tokenizer
from measure import eightfold, save_results

CHUNKS, CHUNK_LEN = 40, 512


class Table:
    """Rows of: what, measured, required, whether it holds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, measured: str, required: str, holds: bool | None) -> None:
        """Add a row and show it at once; `holds` None is a row for information."""
        self.rows.append({"what": what, "measured": measured, "required": required, "holds": holds})
        mark = {True: "ok", False: "MISSED", None: ""}[holds]
        print(f"{what:46} {measured:34} {required:34} {mark}", flush=True)

    def near(self, what: str, got: float, want: float, within: float) -> None:
        """Add a row for a figure that must lie within a distance of another."""
        self.add(what, f"{got:.4f}", f"{want} +- {within:.3g}", abs(got - want) <= within)


PLAIN = ("--anti-outlier", "none")  # as the reference tool's own default


def ppl(directory: Path, text: Path, *options: str) -> float:
    """Return `eightfold eval`'s perplexity."""
    lengths = ("--chunks", str(CHUNKS), "--chunk-len", str(CHUNK_LEN))
    done = eightfold("eval", directory, "--text", text, *lengths, *options, "--json")
    return float(json.loads(done.stdout.splitlines()[-1])["ppl"])


def compare_digests(table: Table, what: str, directory: Path, digests: dict[str, str]) -> None:
    """Compare the SHA-256 of every int8 weight's bytes."""
    checkpoint = Checkpoint.open(directory)
    same = sum(hashlib.sha256(checkpoint.array(name).tobytes()).hexdigest() == d for name, d in digests.items())
    table.add(f"{what}: int8 weights", f"{same} of {len(digests)} equal", "all, by SHA-256", same == len(digests))


def compare_activations(table: Table, directory: Path, golden: Path) -> None:
    """Compare input scales and offsets of static W8A8."""
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(directory)
    theirs = load_file(golden / "tensors" / "w8a8-fp16.safetensors")
    scales = [name for name in theirs if name.endswith(INPUT_SCALE)]
    off = [float((load_tensor(checkpoint, name) / theirs[name] - 1).abs()) for name in scales]
    table.add("W8A8: input_scale, median difference", f"{median(off):.3%}", "<= 0.25 %", median(off) <= 0.0025)
    table.add("W8A8: input_scale, worst difference", f"{max(off):.2%}", "<= 5 %", max(off) <= 0.05)
    offsets = [name for name in theirs if name.endswith(INPUT_OFFSET)]
    apart = [float((load_tensor(checkpoint, name) - theirs[name]).abs()) for name in offsets]
    differ = sum(distance > 0 for distance in apart)
    table.add("W8A8: input_offset", f"{differ} differ, by {max(apart):.0f} at most", "at most 3 apart", max(apart) <= 3)


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Run W8A8_DYNAMIC by float32 matrix products of dequantized values, as the reference tool's simulation does."""

    def call(self: W8A8DynamicLinear, x_TK: Tensor) -> Tensor:
        scale_T1, offset_T1 = token_params(x_TK, self.mode)
        xq = (x_TK / scale_T1 + offset_T1).round().clamp(Q_MIN, Q_MAX)
        weight = self.weight.to(torch.float32) * self.weight_scale[:, None]
        return torch.nn.functional.linear((xq - offset_T1) * scale_T1, weight, self.bias)

    exact = W8A8DynamicLinear.__call__
    W8A8DynamicLinear.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        W8A8DynamicLinear.__call__ = exact  # type: ignore[method-assign]


def chunks_of(directory: Path, text: Path) -> list[list[int]]:
    """Return the chunks that `eightfold eval` measures on."""
    token_ids = Tokenizer(directory).encode(text.read_bytes().decode(), special_tokens=False)
    return cut_chunks(token_ids, CHUNKS, CHUNK_LEN)


def jittered(directory: Path, chunks: list[list[int]], runs: int, mode: str) -> list[float]:
    """Return perplexities after a relative jitter of 1e-6 on the embeddings: what rounding alone moves."""
    plain, generator = Decoder.embed, torch.Generator()

    def embed(self: Decoder, token_ids: list[int]) -> Tensor:
        rows = plain(self, token_ids)
        return rows * (1 + 1e-6 * torch.randn(rows.shape, generator=generator))

    found = []
    Decoder.embed = embed  # type: ignore[method-assign, assignment]
    try:
        for seed in range(runs):
            generator.manual_seed(seed)
            found.append(evaluate_reference(Decoder(Checkpoint.open(directory), mode), chunks).ppl)  # type: ignore[arg-type]
    finally:
        Decoder.embed = plain  # type: ignore[method-assign]
    return found


def check_dynamic(table: Table, directory: Path, text: Path, jitter_runs: int) -> None:
    """Measure W8A8_DYNAMIC in both modes, in our arithmetic and in the reference's."""
    chunks = chunks_of(directory, text)
    for mode, want in (("asymmetric", 25.88), ("symmetric", 26.29)):
        table.near(f"W8A8_DYNAMIC {mode}, perplexity", ppl(directory, text, "--dynamic", mode), want, 0.02)
        with float32_products():
            got = evaluate_reference(Decoder(Checkpoint.open(directory), mode), chunks).ppl  # type: ignore[arg-type]
        table.near("    the same by float32 products", got, want, 0.02)
        if jitter_runs > 1:
            found = torch.tensor(jittered(directory, chunks, jitter_runs, mode))
            spread = f"{found.mean():.3f} +- {found.std():.3f} ({jitter_runs} runs)"
            table.add("    with a jitter of 1e-6: mean and deviation", spread, "for information", None)


def main() -> int:
    """Quantize, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="wikitext2-test.txt")
    parser.add_argument("--calib", type=Path, required=True, help="boolq.jsonl")
    parser.add_argument("--jitter-runs", type=int, default=0, help="repeat the dynamic rows under tiny perturbations")
    args = parser.parse_args()
    folders = {name: os.environ.get(name) for name in ("EIGHTFOLD_SMOL", "EIGHTFOLD_GOLDEN")}
    if not all(folders.values()):
        print(f"nothing measured: set {' and '.join(name for name, value in folders.items() if not value)}")
        return 1
    source, golden = Path(folders["EIGHTFOLD_SMOL"] or "") / "smol-fp16", Path(folders["EIGHTFOLD_GOLDEN"] or "")
    digests = json.loads((golden / "tensors" / "sha256.json").read_text())
    tame_malloc()
    table, work = Table(), Path(tempfile.mkdtemp(prefix="fidelity-"))
    try:
        table.near("float, perplexity", ppl(source, args.text), 25.603, 0.01)
        sixteen, asym, static, dynamic = (work / name for name in ("w8a16", "w8a16-asym", "w8a8", "w8a8-dynamic"))
        eightfold("quantize", source, sixteen, "--scheme", "w8a16", "--save-dtype", "float32")
        compare_digests(table, "W8A16 symmetric", sixteen, digests["w8a16-sym"])
        table.near("W8A16 symmetric, perplexity", ppl(sixteen, args.text), 25.625, 0.01)
        eightfold("quantize", source, asym, "--scheme", "w8a16", "--no-weight-symmetric", "--save-dtype", "float32")
        compare_digests(table, "W8A16 asymmetric", asym, digests["w8a16-asym-noanti"])
        eightfold(
            "quantize", source, static, "--scheme", "w8a8", *PLAIN, "--calib", args.calib, "--save-dtype", "float32"
        )
        compare_digests(table, "W8A8", static, digests["w8a8-fp16"])
        compare_activations(table, static, golden)
        table.near("W8A8, perplexity", ppl(static, args.text), 38.24, 0.02 * 38.24)
        eightfold("quantize", source, dynamic, "--scheme", "w8a8-dynamic", *PLAIN)
        check_dynamic(table, dynamic, args.text, args.jitter_runs)
    finally:
        shutil.rmtree(work)
    save_results("fidelity", table.rows)
    return 0 if all(row["holds"] is not False for row in table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
