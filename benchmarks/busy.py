"""What is left of the speed while another program keeps a core busy?

    python benchmarks/busy.py --ours DIR [--rounds 3] [--prompt-len 512] [--new-tokens 128]

`eightfold bench` on an idle machine and beside a process that counts on the first CPU this one may use, in turn. The
table goes to stdout, the figures to benchmarks/results/busy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from measure import eightfold, save_results

RATES = ("prefill_tok_s", "decode_tok_s")
COUNT = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True:\n    pass\n"


@contextmanager
def one_core_busy() -> Iterator[None]:
    """Count in another process meanwhile."""
    with subprocess.Popen([sys.executable, "-c", COUNT, str(min(os.sched_getaffinity(0)))]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Measure in turn, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="a model directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()

    def bench() -> dict[str, Any]:
        lengths = ("--prompt-len", args.prompt_len, "--new-tokens", args.new_tokens)
        found: dict[str, Any] = json.loads(eightfold("bench", args.ours, *lengths, "--json").stdout.splitlines()[-1])
        return {name: found[name] for name in RATES}

    idle, busy = [], []
    for _ in range(args.rounds):
        idle.append(bench())
        with one_core_busy():
            busy.append(bench())
    rows = []
    for name in RATES:
        shares = [after[name] / before[name] for before, after in zip(idle, busy, strict=True)]
        rows.append({"what": name, "idle": [r[name] for r in idle], "busy": [r[name] for r in busy], "shares": shares})
        rates = f"idle {median(rows[-1]['idle']):8.1f}   one core busy {median(rows[-1]['busy']):8.1f}"
        print(f"{name:14} {rates}   {median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
    save_results("busy", [{"rounds": args.rounds, "model": args.ours.name}, *rows])


if __name__ == "__main__":
    main()
