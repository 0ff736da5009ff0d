"""Compare `quantize` by names with a plain loop that reads, widens, rounds and writes: seconds, CPU seconds, memory.

    python benchmarks/by_name.py --work DIR [--layers 2] [--experts 8] [--repeat 3]

The model has DeepSeek-V3's widths, in float8 with a scale for each block of 128 x 128. Both run in processes of their
own, in turn, so that what else the machine does meets both; what counts is the ratio within a pair. The loop checks
nothing, keeps no journal, holds whole tensors, and does not wait for the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

WIDTH = 128


def make(work: Path, layers: int, experts: int) -> Path:
    """Make the model, unless it is there."""
    from eightfold.synth import shapes
    from eightfold.synth.checkpoint import synthesize

    source = work / f"deepseek-{layers}x{experts}"
    if not source.exists():
        changes = {"n_routed_experts": experts, "num_nextn_predict_layers": 0, "vocab_size": 8192}
        shapes.MODELS["here"] = {**shapes.MODELS["deepseek-v3"], **changes, "first_k_dense_replace": 1}
        synthesize("here", source, layers=layers)
    return source


def plain(source: Path, target: Path) -> None:
    """Convert the model without more ado."""
    import numpy as np
    import torch
    from safetensors import safe_open

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    target.mkdir()
    with (target / "weights.bin").open("wb") as out, torch.inference_mode():
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    if name.endswith("_scale_inv"):
                        continue
                    weight = tensors.get_tensor(name)
                    if weight.dtype != torch.float8_e4m3fn:
                        out.write(weight.view(torch.uint8).numpy().data)
                        continue
                    scale = tensors.get_tensor(f"{name}_scale_inv").repeat_interleave(WIDTH, 0)[: len(weight)]
                    wide = torch.from_numpy(np.take(values, weight.view(torch.uint8).numpy()))  # torch is far slower
                    wide.mul_(scale.repeat_interleave(WIDTH, 1)[:, : weight.shape[1]])
                    steps = wide.abs().amax(1, keepdim=True).div_(127)
                    out.write(wide.div_(steps).round_().to(torch.int8).numpy().data)
                    out.write(steps.numpy().data)


def timed(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, and those of the CPU."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def peak(command: list[str]) -> dict[str, Any]:
    """Run `quantize --json`; return what it says."""
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        plain(*args.plain)
        return
    source = make(args.work, args.layers, args.experts)
    out, loop = args.work / "out", args.work / "loop"
    quantize = [sys.executable, "-m", "eightfold", "quantize", str(source), str(out), "--scheme", "w8a8-dynamic"]
    quantize += ["--memory", "4GiB"]
    theirs = [sys.executable, __file__, "--work", str(args.work), "--plain", str(source), str(loop)]
    pairs = []
    for _ in range(args.repeat):
        subprocess.run(["rm", "-rf", str(out), str(loop)], check=True)
        pairs.append((timed(theirs), timed(quantize)))
    subprocess.run(["rm", "-rf", str(out), str(loop)], check=True)
    found = {key: [(a[key], b[key]) for a, b in pairs] for key in ("seconds", "cpu_seconds")}
    ratios = {f"{key}_loop_over_quantize": round(median(a / b for a, b in each), 2) for key, each in found.items()}
    print(json.dumps({**ratios, "peak_rss_mib": peak(quantize)["peak_rss_mib"], "pairs": found}))
    subprocess.run(["rm", "-rf", str(out)], check=True)


if __name__ == "__main__":
    main()
