"""How near quantization comes to the machine's own limits, on models larger than its caches, and how right `--plan` is.

    python benchmarks/scale.py stream FLOAT_DIR WORK_DIR [--rounds 3]
    python benchmarks/scale.py plan FLOAT_DIR WORK_DIR [--rounds 3] -- OPTIONS OF quantize

stream: data-free W8A16, beside a plain loop that reads the same bytes, turns those of the layers into int8 by one
multiplication, and writes as many bytes; once as it comes, once letting go of the pages it has used. The two take turns
with the quantizer, as other programs on the machine do not stand still.

plan: what `--plan` says before and after a run, and what the run then takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from eightfold.families import layer_of
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.safetensors import drop
from eightfold.format.shards import WriteBehind
from measure import eightfold, save_results

_PIECE = 2 << 20


def copy_loop(source: Path, target: Path, *, drops: bool) -> float:
    """Read a model, convert its layers to int8 without looking at them, write; return the seconds."""
    import torch

    buffer = bytearray(_PIECE)
    values, view = torch.frombuffer(buffer, dtype=torch.bfloat16), memoryview(buffer)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    behind = WriteBehind(out)
    tensors = sorted(Checkpoint.open(source).tensors.values(), key=lambda info: (info.file, info.begin))
    files = {file: os.open(file, os.O_RDONLY) for file in {info.file for info in tensors}}
    began, written = time.perf_counter(), 0
    for info in tensors:
        for at in range(info.begin, info.end, _PIECE):
            count = os.preadv(files[info.file], [view[: min(_PIECE, info.end - at)]], at)
            data: Any = view[:count]
            if layer_of(info.name) is not None:
                data = (values[: count // 2].to(torch.float32) * 100).round_().to(torch.int8).numpy().data
            os.write(out, data)
            if drops:
                behind.wrote(written, written + len(data))
            written += len(data)
        if drops:
            drop(files[info.file], info.begin, info.end)
    os.fdatasync(out)
    seconds = time.perf_counter() - began
    for file in (out, *files.values()):
        os.close(file)
    target.unlink()
    return seconds


def stream(source: Path, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure data-free W8A16 and the plain loops in turn."""
    nbytes = sum(info.nbytes for info in Checkpoint.open(source).tensors.values())
    times: dict[str, list[float]] = {"quantize": [], "plain loop": [], "plain loop, letting go": []}
    peaks = []
    for _ in range(rounds):
        document = quantize(source, work, ["--scheme", "w8a16"])
        times["quantize"].append(document["seconds"])
        peaks.append(document["peak_rss_mib"])
        times["plain loop"].append(copy_loop(source, work / "loop.bin", drops=False))
        times["plain loop, letting go"].append(copy_loop(source, work / "loop.bin", drops=True))
    best = {name: min(seconds) for name, seconds in times.items()}
    return [
        {
            "what": name,
            "model": source.name,
            "source_gb": round(nbytes / 1e9, 2),
            "seconds": [round(value, 1) for value in seconds],
            "source_mb_s": round(nbytes / best[name] / 1e6),
            "quantize_speed_of_it": round(best[name] / best["quantize"], 2),
            **({"peak_rss_mib": max(peaks)} if name == "quantize" else {}),
        }
        for name, seconds in times.items()
    ]


def quantize(source: Path, work: Path, options: list[str]) -> dict[str, Any]:
    """Quantize once; return what `--json` says."""
    out = work / "out"
    try:
        return document_of(eightfold("quantize", source, out, *options, "--json").stdout)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def document_of(stdout: str) -> dict[str, Any]:
    """Return the last line of a command's output."""
    document: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return document


def plan(source: Path, work: Path, rounds: int, options: list[str]) -> list[dict[str, Any]]:
    """Compare `--plan` with runs; a plan before and one after each, as a shared machine changes its speed."""
    rows = []
    for _ in range(rounds):
        plans, run = [], {}
        for step in ("plan", "run", "plan"):
            if step == "run":
                run = quantize(source, work, options)
            else:
                plans.append(
                    document_of(eightfold("quantize", source, work / "out", *options, "--plan", "--json").stdout)
                )
        seconds, peak = (statistics.mean(found[key] for found in plans) for key in ("seconds", "peak_mib"))
        rows.append(
            {
                "model": source.name,
                "options": " ".join(option for option in options if "/" not in option),
                "planned_s": [found["seconds"] for found in plans],
                "took_s": run["seconds"],
                "planned_peak_mib": round(peak),
                "peak_rss_mib": run["peak_rss_mib"],
                "time_ratio": round(seconds / run["seconds"], 2),
                "peak_ratio": round(peak / run["peak_rss_mib"], 2),
            }
        )
    return rows


def main() -> None:
    """Run one of the two and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "plan"))
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    words.work.mkdir(parents=True, exist_ok=True)
    if words.what == "stream":
        rows = stream(words.source, words.work, words.rounds)
    else:
        rows = plan(words.source, words.work, words.rounds, options)
    for row in rows:
        print(json.dumps(row), flush=True)
    save_results(f"scale-{words.what}-{words.source.name}", rows)


if __name__ == "__main__":
    main()
