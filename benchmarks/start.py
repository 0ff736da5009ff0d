"""How soon does the first token come? From a process's start to the answer's first byte, in turn with llama.cpp.

    python benchmarks/start.py --ours DIR [--peer-python VENV/bin/python --gguf Q8_0.gguf] [--runs 12]

Ours is `eightfold run DIR --prompt ... --max-new-tokens 1`, the peer a short script with llama-cpp-python. They have
the same prompt and threads, and all files in the page cache after a first run that does not count. They alternate,
because the machine's speed drifts; what counts is the ratio of neighbours. The table goes to stdout, the figures to
benchmarks/results/start.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from eightfold.model.native import choose_threads
from measure import save_results

PROMPT = "The capital of France is"

LLAMA_CPP = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
sys.stdout.write(next(model(sys.argv[3], max_tokens=1, stream=True))["choices"][0]["text"])
sys.stdout.flush()
"""


@dataclass
class Program:
    """What is started, and what was measured."""

    name: str
    command: list[str]
    first_byte_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)  # of all threads, to the end of the process

    def once(self) -> None:
        """Start it and wait for its first byte, and then for its end."""
        started = time.perf_counter()
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            first = os.read(process.stdout.fileno(), 1)
            seconds = time.perf_counter() - started
            process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not first:
            sys.exit(f"{self.name}: exit code {process.returncode}")
        self.first_byte_s.append(seconds)
        self.processor_s.append(usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Measure in turn, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="a model directory")
    parser.add_argument("--peer-python", type=Path, help="has llama_cpp")
    parser.add_argument("--gguf", type=Path, help="the same model for it")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=choose_threads())
    args = parser.parse_args()
    options = ["--prompt", PROMPT, "--max-new-tokens", "1", "--threads", str(args.threads)]
    programs = [Program("eightfold", [sys.executable, "-m", "eightfold", "run", str(args.ours), *options])]
    if args.peer_python is not None:
        peer = [str(args.peer_python), "-c", LLAMA_CPP, str(args.gguf), str(args.threads), PROMPT]
        programs.append(Program("llama-cpp-python", peer))
    for run in range(1 + args.runs):
        for program in programs if run % 2 else reversed(programs):
            program.once()
    rows = []
    for program in programs:
        first, processor = program.first_byte_s[1:], program.processor_s[1:]
        ratios = [ours / theirs for ours, theirs in zip(programs[0].first_byte_s[1:], first, strict=True)]
        row = {"program": program.name, "first_byte_s": first, "processor_s": processor, "ours_to_this": ratios}
        rows.append(row)
        spread = f"ours to this: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{program.name:18} {median(first):.3f} s, of processors {median(processor):.3f} s; {spread}")
    save_results("start", [{"runs": args.runs, "threads": args.threads}, *rows])


if __name__ == "__main__":
    main()
